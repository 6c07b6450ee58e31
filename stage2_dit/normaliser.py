"""Trajectories in metres and radians <-> the [-1, 1] box that the diffusion works in.

Legend: R rows, F poses; a pose is (x, y, heading) in the ego frame of t = 0, metres and radians, 0.5 s apart.

    x' = 2 (v - low) / (high - low) - 1

``waypoint``: v_j = p_j.  ``delta``: v_j = (p_j - p_{j-1}) / 0.5 s with p_0 = 0 and the heading difference wrapped,
so v is a velocity in m/s and rad/s along the axes of t = 0 (no frame rotation); decoding is the cumulative sum.
Poses outside the bounds are not clipped here, but samples are clipped to [-1, 1] by the sampler, so a planner can
never produce them: :meth:`TrajectoryNormaliser.outside` counts such targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.frames import POSE_INTERVAL_S
from stage2_dit.diffusion.noise_schedule import Float32Tables

TargetKind = Literal["waypoint", "delta"]


@dataclass(frozen=True)
class NormaliserBounds:
    """The box of a planner: part of its configuration, saved with its weights.

    ``low``, ``high``: per component; metres, metres, radians for ``waypoint``, per second for ``delta``.
    ``source`` says where they come from: "published" or how they were fitted.
    """

    target: TargetKind
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    source: str = "custom"

    def __post_init__(self) -> None:
        if self.target not in ("waypoint", "delta"):
            raise DataError(f"normaliser target {self.target!r} does not exist; choose waypoint or delta")
        object.__setattr__(self, "low", tuple(float(value) for value in self.low))
        object.__setattr__(self, "high", tuple(float(value) for value in self.high))
        finite = all(math.isfinite(value) for value in (*self.low, *self.high))
        if len(self.low) != 3 or len(self.high) != 3 or not finite:
            raise DataError(f"normaliser bounds need 3 finite lows and highs, got {self.low} and {self.high}")
        if any(high <= low for low, high in zip(self.low, self.high)):
            raise DataError(f"normaliser bounds are empty: low {self.low}, high {self.high}")


# Published constants: waypoints of the first release, deltas of its later one.
PUBLISHED: dict[str, NormaliserBounds] = {
    "waypoint": NormaliserBounds("waypoint", (-1.57, -19.68, -1.67), (65.17, 22.32, 1.86), "published"),
    "delta": NormaliserBounds("delta", (-1.62, -9.38, -1.02), (29.72, 9.98, 0.86), "published"),
}


def bounds(
    target: TargetKind, low: Sequence[float] | None = None, high: Sequence[float] | None = None
) -> NormaliserBounds:
    """Bounds for configurations: the published constants of a target where ``low`` and ``high`` are not given."""
    if target not in PUBLISHED:
        raise DataError(f"normaliser target {target!r} does not exist; choose one of {', '.join(PUBLISHED)}")
    if (low is None) != (high is None):
        raise DataError(f"normaliser bounds need low and high together, got {low} and {high}")
    return PUBLISHED[target] if low is None else NormaliserBounds(target, tuple(low), tuple(high))


class TrajectoryNormaliser(Float32Tables):
    """Maps trajectories [..., F, 3] float32 into the box and back; exact inverses of one another (to rounding)."""

    low: Tensor
    high: Tensor

    def __init__(self, bounds: NormaliserBounds) -> None:
        super().__init__()
        self.bounds = bounds
        self.register_buffer("low", torch.tensor(bounds.low), persistent=False)
        self.register_buffer("high", torch.tensor(bounds.high), persistent=False)

    def normalise(self, trajectory: Float[Tensor, "*batch F 3"]) -> Float[Tensor, "*batch F 3"]:
        """[..., F, 3] metres, radians -> the box (not clipped)."""
        values = to_target(trajectory, self.bounds.target)
        return 2.0 * (values - self.low) / (self.high - self.low) - 1.0

    def denormalise(self, box: Float[Tensor, "*batch F 3"]) -> Float[Tensor, "*batch F 3"]:
        """[..., F, 3] of the box -> metres, radians."""
        values = (box + 1.0) / 2.0 * (self.high - self.low) + self.low
        return from_target(values, self.bounds.target)

    def outside(self, trajectory: Float[Tensor, "*batch F 3"]) -> Bool[Tensor, "*batch"]:
        """[...] bool: trajectories with a component outside the bounds, which no sample can ever reach."""
        return (self.normalise(trajectory).abs() > 1.0 + 1e-6).flatten(-2).any(dim=-1)


def to_target(trajectory: Float[Tensor, "*batch F 3"], target: TargetKind) -> Float[Tensor, "*batch F 3"]:
    """[..., F, 3] poses -> what is normalised: the poses themselves, or velocities of the steps between them."""
    if target == "waypoint":
        return trajectory
    previous = torch.cat([torch.zeros_like(trajectory[..., :1, :]), trajectory[..., :-1, :]], dim=-2)
    difference = trajectory - previous
    heading = wrap(difference[..., 2:])
    return torch.cat([difference[..., :2], heading], dim=-1) / POSE_INTERVAL_S


def from_target(values: Float[Tensor, "*batch F 3"], target: TargetKind) -> Float[Tensor, "*batch F 3"]:
    """Inverse of :func:`to_target`; headings of ``delta`` come back wrapped to [-pi, pi]."""
    if target == "waypoint":
        return values
    poses = torch.cumsum(values * POSE_INTERVAL_S, dim=-2)
    return torch.cat([poses[..., :2], wrap(poses[..., 2:])], dim=-1)


def wrap(angle: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Angles [rad] to [-pi, pi] through atan2, which keeps the gradient 1."""
    return torch.atan2(torch.sin(angle), torch.cos(angle))


def fit_bounds(
    trajectories: Iterable[Tensor], target: TargetKind, *, margin: float = 0.05, min_range: float = 0.1
) -> NormaliserBounds:
    """Bounds that hold every given target, widened by ``margin`` of the range on each side.

    ``trajectories``: tensors [..., F, 3] in metres and radians (the training split only: bounds are part of the
    model). ``min_range`` keeps a component that never varies invertible. Raises DataError for no or non-finite data.
    """
    low, high, count = torch.full((3,), torch.inf), torch.full((3,), -torch.inf), 0
    for batch in trajectories:
        values = to_target(batch.float(), target).reshape(-1, 3)
        if not torch.isfinite(values).all():
            raise DataError(f"targets are not finite after {count} trajectories: check the index they come from")
        low, high = torch.minimum(low, values.amin(0)), torch.maximum(high, values.amax(0))
        count += batch.reshape(-1, *batch.shape[-2:]).shape[0]
    if count == 0:
        raise DataError("normaliser bounds cannot be fitted to 0 trajectories")
    extent = (high - low).clamp_min(min_range)
    middle = (low + high) / 2
    low, high = middle - extent * (0.5 + margin), middle + extent * (0.5 + margin)
    return NormaliserBounds(target, tuple(low.tolist()), tuple(high.tolist()), f"fitted to {count} trajectories")
