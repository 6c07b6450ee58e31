"""The planner protocol, and planners that need no training: what every learned planner is compared with.

Legend: B samples; 8 poses at 0.5 ... 4.0 s, in the ego frame of now (rear axle, x forward, y left); metres, radians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.frames import NUM_FUTURE_POSES, POSE_INTERVAL_S
from navsim_ext.scene import SceneBatch

if TYPE_CHECKING:
    from navsim_ext.hidden_cache.schema import HiddenBatch

VX, VY = 4, 5  # entries of SceneBatch.status


@runtime_checkable
class Planner(Protocol):
    """Anything that drives. ``name`` stands in tables and score files."""

    name: str

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        """[B,8,3] float32 poses. ``hidden`` are the vision-language states of the batch, for planners that use them."""
        ...


class Human:
    """The driven trajectory (``poses`` of it); its score is the ceiling that the recording itself reaches."""

    name = "human"

    def __init__(self, poses: int = NUM_FUTURE_POSES) -> None:
        if poses < NUM_FUTURE_POSES:
            raise DataError(f"planner human: {poses} poses; at least {NUM_FUTURE_POSES} were expected")
        self.poses = poses

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        """[B,poses,3]. Raises DataError when the batch carries no target or fewer poses."""
        if batch.target is None or batch.target.shape[1] < self.poses:
            found = "none" if batch.target is None else str(batch.target.shape[1])
            raise DataError(
                f"planner human needs {self.poses} future poses, tokens {batch.token[:3]} have {found}: read the "
                f"scenes with a horizon of {self.poses}"
            )
        return batch.target[:, : self.poses].float()


class ConstantVelocityAgent:
    """Straight ahead at the present speed |v| (NAVSIM's ConstantVelocityAgent)."""

    name = "constant_velocity"

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        return straight(speed(batch)[:, None] * pose_times(batch))


class StandingStill:
    """Stays where it is: eight zero poses."""

    name = "standing_still"

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        return straight(torch.zeros(len(batch), NUM_FUTURE_POSES, device=batch.status.device))


class ConstantDeceleration:
    """Straight ahead, braking at ``deceleration`` [m/s^2] > 0 until it stands: x = v t - a t^2 / 2, t <= v / a."""

    def __init__(self, deceleration: float = 2.0) -> None:
        if not 0.0 < deceleration < float("inf"):
            raise DataError(f"constant_deceleration: deceleration is {deceleration} m/s^2; a positive one was expected")
        self.deceleration = float(deceleration)
        self.name = f"constant_deceleration_{self.deceleration:g}"

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        v = speed(batch)[:, None]
        t = torch.minimum(pose_times(batch)[None], v / self.deceleration)
        return straight(v * t - 0.5 * self.deceleration * t**2)


class StraightOn:
    """Straight ahead whatever the route says, gaining speed: v(t) = min(v + a t, ``target_speed``), never below v."""

    name = "straight_on"

    def __init__(self, target_speed: float = 10.0, acceleration: float = 1.0) -> None:
        if not (0.0 < target_speed < float("inf") and 0.0 < acceleration < float("inf")):
            raise DataError(
                f"straight_on: target_speed is {target_speed} m/s, acceleration {acceleration} m/s^2; positive expected"
            )
        self.target_speed, self.acceleration = float(target_speed), float(acceleration)

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        v, a, t = speed(batch)[:, None], self.acceleration, pose_times(batch)[None]
        gaining = torch.minimum(t, torch.clamp((self.target_speed - v) / a, min=0.0))  # s until the speed is reached
        return straight(v * t + a * gaining * (t - 0.5 * gaining))


BASELINES: dict[str, Callable[..., Planner]] = {
    "human": Human,
    "constant_velocity": ConstantVelocityAgent,
    "standing_still": StandingStill,
    "constant_deceleration": ConstantDeceleration,
    "straight_on": StraightOn,
}


def baseline(name: str, **options: Any) -> Planner:
    """A baseline by name; ``options`` go to its constructor. Raises DataError naming those that exist."""
    if name not in BASELINES:
        raise DataError(f"there is no baseline planner {name!r}; there are {', '.join(BASELINES)}")
    return BASELINES[name](**options)


def speed(batch: SceneBatch) -> Float[Tensor, " B"]:
    """[B] |v| [m/s] at now."""
    return torch.hypot(batch.status[:, VX], batch.status[:, VY])


def pose_times(batch: SceneBatch) -> Float[Tensor, " 8"]:
    """[8] seconds of the poses: 0.5 ... 4.0."""
    return torch.arange(1, NUM_FUTURE_POSES + 1, device=batch.status.device) * POSE_INTERVAL_S


def straight(distances: Float[Tensor, "B 8"]) -> Float32[Tensor, "B 8 3"]:
    """[B,8] metres ahead -> poses [B,8,3] float32 on the x axis."""
    poses = torch.zeros(*distances.shape, 3, device=distances.device)
    poses[..., 0] = distances.float()
    return poses
