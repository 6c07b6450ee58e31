"""What a policy asks for: the next 0.5 s of every road user, in one of four forms.

Legend: B worlds, N road users, K = 5 poses of a token. A form becomes poses [B,N,K,3] in the frame of the scene.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from navsim_ext.closed_loop import kernels, kinematics
from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.errors import DataError

if TYPE_CHECKING:
    from navsim_ext.closed_loop.state import WorldState

TOKENS, POSES, ACCELERATIONS, BICYCLE = "tokens", "poses", "accelerations", "bicycle"
SHAPES = {TOKENS: (TOKEN_STEPS, 3), POSES: (TOKEN_STEPS, 3), ACCELERATIONS: (2,), BICYCLE: (2,)}


class BadMoves(DataError):
    """A policy returned moves of a wrong shape or with a value that is not finite."""


@dataclass(frozen=True)
class Moves:
    """Moves of all road users of all worlds; those of absent ones are not looked at."""

    form: str  # one of the four
    values: Tensor  # [B,N,K,3] tokens or poses; [B,N,2] accelerations [m/s^2], or steering [rad] and acceleration
    log_probability: Tensor | None = None  # [B,N] of the choice, where the policy has one
    leaves: Tensor | None = None  # [B,N] bool: declared removed from the world after this token

    @classmethod
    def tokens(cls, local: Tensor, log_probability: Tensor | None = None) -> Moves:
        """Five poses in the road user's own present frame."""
        return cls(TOKENS, local, log_probability)

    @classmethod
    def poses(cls, poses: Tensor, log_probability: Tensor | None = None, leaves: Tensor | None = None) -> Moves:
        """Five poses in the frame of the scene."""
        return cls(POSES, poses, log_probability, leaves)

    @classmethod
    def accelerations(cls, acceleration: Tensor, log_probability: Tensor | None = None) -> Moves:
        """Change of displacement over the token, in the axes of the scene: Verlet (see ``kinematics.verlet``)."""
        return cls(ACCELERATIONS, acceleration, log_probability)

    @classmethod
    def bicycle(cls, steering: Tensor, acceleration: Tensor, log_probability: Tensor | None = None) -> Moves:
        """Steering angle and acceleration, held over the token (see ``kinematics.bicycle``)."""
        return cls(BICYCLE, torch.stack((steering, acceleration), dim=-1), log_probability)

    def resolve(self, state: WorldState) -> Moves:
        """The same moves as poses; raises BadMoves naming worlds and road users where they cannot be carried out."""
        if self.form not in SHAPES:
            raise BadMoves(f"moves have the form {self.form!r}; one of {', '.join(SHAPES)} was expected")
        wanted = (*state.present.shape, *SHAPES[self.form])
        if tuple(self.values.shape) != wanted:
            raise BadMoves(f"moves of form {self.form} have shape {tuple(self.values.shape)}; {wanted} was expected")
        if self.form == POSES:
            poses = self.values
        elif self.form == TOKENS:
            poses = _composed(state.pose, self.values)
        elif self.form == ACCELERATIONS:
            poses = kinematics.verlet(state.pose, state.displacement(), self.values)
        else:
            speed = state.speed.clamp_min(0.0)
            length = state.scenes.size[state.scene, :, 0]
            poses, _ = kinematics.bicycle(state.pose, speed, length, self.values[..., 0], self.values[..., 1])
        if not all_finite(poses, state.present):
            bad = (~torch.isfinite(poses).all(-1).all(-1) & state.present).nonzero().tolist()
            names = [f"{state.scenes.sources[int(state.scene[b])].id} row {n}" for b, n in bad[:4]]
            raise BadMoves(
                f"moves of form {self.form} are not finite for {len(bad)} road users ({'; '.join(names)}) at step "
                f"{state.step}: the policy that made them is broken"
            )
        return replace(self, form=POSES, values=poses)


def _composed(pose: Tensor, local: Tensor) -> Tensor:
    """``kinematics.compose``, on a CPU by its compiled twin."""
    if not on_cpu(pose, local):
        return kinematics.compose(pose, local)
    result = torch.empty_like(local, memory_format=torch.contiguous_format)
    kernels.compose(pose.numpy(), local.detach().contiguous().numpy(), result.numpy())
    return result


def all_finite(poses: Tensor, present: Tensor) -> bool:
    """Whether the poses [B,N,K,3] of all who are present [B,N] are finite."""
    if on_cpu(poses):
        return bool(kernels.all_finite(poses.detach().contiguous().numpy(), present.contiguous().numpy()))
    return bool(torch.isfinite(torch.where(present[..., None, None], poses, 0.0).sum()))


def on_cpu(*tensors: Tensor) -> bool:
    """Whether the compiled kernels can take these: float32 on the CPU."""
    return all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)


def chosen(masks: list[Tensor], moves: list[Moves], state: WorldState) -> Moves:
    """One set of moves from several: those of ``moves[k]`` where ``masks[k]`` [B,N]; later ones win."""
    result = moves[0].resolve(state)
    values, leaves = result.values, result.leaves
    log_probability = result.log_probability
    for mask, other in zip(masks[1:], moves[1:]):
        other = other.resolve(state)
        values = torch.where(mask[..., None, None], other.values, values)
        leaves = _merge(mask, other.leaves, leaves, torch.zeros_like(mask))
        log_probability = _merge(mask, other.log_probability, log_probability, torch.zeros_like(values[..., 0, 0]))
    return Moves(POSES, values, log_probability, leaves)


def _merge(mask: Tensor, new: Tensor | None, old: Tensor | None, nothing: Tensor) -> Tensor | None:
    if new is None and old is None:
        return None
    return torch.where(mask, nothing if new is None else new, nothing if old is None else old)
