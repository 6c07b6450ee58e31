"""Two-stage scores of a file of trajectories or of a submission: what ``score_file protocol=two_stage`` does.

IN is a parquet file with ``token``, ``name``, ``poses`` (n x 3 float64, row-major) and ``interval`` (s between poses;
0.5 where the column is absent), or a submission pickle. OUT has a row per planner and scene: ``name``, ``token``,
``stage``, ``valid``, ``reason``, NAVSIM's nine sub-scores, ``weight`` and ``score``. Beside it
``OUT.aggregates.parquet`` has NAVSIM's three summary rows per planner, with the number of groups that they rest on and
intervals over groups.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.submission_file import read_submission
from navsim_ext.evaluation.trajectory_file import trajectory_table
from navsim_ext.evaluation.two_stage import (
    NAMES,
    STAGE_ROWS,
    Trajectories,
    TwoStageResult,
    evaluate,
    navsim_table,
    stage_one_score,
)
from navsim_ext.files import atomic_file
from navsim_ext.fingerprint import Fingerprint, digest_file, digest_json, digest_tokens
from navsim_ext.frames import NUM_FUTURE_POSES, POSE_INTERVAL_S
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.metric_cache.settings import second_stage_identity
from navsim_ext.pdm import arithmetic, scorer_fingerprint
from navsim_ext.pdm.closed.planner import PdmClosed
from navsim_ext.readers import SplitConfig, read_split, second_stage_folder
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.progress import track

logger = logging.getLogger(__name__)

KIND = "two_stage_scores"
SECONDS_PER_ROW = 2e-3  # one core, reactive; only for the estimate that is told beforehand
HORIZON_S = NUM_FUTURE_POSES * POSE_INTERVAL_S


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Which second stage was scored on: NAVSIM's has changed over time, and numbers of two snapshots do not compare."""

    split: str
    tokens: str  # digest of the second stage's token list
    pdm_closed: float  # PDM-Closed's first-stage score, in the same traffic and with the same filter

    def line(self) -> str:
        return f"{self.split}, second stage {self.tokens}, PDM-Closed stage one {self.pdm_closed * 100:.2f}"


@dataclass(frozen=True)
class Options:
    """How the trajectories are scored."""

    traffic: str = "reactive"
    human_filter: bool = True
    strict: bool = False
    threads: int | None = None


def read_planners(path: str | os.PathLike[str]) -> dict[str, Trajectories]:
    """Trajectories by planner, in the order of IN; a submission (``*.pkl``) is one planner, named after its team.

    Raises MissingError, or DataError for what is neither.
    """
    if Path(path).suffix == ".pkl":
        found = read_submission(path)
        tokens = [*found.poses, *found.malformed]
        poses = [np.asarray(values, dtype=np.float64) for values in found.poses.values()]
        poses += [np.zeros((0, 3))] * len(found.malformed)
        bad = dict(enumerate(found.malformed.values(), start=len(found.poses)))
        intervals = [found.intervals.get(token, POSE_INTERVAL_S) for token in tokens]
        return {str(found.team["team_name"] or "submission"): Trajectories(tokens, poses, intervals, bad)}
    table = trajectory_table(path, ("token", "name", "poses"))
    tokens, names = table["token"].to_pylist(), table["name"].to_pylist()
    intervals = table["interval"].to_pylist() if "interval" in table.column_names else [POSE_INTERVAL_S] * len(tokens)
    planners: dict[str, tuple[list[str], list[NDArray], list[float], dict[int, str]]] = {}
    for token, name, values, interval in zip(tokens, names, table["poses"].to_pylist(), intervals):
        kept = planners.setdefault(name, ([], [], [], {}))
        poses, problem = checked_poses(values, interval)
        if problem:
            kept[3][len(kept[0])] = problem
        kept[0].append(token)
        kept[1].append(poses)
        kept[2].append(interval)
    return {name: Trajectories(*parts) for name, parts in planners.items()}


