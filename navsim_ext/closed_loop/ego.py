"""A planner in the ego's seat: asked every half second with what it would see, its plan driven by NAVSIM's tracker.

At each question a planner of the suite gets a ``SceneBatch``: the past 1.5 s as driven (rear axle, 2 Hz), the command,
speed and acceleration, and freshly drawn cameras where the seat has some. Between questions the plan (8 poses of 0.5 s)
is followed as in scoring: interpolated to 0.1 s, LQR tracker, kinematic bicycle of a Pacifica (``tracker.py`` says what
was added for long drives). The tracker's state (speed, steering) lives on from question to question, in float64.

A planner has no plan where its poses are not finite (a VLM whose answer cannot be read gives NaN). ``without_plan``
says what becomes of that scene: "invalid", the default, ends it as open-loop scoring does; "last" lets the ego go on
with the plan that it has, for as long as that lasts (4 s), and then ends it. Both are counted (``unanswered``).

Declared here: where the recording has less than 1.5 s of past, the ego is taken to have driven straight at its first
speed; the lateral acceleration told is v times the yaw rate (NAVSIM's bicycle says 0); a scene without commands tells
left or right where the recorded way bends by more than 2 m within the next 20 m of it, else straight.

Legend: B worlds, N road users, H = 4 past poses. Rear-axle poses in the frame of the scene.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_S, TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.score import rear_axle_offset
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracker import follow
from navsim_ext.closed_loop.tracks import ABSENT
from navsim_ext.errors import DataError
from navsim_ext.frames import NUM_FUTURE_POSES, NUM_HISTORY_POSES, to_global, to_local, wrap_angle
from navsim_ext.hidden_cache.source import SceneEncoder
from navsim_ext.pdm.ego import AX, HEADING, STATE_SIZE, STEERING, VX, WHEEL_BASE, YAW_RATE
from navsim_ext.planners import Planner
from navsim_ext.scene import COMMANDS, SceneBatch
from navsim_ext.traffic.scene import TrafficScene

PLAN_STEPS = 40  # of 0.1 s that one plan lasts
WITHOUT_PLAN = ("invalid", "last")
BEND_M, BEND_WITHIN_M = 2.0, 20.0
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a planner may raise in the middle of a drive: its scene becomes invalid, the others go on."""


class EgoCameras(Protocol):
    """Draws what the ego's cameras see; made by configuration, since drawing stands above this package."""

    def __call__(
        self, state: WorldState, worlds: Sequence[int], ego: NDArray[np.float64]
    ) -> Sequence[Mapping[str, str]]:
        """Absolute paths of pictures by camera name for these worlds; ``ego`` [len(worlds),3] are rear-axle poses."""
        ...


