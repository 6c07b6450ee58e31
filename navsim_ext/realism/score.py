"""Scores rollouts by the sim-agents rules.

    python -m navsim_ext.realism.score rollouts=DIR scenes=DIR output_dir=DIR

``scenes`` is a store of ``navsim_ext.traffic.build`` or a folder of ``NAME.scene.npz``; ``rollouts`` a store of
rollouts or a folder of ``NAME.rollouts.npz``. The output folder gets ``scenarios.parquet`` (one row a scenario,
under the challenge's names), ``summary.json`` (aggregates and buckets with bootstrap intervals over scenarios) and
``listed.csv`` (scored objects whose recording itself breaks the rules). Scenarios that are done are kept: a killed
command goes on when it is given again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import bootstrap_mean
from navsim_ext.errors import DataError
from navsim_ext.files import atomic_file, write_json_atomic
from navsim_ext.fingerprint import Fingerprint, digest_tokens
from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.likelihood import buckets
from navsim_ext.realism.metric import CLEAN, realism
from navsim_ext.realism.rollouts import RolloutFolder
from navsim_ext.realism.rules import BUCKETS, FEATURES, rules_of
from navsim_ext.realism.scene_folder import SceneFolder
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import spread
from navsim_ext.shards import ShardStore, ShardWriter, merge

logger = logging.getLogger(__name__)

KIND = "realism_scores"
VERSION = 2
"""Raised whenever a figure may change."""
PARTS_FOLDER, SCENARIOS_FILE, SUMMARY_FILE, LISTED_FILE = "parts", "scenarios.parquet", "summary.json", "listed.csv"
SECONDS_PER_SCENARIO = 0.5
METRICS = (
    "metametric", "average_displacement_error", "min_average_displacement_error",
    *(f"{name}_likelihood" for name in FEATURES),
    "simulated_collision_rate", "simulated_offroad_rate", "simulated_traffic_light_violation_rate",
)  # fmt: skip
"""Columns of a scenario, under the challenge's names."""


@dataclass(frozen=True)
class ScoreSettings:
    """What is scored how. ``expected`` rollouts a scene (None: any number)."""

    scenes: str
    rollouts: str
    year: int
    expected: int | None


class ScenarioWorker:
    """Scores one scenario after another; both folders are opened once."""

    def __init__(self, settings: ScoreSettings, name: str) -> None:
        self.settings = settings
        self.scenes, self.rollouts = SceneFolder(settings.scenes), RolloutFolder(settings.rollouts)

    def process(self, name: str) -> tuple[str, dict[str, np.ndarray] | str]:
        """(name, arrays of the record), or (name, why it cannot be scored)."""
        try:
            scene = self.scenes.get(name)
            result = realism(scene, self.rollouts.get(name), year=self.settings.year, expected=self.settings.expected)
        except DataError as error:
            return name, str(error)
        contacts = np.array(result.listed.contacts, np.int64).reshape(-1, 3)
        return name, {
            "metrics": np.array([result.metrics[column] for column in METRICS]),
            "clean": np.array([result.clean, result.listed.clean.sum(), result.scored], np.float64),
            "contacts": contacts,
            "offroad": np.array(result.listed.offroad, np.int64),
        }

    def close(self) -> None:
        pass