def checked_poses(values: Any, interval: Any) -> tuple[NDArray[np.float64], str]:
    """(poses [M,3], what is wrong with them): a flat or nested list of numbers, ``interval`` seconds apart."""
    nothing = np.zeros((0, 3))
    if values is None:
        return nothing, "poses is null"
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return nothing, "poses are not numbers of shape n x 3"
    if array.size == 0 or array.size % 3 or (array.ndim > 1 and array.shape[-1] != 3):
        return nothing, f"poses have {array.size} values; n x 3 are needed"
    poses = array.reshape(-1, 3)
    if not isinstance(interval, int | float) or not 0.0 < interval < np.inf:
        return nothing, f"the interval is {interval!r}; seconds between poses were expected"
    if len(poses) * interval < HORIZON_S - 1e-9:
        return (
            nothing,
            f"{len(poses)} poses every {interval:g} s cover {len(poses) * interval:g} s; {HORIZON_S:g} s needed",
        )
    if not np.isfinite(poses).all():
        bad = int(np.argwhere(~np.isfinite(poses).all(axis=1))[0, 0])
        return nothing, f"trajectory is not finite: pose {bad} is {poses[bad].tolist()}"
    return poses, ""


def samplings(trajectories: Trajectories) -> dict[str, int]:
    """How many trajectories there are of each sampling, e.g. {"8 x 0.5 s": 1200}."""
    pairs = enumerate(zip(trajectories.poses, trajectories.intervals))
    good = (f"{len(poses)} x {interval:g} s" for i, (poses, interval) in pairs if i not in trajectories.malformed)
    return dict(Counter(good).most_common())


def open_split(data: Mapping[str, Any], cache: MetricCache) -> SplitConfig:
    """The split of a command's ``data`` node. Where its data root is there, the cache must be of the same snapshot.

    Raises MissingError when no split is given, DataError when cache and second stage differ.
    """
    if data.get("split_config") is None:
        raise MissingError("protocol=two_stage needs data.split_config=.../train_test_split/NAME.yaml")
    split = read_split(data["split_config"])
    cached = cache.fingerprint.fields.get("data", {}).get("second_stage")
    if data.get("root") is not None and cached is not None:
        found = second_stage_identity(second_stage_folder(data["root"], split.name, data.get("second_stage")))
        if found != cached:
            raise DataError(
                f"the second stage under {data['root']} ({found}) is not the one that the metric cache {cache.folder} "
                f"was built from ({cached}): numbers of different snapshots do not compare. Build the cache again"
            )
    return split


def take_snapshot(split: SplitConfig, cache: MetricCache, options: Options) -> Snapshot:
    """Scores PDM-Closed on the first stage, which tells snapshots and scorers apart at a glance."""
    closed = PdmClosed(cache, "v2")
    tokens = [token for token in split.first_stage_tokens if token in cache]
    poses = [closed.trajectory(token).numpy().astype(np.float64) for token in tokens]
    trajectories = Trajectories(tokens, poses, [POSE_INTERVAL_S] * len(tokens))
    mean = stage_one_score(
        trajectories, split, cache, traffic=options.traffic, human_filter=options.human_filter, threads=options.threads
    )
    return Snapshot(split.name, digest_tokens(split.second_stage_tokens)[:16], mean)


def evaluate_planners(
    planners: Mapping[str, Trajectories], split: SplitConfig, cache: MetricCache, options: Options
) -> dict[str, TwoStageResult]:
    """Each planner's evaluation, after saying what it will cost."""
    count = sum(len(trajectories.tokens) for trajectories in planners.values())
    logger.info(
        "%d trajectories of %d planners on %s, about %.0f s on one core",
        count, len(planners), split.name, count * SECONDS_PER_ROW,
    )  # fmt: skip
    return {
        name: evaluate(
            trajectories,
            split,
            cache,
            traffic=options.traffic,
            human_filter=options.human_filter,
            strict=options.strict,
            threads=options.threads,
        )
        for name, trajectories in track(planners.items(), "two stages, planners", total=len(planners))
    }


