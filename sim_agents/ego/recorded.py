"""Recorded drives as examples for the path and the tree planner: states at any recorded moment, moved off the record.

Against covariate shift an example may begin beside the recording: the ego's place and heading at the present are moved
(its past along with them, less the longer ago), and what it should do leads back:

    target(t) = recorded(t) + offset exp(-t / RETURN_S),   heading(t) = recorded heading(t) + turn exp(-t / RETURN_S)

Legend: B examples (each a world), J future moments 0.5 s apart, N road users.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_S, TOKEN_STEPS
from navsim_ext.closed_loop.scenes import ScenePart, WorldScenes
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import ABSENT
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.data.stored import StoredBatches, StoredItems
from sim_agents.ego.surroundings import Around, EgoSurroundings

RETURN_S = 1.0
FADE_S = 1.5  # over which a shift of the present dies out into the past
GOAL_S = (2.0, 15.0)  # a goal of training is where the ego was recorded this much later


@dataclass(frozen=True)
class Disturbance:
    """Standard deviations of how far from the record an example begins, and the ``share`` of examples that do."""

    aside_m: float = 0.4
    turn_rad: float = 0.04
    share: float = 0.6

    def __post_init__(self) -> None:
        if not (0.0 <= self.share <= 1.0 and self.aside_m >= 0.0 and self.turn_rad >= 0.0):
            raise DataError(f"{self}: a share in [0, 1] and deviations >= 0 were expected")


@dataclass(frozen=True)
class EgoExample:
    """One scene at one recorded moment, with a goal [2] (NaN: none)."""

    part: ScenePart
    around: Around
    goal: NDArray[np.float32]


def focused(scene: TrafficScene, reach_m: float) -> TrafficScene:
    """The scene without road users that never come within ``reach_m`` of where the ego is recorded: smaller grids, and
    a smaller batch. The state of the law that made it is dropped."""
    way = scene.pose[scene.ego, scene.valid[scene.ego], :2][::5].astype(np.float64)
    apart = np.full(scene.num_agents, np.inf)
    for row in range(scene.num_agents):
        track = scene.pose[row, scene.valid[row], :2][::5].astype(np.float64)
        if len(track):
            apart[row] = np.sqrt(((track[:, None] - way[None]) ** 2).sum(-1).min())
    kept = np.flatnonzero(apart <= reach_m)
    if len(kept) == scene.num_agents:
        return replace(scene, law={})
    names = ("pose", "speed", "valid", "size", "kind", "role", "agent_id", "z", "source_heading", "goal")
    values = {name: getattr(scene, name)[kept] for name in names if getattr(scene, name) is not None}
    tokens = tuple(scene.agent_tokens[row] for row in kept) if scene.agent_tokens else ()
    return replace(scene, **values, agent_tokens=tokens, law={})


class EgoDataset(StoredItems):
    """Item i is a scene of a store: at a random recorded moment with a random goal if ``random`` (from numpy's global
    state, which the training loader seeds for each item; each scene is ``repeat`` items), else at its own present with
    the end of its record as goal. ``kept`` scenes stay in memory. Raises DataError for an empty store and for a scene
    that is too short."""

    def __init__(
        self, folder: str | os.PathLike[str], *, future_s: float, random: bool, reach_m: float = 60.0,
        without_goal: float = 0.1, kept: int = 2048, repeat: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(folder)
        self.repeat = repeat if random else 1
        self.future, self.random, self.reach_m = round(future_s / STEP_S), random, reach_m
        self.without_goal, self.kept = without_goal, kept
        self._made: OrderedDict[int, tuple[ScenePart, Around]] = OrderedDict()

    def __len__(self) -> int:
        return super().__len__() * self.repeat

    def __getitem__(self, item: int) -> EgoExample:
        part, around = self._load(item % len(self.store))
        seen = part.state[part.scene.ego] != ABSENT
        last = len(seen) - 1 - int(seen[::-1].argmax())
        moments = np.arange(part.now, last - self.future + 1)
        moments = moments[[bool(seen[c : c + self.future + 1].all()) for c in moments]]
        if len(moments) == 0:
            raise DataError(
                f"{self.store.folder}: scene {part.scene.id} has no moment from which its ego is recorded for "
                f"{self.future * STEP_S:g} s: build longer scenes, or ask for a shorter future"
            )
        track = part.pose[part.scene.ego, :, :2]
        if not self.random:
            return EgoExample(part.at(int(moments[0])), around, track[last].astype(np.float32))
        now = int(np.random.choice(moments))  # noqa: NPY002 - seeded by the loader
        low, high = (min(now + round(s / STEP_S), last) for s in GOAL_S)
        goal = track[np.random.randint(low, high + 1)].astype(np.float32)  # noqa: NPY002
        if np.random.random() < self.without_goal:  # noqa: NPY002
            goal = np.full(2, np.nan, np.float32)
        return EgoExample(part.at(now), around, goal)

    def _load(self, item: int) -> tuple[ScenePart, Around]:
        if item in self._made:
            self._made.move_to_end(item)
            return self._made[item]
        part = ScenePart.of(focused(self.scene(item), self.reach_m))
        made = part, Around.of(part.scene, part.frame)
        self._made[item] = made
        if len(self._made) > self.kept:
            self._made.popitem(last=False)
        return made


def assemble(
    examples: Sequence[EgoExample], device: torch.device | str = "cpu", *, horizon_s: float, events: Sequence[str] = ()
) -> tuple[World, WorldState, EgoSurroundings]:
    """A world in which every example is at its own present."""
    scenes = WorldScenes.of_parts([example.part for example in examples], device)
    goal = torch.from_numpy(np.stack([example.goal for example in examples])).to(device)
    world = World(horizon_s=horizon_s, enter="log", events=events, device=device)
    return world, world.reset(scenes), EgoSurroundings.stack([example.around for example in examples], goal)


@dataclass(frozen=True)
class Targets:
    """Where the ego should be 0.5, 1.0 ... s from now: ``pose`` [B,J,3] in the scene's frame, ``valid`` [B,J]."""

    pose: Tensor
    valid: Tensor