def score_rollouts(
    settings: ScoreSettings,
    output_dir: str,
    *,
    workers: str = "sequential",
    num_workers: int = 1,
    ray_address: str | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Scores every scenario of ``settings.scenes`` that has rollouts; returns the content of ``summary.json``.

    A scenario that breaks a rule is an invalid row with the reason; the aggregates rest on the others and say so.
    Raises RealismError where scenes have no rollouts or rollouts no scene (unless ``allow_missing``), or no
    scenario is valid.
    """
    rules = rules_of(settings.year)
    scenes, rollouts = SceneFolder(settings.scenes), RolloutFolder(settings.rollouts)
    names = _matched(scenes.names, rollouts.names, allow_missing)
    fingerprint = Fingerprint(
        KIND,
        {
            "version": VERSION, "year": settings.year, "expected": settings.expected, "scenes": scenes.identity(),
            "rollouts": rollouts.identity(), "scenarios": digest_tokens(names),
        },
        info={"scenes": settings.scenes, "rollouts": settings.rollouts},
    )  # fmt: skip
    parts = Path(output_dir) / PARTS_FOLDER
    with FolderLock(output_dir):
        failed: dict[str, str] = {}
        with ShardWriter(parts, fingerprint) as writer:
            left = [name for name in names if name not in writer.done]
            logger.info(
                "%d scenarios (%d done before), about %.0f s on %d workers", len(left), len(names) - len(left),
                len(left) * SECONDS_PER_SCENARIO / num_workers, num_workers,
            )  # fmt: skip
            make = partial(ScenarioWorker, settings)
            results = spread(make, left, kind=workers, num_workers=num_workers, ray_address=ray_address)
            done = len(names) - len(left)
            for _, (name, found) in track(results, "realism, scenarios", total=len(names), done=done):
                if isinstance(found, str):
                    failed[name] = found
                else:
                    writer.put(name, found)
        merge(parts)
        store = ShardStore(parts)
        table = scenario_table(store, names, failed)
        write_table(Path(output_dir) / SCENARIOS_FILE, table)
        _write_listed(store, [name for name in names if name not in failed], Path(output_dir) / LISTED_FILE)
        summary = summarise(table, settings.year) | {"year": rules.year, "fingerprint": fingerprint.to_json()}
        write_json_atomic(Path(output_dir) / SUMMARY_FILE, summary)
        if len(failed) == len(names):
            raise RealismError(f"0 of {len(names)} scenarios can be scored; the first: {next(iter(failed.items()))}")
    return summary


def _matched(scenes: Sequence[str], rollouts: Sequence[str], allow_missing: bool) -> list[str]:
    both = sorted(set(scenes) & set(rollouts))
    for what, lacking in (("rollouts", set(scenes) - set(rollouts)), ("scenes", set(rollouts) - set(scenes))):
        if lacking and not allow_missing:
            raise RealismError(
                f"{len(lacking)} scenarios have no {what} ({', '.join(sorted(lacking)[:5])}): make them, or score only "
                "what has both with allow_missing=true"
            )
    if not both:
        raise RealismError("0 scenarios have both a scene and rollouts: check the names in the two folders")
    return both


def scenario_table(store: ShardStore, names: Sequence[str], failed: Mapping[str, str]) -> pd.DataFrame:
    """One row a scenario: ``scenario``, ``valid``, ``reason``, the challenge's entries, the additional figure and the
    numbers of objects; an invalid row holds NaN and 0 objects."""
    rows = []
    for name in names:
        if name in failed:
            row = dict.fromkeys(METRICS, float("nan"))
            clean, kept, scored = float("nan"), 0.0, 0.0
        else:
            record = store.get(name)
            row = dict(zip(METRICS, record["metrics"].tolist(), strict=True))
            clean, kept, scored = record["clean"].tolist()
        told = {"scenario": name, "valid": name not in failed, "reason": failed.get(name, "")}
        rows.append({**told, **row, CLEAN: clean, "scored_objects": int(scored), "clean_objects": int(kept)})
    return pd.DataFrame(rows)


def _write_listed(store: ShardStore, names: Sequence[str], path: Path) -> None:
    """Scored objects that touch another in the log (with whom and since when), or are off the road at the present
    step."""
    lines = ["scenario,object,fault,other,step"]
    for name in names:
        record = store.get(name)
        lines += [f"{name},{one},contact,{other},{step}" for one, other, step in record["contacts"].tolist()]
        lines += [f"{name},{one},offroad,," for one in record["offroad"].tolist()]
    with atomic_file(path) as temporary:
        Path(temporary).write_text("\n".join(lines) + "\n")


def summarise(table: pd.DataFrame, year: int) -> dict[str, Any]:
    """Aggregates: plain means over scenarios as the challenge takes them, with bootstrap intervals over scenarios;
    buckets; and how many scenarios and scored objects they rest on. Invalid rows are counted, never averaged."""
    invalid, table = table[~table["valid"]], table[table["valid"]]
    names = table["scenario"].tolist()
    estimates = {column: bootstrap_mean(table[column].to_numpy(float), names) for column in (*METRICS, CLEAN)}
    means = {column: float(table[column].mean(skipna=False)) for column in METRICS}
    per_row = [buckets(row, rules_of(year)) for row in table.to_dict("records")]
    bucket_estimates = {
        name: bootstrap_mean(np.array([row[name] for row in per_row], float), names) for name in BUCKETS
    }
    return {
        "scenarios": len(table),
        "invalid": dict(zip(invalid["scenario"], invalid["reason"], strict=True)),
        "scored_objects": int(table["scored_objects"].sum()),
        "listed_objects": int((table["scored_objects"] - table["clean_objects"]).sum()),
        "nan_scenarios": int(table["metametric"].isna().sum()),
        "mean": means,
        "buckets": buckets(means, rules_of(year)),
        "intervals": {name: one.to_json() for name, one in (estimates | bucket_estimates).items()},
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """A table of 80 columns: mean and interval of each figure."""
    table = Table(title=f"Sim agents realism, rules of {summary['year']}: mean [95 % over scenarios]",
                  title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    table.add_column("figure")
    table.add_column("mean", justify="right")
    table.add_column("interval", justify="right")
    shown = ("metametric", CLEAN, *BUCKETS, *METRICS[1:])
    for name in shown:
        one = summary["intervals"][name]
        values = {key: float("nan") if one[key] is None else one[key] for key in ("mean", "low", "high")}
        interval = "-" if one["low"] is None else f"[{values['low']:.4f}, {values['high']:.4f}]"
        table.add_row(name.replace("_", " "), f"{values['mean']:.4f}", interval)
    console.print(table)
    console.print(
        f"{summary['scenarios']} scenarios, {summary['scored_objects']} scored objects, {summary['listed_objects']} of "
        f"them listed in {LISTED_FILE} (in contact, or off the road, in the recording itself)",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if summary["invalid"]:
        console.print(f"INCOMPLETE: {len(summary['invalid'])} scenarios are invalid and in no figure:", markup=False)
        for name, reason in list(summary["invalid"].items())[:10]:
            console.print(f"  {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if summary["nan_scenarios"]:
        console.print(f"{summary['nan_scenarios']} scenarios have no meta-metric (a feature without any valid step)")


@job("realism")
def main(cfg: DictConfig) -> None:
    settings = ScoreSettings(str(cfg.scenes), str(cfg.rollouts), int(cfg.year), cfg.expected)
    summary = score_rollouts(
        settings, str(cfg.output_dir), workers=cfg.workers, num_workers=cfg.num_workers, ray_address=cfg.ray_address,
        allow_missing=cfg.allow_missing,
    )  # fmt: skip
    print_summary(summary, Console())
    if summary["invalid"]:
        raise RealismError(f"{len(summary['invalid'])} scenarios are invalid; the others are in {cfg.output_dir}")


if __name__ == "__main__":
    main()
