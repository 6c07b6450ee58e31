"""``python -m navsim_ext.evaluation.score planner=... data.index=... metric_cache=... output_dir=...``

Plans every scene of an index with one planner, scores the trajectories (PDMS v1.1, EPDMS v2.2 with and without the
human filter, any reward weighting), prints the table with intervals by log and the identity of what was scored, and
writes ``scores.parquet``, ``scores.csv``, ``trajectories.parquet``, ``aggregate.json`` and ``fingerprint.json``.
Killed and started again, it goes on with the first scene that was not planned. ``probes=true`` adds planners that see
nothing (:mod:`navsim_ext.evaluation.probes`) and says whether the planner beats them. ``protocol=two_stage`` is NAVSIM
2's pseudo-simulation (:mod:`navsim_ext.evaluation.two_stage_planner`), ``protocol=open_loop`` gives the distance to the
driven path and collisions (:mod:`navsim_ext.evaluation.open_loop`), for scenes without a map; ``rater_feedback`` gives
WOD-E2E's score (:mod:`navsim_ext.evaluation.rated_frames`); ``protocol=plan`` writes the trajectories alone
(:mod:`navsim_ext.evaluation.plan_only`), for splits that only a server can score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation import probes
from navsim_ext.evaluation.planning import plan_scenes
from navsim_ext.evaluation.scoring import NothingScored, score_table
from navsim_ext.evaluation.table import (
    SCORES_FILE,
    TITLES,
    TRAJECTORIES_FILE,
    headline_of,
    identity,
    identity_line,
    print_table,
    summarise,
)
from navsim_ext.files import atomic_file, write_json_atomic
from navsim_ext.fingerprint import Fingerprint, digest_tokens, package_versions
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import RewardWeights, arithmetic, scorer_fingerprint
from navsim_ext.pdm.version import require_traffic
from navsim_ext.planners import Planner
from navsim_ext.readers import read_split
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.preflight import preflight

TWO_STAGE_DATA = ("split_config", "second_stage", "second_stage_hidden")
AGGREGATE_FILE = "aggregate.json"
BYTES_PER_ROW = 1000  # of all files together


def score_planner(cfg: DictConfig, console: Console) -> pd.DataFrame:
    """Runs the command and returns the per-token table. Raises NothingScored when no row is valid (require_valid)."""
    output = Path(cfg.output_dir)
    verdict = arithmetic.verdict()
    traffic = cfg.traffic or "log_replay"
    require_traffic(traffic)
    _refuse_two_stage_options(cfg)
    dataset = SceneDataset(cfg.data.index, sensor_root=cfg.data.sensor_root, cameras=list(cfg.data.cameras))
    cache = MetricCache(cfg.metric_cache)
    covered = sum(token in cache for token in dataset.tokens)
    if covered < len(dataset) * cfg.min_coverage:
        raise DataError(
            f"metric cache {cfg.metric_cache} holds {covered} of the {len(dataset)} tokens of {cfg.data.index}; at "
            f"least {cfg.min_coverage:.0%} were expected (min_coverage): build the cache of this split"
        )
    preflight(output_dir=output, items=len(dataset), bytes_per_item=BYTES_PER_ROW, title="scoring", console=console)
    hidden = instantiate(cfg.hidden) if cfg.hidden else None
    planner: Planner = instantiate(cfg.planner)
    if hidden is not None and hasattr(planner, "require_hidden"):
        planner.require_hidden(hidden.fingerprint)
    planned, made = plan_scenes(
        planner,
        dataset,
        hidden,
        output,
        batch_size=cfg.batch_size,
        num_workers=cfg.num_loaders,
        device=cfg.device,
    )
    if cfg.name:
        planned["name"] = cfg.name
    if cfg.probes:
        known = traffic == "log_replay" and _has_v1(cache, dataset.tokens)
        version = "v1" if known else "v2"
        blind = probes.probes_of(planner, cfg.name, sees=hidden is not None, cache=cache, version=version)
        options = {"batch_size": cfg.batch_size, "num_workers": cfg.num_loaders, "device": cfg.device}
        others = [plan_scenes(one, dataset, hidden, output / "probes" / one.name, **options)[0] for one in blind]
        planned = pd.concat([planned, *others], ignore_index=True)
    write_table(output / TRAJECTORIES_FILE, planned[["token", "name", "poses"]])
    scores = score_table(
        planned,
        cfg.metric_cache,
        two_frame=cfg.two_frame,
        reward=RewardWeights(**cfg.reward) if cfg.reward else None,
        traffic=traffic,
        workers=cfg.workers,
        num_workers=cfg.num_workers,
        ray_address=cfg.ray_address,
    )
    what = identity(scores, split=cfg.data.split or "") | {"traffic": traffic}
    fingerprint = Fingerprint(
        "scores",
        {
            "two_frame": bool(cfg.two_frame),
            "reward": dict(cfg.reward) if cfg.reward else None,
            "tokens": digest_tokens(scores["token"]),
            "split": what["split"],
            **({"probes": True} if cfg.probes else {}),
        },
        {"scorer": scorer_fingerprint(traffic), "planned": made, "metric_cache": cache.fingerprint},
        {"doctor": verdict, "versions": package_versions("numpy", "scipy", "numba", "torch")},
    )
    write_table(output / SCORES_FILE, scores)
    with atomic_file(output / "scores.csv") as temporary:
        scores.to_csv(temporary, index=False)
    summary = summarise(scores)
    judged = [one for score in headline_of(scores.columns) for one in probes.table_verdicts(scores, score)]
    content: dict[str, Any] = {
        "identity": what,
        "failures": scores.loc[~scores["valid"], "reason"].value_counts().to_dict(),
        "incomplete": scores.loc[scores["valid"] & (scores["reason"] != ""), "reason"].value_counts().to_dict(),
        "estimates": {name: {c: e.to_json() for c, e in columns.items()} for name, columns in summary.items()},
        "verdicts": [one.line(TITLES[one.score]) for one in judged],
    }
    write_json_atomic(output / AGGREGATE_FILE, content)
    fingerprint.save(output)
    for table in print_table(summary, what):
        console.print(table)
    console.print(identity_line(what, fingerprint.parents["scorer"]), soft_wrap=True, highlight=False)
    for line in content["verdicts"]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for kind, key in (("invalid", "failures"), ("incomplete", "incomplete")):
        for reason, count in list(content[key].items())[:5]:
            line = f"{kind}: {count} x {reason}"  # reasons hold brackets, which are not markup
            console.print(line, soft_wrap=True, style="yellow", highlight=False, markup=False)
    if cfg.require_valid and not scores["valid"].any():
        raise NothingScored(f"all {len(scores)} trajectories are invalid: see {output / SCORES_FILE}")
    return scores


def _has_v1(cache: MetricCache, tokens: Sequence[str]) -> bool:
    """Whether the cache holds what NAVSIM 1.1's scores refer to (windows of navhard are too short for it)."""
    first = next((token for token in tokens if token in cache), None)
    return first is not None and bool(np.isfinite(cache.load(first).pdm_closed[0]).all())


