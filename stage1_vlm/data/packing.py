"""Which conversations share a row or a batch, and what padding costs under each way of batching.

Packing is best-fit decreasing: longest first, each into the fullest row that still has room (at most 11/9 of the
least number of rows + 6/9, Johnson 1973). The plan depends on lengths and capacity alone; rows are shuffled later.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.errors import DataError

CLASS_RATIO = 1.25


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


def padding_share(lengths: ArrayLike, order: NDArray[np.int64], batch_size: int) -> float:
    """Share of padding among all tokens when consecutive items of ``order`` form batches of ``batch_size``."""
    ordered = np.asarray(lengths)[order]
    whole = len(ordered) // batch_size * batch_size
    batches = ordered[:whole].reshape(-1, batch_size)
    if not batches.size:
        return 0.0
    return 1.0 - float(batches.sum() / (batches.max(axis=1) * batch_size).sum())
