"""What :mod:`navsim_ext.evaluation.watch` measured of a run, beside what the run logged itself.

    RUN/watch/version_N/validation.csv    one row per checkpoint: step, checkpoint, status, reason, then per figure its
                                          mean and interval: pdms_v1, pdms_v1_low, pdms_v1_high ...
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.table import HEADLINE, PROBE_PREFIX, TITLES, WITHOUT_COMFORT
from navsim_ext.files import reading

FOLDER, TABLE_NAME = "watch", "validation.csv"
COLUMNS = ("step", "checkpoint", "status", "reason")
SCORED, FAILED = "scored", "failed"
INTERVAL = ("_low", "_high")
SHARES = (*HEADLINE, *WITHOUT_COMFORT.values())  # printed x 100
SHOWN = (*SHARES, "rfs", "ade_3s", "ade_5s", "l2_at_3s", "l2_mean_3s")
LOGGED = ("train/loss", "reward")  # of metrics.csv, the first that is there


def figures_of(aggregate: Mapping[str, Any]) -> dict[str, float]:
    """Columns of one checkpoint from the ``aggregate.json`` of its scores; what has no value is left out."""
    estimates = aggregate["estimates"]
    if estimates and all(isinstance(value, dict) and "mean" not in value for value in estimates.values()):
        names = [name for name in estimates if not name.startswith(PROBE_PREFIX)]
        estimates = estimates[names[0]]  # the planner's, not its blind probes'
    figures = {}
    for column, estimate in estimates.items():
        for ending, key in (("", "mean"), ("_low", "low"), ("_high", "high")):
            if estimate.get(key) is not None:
                figures[f"{column}{ending}"] = float(estimate[key])
    return figures


def watched_file(run: str | os.PathLike[str]) -> Path | None:
    """The newest version's table below a run's output_dir; None where nobody watched."""
    versions = [
        (int(path.parent.name.removeprefix("version_")), path)
        for path in Path(run).glob(f"{FOLDER}/version_*/{TABLE_NAME}")
        if path.parent.name.removeprefix("version_").isdigit()
    ]
    return max(versions)[1] if versions else None


def read_watched(run: str | os.PathLike[str]) -> pd.DataFrame:
    """The rows by step. Raises MissingError for a run that nobody watched, CorruptFile or DataError for a bad table."""
    path = watched_file(run)
    if path is None:
        raise MissingError(f"{run}/{FOLDER} holds no {TABLE_NAME}: python -m navsim_ext.evaluation.watch run={run}")
    with reading(path, "run the watching command again"):
        table = pd.read_csv(path)
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}: run the watching command again")
    return table.sort_values("step", kind="stable").reset_index(drop=True)


def figure_columns(table: pd.DataFrame) -> list[str]:
    """The columns of means, headline scores first."""
    means = [c for c in table if c not in COLUMNS and not c.endswith(INTERVAL) and table[c].notna().any()]
    return [c for c in SHOWN if c in means] + [c for c in means if c not in SHOWN]


def joined(run: str | os.PathLike[str]) -> pd.DataFrame:
    """The rows of :func:`read_watched`, each with what the run itself had last logged at that step."""
    table, path = read_watched(run), watched_file(run)
    metrics = Path(run) / path.parent.name / "metrics.csv"
    if not metrics.is_file() or table.empty:
        return table
    with reading(metrics, "a training writes it"):
        logged = pd.read_csv(metrics)
    known = [column for column in LOGGED if column in logged]
    if "step" not in logged or not known:
        return table
    last = logged[["step", known[0]]].dropna().sort_values("step", kind="stable")
    return pd.merge_asof(table, last.drop_duplicates("step", keep="last"), on="step")


def watched_table(run: str | os.PathLike[str]) -> Table:
    """One row per checkpoint, at most 80 columns."""
    rows = joined(run)
    shown = [column for column in SHOWN if column in rows and rows[column].notna().any()][:3]
    logged = [column for column in LOGGED if column in rows]
    table = Table(title=f"{run}: checkpoints scored while it trained", title_justify="left", box=box.SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    table.add_column("step", justify="right")
    for column in [*shown, *logged]:
        table.add_column(TITLES.get(column, column), justify="right")
    for _, row in rows.iterrows():
        if row["status"] == FAILED:
            table.add_row(str(row["step"]), f"failed: {row['reason']!s:.40}", *[""] * (len(shown) + len(logged) - 1))
            continue
        cells = [_cell(row, column) for column in shown]
        table.add_row(str(row["step"]), *cells, *(f"{row[column]:.4g}" for column in logged))
    return table


def _cell(row: pd.Series, column: str) -> str:
    scale, digits = (100.0, 1) if column in SHARES else (1.0, 2)
    values = [row.get(f"{column}{ending}", float("nan")) for ending in ("", *INTERVAL)]
    mean, low, high = (f"{value * scale:.{digits}f}" for value in values)
    return "-" if pd.isna(values[0]) else mean if pd.isna(values[1]) else f"{mean} [{low}, {high}]"
