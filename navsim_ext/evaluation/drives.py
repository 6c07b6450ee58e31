"""Folders of ``navsim_ext.closed_loop.drive`` as score tables: for compare, the report and rankings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from navsim_ext.closed_loop.score import COLUMNS, MULTIPLIERS, WEIGHTS, combine
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.attribution import ScoreFormula
from navsim_ext.fingerprint import FILE_NAME, Fingerprint
from navsim_ext.runtime.parquet import read_table, require_columns

KIND = "closed-loop-drives"
SCORES_FILE = "scores.parquet"
REMEDY = "drive again with python -m navsim_ext.closed_loop.drive"
HEADLINE = ("score",)
TITLES = {"score": "closed-loop score", "clean": "clean", **{term: term.upper() for term in (*MULTIPLIERS, *WEIGHTS)}}


class DriveFormula(ScoreFormula):
    """The closed-loop score; a gate that a scene cannot tell (NaN) is open."""

    def __call__(self, columns):
        return combine(dict(columns))


FORMULA = DriveFormula("score", MULTIPLIERS, WEIGHTS)


def are_drives(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds drives."""
    return (Path(folder) / FILE_NAME).is_file() and Fingerprint.load(folder).kind == KIND


def read_drives(folder: str | os.PathLike[str]) -> tuple[pd.DataFrame, Fingerprint]:
    """(one row a scene, in the columns of a score table: token, log_name, name, valid, and the closed-loop columns;
    fingerprint with the parent ``scorer``: score, traffic and horizon, which must be equal to compare).

    Raises MissingError for a folder whose drives are not finished.
    """
    path = Path(folder) / SCORES_FILE
    if not are_drives(folder) or not path.is_file():
        raise MissingError(f"{folder} holds no finished drives: {REMEDY}")
    table = read_table(path, REMEDY)
    require_columns(path, table.column_names, ("id", "planner", "agents", "valid", "reason", "clean", *COLUMNS), REMEDY)
    rows = table.to_pandas().rename(columns={"id": "token", "planner": "name"}).sort_values("token", ignore_index=True)
    rows["log_name"] = rows["token"]
    made = Fingerprint.load(folder)
    judge = {"agents": made.fields["agents"], "horizon_s": made.fields["horizon_s"]}
    scorer = Fingerprint("closed-loop-judge", judge, {"score": made.parents["score"]})
    return rows, Fingerprint(made.kind, made.fields, {**made.parents, "scorer": scorer}, info=made.info)


def matrix(tables: Sequence[pd.DataFrame], column: str = "score") -> tuple[NDArray[np.float64], list[str]]:
    """([P,n] of a column, [n] tokens) over the scenes that are valid for all tables; raises DataError for none."""
    indexed = [rows[rows["valid"]].set_index("token")[column] for rows in tables]
    shared = sorted(set.intersection(*(set(one.index) for one in indexed)))
    if not shared:
        raise DataError("no scene is valid for all planners")
    return np.stack([one.loc[shared].to_numpy(float) for one in indexed]), shared
