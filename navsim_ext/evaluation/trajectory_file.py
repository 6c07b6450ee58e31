"""A file of trajectories, whoever made them: reading and checking it, before anything is scored.

Columns: ``token``, ``name`` (the planner's), ``poses`` (24 float64, row-major 8x3: x, y [m], heading [rad] at 0.5 ...
4.0 s in the ego frame; two stages admit other samplings).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from navsim_ext.errors import DataError, MissingError
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm.ego import NUM_POSES
from navsim_ext.runtime.parquet import read_table, require_columns

POSE_VALUES = NUM_POSES * 3


@dataclass(frozen=True, eq=False)
class TrajectoryFile:
    """The rows of a trajectory file; ``malformed`` says what is wrong with rows whose poses are not 24 numbers."""

    tokens: list[str]
    names: list[str]
    poses: NDArray[np.float64]  # [N,8,3], NaN where malformed
    malformed: dict[int, str]

    def log_names(self, metric_cache: MetricCache) -> list[str]:
        """The log of each row, which intervals are drawn by; empty for a token that the cache does not hold."""
        known = {token: metric_cache.load(token).log_name for token in set(self.tokens) if token in metric_cache}
        return [known.get(token, "") for token in self.tokens]


def read_trajectories(path: str | os.PathLike[str]) -> TrajectoryFile:
    """Reads and checks IN. Raises MissingError for no file, CorruptFile for a damaged one, DataError for a missing
    column, a null token or name, a column of another type, or no rows."""
    path = Path(path)
    table = trajectory_table(path, ("token", "name", "poses"))
    poses, malformed = _poses(table["poses"], path)
    return TrajectoryFile(table["token"].to_pylist(), table["name"].to_pylist(), poses, malformed)


def trajectory_table(path: str | os.PathLike[str], columns: Sequence[str]) -> pa.Table:
    """A parquet table with these columns, of which ``token`` and ``name`` hold text in every row. Raises as
    :func:`read_trajectories`."""
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"trajectories={path} does not exist")
    table = read_table(path, "write the trajectories again", required=False)
    require_columns(path, table.column_names, columns, "--help says what they hold")
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows")
    for name in ("token", "name"):
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column {name} is of type {kind}; strings were expected")
        if table[name].null_count:
            raise DataError(f"{path}: column {name} has {table[name].null_count} nulls")
    return table


def _poses(column: pa.ChunkedArray, path: Path) -> tuple[NDArray[np.float64], dict[int, str]]:
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DataError(f"{path}: column poses is of type {kind}; lists of {POSE_VALUES} float64 were expected")
    array = column.combine_chunks()
    lengths = np.array([-1 if value is None else value for value in pa.compute.list_value_length(array).to_pylist()])
    good = lengths == POSE_VALUES
    poses = np.full((len(array), POSE_VALUES), np.nan)
    values = array.filter(pa.array(good)).flatten().cast(pa.float64())
    poses[good] = values.to_numpy(zero_copy_only=False).reshape(-1, POSE_VALUES)
    malformed = {
        int(row): "poses is null" if lengths[row] < 0 else f"poses has {lengths[row]} values, {POSE_VALUES} are needed"
        for row in np.flatnonzero(~good)
    }
    return poses.reshape(-1, NUM_POSES, 3), malformed
