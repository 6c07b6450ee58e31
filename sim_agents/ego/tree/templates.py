"""Action templates of the tree planner: a few (acceleration, curvature) pairs that cover what egos were recorded to do.

A template is held for half a second by the bicycle of ``ego/motion.py``, so any sequence of templates from any speed is
a path that a car can drive. The set is made from data, by k-disks in the space of where actions lead:

    repeat: take a random recorded half second that no template covers; its action (fitted by ``action_towards``) is the
    next template; it covers every half second whose end it reaches, **from that half second's own speed**, within the
    radius (mean distance of the corners of a 4.8 m by 2.0 m box)

The radius is found by bisection: the smallest with which ``count`` templates cover the given share. The first two are
given: to do nothing (standing stays standing, driving goes on), and to brake hard, so that standing still and stopping
are covered whatever was recorded.

Legend: n half seconds, A templates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS, relative
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.ego.motion import STANDING_SPEED, action_towards, play
from sim_agents.vocabulary.motion import MATCHING_BOX_M, corner_distance

BISECTIONS = 8
SMALLEST_M, LARGEST_M = 0.02, 3.0
MOST = 20_000  # half seconds that are looked at
GIVEN = ((0.0, 0.0), (-5.0, 0.0))
LEAST_BRAKING = -1.0  # m/s^2 that some template must brake with


class BadTemplates(DataError):
    """A template set that a car cannot be driven with."""


@dataclass(frozen=True)
class Segments:
    """Recorded half seconds: ``speed`` [n] at their begin, ``end`` [n,3] seen from it, ``length`` [n] of the car."""

    speed: Tensor
    end: Tensor
    length: Tensor

    def __len__(self) -> int:
        return len(self.speed)


def ego_segments(scenes: Iterable[TrafficScene], *, mirror: bool = True, seed: int = 0) -> Segments:
    """Half seconds of the egos, from any step whose two neighbours are recorded; mirrored twins with ``mirror``.

    Raises DataError for another interval than 0.1 s, or where there is none at all."""
    speeds, ends, lengths = [], [], []
    for scene in scenes:
        if abs(scene.dt - STEP_S) > 1e-6:
            raise DataError(f"scene {scene.id} has steps of {scene.dt:g} s; templates need steps of {STEP_S} s")
        steps = np.arange(1, scene.num_steps - TOKEN_STEPS)
        seen = scene.valid[scene.ego]
        steps = steps[[bool(seen[t - 1 : t + TOKEN_STEPS + 1].all()) for t in steps]]
        pose = torch.from_numpy(scene.pose[scene.ego].astype(np.float32))
        here = pose[steps]
        back = relative(here, pose[steps - 1][:, None])[:, 0]
        speeds.append((-back[:, 0] / STEP_S).clamp_min(0.0))
        ends.append(relative(here, pose[steps + TOKEN_STEPS][:, None])[:, 0])
        lengths.append(torch.full((len(steps),), float(scene.size[scene.ego, 0])))
    if not speeds or not sum(map(len, speeds)):
        raise DataError("no ego is recorded for half a second: there is nothing to make templates from")
    found = Segments(torch.cat(speeds), torch.cat(ends), torch.cat(lengths))
    if len(found) > MOST:
        rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:MOST]
        found = Segments(found.speed[rows], found.end[rows], found.length[rows])
    if mirror:
        flip = torch.tensor([1.0, -1.0, -1.0])
        found = Segments(*(torch.cat(pair) for pair in (
            (found.speed, found.speed), (found.end, found.end * flip), (found.length, found.length))))  # fmt: skip
    return found


def reached(segments: Segments, actions: Tensor) -> Tensor:
    """[n,A] m between where each action [A,2] leads from each half second's speed, and where it was recorded to end."""
    n, A = len(segments), len(actions)
    speed, length = segments.speed[:, None].expand(n, A), segments.length[:, None].expand(n, A)
    poses, _ = play(torch.zeros(n, A, 3), speed, length, actions.expand(n, A, 2))
    return corner_distance(poses[..., -1, :], segments.end[:, None], torch.tensor(MATCHING_BOX_M[0]))


