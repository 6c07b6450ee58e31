"""Rewards of driving, decision by decision: each term is one thing that is wanted of a road user, or not wanted.

Legend: B worlds, N road users, K decisions of half a second (five steps of 0.1 s each), E = 5 K steps. A term gives
[B,N,K] values and where they are known: what a map, a light or a recording does not tell is no zero of it, and a
decision that no term knows anything of is not credited.

    r = -|position - log| - lambda contact        (arXiv 2409.18343: LogDistance 1, Contact lambda)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from navsim_ext.closed_loop.events import Event, Events
from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import OBSERVED
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import PieceKind
from navsim_ext.traffic.scene import TrafficScene


class Driven(NamedTuple):
    """A finished drive: the state at its end, and the events of all of its steps."""

    state: WorldState
    events: Events

    @property
    def poses(self) -> Tensor:
        """[B,N,E+1,3] from the present on."""
        state = self.state
        return state.poses[:, :, state.scenes.now : state.scenes.now + state.step + 1]

    @property
    def log(self) -> tuple[Tensor, Tensor]:
        """Recorded poses [B,N,E+1,3] from the present on, and where they were observed [B,N,E+1]; steps after the
        recording are not."""
        state, scenes = self.state, self.state.scenes
        last = scenes.now + state.step + 1
        pose, seen = scenes.log_pose[:, :, scenes.now : last], scenes.log_state[:, :, scenes.now : last] == OBSERVED
        if missing := state.step + 1 - pose.shape[2]:
            pose = torch.nn.functional.pad(pose, (0, 0, 0, missing))
            seen = torch.nn.functional.pad(seen, (0, missing))
        return pose[state.scene], seen[state.scene]


class TrafficTerm(Protocol):
    """``weight`` of the term in the sum; ``event`` that the world must find for it (None: none)."""

    weight: float
    event: ClassVar[str | None]

    def value(self, driven: Driven) -> tuple[Tensor, Tensor]:
        """[B,N,K] values, and where they are known."""
        ...

    def missing(self, scene: TrafficScene) -> str | None:
        """What a scene lacks for this term; None: nothing."""
        ...


def per_decision(values: Tensor) -> Tensor:
    """[B,N,E] -> [B,N,K,5]."""
    return values.unflatten(-1, (-1, TOKEN_STEPS))


def happened(event: Event) -> tuple[Tensor, Tensor]:
    """Whether an event happened at a known step of each decision, [B,N,K], and where any step is known."""
    known = per_decision(event.valid)
    return (per_decision(event.value) & known).any(dim=-1).float(), known.any(dim=-1)


@dataclass(frozen=True)
class LogDistance:
    """-min(|position - log|, ``most_m``) m at the end of each half second, where the log was observed then."""

    weight: float = 1.0
    most_m: float = 1.0e9
    event: ClassVar[str | None] = None

    def value(self, driven: Driven) -> tuple[Tensor, Tensor]:
        log, seen = driven.log
        ends = slice(TOKEN_STEPS, None, TOKEN_STEPS)
        apart = torch.linalg.vector_norm(driven.poses[:, :, ends, :2] - log[:, :, ends, :2], dim=-1)
        known = seen[:, :, ends]
        return -apart.clamp_max(self.most_m).masked_fill(~known, 0.0), known

    def missing(self, scene: TrafficScene) -> str | None:
        return None if scene.valid[:, scene.now + 1 :].any() else "nobody is recorded after the present"


@dataclass(frozen=True)
class Contact:
    """1 where the full box touches another one during the half second: give it a negative weight (-lambda)."""

    weight: float = -2.0
    event: ClassVar[str | None] = "contact"

    def value(self, driven: Driven) -> tuple[Tensor, Tensor]:
        return happened(driven.events.contact)

    def missing(self, scene: TrafficScene) -> str | None:
        return None


@dataclass(frozen=True)
class RoadDeparture:
    """1 where a corner of the box lies off the road during the half second; drivers on a map with road edges."""

    weight: float = -1.0
    event: ClassVar[str | None] = "off_road"

    def value(self, driven: Driven) -> tuple[Tensor, Tensor]:
        return happened(driven.events.off_road)

    def missing(self, scene: TrafficScene) -> str | None:
        edges = scene.pieces(PieceKind.ROAD_EDGE, PieceKind.DRIVABLE_AREA)
        return None if len(edges) else "its map has no road edges"


@dataclass(frozen=True)
class RedLight:
    """1 where the front bumper crosses a red stop point during the half second."""

    weight: float = -1.0
    event: ClassVar[str | None] = "red_light"

    def value(self, driven: Driven) -> tuple[Tensor, Tensor]:
        return happened(driven.events.red_light)

    def missing(self, scene: TrafficScene) -> str | None:
        return None if scene.has_lights else "its source tells no lights"


@dataclass(frozen=True)
class LogProgress:
    """Metres driven in the half second, at most those of the recording in the same half second."""

    weight: float = 0.2
    event: ClassVar[str | None] = None

    def value(self, driven: Driven) -> tuple[Tensor, Tensor]:
        log, seen = driven.log
        ends = slice(None, None, TOKEN_STEPS)
        length = lambda poses: torch.linalg.vector_norm(poses[:, :, ends, :2].diff(dim=2), dim=-1)  # noqa: E731
        known = seen[:, :, ends]
        known = known[..., 1:] & known[..., :-1]
        return torch.minimum(length(driven.poses), length(log)).masked_fill(~known, 0.0), known

    def missing(self, scene: TrafficScene) -> str | None:
        return None if scene.valid[:, scene.now + 1 :].any() else "nobody is recorded after the present"


@dataclass(frozen=True)
class Comfortable:
    """Share of the half second's steps within NAVSIM's bounds of accelerations and yaw rate."""

    weight: float = 0.1
    event: ClassVar[str | None] = "comfort"

    def value(self, driven: Driven) -> tuple[Tensor, Tensor]:
        known = per_decision(driven.events.comfort.valid)
        good = (per_decision(driven.events.comfort.value) & known).sum(dim=-1)
        return good / known.sum(dim=-1).clamp_min(1), known.any(dim=-1)

    def missing(self, scene: TrafficScene) -> str | None:
        return None


@dataclass(frozen=True)
class GoalReached:
    """1 in the half second in which the centre first comes within 2 m of the road user's goal."""

    weight: float = 1.0
    event: ClassVar[str | None] = "goal"

    def value(self, driven: Driven) -> tuple[Tensor, Tensor]:
        reached, known = happened(driven.events.goal)
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], dim=-1).cummax(dim=-1).values
        return reached * (1.0 - before), known

    def missing(self, scene: TrafficScene) -> str | None:
        return None if scene.goal is not None and np.isfinite(scene.goal).any() else "nobody's goal is known"


def require_known(terms: dict[str, TrafficTerm], scenes: list[TrafficScene]) -> None:
    """Raises DataError where none of the scenes has what a term reads: it would be zero throughout."""
    for name, term in terms.items():
        lacks = [term.missing(scene) for scene in scenes]
        if scenes and all(lacks):
            raise DataError(
                f"reward term {name} ({type(term).__name__}) has nothing to read in any of {len(scenes)} scenes, first "
                f"{scenes[0].id}: {lacks[0]}; remove it (reward.terms.{name}=null) or take scenes that tell it"
            )
