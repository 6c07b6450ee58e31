"""``score protocol=two_stage``: a planner drives both stages of NAVSIM 2's pseudo-simulation.

    python -m navsim_ext.evaluation.score protocol=two_stage planner=... data.split_config=YAML \\
        data.index=FIRST data.second_stage=SECOND metric_cache=CACHE output_dir=DIR

FIRST and SECOND are scene indices (``navsim_ext.dataset`` with the split's scene filter, SECOND with
``data.second_stage=FOLDER`` besides). DIR gets ``trajectories.parquet`` of both stages (a submission can be written
from it), ``two_stage.parquet``, ``two_stage.aggregates.parquet``, ``csv/`` in NAVSIM's layout, ``two_stage.json`` and
``fingerprint.json``. What an index lacks makes its group invalid and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation import probes
from navsim_ext.evaluation.scoring import NothingScored
from navsim_ext.evaluation.stages import STAGES, planned_stages, stage_datasets, stage_states
from navsim_ext.evaluation.table import PROBE_PREFIX, TRAJECTORIES_FILE
from navsim_ext.evaluation.two_stage import Trajectories, TwoStageResult, combined_estimate
from navsim_ext.evaluation.two_stage_file import (
    Options,
    Snapshot,
    evaluate_planners,
    fingerprint_of,
    open_split,
    print_results,
    take_snapshot,
    write_results,
)
from navsim_ext.files import read_json, write_json_atomic
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.frames import POSE_INTERVAL_S
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import arithmetic
from navsim_ext.pdm.version import require_traffic
from navsim_ext.planners import Planner
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.preflight import preflight

SUMMARY_FILE, ROWS_FILE, CSV_FOLDER = "two_stage.json", "two_stage.parquet", "csv"
SUMMARY_TITLES = ("stage 1", "stage 2", "combined", "groups")
BYTES_PER_ROW = 1500  # of all files together


def score_two_stages(cfg: DictConfig, console: Console) -> dict[str, TwoStageResult]:
    """Plans both stages, scores and combines them. Raises NothingScored when no group is valid (``require_valid``)."""
    arithmetic.verdict()
    options = Options(cfg.traffic or "reactive", cfg.human_filter, cfg.strict)
    require_traffic(options.traffic)
    if cfg.data.second_stage is None:
        raise MissingError("protocol=two_stage needs data.second_stage=FOLDER, the scene index of the second stage")
    cache = MetricCache(cfg.metric_cache)
    split = open_split({"split_config": cfg.data.split_config}, cache)
    split.require_groups()
    datasets = stage_datasets(cfg, split)
    rows = sum(len(dataset) for dataset in datasets)
    output = Path(cfg.output_dir)
    preflight(output_dir=output, items=rows, bytes_per_item=BYTES_PER_ROW, title="two stages", console=console)
    planner: Planner = instantiate(cfg.planner)
    hidden = stage_states(cfg, planner)
    planners = [planner]
    if cfg.probes:
        planners += probes.probes_of(planner, cfg.name, sees=hidden[0] is not None, cache=cache, version="v2")
    tables, made = [], {}
    for one in planners:
        folder = output if one is planner else output / "probes" / one.name
        for stage, (planned, fingerprint) in zip(STAGES, planned_stages(cfg, one, datasets, hidden, folder)):
            if one is planner:
                made[f"planned_stage_{stage}"] = fingerprint
                planned["name"] = cfg.name or planned["name"]
            tables.append(planned)
    table = pd.concat(tables, ignore_index=True)
    write_table(output / TRAJECTORIES_FILE, table[["token", "name", "poses", "interval"]])
    trajectories = {str(name): _trajectories(part) for name, part in table.groupby("name", sort=False)}
    snapshot = take_snapshot(split, cache, options)
    results = evaluate_planners(trajectories, split, cache, options)
    scored = fingerprint_of(output / TRAJECTORIES_FILE, split, cache, options)
    scored = Fingerprint(scored.kind, scored.fields, {**scored.parents, **made}, scored.info)
    write_results(output / ROWS_FILE, results, scored, snapshot, output / CSV_FOLDER)
    scored.save(output)
    write_json_atomic(output / SUMMARY_FILE, summary_of(results, snapshot, options))
    print_results(results, snapshot, options, console)
    for line in verdict_lines(results):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if cfg.require_valid and not any(result.groups["valid"].any() for result in results.values()):
        reasons = "; ".join(sorted({str(reason) for r in results.values() for reason in r.groups["reason"]})[:3])
        raise NothingScored(f"not one group could be scored: {reasons}")
    return results


def _trajectories(table: pd.DataFrame) -> Trajectories:
    poses = [np.asarray(row, dtype=np.float64).reshape(-1, 3) for row in table["poses"]]
    bad = {i: "trajectory is not finite" for i, one in enumerate(poses) if not np.isfinite(one).all()}
    return Trajectories(table["token"].tolist(), poses, [POSE_INTERVAL_S] * len(poses), bad)


def summary_of(results: Mapping[str, TwoStageResult], snapshot: Snapshot, options: Options) -> dict[str, Any]:
    """What the report shows of an evaluation."""
    planners = {}
    for name, result in results.items():
        bad = result.groups[~result.groups["valid"]]
        stages = [None if np.isnan(value) else float(value) for value in result.stages["score"]]
        planners[name] = {
            "stage_one": stages[0], "stage_two": stages[1], "combined": combined_estimate(result).to_json(),
            "groups": len(result.groups) - len(bad), "groups_expected": len(result.groups),
            "reasons": bad["reason"].value_counts().head(10).to_dict(),
        }  # fmt: skip
    return {
        "snapshot": snapshot.line(), "traffic": options.traffic, "human_filter": options.human_filter,
        "planners": planners, "verdicts": verdict_lines(results),
    }  # fmt: skip


def summary_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"name", "cells"} of each planner of a :func:`summary_of`: both stages, combined with interval, groups."""
    rows = []
    for name, entry in summary["planners"].items():
        combined = Estimate(**{key: np.nan if value is None else value for key, value in entry["combined"].items()})
        cells = ["-" if entry[key] is None else f"{100.0 * entry[key]:.1f}" for key in ("stage_one", "stage_two")]
        whole = entry["groups"] == entry["groups_expected"]
        groups = f"{entry['groups']}/{entry['groups_expected']}" + ("" if whole else " INCOMPLETE")
        rows.append({"name": name, "cells": [*cells, combined.format(), groups]})
    return rows


