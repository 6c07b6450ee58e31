"""How a drive might have gone on: the same people from a step on, the ego with another temper and beside its path.

The ego still obeys the law and reacts; only its pace, its distances and its place in the lane are another driver's.
The others see it where it is along its path (not how far beside it) and react by the same law as in the recording.

Legend: N road users, 0 the ego; u m driven since the split; d m to the left of the path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.synthetic import expert, traffic
from navsim_ext.synthetic.cast import EGO_AXLE_TO_CENTRE, EGO_SIZE
from navsim_ext.synthetic.drive import Run
from navsim_ext.synthetic.paths import SPACING
from navsim_ext.synthetic.traffic import Motion, Resumed
from navsim_ext.synthetic.traffic_scenes import law_tables

SHIFT_OVER_M = 12.0  # driven until the ego is beside its path by the whole offset
PACE = (0.6, 1.15)  # of the recorded ego's wish
HEADWAY = (0.8, 1.6)
OFFSET_M = 0.6


@dataclass(frozen=True)
class Temper:
    """Another driver in the ego's seat."""

    pace: float = 1.0  # factor on the speed that it wants
    headway: float = 1.0  # factor on the time gap that it keeps
    offset_m: float = 0.0  # to the left of the path

    @classmethod
    def draw(cls, random: np.random.Generator) -> Temper:
        return cls(*(float(random.uniform(*span)) for span in (PACE, HEADWAY, (-OFFSET_M, OFFSET_M))))


def go_on(run: Run, begin: int, steps: int, temper: Temper) -> Motion:
    """The run up to step ``begin``, then ``steps`` steps of what would have followed; indices are those of the run."""
    tables = law_tables(run, 0, np.zeros(0, np.int64))
    for name, factor in (("eagerness", temper.pace), ("headway", temper.headway)):
        tables[f"user_{name}"] = tables[f"user_{name}"].copy()
        tables[f"user_{name}"][0] *= factor
    before = run.motion
    external = np.zeros(before.s.shape[1], dtype=np.bool_)
    state = Resumed(
        begin, before.s[begin].copy(), before.speed[begin].copy(), before.acceleration[begin].copy(),
        before.waiting[begin].copy(), external, before.pose[begin].copy(),
    )  # fmt: skip
    after = traffic.resume(tables, state, steps)
    after.pose[:, 0] = beside(after.pose[:, 0], after.s[:, 0] - after.s[0, 0], temper.offset_m)
    return Motion(*(np.concatenate([getattr(before, f)[:begin], getattr(after, f)]) for f in Motion.__annotations__))


def beside(pose: NDArray[np.float64], u: NDArray[np.float64], offset_m: float) -> NDArray[np.float64]:
    """Centre poses [T,3] of a drive that moves ``offset_m`` to the left over SHIFT_OVER_M: d(u) = D (3 x^2 - 2 x^3).

    A car that does not move on does not move aside: x = u / SHIFT_OVER_M.
    """
    x = np.clip(u / SHIFT_OVER_M, 0.0, 1.0)
    d, slope = offset_m * (3.0 * x**2 - 2.0 * x**3), offset_m * (6.0 * x - 6.0 * x**2) / SHIFT_OVER_M
    h = pose[:, 2]
    axle = pose[:, :2] - EGO_AXLE_TO_CENTRE * np.column_stack([np.cos(h), np.sin(h)])
    axle = axle + d[:, None] * np.column_stack([-np.sin(h), np.cos(h)])
    h = h + np.arctan(slope)
    return np.column_stack([axle + EGO_AXLE_TO_CENTRE * np.column_stack([np.cos(h), np.sin(h)]), h])


def usable(run: Run, motion: Motion, begin: int, end: int) -> bool:
    """Whether the ego stays on its path and touches nobody from step ``begin`` up to and with step ``end``."""
    path = run.cast.paths[0]
    if motion.s[end, 0] > (len(path.xy) - 1) * SPACING - EGO_SIZE[0]:
        return False
    size = np.array([row["size"][:2] for row in run.cast.rows])
    for step in range(begin, end + 1):
        ego, others = motion.pose[step, :1], motion.pose[step, 1:]
        near = np.flatnonzero(np.hypot(*(others[:, :2] - ego[:, :2]).T) < 0.5 * np.hypot(*size[1:].T) + 4.0)
        if expert.overlap(np.repeat(ego, len(near), axis=0), size[0] + 0.1, others[near], size[1:][near]).any():
            return False
    return True


def on_their_way(run: Run, motion: Motion, step: int) -> NDArray[np.bool_]:
    """[N] who still has path before it; a car that has driven off its path's end is somewhere the town knows nothing of
    and is no longer told of."""
    ends = np.array([np.inf if path is None else (len(path.xy) - 1) * SPACING for path in run.cast.paths])
    return motion.s[step] <= ends
