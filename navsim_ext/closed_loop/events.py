"""What happens to road users: contact, leaving the road, red lights, wrong way, goals, time to contact, comfort.

Each event has a mask of where it is known: nothing is "no event" because the map, the lights or the past are missing.
"Drivers" are vehicles and cyclists.

| event           | what it is                                                      | known for                    |
|-----------------|-----------------------------------------------------------------|------------------------------|
| contact         | the full box touches another full box                           | all, there the whole token   |
| off_road        | a corner of the box lies off the road (signed distance < 0)     | drivers on a scene's grid    |
| red_light       | the middle of the front bumper crosses a stop point that has    | drivers, scenes with lights  |
|                 | been red for 1 s (2 m beside it, within 45 degrees of the lane) |                              |
| wrong_way       | lanes lie below the centre, and all run against the heading     | drivers with a lane in 2.75 m|
| goal            | the centre is within 2 m of the goal                            | those whose goal is known    |
| time_to_contact | seconds to contact at the present velocities; inf above 3 s     | there in the step before too |
| comfort         | accelerations and yaw rate over 0.5 s within NAVSIM's bounds    | there for the last second    |

Legend: B worlds, N road users, E steps asked for, all of 0.1 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop import kernels
from navsim_ext.closed_loop.contact import MARGIN_M, Planes, circumradius, find_contacts, planes, time_to_contact
from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS, wrap
from navsim_ext.closed_loop.scenes import is_road_user
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.pdm.comfort import (
    MAX_LAT_ACCELERATION,
    MAX_LON_ACCELERATION,
    MAX_YAW_RATE,
    MIN_LON_ACCELERATION,
)

EVENTS = ("contact", "off_road", "red_light", "wrong_way", "goal", "time_to_contact", "comfort")
GOAL_RADIUS_M = 2.0
STOP_POINT_REACH_M = 2.0  # to the side of a stop point
STOP_POINT_COSINE = math.cos(math.radians(45.0))
RED_GRACE_STEPS = 10  # 1 s: nobody can stop for a light that has just turned (most sources tell no yellow)
TIME_TO_CONTACT_S = 3.0
CHUNK_PAIRS = 1 << 18  # pairs of road users that the broad phase looks at in one go (memory and cache)
COMFORT_STEPS = 5  # over which accelerations are taken
STEPS_PER_THREAD = 16_384  # agent-steps that are worth a thread of their own


@dataclass
class Event:
    """``value`` [B,N,E] and where it means something, ``valid`` [B,N,E] bool."""

    value: Tensor
    valid: Tensor

    def any(self) -> Tensor:
        """[B,N] whether a boolean event happened at a step where it is known."""
        return (self.value & self.valid).any(dim=-1)


@dataclass
class Events:
    """Events of the steps ``first`` + 1 ... ``last``; None for those that the world was not asked for."""

    first: int
    last: int
    contact: Event | None = None
    contact_pairs: Tensor | None = None  # [P,4] int64 world, road user, other, step; both orders
    off_road: Event | None = None
    red_light: Event | None = None
    wrong_way: Event | None = None
    goal: Event | None = None
    time_to_contact: Event | None = None
    comfort: Event | None = None


def find_events(state: WorldState, first: int, last: int, wanted: Sequence[str]) -> Events:
    """The events of steps first + 1 ... last of a state."""
    scenes, scene = state.scenes, state.scene
    span = slice(scenes.now + first + 1, scenes.now + last + 1)
    poses, there = state.poses[:, :, span], state.there[:, :, span]
    boxes, size = planes(poses), scenes.size[scene]
    drives = is_road_user(scenes)[scene]
    result = Events(first, last)
    if "contact" in wanted:
        result.contact, result.contact_pairs = contacts(boxes, size, there, first)
    if "off_road" in wanted:
        distance = edge_distance(state, boxes, size, there & (drives & scenes.knows_road[scene][:, None])[..., None])
        result.off_road = Event(distance < 0.0, ~distance.isnan())
    if "wrong_way" in wanted:
        against, valid = scenes.lanes.against(*boxes, scene)
        result.wrong_way = Event(against, valid & there & drives[..., None])
    if "red_light" in wanted:
        result.red_light = red_lights(state, first, last, drives)
    if "goal" in wanted:
        goal = scenes.goal[scene][:, :, None]
        reached = torch.hypot(boxes.x - goal[..., 0], boxes.y - goal[..., 1]) <= GOAL_RADIUS_M
        result.goal = Event(reached, there & ~goal[..., 0].isnan())
    if "time_to_contact" in wanted:
        result.time_to_contact = times_to_contact(state, first, last)
    if "comfort" in wanted:
        result.comfort = comfort(state, first, last)
    return result


def contacts(boxes: Planes, size: Tensor, there: Tensor, first: int) -> tuple[Event, Tensor]:
    """(event, pairs [P,4] in no particular order) of the contacts of boxes [B,N,E]; the first step is ``first`` + 1.

    Known for those who are in the world during the whole token.
    """
    if boxes.x.device.type != "cpu":
        return tensor_contacts(boxes, size, there, first)
    B, _, E = there.shape
    event = Event(torch.zeros_like(there), torch.zeros_like(there))
    arrays = [one.contiguous().numpy() for one in (*boxes, 0.5 * size[..., :2], there)]
    values, valid = event.value.numpy(), event.valid.numpy()

    def work(begin: int, end: int) -> NDArray[np.int64]:
        return kernels.find_contacts(*arrays, TOKEN_STEPS, MARGIN_M, first + 1, begin, end, values, valid)

    pairs = kernels.split(work, B * -(-E // TOKEN_STEPS), threads_for(there))
    return event, torch.from_numpy(np.concatenate(pairs))


def threads_for(there: Tensor) -> int:
    """How many of torch's threads events of ``there`` [B,N,E] are worth."""
    return min(torch.get_num_threads(), there.numel() // STEPS_PER_THREAD)


def tensor_contacts(boxes: Planes, size: Tensor, there: Tensor, first: int) -> tuple[Event, Tensor]:
    """:func:`contacts` on any device, token by token, several tokens in one go where worlds are few."""
    B, N, E = there.shape
    touching, known = torch.zeros_like(there), torch.zeros_like(there)
    pairs = [torch.empty(0, 4, dtype=torch.int64, device=size.device)]
    whole, rest = divmod(E, TOKEN_STEPS)
    groups = [(begin * TOKEN_STEPS, TOKEN_STEPS, count) for begin, count in _chunks(B, N, whole)]
    groups += [(whole * TOKEN_STEPS, rest, 1)] if rest else []
    for begin, K, count in groups:
        # The tokens of a world side by side: to the search each is a world of its own.
        window = slice(begin, begin + K * count)

        def unfold(values: Tensor, K: int = K, window: slice = window) -> Tensor:  # [B,N,count K] -> [B count,N,K]
            return values[:, :, window].reshape(B, N, -1, K).transpose(1, 2).reshape(-1, N, K)

        present = unfold(there).all(dim=-1)
        sizes = size.repeat_interleave(count, dim=0)
        found = find_contacts(boxes.map(unfold), sizes, circumradius(present, sizes))
        fold = lambda values, count=count: values.view(B, count, N, -1).transpose(1, 2).reshape(B, N, -1)  # noqa: E731
        touching[:, :, window] = fold(found.touching)
        known[:, :, window] = fold(present[..., None].expand(-1, -1, K).contiguous())
        world = torch.div(found.pairs[:, 0], count, rounding_mode="floor")
        step = first + 1 + begin + (found.pairs[:, 0] - world * count) * K + found.pairs[:, 3]
        pairs.append(torch.stack((world, found.pairs[:, 1], found.pairs[:, 2], step), dim=-1))
    return Event(touching, known), torch.cat(pairs)


def _chunks(B: int, N: int, tokens: int):
    """(first token, number of tokens) of pieces with at most CHUNK_PAIRS pairs, or one token."""
    size = max(1, CHUNK_PAIRS // max(B * N * N, 1))
    for begin in range(0, tokens, size):
        yield begin, min(size, tokens - begin)


def edge_distance(state: WorldState, boxes: Planes, size: Tensor, wanted: Tensor) -> Tensor:
    """[B,N,E] m, the least signed distance of a box's four corners to the road's edge; NaN: a corner off the grid, or
    not ``wanted`` [B,N,E] bool."""
    if boxes.x.device.type != "cpu":
        return tensor_edge_distance(state, boxes, size, wanted)
    road, (B, N, _) = state.scenes.road, wanted.shape
    result = torch.empty(wanted.shape)
    arrays = [one.contiguous().numpy() for one in (*boxes, 0.5 * size[..., :2], wanted)]
    row = road.row[state.scene].numpy()
    grids = (road.flat.numpy(), *road.shape, road.origin.numpy(), np.float32(road.cell), row)

    def work(begin: int, end: int) -> None:
        kernels.edge_distances(*arrays, *grids, begin, end, result.numpy())

    kernels.split(work, B * N, threads_for(wanted))
    return result


def tensor_edge_distance(state: WorldState, boxes: Planes, size: Tensor, wanted: Tensor) -> Tensor:
    """:func:`edge_distance` on any device."""
    l, w = 0.5 * size[..., 0:1], 0.5 * size[..., 1:2]
    along = torch.stack((l, -l, -l, l))  # [4,B,N,1] front left, rear left, rear right, front right
    across = torch.stack((w, w, -w, -w))
    x = torch.addcmul(boxes.x, boxes.c, along).addcmul_(boxes.s, across, value=-1.0)
    y = torch.addcmul(boxes.y, boxes.s, along).addcmul_(boxes.c, across)
    return torch.where(wanted, state.scenes.road.at(x, y, state.scene).amin(dim=0), torch.nan)


def red_lights(state: WorldState, first: int, last: int, drives: Tensor) -> Event:
    """Whether the front bumper crossed a red stop point from one step to the next; the first step of a road user in the
    world is not valid: there is no step before."""
    scenes, scene = state.scenes, state.scene
    columns = slice(scenes.now + first, scenes.now + last + 1)
    boxes, there = planes(state.poses[:, :, columns]), state.there[:, :, columns]
    half = 0.5 * scenes.size[scene, :, 0:1]
    x, y = torch.addcmul(boxes.x, boxes.c, half), torch.addcmul(boxes.y, boxes.s, half)
    valid = there[..., 1:] & there[..., :-1] & (drives & scenes.knows_lights[scene][:, None])[..., None]
    U = scenes.light_red.shape[2]
    at = torch.arange(scenes.now + first + 1, scenes.now + last + 1, device=scene.device).clamp_max(U - 1)
    red = scenes.light_red[:, :, at]
    before = (at - RED_GRACE_STEPS).clamp_min(0)
    red = (red & scenes.light_red[:, :, before])[scene]  # [B,K,E] and red already a second ago
    crossed = torch.zeros_like(valid)
    for k in red.any(dim=-1).any(dim=0).nonzero()[:, 0].tolist():  # one by one: [B,N,E,K] may be large
        stop, light = scenes.light_stop[scene, k, :, None, None], scenes.light_direction[scene, k, :, None, None]
        dx, dy = x - stop[:, 0], y - stop[:, 1]
        s, side = light[:, 0] * dx + light[:, 1] * dy, light[:, 0] * dy - light[:, 1] * dx
        straight = light[:, 0] * boxes.c[..., 1:] + light[:, 1] * boxes.s[..., 1:] > STOP_POINT_COSINE
        passes = (s[..., :-1] < 0.0) & (s[..., 1:] >= 0.0) & (side[..., 1:].abs() <= STOP_POINT_REACH_M)
        crossed |= passes & straight & red[:, k, None, :]
    return Event(crossed, valid)


def times_to_contact(state: WorldState, first: int, last: int) -> Event:
    """Exact times to contact of translating boxes at every step."""
    scenes, now = state.scenes, state.scenes.now
    size = scenes.size[state.scene]
    values, valid = [], []
    for step in range(first + 1, last + 1):
        here, before = state.poses[:, :, now + step], state.poses[:, :, now + step - 1]
        known = state.there[:, :, now + step] & state.there[:, :, now + step - 1]
        velocity = torch.where(known[..., None], (here[..., :2] - before[..., :2]) / STEP_S, 0.0)
        values.append(time_to_contact(here, velocity, size, state.there[:, :, now + step], TIME_TO_CONTACT_S))
        valid.append(known)
    return Event(torch.stack(values, dim=-1), torch.stack(valid, dim=-1))


def comfort(state: WorldState, first: int, last: int) -> Event:
    """Accelerations and yaw rate from positions 0.5 s apart, against NAVSIM's bounds (pdm/comfort.py)."""
    now, d = state.scenes.now, COMFORT_STEPS
    values, valid = [], []
    span = d * STEP_S
    for column in range(now + first + 1, now + last + 1):
        if column < 2 * d:
            values.append(torch.ones_like(state.present))
            valid.append(torch.zeros_like(state.present))
            continue
        a, b, c = (state.poses[:, :, column - 2 * d], state.poses[:, :, column - d], state.poses[:, :, column])
        known = state.there[:, :, column - 2 * d : column + 1].all(dim=-1)
        change = (c[..., :2] - 2.0 * b[..., :2] + a[..., :2]) / span**2
        heading = b[..., 2].contiguous()
        cos, sin = torch.cos(heading), torch.sin(heading)
        along, across = cos * change[..., 0] + sin * change[..., 1], -sin * change[..., 0] + cos * change[..., 1]
        yaw_rate = wrap(c[..., 2] - b[..., 2]) / span
        good = (along > MIN_LON_ACCELERATION) & (along < MAX_LON_ACCELERATION)
        good &= (across.abs() < MAX_LAT_ACCELERATION) & (yaw_rate.abs() < MAX_YAW_RATE)
        values.append(good)
        valid.append(known)
    return Event(torch.stack(values, dim=-1), torch.stack(valid, dim=-1))
