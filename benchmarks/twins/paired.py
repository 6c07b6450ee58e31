"""Time of two ways to do the same work, measured in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Paired(NamedTuple):
    """Medians over the rounds: seconds of each side, and theirs divided by ours of the same round."""

    ours: float
    theirs: float
    faster_by: float


def paired(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> Paired:
    """Each round times both, in an order that alternates; what slows the machine for longer slows both.

    Call both once before: the first call of either is not like the others.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (ours, theirs)[side]()
            seconds[side].append(time.perf_counter() - start)
    ratios = [other / mine for mine, other in zip(*seconds)]
    return Paired(*map(statistics.median, (*seconds, ratios)))