@torch.no_grad()
def begin(
    state: WorldState, moments: int, disturbance: Disturbance | None = None, generator: torch.Generator | None = None
) -> Targets:
    """Moves the egos of a fresh state off the record, in place, and says where they should drive from there."""
    scenes = state.scenes
    worlds, ego = state.ego_index()
    device, now = state.pose.device, scenes.now
    columns = now + TOKEN_STEPS * torch.arange(1, moments + 1, device=device)
    kept = columns.clamp_max(scenes.log_pose.shape[2] - 1)
    pose = scenes.log_pose[state.scene, ego][:, kept].clone()
    valid = (scenes.log_state[state.scene, ego][:, kept] != ABSENT) & (columns < scenes.log_pose.shape[2])
    if disturbance is None or disturbance.share == 0.0:
        return Targets(pose, valid)
    B = len(worlds)
    draw = torch.randn(B, 2, generator=generator).to(device)
    moved = (torch.rand(B, generator=generator) < disturbance.share).to(device)
    aside = torch.where(moved, draw[:, 0] * disturbance.aside_m, 0.0)
    turn = torch.where(moved, draw[:, 1] * disturbance.turn_rad, 0.0)
    heading = state.pose[worlds, ego, 2].contiguous()
    offset = aside[:, None] * torch.stack([-torch.sin(heading), torch.cos(heading)], dim=-1)  # [B,2]
    age = STEP_S * (now - torch.arange(now + 1, device=device))
    share = (1.0 - age / FADE_S).clamp_min(0.0)[:, None]
    shift = torch.cat([offset, turn[:, None]], dim=-1)[:, None] * share  # [B,now+1,3]
    past = state.poses[worlds, ego]
    past[:, : now + 1] += torch.where(state.there[worlds, ego][:, : now + 1, None], shift, 0.0)
    state.poses[worlds, ego] = past
    left = torch.exp(-TOKEN_S * torch.arange(1, moments + 1, device=device) / RETURN_S)[:, None]
    pose += torch.cat([offset, turn[:, None]], dim=-1)[:, None] * left
    return Targets(pose, valid)


class EgoDataModule(StoredBatches):
    """Lists of examples from stores of ``navsim_ext.traffic.build``; :func:`assemble` makes a world of them."""

    def __init__(
        self,
        train: str | os.PathLike[str],
        val: str | os.PathLike[str] | None = None,
        *,
        future_s: float = 4.0,
        reach_m: float = 60.0,
        without_goal: float = 0.1,
        kept: int = 2048,
        repeat: int = 1,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train, val, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, num_workers=num_workers
        )
        if future_s < TOKEN_S or not 0.0 <= without_goal <= 1.0 or min(kept, repeat) < 1:
            raise DataError(f"future_s={future_s}, without_goal={without_goal}, kept={kept}, repeat={repeat}: no sense")
        self.options = {
            "future_s": future_s, "reach_m": reach_m, "without_goal": without_goal, "kept": kept, "repeat": repeat,
        }  # fmt: skip

    def open(self, name: str) -> EgoDataset:
        return EgoDataset(self.folders[name], random=name == "train", **self.options)
