"""One closed-loop score of a drive, from what the ego and everybody else did: NAVSIM's gates and weights, all of it.

  score = NC DAC DDC TLC (5 EP + 5 TTC + 2 C) / 12

Over the whole drive, every 0.1 s:
  NC   no at-fault contact: 0 after one with a road user, 0.5 with an object (kind OTHER), else 1. NAVSIM's rule: the
       ego moves, and hits somebody who stands, or hits with its front edge somebody who is not behind, or with a side
       while it is astray (straddles lanes or is off the road).
  DAC  1 unless a corner of the ego's box was off the road.
  DDC  metres driven against all lanes below within any 1.1 s: below 2 m 1, below 6 m 0.5, else 0.
  TLC  1 unless the front bumper crossed a stop point that had been red for RED_GRACE_STEPS (1 s).
  EP   progress along the recorded way / that of the recording in the same time, at most 1; 1 where that is below 5 m.
  TTC  share of the time in which the ego, going on straight at its speed for 0.3, 0.6 or 0.9 s, would not touch where
       somebody ahead of it (within 30 degrees) is by then, nor somebody not behind it while it is astray.
  C    share of the time in which accelerations, jerks and yaw rates, smoothed as NAVSIM 2.2 does, are within NAVSIM's
       bounds.

What was decided, and why:
  gates        NAVSIM's, all or nothing, also over 15 s: one fault ends a drive in the real world as well.
  TTC, C       all or nothing in NAVSIM's 4 seconds; over a whole drive that would say of nearly everybody that there
               was a bad moment (of the recordings too), so here they are shares of time.
  red for 1 s  most sources tell no yellow, and nobody can stop for a light that turned red a moment ago. A law with a
               yellow of 3 s would be stricter.
  tracker      a planner is judged through ``tracker.py``, which holds the driven distance where NAVSIM's does not:
               without it the recorded plan itself drifts by metres within 15 s, which is no planner's fault. What the
               whole loop costs is measured before anything else (``closed_loop.check``), and must stay below 0.5.
  EP           against the recorded ego, who may stand where another could have gone: progress beyond it earns nothing.

A term that the scene cannot tell (no lights, road edges or lanes) is NaN and takes no part; ``unknown`` counts them.
It is not PDMS or EPDMS: those score 4 seconds from one question with everybody else on rails, relative to PDM-Closed,
with polygons of lanes and intersections (which a scene of centre lines has not: straddling is a centre more than
STRADDLE_M from the nearest centre line, and the clause on intersections is left out). It is not nuPlan's closed-loop
score, nor comparable with either, nor across other horizons, traffic or versions: the fingerprint says all that.

Legend: B worlds, N road users, E steps of the drive.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop.contact import boxes_touch
from navsim_ext.closed_loop.events import RED_GRACE_STEPS, find_events
from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.closed_loop.paths import Paths, build_paths, project
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.pdm.comfort import (
    MAX_JERK,
    MAX_LAT_ACCELERATION,
    MAX_LON_ACCELERATION,
    MAX_LON_JERK,
    MAX_YAW_ACCELERATION,
    MAX_YAW_RATE,
    MIN_LON_ACCELERATION,
    Filter,
    comfort_filters,
)
from navsim_ext.pdm.ego import LENGTH, REAR_AXLE_TO_CENTER
from navsim_ext.traffic.codes import AgentKind

VERSION = 2
MULTIPLIERS = ("nc", "dac", "ddc", "tlc")
WEIGHTS = {"ep": 5.0, "ttc": 5.0, "c": 2.0}
COLUMNS = ("score", *MULTIPLIERS, *WEIGHTS)
STOPPED_SPEED = 0.05  # m/s
AHEAD, BEHIND = math.radians(30.0), math.radians(150.0)
STRADDLE_M = 0.75  # a car of 2 m in a lane of 3.5 m leaves it at this offset
OBJECT_PENALTY = 0.5
WRONG_WAY_STEPS, WRONG_WAY_M = 11, (2.0, 6.0)
LOOK_AHEAD = (3, 6, 9)  # steps
MINIMUM_PROGRESS_M = 5.0
COMFORT_SAMPLES = 16  # fewest for NAVSIM's filters


def fingerprint() -> Fingerprint:
    """What the score is: version, weights and constants."""
    fields = {
        "version": VERSION, "multipliers": list(MULTIPLIERS), "weights": WEIGHTS, "straddle_m": STRADDLE_M,
        "look_ahead_steps": list(LOOK_AHEAD), "wrong_way_m": list(WRONG_WAY_M), "object_penalty": OBJECT_PENALTY,
        "minimum_progress_m": MINIMUM_PROGRESS_M, "red_grace_steps": RED_GRACE_STEPS, "stopped_speed": STOPPED_SPEED,
    }  # fmt: skip
    return Fingerprint("closed-loop-score", fields)


def rear_axle_offset(state: WorldState) -> Tensor:
    """[B] m from the ego's rear axle forward to its box centre: the scene's, or a Pacifica's share of the length."""
    worlds, ego = state.ego_index()
    known = torch.tensor([scene.rear_axle for scene in state.scenes.sources], device=state.scene.device)[state.scene]
    share = REAR_AXLE_TO_CENTER / LENGTH * state.scenes.size[state.scene][worlds, ego, 0]
    return torch.where(known.isnan(), share, known)


