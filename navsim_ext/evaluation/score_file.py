r"""Scores a file of trajectories, whoever made them.

    python -m navsim_ext.evaluation.score_file trajectories=IN.parquet metric_cache=DIR output=OUT
    python -m navsim_ext.evaluation.score_file protocol=two_stage trajectories=IN.parquet metric_cache=DIR \
        data.root=DATASET data.split_config=YAML traffic=reactive human_filter=true output=OUT.parquet

The second form is NAVSIM 2's pseudo-simulation (:mod:`navsim_ext.evaluation.two_stage_file`). Of the first form:
OUT ends in ``.parquet`` or ``.csv``, or is a folder as ``navsim_ext.evaluation.score`` leaves one; ``compare`` and
``show`` take the folder or the Parquet file, the report the folder. A file of one's own:

    import pandas as pd
    rows = [{"token": token, "name": "mine", "poses": poses.ravel().tolist()} for token, poses in planned.items()]
    pd.DataFrame(rows).to_parquet("IN.parquet")  # poses: [8,3] float64

IN has the columns ``token``, ``name`` (the planner's) and ``poses`` (24 float64, row-major 8x3: x, y [m], heading [rad]
at 0.5 ... 4.0 s in the ego frame). OUT has ``token``, ``name``, ``log_name``, ``valid``, ``reason``, ``map_label`` and
the sub-scores and scores of both versions, in [0, 1] and in the order of IN; invalid rows hold nulls, never numbers.
Two-frame comfort pairs a scene with its predecessor under the same name. The Parquet file's metadata carries the
fingerprint (scorer, metric cache, doctor's verdict, digest of IN) and the summary under the keys
``trivium_fingerprint`` and ``trivium_summary``.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.errors import DataError
from navsim_ext.evaluation.scoring import NothingScored
from navsim_ext.evaluation.table import FINGERPRINT_KEY, HEADLINE, SCORES_FILE, TITLES, TRAJECTORIES_FILE
from navsim_ext.evaluation.trajectory_file import TrajectoryFile, read_trajectories
from navsim_ext.files import atomic_file
from navsim_ext.fingerprint import Fingerprint, digest_file, digest_tokens
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import PdmResult, arithmetic, score_pairs, scorer_fingerprint
from navsim_ext.pdm.columns import SCORE_COLUMNS
from navsim_ext.pdm.version import require_traffic
from navsim_ext.runtime.config import job
from navsim_ext.runtime.parquet import write_table

logger = logging.getLogger(__name__)

KIND = "pdm_scores"  # Fingerprint.kind of a score file
SUMMARY_KEY = b"trivium_summary"
ROWS_PER_SECOND = 5_000.0  # per core, both versions; only for the estimate that is told beforehand


def score_file(
    trajectories: str | os.PathLike[str],
    metric_cache: MetricCache,
    *,
    threads: int | None = None,
    traffic: str = "log_replay",
) -> tuple[TrajectoryFile, PdmResult]:
    """Scores every row; planner by planner, so that two-frame comfort finds the predecessor and memory stays small.

    Raises DataError when a planner has a token twice.
    """
    from navsim_ext.runtime.progress import track

    content = read_trajectories(trajectories)
    planners: dict[str, list[int]] = {}
    for row, name in enumerate(content.names):
        planners.setdefault(name, []).append(row)
    cost = len(content.tokens) / ROWS_PER_SECOND
    logger.info("%d trajectories of %d planners, about %.1f s on one core", len(content.tokens), len(planners), cost)
    parts: list[tuple[list[int], PdmResult]] = []
    for name, rows in track(planners.items(), "scores, planners", total=len(planners)):
        tokens = [content.tokens[row] for row in rows]
        result = score_pairs(
            tokens, content.poses[rows], metric_cache, names=[name] * len(rows), threads=threads, traffic=traffic
        )
        parts.append((rows, result))
    joined = _join(parts, content)
    for row, reason in content.malformed.items():
        joined.reason[row] = reason
    return content, joined


def _join(parts: Sequence[tuple[list[int], PdmResult]], content: TrajectoryFile) -> PdmResult:
    count = len(content.tokens)
    values = np.full((count, parts[0][1].values.shape[1]), np.nan)
    valid = np.zeros(count, dtype=bool)
    reason, label = np.full(count, "", dtype=object), np.full(count, "", dtype=object)
    for rows, result in parts:
        values[rows], valid[rows], reason[rows] = result.values, result.valid, result.reason
        label[rows] = result.map_label
    return PdmResult(content.tokens, values, valid, reason, label, two_frame=True)


def file_fingerprint(
    trajectories: str | os.PathLike[str],
    metric_cache: MetricCache,
    tokens: Sequence[str],
    *,
    split: str = "",
    traffic: str = "log_replay",
) -> Fingerprint:
    """What a score file was made of; the doctor's verdict on this machine stands in ``info``."""
    return Fingerprint(
        kind=KIND,
        fields={
            "trajectories": digest_file(trajectories),
            "human_filter": "epdms_v2",
            "two_frame": "same name",
            "tokens": digest_tokens(tokens),
            "split": split,
        },
        parents={"scorer": scorer_fingerprint(traffic), "metric_cache": metric_cache.fingerprint},
        info={"doctor": arithmetic.verdict(), "trajectories": str(trajectories)},
    )


