"""Motion vocabularies: what a road user can do in the next half second, as a finite set of tokens.

Legend: N road users, V tokens of a class (padded to the largest class), J = 5 poses of 0.1 s in a token, C = 3 classes.
A pose is (x, y, heading) of the box centre in m, m, rad. Everything is float32 torch.

One interface for vocabularies of fixed shapes (k-disks, grid) and of accelerations (Verlet): from the state of a road
user, ``ends`` says where each token would lead, ``play`` gives the five poses of one token and the state after it.
Tokenising, noise, closest-token targets and closed-loop rollouts need nothing else, so they are written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import TOKEN_S, compose, verlet
from navsim_ext.traffic.codes import AgentKind

CLASSES = (AgentKind.VEHICLE, AgentKind.PEDESTRIAN, AgentKind.CYCLIST)
CLASS_NAMES = tuple(kind.name.lower() for kind in CLASSES)
MATCHING_BOX_M = ((4.8, 2.0), (1.0, 1.0), (2.0, 1.0))
"""Length and width [C, 2] of the box in which tokens of a class are compared: the same for every road user of the
class, so that a token means the same motion whoever drives it (the boxes of the published vocabularies)."""


def class_of(kind: Tensor) -> Tensor:
    """Rows of the class tables for AgentKind codes; what is none of the three classes moves by pedestrians' tokens."""
    return torch.where(kind < len(CLASSES), kind, torch.full_like(kind, int(AgentKind.PEDESTRIAN))).long()


def matching_box(classes: Tensor) -> Tensor:
    """[..., 2] m of the boxes in which road users of class rows [...] are compared."""
    return torch.tensor(MATCHING_BOX_M, device=classes.device)[classes]


@dataclass(frozen=True)
class MotionState:
    """Where road users are before a token: ``pose`` [N, 3], and ``displacement`` [N, 2] m over the last half second
    in the axes of the poses, which only acceleration tokens read."""

    pose: Tensor
    displacement: Tensor

    def where(self, mask: Tensor, other: MotionState) -> MotionState:
        """This state where ``mask`` [N], the other one elsewhere."""
        row = mask[..., None]
        return MotionState(
            torch.where(row, self.pose, other.pose), torch.where(row, self.displacement, other.displacement)
        )

    def after(self, poses: Tensor) -> MotionState:
        """The state at the end of a token's poses [N, J, 3] that were played from this one."""
        return MotionState(poses[..., -1, :], poses[..., -1, :2] - self.pose[..., :2])


class MotionVocabulary(Protocol):
    """Tokens per class and how a road user moves by one."""

    counts: Tensor  # [C] int64, tokens of each class

    @property
    def size(self) -> int:
        """V: width of a head over the tokens of any class."""
        ...

    def ends(self, state: MotionState, classes: Tensor) -> Tensor:
        """Poses [N, V, 3] that each token would lead to, for class rows [N]; padding repeats the class's token 0."""
        ...

    def play(self, state: MotionState, classes: Tensor, tokens: Tensor) -> tuple[Tensor, MotionState]:
        """The poses [N, J, 3] of the tokens [N] and the state after them."""
        ...

    def spread(self) -> Tensor:
        """Distances [C, V, V] in m between the ends of two tokens of a class, for spatial label smoothing; inf in
        padding."""
        ...


def corner_distance(one: Tensor, other: Tensor, box: Tensor) -> Tensor:
    """Mean distance [...] in m of the four corners of the same box [..., 2] at two poses [..., 3].

    A corner is p + R(h) c, so its two places differ by dp + (R(h1) - R(h2)) c; no corner is built.
    """
    dx, dy = one[..., 0] - other[..., 0], one[..., 1] - other[..., 1]
    dcos = torch.cos(one[..., 2]) - torch.cos(other[..., 2])
    dsin = torch.sin(one[..., 2]) - torch.sin(other[..., 2])
    total = torch.zeros_like(dx)
    for along, across in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5)):
        x, y = along * box[..., 0], across * box[..., 1]
        total = total + torch.hypot(dx + dcos * x - dsin * y, dy + dsin * x + dcos * y)
    return total / 4.0


