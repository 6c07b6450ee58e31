"""Content of files with one thing wrong at a random place: a value of another type, size or meaning, a missing key."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

WRONG: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, -(2**63), 2**64 - 1, 0.5, -1e308, 1e30, float("nan"), float("inf"),
    "", " ", "text", "0", "nan", "../../x", "/etc/passwd", "a/b", "路口", "x" * 5_000, "\0", "\n", b"bytes",
    [], [None], [0], ["a", "b"], [[]], [[1, 2], [3]], list(range(200)), (), (1, 2, 3), {}, {"a": 1}, {"": None}, {0: 1},
    [float("nan")] * 3, [True, True, True, True], [1.0, 0.0, 0.0, 0.0], [1e400, 0.0], ["x"] * 3, [{}], [[[]]],
)  # fmt: skip
ARRAYS: tuple[Any, ...] = (
    np.zeros(0), np.zeros((0, 7)), np.zeros((2, 0)), np.zeros(3), np.full(3, np.nan), np.full((2, 7), np.inf),
    np.array(5.0), np.array("text"), np.array(["a", "b"]), np.array([None, 1], dtype=object), np.ones((2, 7), bool),
    np.ones((2, 7), complex), np.full((2, 7), 1e300), np.full((2, 3), -1.0), np.zeros((50, 3, 3)), np.arange(4),
    np.float64("nan"), np.float32(2.5), np.int64(7), np.array([b"a"]), np.array([{}, []], dtype=object),
)  # fmt: skip


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything inside nested dictionaries and lists."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def _changed(value: Any, generator: random.Random, wrong: tuple[Any, ...]) -> Any:
    """A value near the right one, or one from the list."""
    kind = generator.random()
    if isinstance(value, np.ndarray) and value.size and kind < 0.45:
        array = value.copy()
        if kind < 0.1:
            return array[:-1] if array.ndim else array
        if kind < 0.2:
            return array.astype(object)
        if kind < 0.25:
            return array.tolist()
        if kind < 0.3:
            return np.concatenate([array, array]) if array.ndim else array
        if array.dtype.kind == "f":
            array.flat[generator.randrange(array.size)] = generator.choice([np.nan, np.inf, -1e300, 1e12, -5.0])
        return array
    if isinstance(value, list) and value and kind < 0.3:
        return value[:-1] if kind < 0.1 else value + value if kind < 0.2 else value[::-1]
    if isinstance(value, str) and kind < 0.15:
        return value + "x" if kind < 0.1 else value[:-1]
    if isinstance(value, int | float) and not isinstance(value, bool) and kind < 0.15:
        return -value if kind < 0.1 else value * 1_000_000
    return copy.deepcopy(generator.choice(wrong))


def with_one_wrong(content: Any, generator: random.Random, *, arrays: bool) -> tuple[Any, str]:
    """(a copy of ``content`` with one thing wrong, what was done to it). ``arrays``: numpy's among the wrong values."""
    changed = copy.deepcopy(content)
    path = generator.choice(list(places(changed)))
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    last, chance = path[-1], generator.random()
    if chance < 0.12:
        del holder[last]
        return changed, f"{path} absent"
    if chance < 0.17 and isinstance(holder, dict):
        holder[generator.choice(["other", "", 3, None])] = holder.pop(last)
        return changed, f"{path} renamed"
    value = _changed(holder[last], generator, WRONG + ARRAYS if arrays else WRONG)
    holder[last] = value
    return changed, f"{path} = {value!r:.100}"
