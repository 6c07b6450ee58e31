"""How the planners' cars move: a bicycle that is held inside what a car can do, and what it must do to get somewhere.

An action is (acceleration [m/s^2], curvature [1/m]), held for one token of 0.5 s. The world's bicycle
(``closed_loop.kinematics.bicycle``) carries it out, so every path is drivable: no step to the side, no turn on the
spot, no reversing. Bounds: acceleration in [-8, 4], curvature by the steering lock and by 4.89 m/s^2 of lateral
acceleration (nuPlan's comfort bound) at the fastest speed of the token.

Legend: [...] any shape, J = 5 poses of 0.1 s; box centres.
"""

from __future__ import annotations

import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import TOKEN_S, WHEEL_BASE_SHARE, bicycle, relative

HARDEST_BRAKING, STRONGEST_ACCELERATION = -8.0, 4.0  # m/s^2
LATERAL_BOUND = 4.89  # m/s^2
SHARPEST = 0.18  # 1/m: a car of 5 m at full lock turns on a radius of 5.6 m
STANDING_SPEED = 0.05  # m/s


def bounded(speed: Tensor, action: Tensor) -> Tensor:
    """The action [...,2] that a car at ``speed`` [...] can carry out, nearest to what was asked for."""
    acceleration = action[..., 0].clamp(HARDEST_BRAKING, STRONGEST_ACCELERATION)
    fastest = (speed + acceleration.clamp_min(0.0) * TOKEN_S).clamp_min(1.0)
    sharpest = (LATERAL_BOUND / fastest.square()).clamp_max(SHARPEST)
    return torch.stack([acceleration, torch.maximum(torch.minimum(action[..., 1], sharpest), -sharpest)], dim=-1)


def play(pose: Tensor, speed: Tensor, length: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """(poses [...,J,3], speed after them [...]) of an action [...,2], bounded first. ``speed`` below 0 counts as 0.

    The steering angle d of curvature k on wheel base L: tan d = k L / sqrt(1 - (k L / 2)^2).
    """
    speed = speed.clamp_min(0.0)
    action = bounded(speed, action)
    bend = action[..., 1] * WHEEL_BASE_SHARE * length
    steering = torch.atan(bend / torch.sqrt(1.0 - 0.25 * bend.square().clamp_max(3.9)))
    poses, speeds = bicycle(pose, speed, length, steering, action[..., 0])
    return poses, speeds[..., -1]


def action_towards(point: Tensor, speed: Tensor, length: Tensor) -> Tensor:
    """Action [...,2] after which the centre is at ``point`` [...,2] (m, own frame) 0.5 s from now, nearly.

      a = 2 (s - v T) / T^2,  k = 2 bearing / (L + s),  s the distance along the point's direction, L the wheel base
    (the centre of a bicycle moves off at the slip angle, about k L / 2, and turns by k s). A point behind is at s = 0.
    """
    x, y = point[..., 0], point[..., 1]
    # The arc to a point at a bearing b is b / sin b times its chord.
    chord = torch.sqrt(x.square() + y.square() + 1e-12)
    bearing = torch.atan2(y, x.clamp_min(1e-3))
    s = torch.where(x > 0.0, chord, 0.0 * chord)
    acceleration = 2.0 * (s - speed.clamp_min(0.0) * TOKEN_S) / TOKEN_S**2
    # Towards standstill the direction of the point is noise: it fades out below 0.3 m.
    fade = s.square() / (s.square() + 0.09)
    return torch.stack([acceleration, fade * 2.0 * bearing / (WHEEL_BASE_SHARE * length + s)], dim=-1)


def headings_along(points: Tensor) -> Tensor:
    """[...,W,3] poses from waypoints [...,W,2] in the ego's frame, which starts at 0: a waypoint looks along the chord
    from the one before it to the one after it (the last: from the one before), where that is longer than 0.2 m; else
    it keeps the heading before it."""
    zero = torch.zeros_like(points[..., :1, :])
    line = torch.cat([zero, points], dim=-2)
    after = torch.cat([line[..., 2:, :], line[..., -1:, :]], dim=-2)
    chord = after - line[..., :-1, :]
    headings, last = [], torch.zeros_like(points[..., 0, 0])
    for k in range(points.shape[-2]):
        d = chord[..., k, :]
        last = torch.where(d.norm(dim=-1) > 0.2, torch.atan2(d[..., 1], d[..., 0]), last)
        headings.append(last)
    return torch.cat([points, torch.stack(headings, dim=-1)[..., None]], dim=-1)


def local_point(pose: Tensor, place: Tensor) -> Tensor:
    """Places [...,2] as seen from poses [...,3]."""
    other = torch.cat([place, pose[..., 2:]], dim=-1)
    return relative(pose, other[..., None, :])[..., 0, :2]
