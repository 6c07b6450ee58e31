"""What the ego's seat sees of a moving world, as numbers: one place for all vector planners and other RL libraries.

Everything is in the ego's own frame (box centre at the present, x forward, y left), so moving or turning the whole
scene changes nothing but rounding; road users are listed nearest first, so their order in the scene changes nothing.

  ego      speed, mean speed and change of heading over the last 0.5 s, whether that was recorded, length, width
  past     where the ego was 0.5, 1.0 ... s ago: x, y, cos, sin, known
  others   nearest road users: x, y, cos, sin, velocity, displacement over the last 0.5 s, length, width, kind, distance
  pieces   nearest pieces of the map (5 m of a lane, road edge, crosswalk, stop line): place and direction of the first
           point, middle and last point, kind, on the route, distance
  lights   nearest stop points: x, y, cos, sin of the lane there, red, known
  way      poses on the way, the first beside the ego and then every ``way_step_m``: x, y, cos, sin
  goal     x, y, log distance, cos and sin of its direction; all 0 where there is none, or it was reached

Scales: places / 20 m, velocities / 10 m/s, displacements and sizes / 5 m; clipped to +-10. What is not there is 0.

Legend: B worlds, H past half seconds, A road users, M pieces, L lights, W poses of the way.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop.events import GOAL_RADIUS_M
from navsim_ext.closed_loop.kinematics import TOKEN_S, TOKEN_STEPS, compose, relative
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import AgentKind
from sim_agents.data.pieces import NUM_KINDS, PIECE_POINTS
from sim_agents.ego.surroundings import EgoSurroundings

PLACE_M, SPEED, LENGTH_M, CLIP = 20.0, 10.0, 5.0, 10.0
EGO, PAST, OTHER, PIECE, LIGHT, WAY, GOAL = 6, 5, 11 + len(AgentKind), 8 + NUM_KINDS + 2, 6, 4, 5
"""Numbers of each part."""


@dataclass(frozen=True)
class Sight:
    """How much is seen."""

    history: int = 3  # half seconds of the ego's own past
    others: int = 16
    pieces: int = 40
    lights: int = 4
    way: int = 10
    way_step_m: int = 5
    reach_m: float = 80.0  # road users, pieces and lights farther away are not seen

    def __post_init__(self) -> None:
        counts = (self.history, self.others, self.pieces, self.lights, self.way, self.way_step_m)
        if min(counts) < 1 or not self.reach_m > 0.0:
            raise DataError(f"{self}: at least 1 of each, and a reach above 0 m, were expected")


@dataclass(frozen=True)
class EgoObservation:
    """B observations; ``*_valid`` says which rows are something."""

    ego: Tensor  # [B,EGO] float32
    past: Tensor  # [B,H,PAST]
    others: Tensor  # [B,A,OTHER]
    others_valid: Tensor  # [B,A] bool
    pieces: Tensor  # [B,M,PIECE]
    pieces_valid: Tensor  # [B,M]
    lights: Tensor  # [B,L,LIGHT]
    lights_valid: Tensor  # [B,L]
    way: Tensor  # [B,W,WAY]
    way_valid: Tensor  # [B,W]
    goal: Tensor  # [B,GOAL]
    goal_valid: Tensor  # [B]

    def __len__(self) -> int:
        return len(self.ego)

    def __getitem__(self, rows) -> EgoObservation:
        """Some of the observations."""
        return EgoObservation(*(getattr(self, one.name)[rows] for one in fields(self)))

    def to(self, device: torch.device | str) -> EgoObservation:
        return EgoObservation(*(getattr(self, one.name).to(device) for one in fields(self)))

    def flat(self) -> Tensor:
        """[B,F] float32: all parts one after another, what is not there 0; for libraries that want one vector."""
        parts = [self.ego, self.past, self.others, self.pieces, self.lights, self.way, self.goal]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    @staticmethod
    def cat(parts: list[EgoObservation]) -> EgoObservation:
        return EgoObservation(*(torch.cat([getattr(one, f.name) for one in parts]) for f in fields(EgoObservation)))


class FlatView:
    """The observation as the vector of an environment (``observer`` of ``ClosedLoopEnv``): other RL libraries see what
    the planners here see."""

    def __init__(self, sight: Sight | None = None, goal: str = "log") -> None:
        self.sight, self.goal = sight or Sight(), goal
        self.size = flat_size(self.sight)

    def start(self, state: WorldState) -> None:
        self.around = EgoSurroundings.build(state.scenes, self.goal)

    def observe(self, state: WorldState) -> NDArray[np.float32]:
        """[B,size] of all worlds."""
        return observe(state, self.around, self.sight).flat().cpu().numpy()


def flat_size(sight: Sight) -> int:
    """F of :meth:`EgoObservation.flat`."""
    rows = sight.history * PAST + sight.others * OTHER + sight.pieces * PIECE + sight.lights * LIGHT + sight.way * WAY
    return EGO + rows + GOAL


@torch.no_grad()
def observe(state: WorldState, around: EgoSurroundings, sight: Sight) -> EgoObservation:
    """What the egos of B worlds see now."""
    worlds, row = state.ego_index()
    mine = state.pose[worlds, row]  # [B,3]
    goal, goal_valid = _goal(state, around, mine, worlds, row)
    others, others_valid = _others(state, mine, row, sight)
    pieces, pieces_valid = _pieces(around, state.scene, mine, sight)
    lights, lights_valid = _lights(state, mine, sight)
    way, way_valid = _way(around, state.scene, mine, sight)
    ego, past = _ego(state, mine, worlds, row, sight)
    parts = (ego, past, others, others_valid, pieces, pieces_valid, lights, lights_valid, way, way_valid, goal,
             goal_valid)  # fmt: skip
    return EgoObservation(*(part if part.dtype == torch.bool else part.clamp(-CLIP, CLIP) for part in parts))


def _seen(pose: Tensor) -> Tensor:
    """Relative poses [...,3] as x, y, cos, sin [...,4]."""
    turn = pose[..., 2].contiguous()
    return torch.cat([pose[..., :2] / PLACE_M, torch.cos(turn)[..., None], torch.sin(turn)[..., None]], dim=-1)


def _ego(state: WorldState, mine: Tensor, worlds: Tensor, row: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    columns = state.column - TOKEN_STEPS * torch.arange(1, sight.history + 1, device=mine.device)
    kept = columns.clamp_min(0)
    known = state.there[worlds, row][:, kept] & (columns >= 0)
    known = known.cumprod(dim=1).bool()  # nothing before a gap
    before = relative(mine, state.poses[worlds, row][:, kept])  # [B,H,3]
    past = torch.where(known[..., None], torch.cat([_seen(before), known[..., None].float()], dim=-1), 0.0)
    speed, first = state.speed[worlds, row], known[:, 0]
    mean = torch.where(first, before[:, 0, :2].norm(dim=-1) / TOKEN_S, speed.abs())
    turned = torch.where(first, -before[:, 0, 2], 0.0)
    size = state.scenes.size[state.scene, row] / LENGTH_M
    ego = torch.stack([speed / SPEED, mean / SPEED, turned, first.float(), size[:, 0], size[:, 1]], dim=-1)
    return ego, past


def _others(state: WorldState, mine: Tensor, row: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    scenes, N = state.scenes, state.present.shape[1]
    seen = relative(mine, state.pose)  # [B,N,3]
    distance = seen[..., :2].norm(dim=-1)
    mask = state.present & (torch.arange(N, device=row.device) != row[:, None])
    rows, valid = _nearest(distance, mask, sight.others, sight.reach_m)
    pick = lambda values: values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))  # noqa: E731
    turn = seen[..., 2].contiguous()
    velocity = state.speed[..., None] * torch.stack([torch.cos(turn), torch.sin(turn)], dim=-1) / SPEED
    heading = mine[:, 2, None].contiguous()
    cos, sin, moved = torch.cos(heading), torch.sin(heading), state.displacement()
    moved = torch.stack([cos * moved[..., 0] + sin * moved[..., 1], cos * moved[..., 1] - sin * moved[..., 0]], dim=-1)
    kind = torch.nn.functional.one_hot(scenes.kind[state.scene].clamp(0, len(AgentKind) - 1), len(AgentKind))
    size = scenes.size[state.scene] / LENGTH_M
    values = torch.cat(
        [_seen(seen), velocity, moved / LENGTH_M, size, kind.float(), torch.log1p(distance)[..., None] / 4.0], dim=-1
    )
    return torch.where(valid[..., None], pick(values), 0.0), valid


def _pieces(around: EgoSurroundings, scene: Tensor, mine: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    pose, valid = around.pose[scene], around.valid[scene]
    distance = (pose[..., :2] - mine[:, None, :2]).norm(dim=-1)
    rows, near = _nearest(distance, valid, sight.pieces, sight.reach_m)
    worlds = torch.arange(len(scene), device=scene.device)[:, None]
    place, shape = pose[worlds, rows], around.shape[scene[:, None], rows]
    ends = shape[:, :, [PIECE_POINTS // 2, PIECE_POINTS - 1]]  # in the piece's frame
    ends = compose(place, torch.cat([ends, torch.zeros_like(ends[..., :1])], dim=-1))  # in the scene's
    ends = relative(mine, ends.flatten(1, 2)).unflatten(1, ends.shape[1:3])[..., :2] / PLACE_M
    kind = torch.nn.functional.one_hot(around.kind[scene[:, None], rows], NUM_KINDS).float()
    route = around.route[scene[:, None], rows].float()[..., None]
    far = torch.log1p(distance.gather(1, rows))[..., None] / 4.0
    values = torch.cat([_seen(relative(mine, place)), ends.flatten(2), kind, route, far], dim=-1)
    return torch.where(near[..., None], values, 0.0), near


def _lights(state: WorldState, mine: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    scenes, scene = state.scenes, state.scene
    stop, direction = scenes.light_stop[scene], scenes.light_direction[scene]
    there = ~stop[..., 0].isnan() & scenes.knows_lights[scene][:, None]
    stop = torch.where(there[..., None], stop, 0.0)
    pose = torch.cat([stop, torch.atan2(direction[..., 1], direction[..., 0])[..., None]], dim=-1)
    seen = relative(mine, pose)
    rows, valid = _nearest(seen[..., :2].norm(dim=-1), there, sight.lights, sight.reach_m)
    red = scenes.light_red[scene][:, :, min(state.column, scenes.light_red.shape[2] - 1)].float()
    values = torch.cat([_seen(seen), red[..., None], torch.ones_like(red)[..., None]], dim=-1)
    values = values.gather(1, rows[..., None].expand(-1, -1, LIGHT))
    return torch.where(valid[..., None], values, 0.0), valid


def way_index(around: EgoSurroundings, scene: Tensor, mine: Tensor) -> Tensor:
    """[B] index of the pose of the way nearest to poses [B,3]; 0 where there is no way."""
    way, count = around.way[scene], around.way_count[scene]
    beyond = torch.arange(way.shape[1], device=scene.device) >= count[:, None]
    distance = (way[..., :2] - mine[:, None, :2]).square().sum(-1).masked_fill(beyond, torch.inf)
    return torch.where(count > 0, distance.argmin(dim=1), 0)


def _way(around: EgoSurroundings, scene: Tensor, mine: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    count = around.way_count[scene]
    steps = sight.way_step_m * torch.arange(sight.way, device=scene.device)
    index = way_index(around, scene, mine)[:, None] + steps
    valid = index < count[:, None]
    index = index.clamp_max(around.way.shape[1] - 1)
    seen = relative(mine, around.way[scene[:, None], index])
    return torch.where(valid[..., None], _seen(seen), 0.0), valid


def goal_reached(state: WorldState, goal: Tensor) -> Tensor:
    """[B] bool: the ego has been within 2 m of its goal [B,2] since now; False where the goal is NaN."""
    worlds, row = state.ego_index()
    track = state.poses[worlds, row, state.scenes.now : state.column + 1, :2]
    return ((track - goal[:, None]).norm(dim=-1) <= GOAL_RADIUS_M).any(dim=1)


def _goal(
    state: WorldState, around: EgoSurroundings, mine: Tensor, worlds: Tensor, row: Tensor
) -> tuple[Tensor, Tensor]:
    goal = around.goal[state.scene]
    valid = ~goal.isnan().any(-1) & ~goal_reached(state, goal)
    place = torch.where(valid[:, None], goal, mine[:, :2])
    seen = relative(mine, torch.cat([place, mine[:, 2:]], dim=-1)[:, None])[:, 0, :2]
    far = seen.norm(dim=-1, keepdim=True)
    values = torch.cat([seen / PLACE_M, torch.log1p(far) / 4.0, seen / far.clamp_min(0.1)], dim=-1)
    return torch.where(valid[:, None], values, 0.0), valid


def _nearest(distance: Tensor, mask: Tensor, most: int, reach: float) -> tuple[Tensor, Tensor]:
    """(rows [B,most], valid [B,most]) of the nearest among C candidates [B,C], nearest first."""
    hidden = distance.masked_fill(~mask, torch.inf)
    if hidden.shape[1] < most:
        hidden = torch.nn.functional.pad(hidden, (0, most - hidden.shape[1]), value=torch.inf)
    found = hidden.topk(most, dim=1, largest=False)
    valid = found.values <= reach
    return torch.where(valid, found.indices, 0), valid
