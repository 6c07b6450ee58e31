"""From a plan to a recorded drive: stage, simulate, check, and draw again until an expert's drive comes out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import TriviumError
from navsim_ext.synthetic import expert, scenarios
from navsim_ext.synthetic.cast import EGO_AXLE_TO_CENTRE, Cast
from navsim_ext.synthetic.paths import SPACING
from navsim_ext.synthetic.scenarios import Plan, Unsuitable
from navsim_ext.synthetic.town import stream
from navsim_ext.synthetic.traffic import STEP_S, Motion, is_green, simulate

FRAME_STEPS = 5  # simulation steps between two frames of a log (2 Hz)
ATTEMPTS = 60
RANGE_M = 75.0  # objects that never come nearer to the ego are not annotated


class NoDrive(TriviumError):
    """A situation could not be realised in a town."""


@dataclass(frozen=True)
class Drive:
    """One log at 2 Hz: F frames, N annotated objects (present in all frames), all in the town's frame."""

    plan: Plan
    cast: Cast
    ego: NDArray[np.float64]  # [F,3] rear axle
    ego_dynamics: NDArray[np.float64]  # [F,4] vx, vy, ax, ay in the ego frame
    ego_s: NDArray[np.float64]  # [F] m along the ego's path
    objects: NDArray[np.float64]  # [F,N,3] centre poses
    speeds: NDArray[np.float64]  # [F,N]
    braking: NDArray[np.bool_]  # [F,N] brake lights
    members: NDArray[np.int64]  # [N] index in the cast
    green: NDArray[np.bool_]  # [F,C] per connector of the town; connectors without a signal are green
    attempts: int
    faults: Counter


@dataclass(frozen=True)
class Run:
    """A simulated drive that is an expert's from step ``first`` on, at STEP_S, as the law left it."""

    plan: Plan
    cast: Cast
    motion: Motion
    first: int  # step of the first frame; those before it are warm-up
    attempts: int
    faults: Counter


def record(plan: Plan, *key: int | str) -> Drive:
    """The drive of a key at 2 Hz; raises NoDrive as :func:`run` does."""
    return recorded(run(plan, *key))


def run(plan: Plan, *key: int | str) -> Run:
    """The drive of a key; raises NoDrive naming town, kind and the faults met when ATTEMPTS draws all fail."""
    first = int(round(plan.warm_up_s / STEP_S))
    steps = first + int(round(plan.duration_s / STEP_S))
    faults: Counter = Counter()
    for attempt in range(ATTEMPTS):
        random = stream("drive", *key, attempt)
        try:
            cast = scenarios.stage(plan, random)
        except Unsuitable as reason:
            faults[str(reason)] += 1
            continue
        begin = cast.rows[0]["start"]
        reach = begin + float(cast.paths[0].speed.max()) * steps * STEP_S
        track = cast.paths[0].xy[int(begin / SPACING) : int(reach / SPACING) + 2]
        scenarios.populate(plan, cast, track)
        if not _settle(cast):
            faults["crowded"] += 1
            continue
        motion = simulate(plan.town, cast.paths, cast.pack(), cast.signals, steps)
        found = expert.fault(cast, motion, first)
        if found is None:
            return Run(plan, cast, motion, first, attempt + 1, faults)
        faults[found] += 1
    raise NoDrive(
        f"no {plan.kind!r} drive in town {plan.town.location} (seed {plan.town.seed}) after {ATTEMPTS} draws: "
        f"{dict(faults)}; choose another seed or leave this kind out of the mix"
    )


def _settle(cast: Cast) -> bool:
    """Removes bystanders who would start inside somebody; False where the main actors themselves overlap."""
    poses = np.array([_start_pose(cast, i) for i in range(len(cast))])
    size = np.array([row["size"][:2] for row in cast.rows])
    distance = np.hypot(*(poses[:, None, :2] - poses[None, :, :2]).transpose(2, 0, 1))
    drop: set[int] = set()
    for i, j in np.argwhere(np.triu(distance < 9.0, 1)):
        if i in drop or j in drop:
            continue
        if expert.overlap(poses[i : i + 1], size[i] + 0.8, poses[j : j + 1], size[j])[0]:
            if j < cast.principals:
                return False
            drop.add(int(j))
    for i in sorted(drop, reverse=True):
        del cast.names[i], cast.paths[i], cast.rows[i]
    return True


def _start_pose(cast: Cast, i: int) -> NDArray[np.float64]:
    path, row = cast.paths[i], cast.rows[i]
    if path is None:
        return np.array(row["pose"])
    index = min(int(row["start"] / SPACING), len(path.xy) - 1)
    heading = path.heading[index]
    return np.append(path.xy[index] + row["axle"] * np.array([np.cos(heading), np.sin(heading)]), heading)


def recorded(run: Run) -> Drive:
    """A run at 2 Hz, from its step ``first`` on."""
    plan, cast, motion = run.plan, run.cast, run.motion
    at = np.arange(run.first, len(motion.pose), FRAME_STEPS)
    centre, heading = motion.pose[at, 0, :2], motion.pose[at, 0, 2]
    axle = centre - EGO_AXLE_TO_CENTRE * np.column_stack([np.cos(heading), np.sin(heading)])
    speed = motion.speed[at, 0]
    path = cast.paths[0]
    curvature = path.curvature[np.clip((motion.s[at, 0] / SPACING).astype(int), 0, len(path.curvature) - 1)]
    nothing = np.zeros(len(at))
    dynamics = np.column_stack([speed, nothing, motion.acceleration[at, 0], speed**2 * curvature])
    distance = np.hypot(*(motion.pose[at, 1:, :2] - centre[:, None]).transpose(2, 0, 1))
    members = 1 + np.flatnonzero(distance.min(axis=0) < RANGE_M)
    green = np.array(
        [
            [
                is_green(step * STEP_S, c.node, c.phase, cast.signals.offset, cast.signals.green)
                for c in plan.town.connectors
            ]
            for step in at
        ]
    )
    return Drive(
        plan=plan,
        cast=cast,
        ego=np.column_stack([axle, heading]),
        ego_dynamics=dynamics,
        ego_s=motion.s[at, 0],
        objects=motion.pose[at][:, members],
        speeds=motion.speed[at][:, members],
        braking=motion.acceleration[at][:, members] < -0.8,
        members=members,
        green=green,
        attempts=run.attempts,
        faults=run.faults,
    )
