"""What a token of 0.5 s was worth, from what happened in the world: Plan-R1's product, or goals and failures alone.

    product   r = [on the road] [no contact] [no red light] (5 progress + 5 time to contact + 2 comfort) / 12
    goal      r = GOAL [goal reached for the first time] - [contact] - [off the road] - [red light]

Progress is that along the way, as a share of what the recording made in the same time (at most 1; 1 where that was
less than half a metre); time to contact and comfort are 1 where the nearest contact is more than 0.95 s away, and where
accelerations and yaw rates are within NAVSIM's bounds. A term that the scene cannot tell takes no part. A token with a
contact, off the road or over a red light **fails**: nothing after it is worth anything.

Several poses of a token are one decision (a semi-Markov process). With the discount g of one step of 0.1 s:

    reward of a token = sum_{j < 5} g^j r_j,    discount of what comes after it = g^5

Legend: B worlds, E steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_ext.closed_loop.events import Event
from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import ABSENT
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from sim_agents.ego.observation import way_index
from sim_agents.ego.surroundings import EgoSurroundings

FORMS = ("product", "goal")
EVENTS = ("contact", "off_road", "red_light", "time_to_contact", "comfort")
WEIGHTS = {"progress": 5.0, "time_to_contact": 5.0, "comfort": 2.0}
NEAR_CONTACT_S = 0.95
LEAST_PROGRESS_M = 0.5  # of the recording in a token, below which progress is not asked for
GOAL_RADIUS_M = 2.0


@dataclass(frozen=True)
class EgoReward:
    """What reinforcement of an ego is paid: ``form`` as above, less ``failure`` for a token that fails. ``discount`` g
    is of one step; with ``end_at_goal`` a drive ends where its goal is reached."""

    form: str = "product"
    failure: float = 0.0
    discount: float = 0.98
    end_at_goal: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise DataError(f"form={self.form}: one of {', '.join(FORMS)} was expected")
        if not 0.0 < self.discount <= 1.0 or self.failure < 0.0:
            raise DataError(f"{self}: 0 < discount <= 1 and failure >= 0 were expected")


@dataclass(frozen=True)
class Outcome:
    """Of the last token: ``steps`` [B,E] reward of each step (a product is paid in equal parts), ``failed`` [B] bool,
    ``reached`` [B] bool (the goal, for the first time)."""

    steps: Tensor
    failed: Tensor
    reached: Tensor

    @property
    def reward(self) -> Tensor:
        """[B], undiscounted."""
        return self.steps.sum(dim=-1)


def semi_markov(rewards: Tensor, discount: float) -> tuple[Tensor, float]:
    """(reward [...] of a token whose steps earn ``rewards`` [...,E], discount of what comes after it), g per step."""
    if not 0.0 < discount <= 1.0:
        raise DataError(f"discount={discount}: 0 < discount <= 1 was expected")
    powers = discount ** torch.arange(rewards.shape[-1], device=rewards.device, dtype=rewards.dtype)
    return (rewards * powers).sum(dim=-1), discount ** rewards.shape[-1]


def outcome(world: World, state: WorldState, around: EgoSurroundings, form: str = "product") -> Outcome:
    """What the token that was just driven was worth; ``world`` must know :data:`EVENTS`."""
    if form not in FORMS:
        raise DataError(f"reward={form}: one of {', '.join(FORMS)} was expected")
    events, (worlds, ego) = world.events(state), state.ego_index()
    happened = lambda event: event.any()[worlds, ego]  # noqa: E731
    failed = happened(events.contact) | happened(events.off_road) | happened(events.red_light)
    arrives = _arrives(state, around)
    reached = arrives.any(dim=1)
    if form == "goal":
        bad = (events.contact, events.off_road, events.red_light)
        begins = sum(_first((event.value & event.valid)[worlds, ego]).float() for event in bad)
        return Outcome(arrives.float() - begins, failed, reached)
    far = Event(events.time_to_contact.value <= NEAR_CONTACT_S, events.time_to_contact.valid)
    rough = Event(~events.comfort.value, events.comfort.valid)
    terms = {
        "progress": _progress(state, around),
        "time_to_contact": _never(far, worlds, ego),
        "comfort": _never(rough, worlds, ego),
    }
    values = torch.stack([terms[name] for name in WEIGHTS])
    weights = torch.tensor(list(WEIGHTS.values()), device=values.device)[:, None] * ~values.isnan()
    earned = (weights * values.nan_to_num()).sum(dim=0) / weights.sum(dim=0)
    parts = torch.where(failed, 0.0, earned)[:, None] / TOKEN_STEPS
    return Outcome(parts.expand(-1, TOKEN_STEPS), failed, reached)


def _never(event: Event, worlds: Tensor, ego: Tensor) -> Tensor:
    """[B] 1 where it did not happen, 0 where it did, NaN where that is not known."""
    known = event.valid[worlds, ego].any(dim=-1)
    return torch.where(known, 1.0 - event.any()[worlds, ego].float(), torch.nan)


def _first(happens: Tensor) -> Tensor:
    """[B,E] bool: the first step at which it happens."""
    return happens & (happens.long().cumsum(dim=1) == 1)


def _arrives(state: WorldState, around: EgoSurroundings) -> Tensor:
    """[B,E] bool: the step of the last token at which the goal is reached for the first time."""
    worlds, ego = state.ego_index()
    first = max(state.column - TOKEN_STEPS, state.scenes.now) + 1
    track = state.poses[worlds, ego, state.scenes.now : state.column + 1, :2]
    near = (track - around.goal[state.scene][:, None]).norm(dim=-1) <= GOAL_RADIUS_M  # NaN is near to nothing
    split = first - state.scenes.now
    return _first(near[:, split:]) & ~near[:, :split].any(dim=1, keepdim=True)


def along(around: EgoSurroundings, scene: Tensor, pose: Tensor) -> Tensor:
    """[B] m along the way of poses [B,3]; NaN where there is no way."""
    index = way_index(around, scene, pose)
    on = around.way[scene, index]
    d = pose[:, :2] - on[:, :2]
    heading = on[:, 2].contiguous()
    s = index.to(d.dtype) + torch.cos(heading) * d[:, 0] + torch.sin(heading) * d[:, 1]
    return torch.where(around.way_count[scene] > 0, s, torch.nan)


def _progress(state: WorldState, around: EgoSurroundings) -> Tensor:
    """[B] share; NaN where there is no way, or the recording has ended."""
    scenes, scene = state.scenes, state.scene
    worlds, ego = state.ego_index()
    before, now = state.column - TOKEN_STEPS, state.column
    made = along(around, scene, state.pose[worlds, ego]) - along(around, scene, state.poses[worlds, ego, before])
    if now >= scenes.log_pose.shape[2]:
        return torch.full_like(made, torch.nan)
    log, known = scenes.log_pose[scene, ego], scenes.log_state[scene, ego] != ABSENT
    wanted = along(around, scene, log[:, now]) - along(around, scene, log[:, before])
    share = torch.where(wanted < LEAST_PROGRESS_M, 1.0, (made / wanted.clamp_min(LEAST_PROGRESS_M)).clamp(0.0, 1.0))
    return torch.where(known[:, now] & known[:, before] & ~made.isnan(), share, torch.nan)