def score_drives(state: WorldState) -> dict[str, NDArray[np.float64]]:
    """Columns [B] of every driven world: :data:`COLUMNS`, ``unknown``, ``contacts``, ``progress_m``, ``recorded_m``,
    ``mean_speed``, ``first_fault_s`` (of an at-fault contact; NaN: none) and ``clean`` (share of the drive before the
    first moment at which a gate falls below 1: grades drives that all end with a fault). Raises DataError before the
    first step."""
    if state.step < 1:
        raise DataError("nothing was driven: there is no drive to score")
    events = find_events(state, 0, state.step, ("contact", "off_road", "red_light", "wrong_way"))
    worlds, ego = state.ego_index()
    drive = _Drive(state, events, worlds, ego)
    nc, first, contacts, ignored = drive.collisions()
    pick = lambda event: (event.value[worlds, ego], event.valid[worlds, ego])  # noqa: E731
    columns: dict[str, Tensor] = {"nc": nc}
    for name, event in (("dac", events.off_road), ("tlc", events.red_light)):
        value, valid = pick(event)
        columns[name] = torch.where(valid.any(-1), 1.0 - (value & valid).any(-1).float(), torch.nan)
    columns["ddc"], wrong = drive.driving_direction(*pick(events.wrong_way))
    faults = [wrong, *(value & valid for value, valid in (pick(events.off_road), pick(events.red_light)))]
    columns["clean"] = _clean_share(faults, first, state.step)
    columns["ttc"] = drive.time_to_collision(ignored)
    columns["c"] = drive.comfort()
    progress, recorded = progress_of(state, build_paths(state.scenes, "log", only_egos=True))
    columns["ep"] = torch.where(
        recorded < MINIMUM_PROGRESS_M, 1.0, (progress / recorded.clamp_min(MINIMUM_PROGRESS_M)).clamp(0.0, 1.0)
    )
    result = {name: columns[name].double().cpu().numpy() for name in (*MULTIPLIERS, *WEIGHTS)}
    result["score"] = combine(result)
    result["unknown"] = np.sum([np.isnan(result[name]) for name in (*MULTIPLIERS, *WEIGHTS)], axis=0).astype(float)
    result["contacts"] = contacts.double().cpu().numpy()
    result["progress_m"], result["recorded_m"] = progress.double().cpu().numpy(), recorded.double().cpu().numpy()
    result["mean_speed"] = drive.speed.mean(-1).double().cpu().numpy()
    result["clean"] = columns["clean"].double().cpu().numpy()
    result["first_fault_s"] = np.where(first.cpu().numpy() < 0, np.nan, first.cpu().numpy() * STEP_S)
    return result