def fingerprint_of(
    source: str | os.PathLike[str], split: SplitConfig, cache: MetricCache, options: Options
) -> Fingerprint:
    """What a two-stage score is made of."""
    groups = [[group.now, group.prev, [list(pair) for pair in group.pairs]] for group in split.groups or ()]
    return Fingerprint(
        KIND,
        {
            "trajectories": digest_file(source),
            "human_filter": options.human_filter,
            "two_frame": "both scenes of a pair",
            "split": split.name,
            "groups": digest_json(groups),
            "second_stage_tokens": digest_tokens(split.second_stage_tokens),
        },
        {"scorer": scorer_fingerprint(options.traffic), "metric_cache": cache.fingerprint},
        {"doctor": arithmetic.verdict(), "trajectories": str(source)},
    )


def aggregates_path(output: str | os.PathLike[str]) -> Path:
    """``OUT.aggregates.parquet`` beside ``OUT.parquet``."""
    return Path(output).with_suffix(".aggregates.parquet")


def write_results(
    output: str | os.PathLike[str],
    results: Mapping[str, TwoStageResult],
    fingerprint: Fingerprint,
    snapshot: Snapshot,
    csv_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Writes OUT, its aggregates, and (``csv_dir``) one CSV per planner in NAVSIM's layout, each atomically."""
    rows = pd.concat([result.rows.assign(name=name) for name, result in results.items()], ignore_index=True)
    rows = rows[["name", "token", "stage", "valid", "reason", *NAMES, "weight", "score"]]
    stages = pd.concat([result.stages.assign(name=name) for name, result in results.items()], ignore_index=True)
    stages.insert(0, "name", stages.pop("name"))
    stages = stages.assign(
        split=snapshot.split, second_stage=snapshot.tokens, pdm_closed_stage_one=snapshot.pdm_closed,
        traffic=fingerprint.parents["scorer"].fields["traffic"], human_filter=fingerprint.fields["human_filter"],
    )  # fmt: skip
    metadata = {b"trivium_fingerprint": json.dumps(fingerprint.to_json())}
    for path, frame in ((Path(output), rows), (aggregates_path(output), stages)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, frame, metadata)
    if csv_dir is not None:
        Path(csv_dir).mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            with atomic_file(Path(csv_dir) / f"{name}.csv") as temporary:
                navsim_table(result).to_csv(temporary)


def print_results(
    results: Mapping[str, TwoStageResult], snapshot: Snapshot, options: Options, console: Console
) -> None:
    """Scores of both stages and combined, x 100, with what they rest on; reasons of what is missing."""
    table = Table(title="Two-stage EPDMS x 100 [95 % over groups]", title_justify="left")
    for title, side in (
        ("planner", "left"),
        ("stage 1", "right"),
        ("stage 2", "right"),
        ("combined", "right"),
        ("groups", "right"),
    ):
        table.add_column(title, justify=side)  # fmt: skip
    for name, result in results.items():
        cells = []
        for row in result.stages.to_dict("records"):
            interval = "" if np.isnan(row["low"]) else f" [{row['low'] * 100:.1f}, {row['high'] * 100:.1f}]"
            cells.append(
                "-"
                if np.isnan(row["score"])
                else f"{row['score'] * 100:.1f}" + (interval if row["token"] == STAGE_ROWS[2] else "")
            )
        valid, expected = int(result.stages["groups"].iloc[2]), int(result.stages["groups_expected"].iloc[2])
        table.add_row(name, *cells, f"{valid}/{expected}" if valid == expected else f"{valid}/{expected} INCOMPLETE")
    console.print(table)
    for name, result in results.items():
        if not result.complete:
            bad = result.groups[~result.groups["valid"]]
            console.print(
                f"{name}: INCOMPLETE, the combined score rests on {len(result.groups) - len(bad)} of "
                f"{len(result.groups)} groups",
                style="yellow", soft_wrap=True, highlight=False,
            )  # fmt: skip
            for reason, count in bad["reason"].value_counts().head(10).items():
                console.print(f"  {count} x {reason}", soft_wrap=True, markup=False, highlight=False)
    human = "human filter" if options.human_filter else "no human filter"
    console.print(f"{snapshot.line()} | traffic {options.traffic}, {human}", soft_wrap=True, highlight=False)
