"""A grid of end points, evened out: tokens for every motion that could occur, not only for what did.

Cells of the plane of end points that recorded segments fall into are filled. A filled cell with fewer than 20
filled ones within 4 cells is dropped as noise; an empty one with at least 20 is added. The token of a filled cell
is the mean of its segments; that of an added one a cubic Hermite curve to its centre, whose end heading is the mean
of its filled neighbours'. Source: TrajTok (arXiv 2506.21618) and its released code, whose ranges for vehicles are x
in [-5, 20] m, 250 cells, and y in [-2, 3] m, 80 cells. Chosen here: y in [-2.5, 2.5] m, because mirrored data is
even, and coarser cells for small vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve

from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.errors import DataError


@dataclass(frozen=True)
class GridCells:
    """Range (m) and number of cells along and across, for one class."""

    along: tuple[float, float, int] = (-5.0, 20.0, 250)
    across: tuple[float, float, int] = (-2.5, 2.5, 80)
    reach: int = 4  # cells, in both directions, within which neighbours are counted
    neighbours: int = 20


def grid(segments: NDArray[np.float32], cells: GridCells) -> NDArray[np.float32]:
    """Tokens [V, J, 3] of segments [n, J, 3]. Raises DataError where no cell is left."""
    (x_low, x_high, x_count), (y_low, y_high, y_count) = cells.along, cells.across
    ends = segments[:, -1].astype(np.float64)
    column = np.floor((ends[:, 0] - x_low) / (x_high - x_low) * x_count).astype(np.int64)
    row = np.floor((ends[:, 1] - y_low) / (y_high - y_low) * y_count).astype(np.int64)
    inside = (column >= 0) & (column < x_count) & (row >= 0) & (row < y_count)
    cell = column[inside] * y_count + row[inside]
    counts = np.bincount(cell, minlength=x_count * y_count).reshape(x_count, y_count)
    filled = counts > 0
    around = np.ones((2 * cells.reach + 1,) * 2)
    around[cells.reach, cells.reach] = 0
    neighbours = convolve(filled.astype(np.float64), around, mode="constant")
    enough = neighbours >= cells.neighbours
    kept, added = filled & enough, ~filled & enough
    if not (kept.any() or added.any()):
        raise DataError(
            f"no cell of the grid has {cells.neighbours} filled neighbours ({len(segments)} segments, {filled.sum()} "
            "filled cells): give more scenes or coarser cells"
        )
    standing = _standing(cells)
    kept[standing], added[standing] = filled[standing], not filled[standing]
    sums = np.zeros((x_count * y_count, TOKEN_STEPS, 3))
    np.add.at(sums, cell, segments[inside])
    means = sums / np.maximum(counts.reshape(-1, 1, 1), 1)
    headings = _neighbour_heading(means[:, -1, 2].reshape(x_count, y_count), filled, around)
    tokens = []
    for place in np.argwhere(kept | added):
        if kept[tuple(place)]:
            tokens.append(means[place[0] * y_count + place[1]])
        else:
            x = x_low + (place[0] + 0.5) * (x_high - x_low) / x_count
            y = y_low + (place[1] + 0.5) * (y_high - y_low) / y_count
            tokens.append(_hermite(x, y, headings[tuple(place)]))
    return np.stack(tokens).astype(np.float32)


def _standing(cells: GridCells) -> tuple[int, int]:
    """The cell of no motion, which every vocabulary has."""
    (x_low, x_high, x_count), (y_low, y_high, y_count) = cells.along, cells.across
    return int(-x_low / (x_high - x_low) * x_count), int(-y_low / (y_high - y_low) * y_count)


def _neighbour_heading(heading: NDArray, filled: NDArray[np.bool_], around: NDArray) -> NDArray:
    """Mean end heading (rad) of the filled cells around each cell; 0 where there is none."""
    total = convolve(np.where(filled, heading, 0.0), around, mode="constant")
    return total / np.maximum(convolve(filled.astype(np.float64), around, mode="constant"), 1.0)


def _hermite(x: float, y: float, heading: float) -> NDArray:
    """[J, 3] poses along the cubic from (0, 0) with heading 0 to (x, y) with ``heading``, evenly in its parameter s:

    p(s) = h10(s) m0 + h01(s) p1 + h11(s) m1,  m = chord (cos, sin) of the heading, forward or backward as x is.
    """
    s = np.arange(1, TOKEN_STEPS + 1) / TOKEN_STEPS
    chord = np.hypot(x, y) * (1.0 if x >= 0 else -1.0)
    start, end = np.array([chord, 0.0]), chord * np.array([np.cos(heading), np.sin(heading)])
    p = (s**3 - 2 * s**2 + s)[:, None] * start + (3 * s**2 - 2 * s**3)[:, None] * [x, y] + (s**3 - s**2)[:, None] * end
    poses = np.empty((TOKEN_STEPS, 3))
    poses[:, :2], poses[:, 2] = p, s * heading
    return poses