def _refuse_two_stage_options(cfg: DictConfig) -> None:
    """Options that only the other protocol reads are not given in vain."""
    unread = {"human_filter": cfg.human_filter is not True, "strict": cfg.strict is not False}
    unread |= {f"data.{key}": cfg.data[key] is not None for key in TWO_STAGE_DATA}
    given = [key for key, changed in unread.items() if changed]
    if given:
        raise DataError(f"{', '.join(given)} belong to protocol=two_stage")


def _refuse_single_stage_options(cfg: DictConfig) -> None:
    unread = {"two_frame": cfg.two_frame is not True, "reward": cfg.reward is not None}
    unread["data.split"] = bool(cfg.data.split)
    given = [key for key, changed in unread.items() if changed]
    if given:
        raise DataError(
            f"{', '.join(given)} belong to protocol=single_stage: two stages always compare two frames, give no reward "
            "and are named by data.split_config"
        )


def score_configured(cfg: DictConfig, console: Console) -> None:
    """Runs the protocol of a configuration; its output folder is the caller's to lock."""
    if cfg.protocol in ("single_stage", "two_stage") and cfg.metric_cache is None:
        if cfg.data.split_config is not None:
            read_split(cfg.data.split_config).require_groups()  # before a cache is asked for that cannot be
        raise MissingError(
            f"protocol={cfg.protocol} scores against a metric cache: give metric_cache=FOLDER (of "
            "python -m navsim_ext.metric_cache.build), protocol=open_loop or rater_feedback, or protocol=plan for "
            "trajectories alone"
        )
    if cfg.protocol == "open_loop":
        from navsim_ext.evaluation.open_loop import score_open_loop

        score_open_loop(cfg, console)
    elif cfg.protocol == "rater_feedback":
        from navsim_ext.evaluation.rated_frames import score_rated_frames

        score_rated_frames(cfg, console)
    elif cfg.protocol == "plan":
        from navsim_ext.evaluation.plan_only import plan_stages

        plan_stages(cfg, console)
    elif cfg.protocol == "two_stage":
        from navsim_ext.evaluation.two_stage_planner import score_two_stages

        _refuse_single_stage_options(cfg)
        score_two_stages(cfg, console)
    else:
        score_planner(cfg, console)


@job("score")
def main(cfg: DictConfig) -> None:
    with FolderLock(cfg.output_dir):
        score_configured(cfg, Console())


if __name__ == "__main__":
    main()