class EgoSeat:
    """An AgentPolicy for the ego (mix it in as ``ego=``).

    ``encoder`` gives hidden states for planners that use them; ``ask_every_s`` is a multiple of 0.5 s up to 4 s.
    ``failures`` maps worlds to the reason why they are invalid: a planner that raised, or had no plan. Such an ego goes
    on straight at its speed, so that the other worlds are not held up; its drive must not be scored. ``unanswered``
    counts the questions of each world to which there was no plan.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        encoder: SceneEncoder | None = None,
        cameras: EgoCameras | None = None,
        ask_every_s: float = TOKEN_S,
        without_plan: str = "invalid",
    ) -> None:
        if without_plan not in WITHOUT_PLAN:
            raise DataError(f"without_plan is {without_plan!r}; one of {', '.join(WITHOUT_PLAN)} was expected")
        every = ask_every_s / TOKEN_S
        if abs(every - round(every)) > 1e-6 or not 1 <= round(every) <= PLAN_STEPS // TOKEN_STEPS:
            raise DataError(f"ask_every_s is {ask_every_s}; a multiple of {TOKEN_S} s up to 4 s was expected")
        if encoder is not None and hasattr(planner, "require_hidden"):
            planner.require_hidden(encoder.fingerprint)
        if encoder is not None and cameras is None:
            raise DataError("hidden states of a drive need cameras: set cameras=... beside the encoder")
        self.planner, self.encoder, self.cameras = planner, encoder, cameras
        self.every, self.name, self.without_plan = round(every), planner.name, without_plan
        self.failures: dict[int, str] = {}
        self.unanswered: list[int] = []
        self.questions = 0

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        self.failures, self.unanswered, self.questions = {}, [0] * len(state.scene), 0
        self._left = [0] * len(state.scene)  # steps of each world's last plan that have not been driven
        self.axle = rear_axle_offset(state).double().cpu().numpy()
        self.rear = np.stack([self._first_state(state, b) for b in range(len(state.scene))])  # [B,11]
        self.tracked: NDArray[np.float64] | None = None  # [B,41,11] states that follow from the last plan
        self.references: NDArray[np.float64] | None = None  # [B,41,3] that they follow
        self.used = 0  # tokens of it that have been driven
        self._ways = [self._recorded_way(state, b) for b in range(len(state.scene))]

    @torch.no_grad()
    def act(self, state: WorldState) -> Moves:
        if self.tracked is None or self.used == self.every:
            self._ask(state)
        first = self.used * TOKEN_STEPS
        states = self.tracked[:, first + 1 : first + 1 + TOKEN_STEPS]
        self.used += 1
        self.rear = states[:, -1].copy()
        heading = states[..., HEADING]
        centre = states[..., :2] + self.axle[:, None, None] * np.stack([np.cos(heading), np.sin(heading)], -1)
        worlds, ego = state.ego_index()
        before = state.pose[worlds, ego, 2].double().cpu().numpy()[:, None]
        heading = before + wrap_angle(heading - before)  # continuous
        moves = state.pose[:, :, None].expand(-1, -1, TOKEN_STEPS, -1).clone()
        driven = np.concatenate([centre, heading[..., None]], axis=-1).astype(np.float32)
        moves[worlds, ego] = torch.from_numpy(driven).to(moves.device)
        return Moves.poses(moves)

    def _ask(self, state: WorldState) -> None:
        plans = np.full((len(self.rear), NUM_FUTURE_POSES, 3), np.nan)
        asked = [b for b in range(len(self.rear)) if b not in self.failures]
        try:
            plans[asked] = self._plan(state, asked)
        except FAILURES:
            for b in asked:  # one by one: whose fault is it?
                try:
                    plans[b] = self._plan(state, [b])[0]
                except FAILURES as error:
                    self.failures[b] = f"planner raised {type(error).__name__} at {state.step * STEP_S:.1f} s: {error}"
        begin = self.every * TOKEN_STEPS
        goes_on = []
        for b in asked:
            self._left[b] -= begin
            if b in self.failures:
                continue
            if np.isfinite(plans[b]).all():
                self._left[b] = PLAN_STEPS
                continue
            self.unanswered[b] += 1
            if self.without_plan == "last" and self._left[b] >= begin:
                goes_on.append(b)
            else:
                self.failures[b] = f"plan not finite at {state.step * STEP_S:.1f} s"
                if self.without_plan == "last" and state.step:
                    self.failures[b] += ", and the last plan was used up"
        times = TOKEN_S * np.arange(1, NUM_FUTURE_POSES + 1)
        for b in self.failures:
            plans[b] = 0.0
            plans[b, :, 0] = max(self.rear[b, VX], 0.0) * times
        self.questions += len(asked)
        followed = [
            self._rest(b, begin)
            if b in goes_on
            else follow(plan, rear, None if self.references is None else self.references[b, begin])
            for b, (plan, rear) in enumerate(zip(plans, self.rear))
        ]
        self.tracked, self.references = (np.stack(part) for part in zip(*followed))
        self.used = 0

    def _rest(self, b: int, driven: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What is left of the last plan of a world, held at its end: (states [41,11], reference [41,3])."""
        at = np.minimum(np.arange(driven, driven + PLAN_STEPS + 1), PLAN_STEPS)
        return self.tracked[b, at], self.references[b, at]

    def _plan(self, state: WorldState, worlds: list[int]) -> NDArray[np.float64]:
        if not worlds:
            return np.empty((0, NUM_FUTURE_POSES, 3))
        batch = self.scene_batch(state, worlds)
        hidden = None if self.encoder is None else self.encoder(batch)
        poses = self.planner.plan(batch, hidden).double().cpu().numpy()
        if poses.shape != (len(worlds), NUM_FUTURE_POSES, 3):
            raise DataError(
                f"planner {self.name} gave {poses.shape}; {(len(worlds), NUM_FUTURE_POSES, 3)} was expected"
            )
        return poses

    def scene_batch(self, state: WorldState, worlds: Sequence[int]) -> SceneBatch:
        """What the planner sees in these worlds."""
        history, status, target, tokens = [], [], [], []
        for b in worlds:
            rear, scene = self.rear[b], state.scenes.sources[int(state.scene[b])]
            history.append(to_local(self._past(state, b), rear[:3]))
            one_hot = np.zeros(len(COMMANDS))
            one_hot[self._command(scene, b)] = 1.0
            status.append([*one_hot, rear[VX], 0.0, rear[AX], rear[VX] * rear[YAW_RATE]])
            target.append(to_local(self._recorded_future(state, b), rear[:3]))
            tokens.append(f"{scene.id}@{state.step}")
        cameras = () if self.cameras is None else self.cameras(state, worlds, self.rear[list(worlds), :3])
        tensor = lambda values: torch.from_numpy(np.asarray(values, np.float32))  # noqa: E731
        names = [state.scenes.sources[int(state.scene[b])].id for b in worlds]
        batch = SceneBatch(tokens, names, tensor(history), tensor(status), tensor(target), cameras)
        return batch.validate()

    def _first_state(self, state: WorldState, b: int) -> NDArray[np.float64]:
        """The tracker's state [11] at now: recorded pose, speed, acceleration, and the steering of the recorded yaw
        rate (NAVSIM starts with 0, which in a bend costs a metre to the side)."""
        _, ego = state.ego_index()
        scene = state.scenes.sources[int(state.scene[b])]
        result = np.zeros(STATE_SIZE)
        result[:3] = self._rear_axle(state.poses[b, ego[b], state.column].double().cpu().numpy(), b)
        result[VX] = float(state.speed[b, ego[b]])
        if scene.ego_dynamics is not None:
            result[VX], result[AX] = scene.ego_dynamics[scene.now, 0], scene.ego_dynamics[scene.now, 2]
        elif state.column >= 5 and bool(state.there[b, ego[b], state.column - 5 : state.column + 1].all()):
            xy = state.poses[b, ego[b], [state.column - 5, state.column - 4, state.column - 1, state.column], :2]
            before, after = (xy[1] - xy[0]).norm() / STEP_S, (xy[3] - xy[2]).norm() / STEP_S
            result[AX] = float(after - before) / (4 * STEP_S)
        if state.column and bool(state.there[b, ego[b], state.column - 1]) and result[VX] > 1.0:
            turned = float(state.poses[b, ego[b], state.column, 2] - state.poses[b, ego[b], state.column - 1, 2])
            result[YAW_RATE] = wrap_angle(turned) / STEP_S
            result[STEERING] = math.atan(WHEEL_BASE * result[YAW_RATE] / result[VX])
        return result

    def _rear_axle(self, centre: NDArray[np.float64], b: int) -> NDArray[np.float64]:
        heading = centre[..., 2]
        shift = self.axle[b] * np.stack([np.cos(heading), np.sin(heading), 0.0 * heading], -1)
        return centre - shift

    def _past(self, state: WorldState, b: int) -> NDArray[np.float64]:
        """[H,3] rear-axle poses at -1.5, -1.0, -0.5, 0 s."""
        _, ego = state.ego_index()
        columns = state.column - TOKEN_STEPS * np.arange(NUM_HISTORY_POSES - 1, -1, -1)
        there = state.there[b, ego[b]].cpu().numpy()
        known = np.array([c >= 0 and bool(there[max(c, 0) : state.column + 1].all()) for c in columns])
        poses = state.poses[b, ego[b]].double().cpu().numpy()
        past = np.array([self._rear_axle(poses[max(c, 0)], b) for c in columns])
        past[-1] = self.rear[b, :3]
        oldest = int(np.flatnonzero(known)[0])
        first = past[oldest]
        if oldest + 1 < len(past):
            v = np.hypot(*(past[oldest + 1, :2] - first[:2])) / TOKEN_S
        else:
            v = max(float(self.rear[b, VX]), 0.0)
        for k in range(oldest):
            back = v * TOKEN_S * (oldest - k)
            past[k] = first - [back * math.cos(first[2]), back * math.sin(first[2]), 0.0]
        return past

    def _recorded_future(self, state: WorldState, b: int) -> NDArray[np.float64]:
        """[8,3] recorded rear-axle poses in the next 4 s; after the end of the record straight on at its last speed."""
        _, ego = state.ego_index()
        scenes, s, row = state.scenes, int(state.scene[b]), int(ego[b])
        log, seen = scenes.log_pose[s, row].double().cpu().numpy(), scenes.log_state[s, row].cpu().numpy() != ABSENT
        last = int(np.flatnonzero(seen)[-1])
        columns = state.column + TOKEN_STEPS * np.arange(1, NUM_FUTURE_POSES + 1)
        poses = log[np.minimum(columns, last)].copy()
        v = float(np.hypot(*(log[last, :2] - log[last - 1, :2]))) / STEP_S if last > 0 and seen[last - 1] else 0.0
        beyond = np.maximum(columns - last, 0) * STEP_S * v
        poses[:, 0] += beyond * np.cos(poses[:, 2])
        poses[:, 1] += beyond * np.sin(poses[:, 2])
        return self._rear_axle(poses, b)

    def _recorded_way(self, state: WorldState, b: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(recorded rear-axle poses [n,3], their column in the log [n]) of the ego from now on."""
        _, ego = state.ego_index()
        scenes, s, row = state.scenes, int(state.scene[b]), int(ego[b])
        seen = np.flatnonzero(scenes.log_state[s, row].cpu().numpy() != ABSENT)
        seen = seen[seen >= scenes.now]
        return self._rear_axle(scenes.log_pose[s, row, seen].double().cpu().numpy(), b), seen - scenes.now

    def _command(self, scene: TrafficScene, b: int) -> int:
        """Index into COMMANDS at the place of the recorded way where the ego is."""
        way, column = self._ways[b]
        nearest = int(np.hypot(*(way[:, :2] - self.rear[b, :2]).T).argmin())
        if scene.command is not None:
            step = scene.now + round(column[nearest] * STEP_S / scene.dt)
            return int(scene.command[min(step, len(scene.command) - 1)])
        ahead = to_local(way[nearest:], way[nearest])
        reach = (
            np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(ahead[:, :2], axis=0).T))]) if len(ahead) > 1 else [0.0]
        )
        side = ahead[np.asarray(reach) <= BEND_WITHIN_M, 1]
        widest = side[np.abs(side).argmax()]
        if abs(widest) <= BEND_M:
            return COMMANDS.index("straight")
        return COMMANDS.index("left" if widest > 0.0 else "right")


def ego_global(
    rear: NDArray[np.float64], frame: NDArray[np.float64], origin: NDArray[np.float64]
) -> NDArray[np.float64]:
    """World pose of a rear-axle pose in the frame of a scene: out of the frame, then off the scene's origin."""
    pose = to_global(rear, frame)
    return pose + np.array([origin[0], origin[1], 0.0])