def summary_of(content: TrajectoryFile, result: PdmResult) -> dict[str, Any]:
    """Per planner: rows, valid rows, means; reasons of invalid and incomplete rows; whose maps the scores are from."""
    planners: dict[str, list[int]] = {}
    for row, name in enumerate(content.names):
        planners.setdefault(name, []).append(row)
    summary = {}
    for name, rows in sorted(planners.items()):
        good = np.array(rows)[result.valid[rows]]
        means = {column: _mean(result[column][good]) for column in HEADLINE}
        summary[name] = {"rows": len(rows), "valid": len(good), "mean": means}
    whole = result.summary()
    return {"planners": summary} | {key: whole[key] for key in ("invalid", "incomplete", "maps")}


def _mean(scores: NDArray[np.float64]) -> float | None:
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if len(known) else None


def write_scores(
    path: str | os.PathLike[str],
    content: TrajectoryFile,
    result: PdmResult,
    fingerprint: Fingerprint,
    summary: dict[str, Any],
    metric_cache: MetricCache,
) -> None:
    """Writes OUT atomically, in the form of its suffix: a Parquet file, a CSV file, or a folder of both with the
    trajectories, as ``navsim_ext.evaluation.score`` leaves one."""
    path = Path(path)
    columns: dict[str, pa.Array] = {
        "token": pa.array(content.tokens, pa.string()),
        "name": pa.array(content.names, pa.string()),
        "log_name": pa.array(content.log_names(metric_cache), pa.string()),
        "valid": pa.array(result.valid, pa.bool_()),
        "reason": pa.array(result.reason.tolist(), pa.string()),
        "map_label": pa.array(result.map_label.tolist(), pa.string()),
    }
    for name in SCORE_COLUMNS:
        columns[name] = pa.array(result[name], pa.float64(), from_pandas=True)
    metadata = {FINGERPRINT_KEY: json.dumps(fingerprint.to_json()), SUMMARY_KEY: json.dumps(summary)}
    table = pa.table(columns)
    if path.suffix == ".parquet":
        write_table(path, table, metadata)
    elif path.suffix == ".csv":
        write_csv(path, table)
    else:
        path.mkdir(parents=True, exist_ok=True)
        rows = [poses.ravel().tolist() for poses in content.poses]
        trajectories = {"token": content.tokens, "name": content.names, "poses": pa.array(rows, pa.list_(pa.float64()))}
        write_table(path / TRAJECTORIES_FILE, pa.table(trajectories))
        write_csv(path / "scores.csv", table)
        write_table(path / SCORES_FILE, table, metadata)
        fingerprint.save(path)