def verdict_lines(results: Mapping[str, TwoStageResult]) -> list[str]:
    """Each planner against the best probe, by groups; nothing without probes."""
    columns: Iterable[tuple[str, pd.Series]] = (
        (name, result.groups[result.groups["valid"]].set_index("now")["combined"].astype(float))
        for name, result in results.items()
    )
    values = pd.DataFrame(dict(columns))
    return [one.line("two-stage EPDMS") for one in probes.verdicts(values, values.index.tolist(), "combined")]


def read_summaries(folders: Iterable[str]) -> dict[str, Any]:
    """Several folders of :func:`score_two_stages` as one summary.

    A probe that stands in several counts once. Raises MissingError for a folder that is none, FingerprintMismatch when
    scorer, groups or second stage differ, DataError when a planner comes twice.
    """
    joined: dict[str, Any] = {}
    first: tuple[str, Fingerprint] | None = None
    for folder in folders:
        if not (Path(folder) / SUMMARY_FILE).is_file():
            raise MissingError(
                f"{folder} holds no {SUMMARY_FILE}: score it with python -m navsim_ext.evaluation.score "
                "protocol=two_stage"
            )
        made = Fingerprint.load(folder)
        fields = {name: made.fields[name] for name in ("split", "groups", "second_stage_tokens", "human_filter")}
        comparable = Fingerprint(made.kind, fields, {"scorer": made.parents["scorer"]})
        summary = read_json(Path(folder) / SUMMARY_FILE, "score it again")
        if first is None:
            first, joined = (str(folder), comparable), summary
            continue
        first[1].require_equal(
            comparable, mine=f"two-stage scores in {first[0]}", theirs=f"those in {folder}",
            remedy="A table may hold one scorer and one second stage only: score again.",
        )  # fmt: skip
        for name, entry in summary["planners"].items():
            if name not in joined["planners"]:
                joined["planners"][name] = entry
            elif not name.startswith(PROBE_PREFIX):
                raise DataError(f"planner {name!r} is in {folder} and in an earlier folder: give one another name")
        joined["verdicts"] += summary["verdicts"]
    return joined


def summary_table(summary: Mapping[str, Any]) -> Table:
    """A summary as a table of at most 80 columns."""
    table = Table(title="Two-stage EPDMS x 100 [95 % over groups]", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("planner", overflow="fold", max_width=24)
    for title in SUMMARY_TITLES:
        table.add_column(title, justify="right")
    for row in summary_rows(summary):
        table.add_row(row["name"], *row["cells"])
    return table