def make_templates(segments: Segments, count: int, *, share: float = 0.995, seed: int = 0) -> tuple[Tensor, float]:
    """(actions [A,2], radius in m), A <= ``count``. Raises DataError where LARGEST_M is not enough."""
    if count <= len(GIVEN) or not 0.0 < share <= 1.0:
        raise DataError(f"count={count}, share={share}: at least 3 templates, and a share in (0, 1], were expected")
    fitted = action_towards(segments.end[:, :2], segments.speed, segments.length)
    # What the bicycle can do of the fitted action is the template.
    order = torch.randperm(len(segments), generator=torch.Generator().manual_seed(seed))
    low, high, best = SMALLEST_M, LARGEST_M, None
    for _ in range(BISECTIONS):
        radius = (low * high) ** 0.5
        found = _cover(segments, fitted, order, radius, count, share)
        if found is None:
            low = radius
        else:
            high, best = radius, found
    if best is None:
        raise DataError(f"{count} templates do not cover {share:.1%} of the recording within {LARGEST_M} m: take more")
    return best, high


def _cover(segments: Segments, fitted: Tensor, order: Tensor, radius: float, count: int, share: float) -> Tensor | None:
    """Actions of the discs, or None where ``count`` of them do not cover the share."""
    left = torch.ones(len(segments), dtype=torch.bool)
    allowed = int((1.0 - share) * len(segments))
    actions, place = [], 0
    waiting = [torch.tensor(action) for action in GIVEN]
    while True:
        if waiting:
            candidate = waiting.pop(0)
        else:
            while not left[order[place]]:
                place += 1
            candidate = fitted[order[place]].clone()
            left[order[place]] = False  # its own action may miss it by more than the radius
        actions.append(candidate)
        rows = left.nonzero().flatten()
        part = Segments(segments.speed[rows], segments.end[rows], segments.length[rows])
        left[rows[reached(part, candidate[None])[:, 0] <= radius]] = False
        if int(left.sum()) <= allowed and not waiting:
            return torch.stack(actions)
        if len(actions) == count:
            return None


def coverage(segments: Segments, actions: Tensor) -> dict[str, float]:
    """How well templates cover half seconds: mean error and 99th percentile of the best template (m), share within 0.1
    and 0.25 m, share of standing half seconds within 0.05 m (1 where nobody stands), number of half seconds."""
    error = torch.cat([reached(Segments(*part), actions).amin(dim=1) for part in zip(
        segments.speed.split(2048), segments.end.split(2048), segments.length.split(2048), strict=True)])  # fmt: skip
    stands = (segments.speed < STANDING_SPEED) & (segments.end[:, :2].norm(dim=-1) < STANDING_SPEED)
    return {
        "half_seconds": float(len(error)),
        "mean_error_m": float(error.mean()),
        "p99_error_m": float(torch.quantile(error[:100_000], 0.99)),
        "within_0.1_m": float((error <= 0.1).float().mean()),
        "within_0.25_m": float((error <= 0.25).float().mean()),
        "standing": float((error[stands] <= 0.05).float().mean()) if bool(stands.any()) else 1.0,
    }


def require_drivable(actions: Tensor) -> Tensor:
    """The actions [A,2]; raises BadTemplates where they are not finite, none keeps a standing car standing, or none
    brakes."""
    if actions.dim() != 2 or actions.shape[1] != 2 or len(actions) < 2 or not bool(torch.isfinite(actions).all()):
        raise BadTemplates(f"templates of shape {tuple(actions.shape)}: two or more finite (acceleration, curvature)")
    speed, length = torch.zeros(len(actions)), torch.full((len(actions),), 5.0)
    poses, _ = play(torch.zeros(len(actions), 3), speed, length, actions)
    if float(poses[:, -1, :2].norm(dim=-1).min()) > STANDING_SPEED:
        raise BadTemplates("no template keeps a standing car standing: add one without acceleration")
    if float(actions[:, 0].min()) > LEAST_BRAKING:
        raise BadTemplates(
            f"the hardest braking of the templates is {float(actions[:, 0].min()):.1f} m/s^2; {LEAST_BRAKING} or "
            "harder is needed to stop: make them from scenes in which somebody brakes"
        )
    return actions
