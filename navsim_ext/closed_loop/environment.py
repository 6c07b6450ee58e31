"""The moving world for other RL libraries: one ego to steer, as ``gymnasium.Env`` and ``gymnasium.vector.VectorEnv``.

  action       Box [-1,1]^2: steering / 0.5 rad, acceleration / 4 m/s^2, held for one token of 0.5 s
  observation  Box [-10,10]^OBSERVED float32, in the ego's frame, metres / 20, m/s / 10, angles in rad:
               speed, distance of the box to the road's edge, share of the horizon left;
               way [8,2]: the recorded way 5 ... 40 m ahead; goal [2]: its end;
               others [12,7]: the nearest road users: x, y, cos, sin, speed, length, width; 0 where there are fewer
  reward       progress along the recorded way / 10 m, - 1 for contact, leaving the road or a red light
  terminated   contact, off the road, red light; truncated at the horizon

An ``observer`` sees something else in place of this observation, e.g. what the vector planners see
(``sim_agents.ego.observation.FlatView``). The others are driven by any policy (default: replay). ``reset(seed)`` draws
the scene. In the vector environment every world has its own clock, so that each can end and begin alone (autoreset in
the next step).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from navsim_ext.closed_loop.contact import planes
from navsim_ext.closed_loop.events import edge_distance
from navsim_ext.closed_loop.kinematics import TOKEN_STEPS, bicycle
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.paths import beside, build_paths, interpolate, project
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.policy import AgentPolicy
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene

STEERING, ACCELERATION = 0.5, 4.0  # rad, m/s^2 of an action of 1
WAY_M = tuple(range(5, 45, 5))
NEAREST = 12
OBSERVED = 3 + 2 * len(WAY_M) + 2 + 7 * NEAREST
LIMIT = 10.0
DISTANCE, SPEED = 20.0, 10.0  # scales of the observation
EVENTS = ("contact", "off_road", "red_light")


class Observer(Protocol):
    """What an ego sees of one world, as ``size`` numbers within +-LIMIT."""

    size: int

    def start(self, state: WorldState) -> None:
        """Called at every reset."""
        ...

    def observe(self, state: WorldState) -> NDArray[np.float32]: ...


class ClosedLoopEnv(gymnasium.Env):
    """One world. ``scenes`` are built once and drawn from at every reset."""

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium's own shape)

    def __init__(
        self,
        scenes: Sequence[TrafficScene] | Sequence[WorldScenes],
        *,
        agents: Callable[[], AgentPolicy] = Replay,
        horizon_s: float = 8.0,
        observer: Observer | None = None,
    ) -> None:
        if not scenes:
            raise DataError("an environment of 0 scenes")
        self._observer = observer
        self._scenes = [one if isinstance(one, WorldScenes) else WorldScenes.build([one]) for one in scenes]
        self._paths = [build_paths(one, "log") for one in self._scenes]
        self._agents, self._world, self.horizon_s = agents, World(horizon_s=horizon_s, events=EVENTS), horizon_s
        self.observation_space = gymnasium.spaces.Box(
            -LIMIT, LIMIT, (OBSERVED if observer is None else observer.size,), np.float32
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """``options={"scene": k}`` chooses the scene."""
        super().reset(seed=seed)
        k = (options or {}).get("scene")
        k = int(self.np_random.integers(len(self._scenes))) if k is None else int(k)
        self._state = self._world.reset(self._scenes[k])
        self._way = self._paths[k].poses[0, self._state.scenes.ego[0]][None, None]
        self._policy = self._agents()
        self._policy.start(self._state, self._state.scenes.sources)
        if self._observer is not None:
            self._observer.start(self._state)
        self._s = project(self._way, self._ego_pose(), torch.zeros(1, 1))
        return self._observe(), {"scene": self._state.scenes.sources[0].id}

    def step(self, action: NDArray[np.floating]):
        """Raises DataError for an action of a wrong shape or one that is not finite."""
        action = np.asarray(action, np.float32)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise DataError(f"action {action} is not two finite numbers")
        steering, acceleration = (torch.tensor([[float(v)]]) for v in action.clip(-1.0, 1.0) * (STEERING, ACCELERATION))
        state = self._state
        _, ego = state.ego_index()
        moves = self._policy.act(state).resolve(state)
        values = moves.values.clone()
        speed, length = state.speed[:, ego].clamp_min(0.0), state.scenes.size[:, ego, 0]
        values[:, ego], _ = bicycle(self._ego_pose(), speed, length, steering, acceleration)
        self._world.step(state, Moves.poses(values, leaves=moves.leaves))
        events = self._world.events(state)
        happened = {name: bool(getattr(events, name).any()[0, ego[0]]) for name in EVENTS}
        before, self._s = self._s, project(self._way, self._ego_pose(), self._s, reach=15)
        progress = float(self._s - before)
        terminated = any(happened.values())
        truncated = state.steps_left < TOKEN_STEPS and not terminated
        return self._observe(), progress / 10.0 - float(terminated), terminated, truncated, happened

    def _ego_pose(self) -> torch.Tensor:
        _, ego = self._state.ego_index()
        return self._state.pose[:, ego]

    def _observe(self) -> NDArray[np.float32]:
        state = self._state
        if self._observer is not None:
            return self._observer.observe(state)
        _, ego = state.ego_index()
        row = int(ego[0])
        x, y, h = self._ego_pose()[0, 0].tolist()
        cos, sin = np.cos(h), np.sin(h)

        def local(points: NDArray[np.float32]) -> NDArray[np.float64]:
            d = points - np.array([x, y])
            return np.stack([cos * d[..., 0] + sin * d[..., 1], -sin * d[..., 0] + cos * d[..., 1]], -1) / DISTANCE

        ahead = self._s[..., None] + torch.tensor(WAY_M, dtype=torch.float32)
        way = local(interpolate(self._way, ahead)[0, 0, :, :2].numpy())
        record = state.scenes.log_pose[0, row, int(state.scenes.last_seen[0, row]), :2].numpy()
        asked = state.present[..., None]
        edge = float(edge_distance(state, planes(state.pose[:, :, None]), state.scenes.size, asked)[0, row, 0])
        left = state.steps_left / max(state.steps_left + state.step, 1)
        head = np.array([float(state.speed[0, row]) / SPEED, np.nan_to_num(edge, nan=0.0) / DISTANCE, left])
        pose, speed = state.pose[0].numpy(), state.speed[0].numpy()
        present = state.present[0].numpy().copy()
        present[row] = False
        distance = np.where(present, np.hypot(pose[:, 0] - x, pose[:, 1] - y), np.inf)
        nearest = [n for n in np.argsort(distance, kind="stable")[:NEAREST] if np.isfinite(distance[n])]
        others = np.zeros((NEAREST, 7))
        if nearest:
            turn = pose[nearest, 2] - h
            size = state.scenes.size[0].numpy()[nearest] / DISTANCE
            others[: len(nearest)] = np.column_stack(
                [local(pose[nearest, :2]), np.cos(turn), np.sin(turn), speed[nearest] / SPEED, size]
            )
        values = np.concatenate([head, way.ravel(), local(record), others.ravel()])
        return values.clip(-LIMIT, LIMIT).astype(np.float32)

    def offset(self) -> float:
        """m beside the recorded way, left positive."""
        return float(beside(self._way, self._ego_pose(), self._s)[0])


class ClosedLoopVectorEnv(gymnasium.vector.VectorEnv):
    """``num_envs`` worlds side by side, each with its own clock; one that has ended begins anew in the next step."""

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        scenes: Sequence[TrafficScene],
        num_envs: int,
        *,
        agents: Callable[[], AgentPolicy] = Replay,
        horizon_s: float = 8.0,
        observer: Callable[[], Observer] | None = None,
    ) -> None:
        if num_envs < 1:
            raise DataError(f"num_envs is {num_envs}; at least 1 was expected")
        built = [WorldScenes.build([scene]) for scene in scenes]
        self.envs = [
            ClosedLoopEnv(built, agents=agents, horizon_s=horizon_s, observer=None if observer is None else observer())
            for _ in range(num_envs)
        ]
        self.num_envs = num_envs
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._ended = np.zeros(num_envs, np.bool_)

    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed if isinstance(seed, int) else None)
        seeds = (
            [None if seed is None else seed + k for k in range(self.num_envs)]
            if not isinstance(seed, Sequence)
            else seed
        )
        found = [env.reset(seed=one, options=options) for env, one in zip(self.envs, seeds)]
        self._ended[:] = False
        infos: dict[str, Any] = {}
        for k, (_, info) in enumerate(found):
            infos = self._add_info(infos, info, k)
        return np.stack([observation for observation, _ in found]), infos

    def step(self, actions: NDArray[np.floating]):
        observations, infos = [], {}
        rewards, ended = np.zeros(self.num_envs), np.zeros((2, self.num_envs), np.bool_)
        for k, env in enumerate(self.envs):
            if self._ended[k]:
                observation, info = env.reset()
            else:
                observation, rewards[k], ended[0, k], ended[1, k], info = env.step(actions[k])
            observations.append(observation)
            infos = self._add_info(infos, info, k)
        self._ended = ended.any(axis=0)
        return np.stack(observations), rewards, ended[0].copy(), ended[1].copy(), infos