def _clean_share(faults: list[Tensor], contact: Tensor, steps: int) -> Tensor:
    """[B] share of ``steps`` before the first of the ``faults`` [B,E] and the step of ``contact`` [B] (-1: none)."""
    fault = torch.stack([one.cpu() for one in faults]).any(dim=0)
    first = torch.where(fault.any(-1), fault.float().argmax(-1), steps)
    contact = torch.where(contact < 0, float(steps), contact.cpu() - 1.0)
    return torch.minimum(first.float(), contact) / steps


def combine(columns: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """The formula above; NaN terms take no part. ``ep`` and the comfort term are always known."""
    gate = np.prod([np.nan_to_num(columns[name], nan=1.0) for name in MULTIPLIERS], axis=0)
    x = np.stack([columns[name] for name in WEIGHTS])
    w = np.array(list(WEIGHTS.values()))[:, None] * ~np.isnan(x)
    return gate * (w * np.nan_to_num(x)).sum(0) / w.sum(0)


def progress_of(state: WorldState, paths: Paths) -> tuple[Tensor, Tensor]:
    """(driven, recorded) [B] m along the ego's recorded way from now to the end of the drive."""
    scenes, now = state.scenes, state.scenes.now
    worlds, ego = state.ego_index()
    poses = paths.poses[state.scene, ego][:, None]

    def along(track: Tensor) -> Tensor:  # [B,E+1,3] -> [B]
        s = torch.zeros(len(worlds), 1, device=track.device)
        first = None
        for t in [*range(0, track.shape[1], 5), track.shape[1] - 1]:
            s = project(poses, track[:, t : t + 1], s, reach=12)
            first = s if first is None else first
        return (s - first)[:, 0].clamp_min(0.0)

    driven = along(state.poses[worlds, ego, now : now + state.step + 1])
    columns = (torch.arange(state.step + 1, device=ego.device) + now)[None].expand(len(ego), -1)
    last = torch.minimum(columns, scenes.last_seen[state.scene, ego][:, None])
    log = scenes.log_pose[state.scene, ego].gather(1, last[..., None].expand(-1, -1, 3))
    return driven, along(log)


class _Drive:
    """The ego's drive against everybody else's."""

    def __init__(self, state: WorldState, events, worlds: Tensor, ego: Tensor) -> None:
        now, last = state.scenes.now, state.scenes.now + state.step
        self.state, self.events, self.worlds, self.ego = state, events, worlds, ego
        self.pose = state.poses[worlds, ego, now : last + 1]  # [B,E+1,3], from now on
        self.others = state.poses[:, :, now : last + 1]  # [B,N,E+1,3]
        self.there = state.there[:, :, now : last + 1].clone()
        self.there[worlds, ego] = False
        self.size = state.scenes.size[state.scene]  # [B,N,2]
        self.mine = self.size[worlds, ego]  # [B,2]
        self.axle = rear_axle_offset(state)
        step = self.pose[:, 1:, :2] - self.pose[:, :-1, :2]
        self.step_m = torch.hypot(step[..., 0], step[..., 1])
        self.speed = self.step_m / STEP_S  # [B,E]
        x, y = self.pose[:, 1:, 0][:, None].contiguous(), self.pose[:, 1:, 1][:, None].contiguous()
        offset = state.scenes.lanes.offset_at(x, y, state.scene)[:, 0].abs()
        off = (events.off_road.value & events.off_road.valid)[worlds, ego]
        self.astray = off | (offset > STRADDLE_M) | offset.isnan()  # [B,E] straddles lanes, or is off them
        if state.scenes.lanes.shape == (3, 3):
            self.astray = off

    def _angle(self, world: int, row: int, t: int) -> float:
        """[rad] between the ego's heading and the direction from its rear axle to a road user's centre at step t."""
        x, y, h = self.pose[world, t].tolist()
        axle = float(self.axle[world])
        ox, oy, _ = self.others[world, row, t].tolist()
        dx, dy = ox - (x - axle * math.cos(h)), oy - (y - axle * math.sin(h))
        norm = math.hypot(dx, dy)
        return math.acos(max(-1.0, min(1.0, (math.cos(h) * dx + math.sin(h) * dy) / norm))) if norm > 0.0 else 0.0

    def collisions(self) -> tuple[Tensor, Tensor, Tensor, dict[tuple[int, int], int]]:
        """(NC, step of the first fault or -1, road users touched) [B] and {(world, row): ignored from this step}."""
        B = len(self.worlds)
        nc, first, touched = torch.ones(B), torch.full((B,), -1.0), torch.zeros(B)
        ignored: dict[tuple[int, int], int] = {}
        seen: set[tuple[int, int]] = set()
        ego = self.ego.tolist()
        pairs = self.events.contact_pairs.tolist()
        for world, row, other, t in sorted((p for p in pairs if p[1] == ego[p[0]]), key=lambda p: (p[0], p[3], p[2])):
            del row
            key = (world, other)
            if key not in seen:
                seen.add(key)
                touched[world] += 1
            if key in ignored:
                continue
            if not self._at_fault(world, other, t):
                ignored[key] = t
                continue
            is_object = int(self.state.scenes.kind[self.state.scene[world], other]) == int(AgentKind.OTHER)
            nc[world] = min(float(nc[world]), OBJECT_PENALTY if is_object else 0.0)
            if first[world] < 0:
                first[world] = t
        return nc, first, touched, ignored

    def _at_fault(self, world: int, other: int, t: int) -> bool:
        if float(self.speed[world, t - 1]) <= STOPPED_SPEED:
            return False
        moved = self.others[world, other, t, :2] - self.others[world, other, t - 1, :2]
        known = bool(self.there[world, other, t - 1])
        is_object = int(self.state.scenes.kind[self.state.scene[world], other]) == int(AgentKind.OTHER)
        if is_object or (known and float(moved.norm()) / STEP_S <= STOPPED_SPEED):
            return True
        if self._angle(world, other, t) > BEHIND:
            return False
        x, y, h = self.pose[world, t].tolist()
        half = 0.5 * float(self.mine[world, 0])
        edge = torch.tensor([x + half * math.cos(h), y + half * math.sin(h), h])
        edge_size = torch.tensor([0.0, float(self.mine[world, 1])])
        box, size = self.others[world, other, t].cpu(), self.size[world, other].cpu()
        return bool(boxes_touch(edge, edge_size, box, size)) or bool(self.astray[world, t - 1])

    def driving_direction(self, against: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """(DDC [B], NaN where no lane was ever below; where it is below 1 [B,E])."""
        metres = torch.where(against & valid, self.step_m, 0.0)
        window = torch.nn.functional.pad(metres, (WRONG_WAY_STEPS - 1, 0)).unfold(-1, WRONG_WAY_STEPS, 1).sum(-1)
        worst = window.amax(-1)
        low, high = WRONG_WAY_M
        value = torch.where(worst < low, 1.0, torch.where(worst < high, 0.5, 0.0))
        return torch.where(valid.any(-1), value, torch.nan), window >= low

    def time_to_collision(self, ignored: dict[tuple[int, int], int]) -> Tensor:
        """TTC [B]."""
        B, _, T, _ = self.others.shape
        E = T - 1
        considered = self.there.clone()
        for (world, row), t in ignored.items():
            considered[world, row, t:] = False
        bad = torch.zeros(B, E, dtype=torch.bool)
        heading = self.pose[:, 1:, 2].contiguous()
        cos, sin = torch.cos(heading), torch.sin(heading)
        rear = self.pose[:, 1:, :2] - self.axle[:, None, None] * torch.stack((cos, sin), -1)
        for ahead in LOOK_AHEAD:
            steps = E - ahead
            if steps < 1:
                continue
            moved = self.pose[:, 1 : 1 + steps].clone()
            reach = (self.speed[:, :steps] * ahead * STEP_S)[..., None]
            moved[..., :2] += reach * torch.stack((cos, sin), -1)[:, :steps]
            then = self.others[:, :, 1 + ahead :]
            d = then[..., :2] - moved[:, None, :, :2]
            radius = 0.5 * torch.hypot(self.size[..., 0], self.size[..., 1])
            own = 0.5 * torch.hypot(self.mine[:, 0], self.mine[:, 1])
            near = (d.square().sum(-1) < (radius + own[:, None]).square()[..., None]) & considered[:, :, 1 + ahead :]
            near &= considered[:, :, 1 : 1 + steps] & (self.speed[:, :steps] >= 5e-3)[:, None]
            world, row, t = near.nonzero(as_tuple=True)
            if not len(world):
                continue
            touch = boxes_touch(moved[world, t], self.mine[world], then[world, row, t], self.size[world, row])
            world, row, t = world[touch], row[touch], t[touch]
            towards = then[world, row, t, :2] - rear[world, t]
            cosine = (cos[world, t] * towards[:, 0] + sin[world, t] * towards[:, 1]) / towards.norm(dim=-1).clamp_min(
                1e-6
            )
            violates = cosine > math.cos(AHEAD)
            violates |= self.astray[world, t] & (cosine > math.cos(BEHIND))
            bad[world[violates].cpu(), t[violates].cpu()] = True
        return 1.0 - bad.double().mean(-1)

    def comfort(self) -> Tensor:
        """C [B]: NAVSIM 2.2's filters and bounds on rear-axle speeds from positions; the lateral acceleration is v
        times the yaw rate (NAVSIM's simulated one is 0). Past steps take part as far as the recording shows them."""
        state = self.state
        first, last = max(0, state.scenes.now - 15), state.scenes.now + state.step
        result = torch.ones(len(self.worlds))
        for b, (world, row) in enumerate(zip(self.worlds.tolist(), self.ego.tolist())):
            there = state.there[world, row, first : last + 1].cpu().numpy()
            begin = first + (int(np.flatnonzero(~there)[-1]) + 1 if not there.all() else 0)
            poses = state.poses[world, row, begin : last + 1].double().cpu().numpy()
            if len(poses) < COMFORT_SAMPLES:
                result[b] = torch.nan
                continue
            result[b] = float(comfortable(poses, float(self.axle[world]))[-state.step :].mean())
        return result


def comfortable(poses: NDArray[np.float64], axle: float) -> NDArray[np.bool_]:
    """[n] whether box-centre poses [n,3] 0.1 s apart are within all six bounds of ``pdm/comfort.py`` at each time."""
    heading = np.unwrap(poses[:, 2])
    rear = poses[:, :2] - axle * np.stack([np.cos(heading), np.sin(heading)], -1)
    velocity = np.gradient(rear, STEP_S, axis=0)
    v = np.cos(heading) * velocity[:, 0] + np.sin(heading) * velocity[:, 1]
    ax, ay = np.gradient(v, STEP_S), v * np.gradient(heading, STEP_S)
    filters = comfort_filters("v2", len(poses))
    longitudinal, lateral = _filtered(filters.acceleration, ax), _filtered(filters.acceleration, ay)
    jerk = _filtered(filters.jerk, _filtered(filters.jerk_input, np.hypot(ax, ay)))
    longitudinal_jerk = _filtered(filters.jerk, _filtered(filters.jerk_input, ax))
    return (
        (longitudinal > MIN_LON_ACCELERATION)
        & (longitudinal < MAX_LON_ACCELERATION)
        & (np.abs(lateral) < MAX_LAT_ACCELERATION)
        & (np.abs(jerk) < MAX_JERK)
        & (np.abs(longitudinal_jerk) < MAX_LON_JERK)
        & (np.abs(_filtered(filters.yaw_acceleration, heading)) < MAX_YAW_ACCELERATION)
        & (np.abs(_filtered(filters.yaw_rate, heading)) < MAX_YAW_RATE)
    )


def _filtered(operator: Filter, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """y_i = sum_k weights[i,k] x[start_i + k]."""
    window = operator.start[:, None] + np.arange(operator.weights.shape[1])
    return (operator.weights * values[window]).sum(axis=1)