@dataclass(frozen=True)
class ShapeVocabulary:
    """Tokens that are fixed motions: ``shapes`` [C, V, J, 3] in the frame of the pose before the token, ``counts`` [C].

    Made by k-disks or by a grid of end points.
    """

    shapes: Tensor
    counts: Tensor

    @property
    def size(self) -> int:
        return self.shapes.shape[1]

    def ends(self, state: MotionState, classes: Tensor) -> Tensor:
        return compose(state.pose, self.shapes[:, :, -1][classes])

    def play(self, state: MotionState, classes: Tensor, tokens: Tensor) -> tuple[Tensor, MotionState]:
        poses = compose(state.pose, self.shapes[classes, tokens])
        return poses, state.after(poses)

    def spread(self) -> Tensor:
        ends = self.shapes[:, :, -1]
        box = torch.tensor(MATCHING_BOX_M, device=ends.device)[:, None, None]
        distance = corner_distance(ends[:, :, None], ends[:, None, :], box)
        present = torch.arange(self.size, device=ends.device) < self.counts[:, None]
        return torch.where(present[:, :, None] & present[:, None, :], distance, torch.inf)

    def to(self, device: torch.device | str) -> ShapeVocabulary:
        return ShapeVocabulary(self.shapes.to(device), self.counts.to(device))


RANGE_M, BINS, CHANGES = 18.0, 128, 13


@dataclass(frozen=True)
class VerletVocabulary:
    """Acceleration tokens: how much the motion of the next half second differs from that of the last; needs no data.

    Source: MotionLM (arXiv 2309.16534): displacements of half a second in [-18, 18] m per axis fall into 128 bins,
    and a token changes both bin numbers by -6 ... 6, 13 x 13 = 169 tokens of which the middle one keeps the
    velocity. The axes are those of the road user at the start. Deviation: the first displacement is not rounded to
    a bin, so that a road user that keeps its velocity stays exact. Poses inside a token and headings:
    ``navsim_ext.closed_loop.kinematics.verlet``.
    """

    width: float = 2.0 * RANGE_M / BINS  # m of one bin
    changes: int = CHANGES

    @property
    def size(self) -> int:
        return self.changes**2

    @property
    def counts(self) -> Tensor:
        return torch.full((len(CLASSES),), self.size)

    def _grid(self, device: torch.device) -> Tensor:
        """[V, 2] m: change of the displacement that each token makes, along and across the axis."""
        half = self.changes // 2
        change = torch.arange(-half, half + 1, device=device, dtype=torch.float32) * self.width
        return torch.cartesian_prod(change, change)

    def _accelerations(self, heading: Tensor, grid: Tensor) -> Tensor:
        """m/s^2 in the axes of the poses, for headings [...] and grid rows [..., 2]."""
        cosine, sine = torch.cos(heading), torch.sin(heading)
        x = cosine * grid[..., 0] - sine * grid[..., 1]
        y = sine * grid[..., 0] + cosine * grid[..., 1]
        return torch.stack([x, y], dim=-1) / TOKEN_S**2

    def ends(self, state: MotionState, classes: Tensor) -> Tensor:
        acceleration = self._accelerations(state.pose[..., None, 2], self._grid(state.pose.device))
        pose = state.pose[..., None, :].expand(*acceleration.shape[:-1], 3)
        displacement = state.displacement[..., None, :].expand_as(acceleration)
        return verlet(pose, displacement, acceleration)[..., -1, :]

    def play(self, state: MotionState, classes: Tensor, tokens: Tensor) -> tuple[Tensor, MotionState]:
        acceleration = self._accelerations(state.pose[..., 2], self._grid(state.pose.device)[tokens])
        poses = verlet(state.pose, state.displacement, acceleration)
        return poses, state.after(poses)

    def spread(self) -> Tensor:
        grid = self._grid(torch.device("cpu"))
        return torch.cdist(grid, grid).expand(len(CLASSES), -1, -1)

    def to(self, device: torch.device | str) -> VerletVocabulary:
        return self