def write_csv(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as temporary:
        table.to_pandas().to_csv(temporary, index=False)


def require_form(output: str | os.PathLike[str], protocol: str) -> None:
    """Raises DataError for an output whose suffix promises another form than those that are written."""
    suffix = Path(output).suffix
    if protocol == "two_stage" and suffix != ".parquet":
        raise DataError(f"output={output}: two stages are written as one .parquet file (and csv_dir=FOLDER)")
    if suffix not in ("", ".parquet", ".csv") and not Path(output).is_dir():
        raise DataError(f"output={output}: {suffix} is not written; give .parquet, .csv or a folder (no suffix)")


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Scores per planner and why rows are invalid."""
    table = Table("planner", "rows", "invalid", *(TITLES[column] for column in HEADLINE), title="mean x 100")
    for name, entry in summary["planners"].items():
        means = ["-" if entry["mean"][column] is None else f"{entry['mean'][column] * 100:.1f}" for column in HEADLINE]
        table.add_row(name, str(entry["rows"]), str(entry["rows"] - entry["valid"]), *means)
    console.print(table)
    for reason, count in list(summary["invalid"].items())[:20]:
        console.print(f"invalid: {count} x {reason}", markup=False)
    if len(summary["invalid"]) > 20:
        console.print(f"invalid: {len(summary['invalid']) - 20} further reasons, in the column `reason`")
    for reason, count in summary["incomplete"].items():
        console.print(f"incomplete: {count} x {reason}", markup=False)
    approximate = summary["maps"].get("approx", 0)
    if approximate:
        console.print(f"{approximate} rows were scored on APPROXIMATE maps: not comparable with published scores")


@job("score_file")
def main(cfg: DictConfig) -> None:
    started = time.perf_counter()
    require_form(cfg.output, cfg.protocol)
    arithmetic.verdict()  # refuses, before any work, to score on a machine that computes wrongly
    cache = MetricCache(cfg.metric_cache)
    if cfg.protocol == "two_stage":
        rows = _score_two_stages(cfg, cache)
    elif cfg.protocol == "single_stage":
        rows = _score_single_stage(cfg, cache)
    else:
        raise DataError(f"protocol={cfg.protocol!r}: single_stage or two_stage was expected")
    logger.info("%s: %d rows in %.1f s", cfg.output, rows, time.perf_counter() - started)


def _score_single_stage(cfg: DictConfig, cache: MetricCache) -> int:
    unread = {"human_filter": True, "strict": False, "csv_dir": None}
    changed = [key for key, value in unread.items() if cfg[key] != value]
    if changed:
        raise DataError(
            f"{', '.join(changed)} belong to protocol=two_stage; a single stage gives epdms_v2 with and without"
        )
    traffic = cfg.traffic or "log_replay"
    content, result = score_file(cfg.trajectories, cache, threads=cfg.threads, traffic=traffic)
    summary = summary_of(content, result)
    fingerprint = file_fingerprint(cfg.trajectories, cache, content.tokens, split=cfg.split or "", traffic=traffic)
    write_scores(cfg.output, content, result, fingerprint, summary, cache)
    print_summary(summary, Console())
    if not result.valid.any():
        raise NothingScored(f"all {len(result)} trajectories are invalid: see the column `reason` of {cfg.output}")
    return len(result)


def _score_two_stages(cfg: DictConfig, cache: MetricCache) -> int:
    from navsim_ext.evaluation import two_stage_file as two_stage

    options = two_stage.Options(cfg.traffic or "reactive", cfg.human_filter, cfg.strict, cfg.threads)
    require_traffic(options.traffic)
    split = two_stage.open_split(cfg.data, cache)
    planners = two_stage.read_planners(cfg.trajectories)
    console = Console()
    for name, trajectories in planners.items():
        sampled = two_stage.samplings(trajectories)
        if len(sampled) > 1:
            console.print(f"{name}: mixed samplings {sampled}", style="yellow", soft_wrap=True, highlight=False)
    snapshot = two_stage.take_snapshot(split, cache, options)
    results = two_stage.evaluate_planners(planners, split, cache, options)
    fingerprint = two_stage.fingerprint_of(cfg.trajectories, split, cache, options)
    two_stage.write_results(cfg.output, results, fingerprint, snapshot, cfg.csv_dir)
    two_stage.print_results(results, snapshot, options, console)
    return sum(len(result.rows) for result in results.values())


if __name__ == "__main__":
    main()
