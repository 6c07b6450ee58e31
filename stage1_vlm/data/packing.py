"""Which conversations share a row or a batch, and what padding costs under each way of batching.

Packing is best-fit decreasing: longest first, each into the fullest row that still has room (at most 11/9 of the
least number of rows + 6/9, Johnson 1973). The plan depends on lengths and capacity alone; rows are shuffled later.

Balanced rows are alike in two costs, tokens (the language model's) and picture tokens (the vision encoder's, as many
per tile). The conversations are cut at random into parts of some thousand; those of a part go, the largest first, to
the row whose larger share of the two would be the smallest:

    row(i) = argmin_r max((L_r + l_i) / mean L, (V_r + v_i) / mean V),   L_r + l_i <= capacity,

with as few rows as take them all. So every row, and every rank and step, has about the same work.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.errors import DataError

CLASS_RATIO = 1.25
PART = 2048  # conversations that are spread over rows together


def length_classes(lengths: ArrayLike) -> NDArray[np.int64]:
    """[N] whole numbers k with CLASS_RATIO^k <= length < CLASS_RATIO^(k+1); batches are made within one.

    Sorting by the length itself would put one wording of one task into a batch, and gradients of a single task at a
    time learn far slower: within a class the order stays random, and at most 1 - 1 / CLASS_RATIO = 20 % is padding.
    """
    return np.floor(np.log(np.asarray(lengths)) / np.log(CLASS_RATIO)).astype(np.int64)


def packing_plan(lengths: ArrayLike, capacity: int) -> list[list[int]]:
    """Rows of item indices with at most ``capacity`` tokens each; every item is in exactly one row.

    Raises DataError for an item longer than the capacity.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise DataError(f"an item of {lengths.max()} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # rows by room left
    rooms: list[int] = []  # the keys of open_rows, sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
                rooms.pop(place)
        rows[row].append(item)
        left = room - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(row)
    return rows


def balanced_plan(lengths: ArrayLike, pictures: ArrayLike, capacity: int, *, seed: int = 0) -> list[list[int]]:
    """Rows of item indices with at most ``capacity`` tokens each, alike in tokens and in picture tokens; every item is
    in exactly one row. A function of its arguments.

    Raises DataError for an item longer than the capacity.
    """
    lengths, pictures = np.asarray(lengths, np.int64), np.asarray(pictures, np.int64)
    if len(lengths) and lengths.max() > capacity:
        raise DataError(f"an item of {lengths.max()} tokens does not fit a row of {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    for part in np.array_split(order, max(round(len(order) / PART), 1)):
        count = -(-int(lengths[part].sum()) // capacity)
        found = None
        while len(part) and found is None:
            found = _spread(lengths[part], pictures[part], capacity, count)
            count += 1
        rows += [part[row].tolist() for row in found or ()]
    return rows


def _spread(
    lengths: NDArray[np.int64], pictures: NDArray[np.int64], capacity: int, count: int
) -> list[list[int]] | None:
    """Items spread over ``count`` rows; None where one finds no room."""
    scale = np.maximum(np.array([lengths.sum(), pictures.sum()]) / count, 1.0)  # what a row has on average
    shares = np.stack([lengths, pictures]) / scale[:, None]
    loads, room = np.zeros((2, count)), np.full(count, capacity)
    rows: list[list[int]] = [[] for _ in range(count)]
    for item in np.argsort(-shares.max(axis=0), kind="stable").tolist():
        larger = np.maximum(loads[0] + shares[0, item], loads[1] + shares[1, item])
        larger[room < lengths[item]] = np.inf
        row = int(larger.argmin())
        if not np.isfinite(larger[row]):
            return None
        rows[row].append(item)
        loads[:, row] += shares[:, item]
        room[row] -= lengths[item]
    return [row for row in rows if row]


def waiting_share(costs: ArrayLike, order: NDArray[np.int64], batch_size: int, ranks: int) -> float:
    """How much the ranks of a step wait for the busiest: mean over steps of 1 - (mean cost of a rank / largest).

    ``costs`` [N] of the items; ``order`` as a :class:`PositionSampler` gives it, ``batch_size`` items a rank and step.
    """
    ordered = np.asarray(costs, np.float64)[order]
    steps = len(ordered) // (batch_size * ranks)
    loads = ordered[: steps * batch_size * ranks].reshape(steps, ranks, batch_size).sum(axis=2)
    largest = loads.max(axis=1)
    return float((1.0 - loads.mean(axis=1) / np.maximum(largest, 1e-9))[largest > 0].mean()) if steps else 0.0


def padding_share(lengths: ArrayLike, order: NDArray[np.int64], batch_size: int) -> float:
    """Share of padding among all tokens when consecutive items of ``order`` form batches of ``batch_size``."""
    ordered = np.asarray(lengths)[order]
    whole = len(ordered) // batch_size * batch_size
    batches = ordered[:whole].reshape(-1, batch_size)
    if not batches.size:
        return 0.0
    return 1.0 - float(batches.sum() / (batches.max(axis=1) * batch_size).sum())
