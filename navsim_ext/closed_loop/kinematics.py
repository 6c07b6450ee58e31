"""How road users move by one token: five poses of 0.1 s from a token, from Verlet accelerations, or from a bicycle.

Legend: B worlds (scene x rollout), N road users, K = 5 poses of a token. A pose is (x, y, heading) of the box centre in
the frame of its scene; metres, radians, seconds. All functions are pure and elementwise over [B,N]: a road user's next
poses do not depend on who else is in the batch.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

STEP_S = 0.1  # s between two poses
TOKEN_STEPS = 5  # K, poses of a token
TOKEN_S = STEP_S * TOKEN_STEPS
TURN_DISPLACEMENT_M = 0.5  # Verlet: per token; below it a road user keeps its heading
REAR_SHARE = 0.5  # bicycle: distance of the rear axle behind the centre / wheel base
WHEEL_BASE_SHARE = 0.6  # bicycle: wheel base / length of the box (a Pacifica has 0.597)
MAX_STEERING = math.pi / 3.0  # rad


def wrap(angle: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Angles [rad] in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi


def compose(pose: Float[Tensor, "*any 3"], local: Float[Tensor, "*any K 3"]) -> Float[Tensor, "*any K 3"]:
    """Poses ``local`` [...,K,3] given in the frames of ``pose`` [...,3] -> [...,K,3] in the frame of ``pose``.

    p' = p + R(h) q,  h' = h + dh (not wrapped: headings stay continuous along a drive).
    """
    heading = pose[..., 2:3].contiguous()
    cos, sin = torch.cos(heading), torch.sin(heading)
    qx, qy = local[..., 0], local[..., 1]
    x = pose[..., 0:1] + cos * qx - sin * qy
    y = pose[..., 1:2] + sin * qx + cos * qy
    return torch.stack((x, y, heading + local[..., 2]), dim=-1)


def relative(pose: Float[Tensor, "*any 3"], other: Float[Tensor, "*any K 3"]) -> Float[Tensor, "*any K 3"]:
    """Inverse of :func:`compose`: ``other`` [...,K,3] as seen from ``pose`` [...,3], heading differences wrapped."""
    heading = pose[..., 2:3].contiguous()
    cos, sin = torch.cos(heading), torch.sin(heading)
    dx, dy = other[..., 0] - pose[..., 0:1], other[..., 1] - pose[..., 1:2]
    return torch.stack((cos * dx + sin * dy, -sin * dx + cos * dy, wrap(other[..., 2] - heading)), dim=-1)


def verlet(
    pose: Float[Tensor, "*any 3"], displacement: Float[Tensor, "*any 2"], acceleration: Float[Tensor, "*any 2"]
) -> Float[Tensor, "*any K 3"]:
    """Token poses [...,K,3] from the last token's ``displacement`` [...,2] and an ``acceleration`` [...,2] m/s^2.

    d' = d + a D^2 with D = 0.5 s (Peng et al. 2024; MotionLM's wrapper: a = 0 repeats the displacement). Inside the
    token the path is the parabola through the last, the present and the next position:
      p(s) = p + d s + a D^2 (s^2 + s) / 2,  s in (0, 1].
    The heading is the direction of p'(s) where |d'| > 0.5 m, else it is kept.
    """
    s = torch.arange(1, TOKEN_STEPS + 1, device=pose.device, dtype=pose.dtype) / TOKEN_STEPS
    change = (acceleration * TOKEN_S**2)[..., None, :]
    d = displacement[..., None, :]
    xy = pose[..., None, :2] + d * s[:, None] + change * (0.5 * (s * s + s))[:, None]
    tangent = d + change * (s + 0.5)[:, None]
    moves = torch.linalg.vector_norm(d + change, dim=-1) > TURN_DISPLACEMENT_M
    kept = pose[..., None, 2].expand((*moves.shape[:-1], TOKEN_STEPS))
    direction = torch.atan2(tangent[..., 1].contiguous(), tangent[..., 0].contiguous())
    direction = kept + wrap(direction - kept)
    return torch.cat((xy, torch.where(moves, direction, kept)[..., None]), dim=-1)


def verlet_acceleration(
    displacement: Float[Tensor, "*any 2"], next_displacement: Float[Tensor, "*any 2"]
) -> Float[Tensor, "*any 2"]:
    """[...,2] m/s^2 that turns one token's displacement into the next one: a = (d' - d) / D^2."""
    return (next_displacement - displacement) / TOKEN_S**2


def bicycle(
    pose: Float[Tensor, "*any 3"],
    speed: Float[Tensor, "*any"],
    length: Float[Tensor, "*any"],
    steering: Float[Tensor, "*any"] | Float[Tensor, "*any K"],
    acceleration: Float[Tensor, "*any"] | Float[Tensor, "*any K"],
) -> tuple[Float[Tensor, "*any K 3"], Float[Tensor, "*any K"]]:
    """Token poses [...,K,3] and speeds [...,K] of a kinematic bicycle.

    ``speed`` [...] m/s (>= 0), ``length`` [...] m of the box, ``steering`` and ``acceleration`` [...] held or [...,K].
    With wheel base L = 0.6 length, the centre half-way between the axles, slip b = atan(tan(d) / 2) and curvature
    k = cos(b) tan(d) / L, each step of dt integrates the circle exactly:
      ds = max(0, v + a dt / 2) dt  (and no reversing: v' = max(0, v + a dt), the car stops where v reaches 0),
      p' = p + ds sinc(k ds / 2) (cos, sin)(h + b + k ds / 2),  h' = h + k ds.
    """
    if steering.dim() == pose.dim() - 1:
        steering = steering[..., None].expand(*steering.shape, TOKEN_STEPS)
    if acceleration.dim() == pose.dim() - 1:
        acceleration = acceleration[..., None].expand(*acceleration.shape, TOKEN_STEPS)
    tangent = torch.tan(steering.clamp(-MAX_STEERING, MAX_STEERING).contiguous())
    slip = torch.atan(REAR_SHARE * tangent)
    curvature = torch.cos(slip) * tangent / (WHEEL_BASE_SHARE * length[..., None])
    x, y, heading, v = pose[..., 0], pose[..., 1], pose[..., 2], speed
    poses, speeds = [], []
    for k in range(TOKEN_STEPS):
        a = acceleration[..., k]
        v_next = (v + a * STEP_S).clamp_min(0.0)
        braked = v * v / (-2.0 * a).clamp_min(1e-9)  # m to standstill
        stops = v + a * STEP_S < 0.0
        ds = torch.where(stops, braked, (v + 0.5 * a * STEP_S) * STEP_S)
        half = 0.5 * curvature[..., k] * ds
        chord = ds * torch.sinc(half / math.pi)
        direction = heading + slip[..., k] + half
        x, y = x + chord * torch.cos(direction), y + chord * torch.sin(direction)
        heading, v = heading + 2.0 * half, v_next
        poses.append(torch.stack((x, y, heading), dim=-1))
        speeds.append(v)
    return torch.stack(poses, dim=-2), torch.stack(speeds, dim=-1)
