"""The moving world for other RL libraries: one ego to steer, as ``gymnasium.Env`` and ``gymnasium.vector.VectorEnv``.

  action       Box [-1,1]^2: steering / 0.5 rad, acceleration / 4 m/s^2, held for one token of 0.5 s
  observation  Box [-10,10]^SIZE float32: see ``ego_view.py``
  reward       progress along the recorded way / 10 m, - 1 for contact, leaving the road or a red light
  terminated   contact, off the road, red light; truncated at the horizon

An ``observer`` sees something else in place of this observation, e.g. what the vector planners see
(``sim_agents.ego.observation.FlatView``). The others are driven by any policy (default: replay). ``reset(seed)`` draws
the scene.

The vector environment moves all its worlds in one call: actions, traffic, events and observations are tensors over
worlds. Worlds that began in the same step share a clock, so there is one call for each age that occurs: one as long as
nobody has ended, never more than horizon / 0.5 s, however many worlds there are. Autoreset is NEXT_STEP, gymnasium's
default: the step after a world has ended ignores its action, gives reward 0 and the first observation of the next
episode. World for world it does what ``gymnasium.vector.SyncVectorEnv`` does with single environments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from navsim_ext.closed_loop import ego_view
from navsim_ext.closed_loop.kinematics import TOKEN_STEPS, bicycle
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.paths import build_paths, project
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.policy import AgentPolicy
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene

STEERING, ACCELERATION = 0.5, 4.0  # rad, m/s^2 of an action of 1
PROGRESS_M = 10.0  # that earn 1
EVENTS = ("contact", "off_road", "red_light")


class Observer(Protocol):
    """What the egos of some worlds see, as ``size`` numbers within +-LIMIT each."""

    size: int

    def start(self, state: WorldState) -> None:
        """Called at every reset."""
        ...

    def observe(self, state: WorldState) -> NDArray[np.float32]:
        """[B,size] of all worlds."""
        ...


class Stock:
    """Scenes to draw episodes from: built once, padded to one size, with the recorded ways of their egos."""

    def __init__(self, scenes: Sequence[TrafficScene]) -> None:
        if not scenes:
            raise DataError("an environment of 0 scenes")
        self.scenes = WorldScenes.build(scenes)
        self.ways = build_paths(self.scenes, "log", only_egos=True).poses[range(len(scenes)), self.scenes.ego]

    def __len__(self) -> int:
        return len(self.scenes)


class Episodes:
    """Worlds that began together, one scene of the stock each."""

    def __init__(
        self,
        stock: Stock,
        chosen: Sequence[int],
        world: World,
        agents: Callable[[], AgentPolicy],
        observer: Callable[[], Observer] | None,
    ) -> None:
        beyond = [k for k in chosen if not 0 <= k < len(stock)]
        if beyond:
            raise DataError(f"there are no scenes {beyond}: the environment has {len(stock)}, counted from 0")
        self._world = world
        self.state = world.reset(stock.scenes.select(chosen))
        self._way = stock.ways[list(chosen)][:, None]  # [B,1,P,3]
        self._policy, self._observer = agents(), None if observer is None else observer()
        self._policy.start(self.state, self.state.scenes.sources)
        if self._observer is not None:
            self._observer.start(self.state)
        self._s = project(self._way, self._ego_pose(), torch.zeros(len(chosen), 1))

    @property
    def ids(self) -> list[str]:
        """Of the scenes."""
        return [scene.id for scene in self.state.scenes.sources]

    def observe(self) -> NDArray[np.float32]:
        """[B,size]"""
        if self._observer is not None:
            return self._observer.observe(self.state)
        return ego_view.ego_view(self.state, self._way, self._s)

    def step(self, actions: NDArray[np.floating]):
        """(rewards [B], terminated [B], truncated [B], what happened by event [B]) of one token; ``actions`` [B,2]."""
        state = self.state
        steering, acceleration = torch.from_numpy(actions.clip(-1.0, 1.0) * (STEERING, ACCELERATION)).float().T
        worlds, ego = state.ego_index()
        moves = self._policy.act(state).resolve(state)
        values = moves.values.clone()
        speed, length = state.speed[worlds, ego].clamp_min(0.0), state.scenes.size[state.scene][worlds, ego, 0]
        values[worlds, ego], _ = bicycle(state.pose[worlds, ego], speed, length, steering, acceleration)
        self._world.step(state, Moves.poses(values, leaves=moves.leaves))
        events = self._world.events(state)
        happened = {name: getattr(events, name).any()[worlds, ego].numpy() for name in EVENTS}
        before, self._s = self._s, project(self._way, self._ego_pose(), self._s, reach=15)
        progress = (self._s - before)[:, 0].double().numpy()
        terminated = np.any(list(happened.values()), axis=0)
        truncated = (state.steps_left < TOKEN_STEPS) & ~terminated
        return progress / PROGRESS_M - terminated, terminated, truncated, happened

    def _ego_pose(self) -> torch.Tensor:
        worlds, ego = self.state.ego_index()
        return self.state.pose[worlds, ego][:, None]  # [B,1,3]


def _spaces(observer: Callable[[], Observer] | None) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """(observation space, action space) of one world."""
    size = ego_view.SIZE if observer is None else observer().size
    return (
        gymnasium.spaces.Box(-ego_view.LIMIT, ego_view.LIMIT, (size,), np.float32),
        gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
    )


def _checked(actions: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.float32]:
    actions = np.asarray(actions, np.float32)
    if actions.shape != shape or not np.isfinite(actions).all():
        raise DataError(f"actions {actions} are not finite numbers of shape {shape}")
    return actions


class ClosedLoopEnv(gymnasium.Env):
    """One world. ``scenes`` are built once (or given as a ``Stock``) and drawn from at every reset."""

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium's own shape)

    def __init__(
        self,
        scenes: Sequence[TrafficScene] | Stock,
        *,
        agents: Callable[[], AgentPolicy] = Replay,
        horizon_s: float = 8.0,
        observer: Callable[[], Observer] | None = None,
    ) -> None:
        self._stock = scenes if isinstance(scenes, Stock) else Stock(scenes)
        self._agents, self._observer = agents, observer
        self._world = World(horizon_s=horizon_s, events=EVENTS)
        self.observation_space, self.action_space = _spaces(observer)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """``options={"scene": k}`` chooses the scene."""
        super().reset(seed=seed)
        k = (options or {}).get("scene")
        k = int(self.np_random.integers(len(self._stock))) if k is None else int(k)
        self._episode = Episodes(self._stock, [k], self._world, self._agents, self._observer)
        return self._episode.observe()[0], {"scene": self._episode.ids[0]}

    def step(self, action: NDArray[np.floating]):
        """Raises DataError for an action of a wrong shape or one that is not finite."""
        action = _checked(action, (2,))
        reward, terminated, truncated, happened = self._episode.step(action[None])
        info = {name: bool(value[0]) for name, value in happened.items()}
        return self._episode.observe()[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    @property
    def state(self) -> WorldState:
        """The world as it is."""
        return self._episode.state


class ClosedLoopVectorEnv(gymnasium.vector.VectorEnv):
    """``num_envs`` worlds in one batch; one that has ended begins anew in the next step."""

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        scenes: Sequence[TrafficScene] | Stock,
        num_envs: int,
        *,
        agents: Callable[[], AgentPolicy] = Replay,
        horizon_s: float = 8.0,
        observer: Callable[[], Observer] | None = None,
    ) -> None:
        if num_envs < 1:
            raise DataError(f"num_envs is {num_envs}; at least 1 was expected")
        self._stock = scenes if isinstance(scenes, Stock) else Stock(scenes)
        self._agents, self._observer = agents, observer
        self._world = World(horizon_s=horizon_s, events=EVENTS)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _spaces(observer)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._randoms = [seeding.np_random(None)[0] for _ in range(num_envs)]  # each world draws its own scenes
        self._ended = np.zeros(num_envs, np.bool_)
        self._groups: list[tuple[NDArray[np.int64], Episodes]] = []  # of equal age: whose worlds (-1: ended), episodes

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None):
        """``seed`` k seeds world n with k + n; ``options={"scene": k}`` or a list of ``num_envs`` chooses scenes."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        seeds = [seed + k for k in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise DataError(f"{len(seeds)} seeds for {self.num_envs} worlds")
        for k, one in enumerate(seeds):
            if one is not None:
                self._randoms[k] = seeding.np_random(one)[0]
        scene = (options or {}).get("scene")
        chosen = None if scene is None else np.broadcast_to(np.asarray(scene, np.int64), (self.num_envs,)).tolist()
        self._groups, self._ended[:] = [], False
        observations, infos = self._empty(), {}
        self._begin(np.arange(self.num_envs), chosen, observations, infos)
        return observations, infos

    def step(self, actions: NDArray[np.floating]):
        """Raises DataError for actions of a wrong shape or ones that are not finite."""
        actions = _checked(actions, (self.num_envs, 2))
        observations, infos = self._empty(), {}
        rewards, ended = np.zeros(self.num_envs), np.zeros((2, self.num_envs), np.bool_)
        for envs, episodes in self._groups:
            alive = envs >= 0
            mine = envs[alive]
            group = np.zeros((len(envs), 2), np.float32)  # an ego whose episode has ended drives on unseen
            group[alive] = actions[mine]
            reward, terminated, truncated, happened = episodes.step(group)
            rewards[mine], ended[0, mine], ended[1, mine] = reward[alive], terminated[alive], truncated[alive]
            observations[mine] = episodes.observe()[alive]
            for name, value in happened.items():
                self._inform(infos, name, mine, value[alive])
            envs[alive] = np.where(terminated[alive] | truncated[alive], -1, mine)
        self._groups = [(envs, episodes) for envs, episodes in self._groups if (envs >= 0).any()]
        if self._ended.any():
            self._begin(np.flatnonzero(self._ended), None, observations, infos)
        self._ended = ended.any(axis=0)
        return observations, rewards, ended[0].copy(), ended[1].copy(), infos

    def _begin(self, envs: NDArray[np.int64], chosen: list[int] | None, observations, infos: dict[str, Any]) -> None:
        """New episodes for some worlds."""
        if chosen is None:
            chosen = [int(self._randoms[k].integers(len(self._stock))) for k in envs]
        episodes = Episodes(self._stock, chosen, self._world, self._agents, self._observer)
        self._groups.append((envs.copy(), episodes))
        observations[envs] = episodes.observe()
        self._inform(infos, "scene", envs, np.array(episodes.ids, object))

    def _empty(self) -> NDArray[np.float32]:
        return np.zeros(self.observation_space.shape, np.float32)

    def _inform(self, infos: dict[str, Any], name: str, envs: NDArray[np.int64], values: NDArray) -> None:
        """gymnasium's form: an array over worlds, and under "_" + name where it means something."""
        if name not in infos:
            infos[name] = np.full(self.num_envs, None if values.dtype == object else 0, values.dtype)
            infos[f"_{name}"] = np.zeros(self.num_envs, np.bool_)
        infos[name][envs], infos[f"_{name}"][envs] = values, True
