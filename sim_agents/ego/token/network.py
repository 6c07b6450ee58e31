"""The next-token network told where its ego is to go; without that it is the base network, bit for bit.

Legend: B worlds, N road users, K moments, d width, r width of the condition, P poses of a way, V tokens.

A traffic model gives p(token | past, map, others): what people do. A planner needs p(token | ..., goal). The goal
enters after the base network's blocks, for the ego alone, as the **relation** of the goal to the ego's pose (an
indicator on the relative encoding of the goal; read of others' work: 13.4 % of goals missed against 15.0 % for
coordinates that are concatenated), the way as the relations of its poses 5, 10, 20 and 40 m ahead:

    c = GELU(MLP([LayerNorm(x), relation(ego, goal), relation(ego, way)])),   logits = head(x) + W c,   W = 0 at first

c is 0 for everybody but the ego, and for an ego that is told nothing. So the others do not know the ego's goal, the
base model's weights are untouched by the goal's (its own stage of training), and nothing starts from scratch: an
untrained goal changes no logit. Features are [x, c], so whatever drives a NextTokenNetwork drives this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from navsim_ext.closed_loop.events import GOAL_RADIUS_M
from navsim_ext.errors import DataError
from sim_agents.data.scene_tokens import SceneTokens
from sim_agents.model.network import Agents, NextTokenNetwork, Past, Roadside
from sim_agents.model.relations import RELATION_FEATURES, relation
from sim_agents.model.settings import NetworkSettings
from sim_agents.vocabulary.motion import MotionVocabulary

CONDITIONS = ("goal", "way", "both")
WAY_M = (5, 10, 20, 40)  # ahead of the ego; poses of a way lie 1 m apart
GOAL_NUMBERS = RELATION_FEATURES + 1  # and whether there is one
WAY_NUMBERS = len(WAY_M) * (RELATION_FEATURES + 1)


@dataclass(frozen=True)
class GoalSettings:
    """``condition`` says what the ego is told; ``width`` is r."""

    condition: str = "both"
    width: int = 64

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS or self.width < 1:
            raise DataError(f"{self}: condition one of {', '.join(CONDITIONS)} and width >= 1 were expected")


@dataclass(frozen=True)
class GoalRoadside(Roadside):
    """``goal`` [B,2] m (NaN: none) and ``way`` [B,P,3] of which the first ``way_count`` [B] poses are one; None: the
    ego is told nothing."""

    goal: Tensor | None = None
    way: Tensor | None = None
    way_count: Tensor | None = None


class GoalNetwork(NextTokenNetwork):
    """``settings`` and weights without "goal_" are the base network's."""

    def __init__(self, settings: NetworkSettings, vocabulary: MotionVocabulary, goal: GoalSettings) -> None:
        super().__init__(settings, vocabulary)
        self.goal_settings = goal
        d, r = settings.width, goal.width
        self.goal_norm = nn.LayerNorm(d)
        inputs = d + GOAL_NUMBERS + WAY_NUMBERS
        self.goal_condition = nn.Sequential(nn.Linear(inputs, 2 * r), nn.GELU(), nn.Linear(2 * r, r), nn.GELU())
        self.goal_logits = nn.Linear(r, settings.tokens, bias=False)  # a bias would speak where nothing is told
        nn.init.zeros_(self.goal_logits.weight)
        self.last_told: Tensor | None = None  # [B,told_width] of the last moment that was advanced to

    def base_names(self) -> list[str]:
        """Names of the base network's weights."""
        return [name for name in self.state_dict() if not name.startswith("goal_")]

    def roadside(self, scenes: SceneTokens, now: int) -> GoalRoadside:
        """The scene's, with nothing told to the ego; see :func:`told`."""
        side = super().roadside(scenes, now)
        return GoalRoadside(side.context, side.key_values, side.light_pose, side.light_valid, side.rollouts)

    def features(self, roadside: Roadside, agents: Agents, hidden: Tensor | None = None) -> Tensor:
        x = super().features(roadside, agents, hidden)
        return self._with_condition(roadside, agents, x)[0]

    def advance(self, roadside: Roadside, past: Past, agents: Agents) -> tuple[Tensor, Past]:
        x, past = super().advance(roadside, past, agents)
        features, told = self._with_condition(roadside, agents, x[:, :, None])
        self.last_told = told[:, 0]
        return features[:, :, 0], past

    def logits(self, features: Tensor, classes: Tensor) -> Tensor:
        x, c = features.split([self.settings.width, self.goal_settings.width], dim=-1)
        return super().logits(x, classes) + self.goal_logits(c)

    @property
    def told_width(self) -> int:
        """Numbers from which the ego's logits follow: base features, goal and way."""
        return self.settings.width + GOAL_NUMBERS + WAY_NUMBERS

    def logits_told(self, told: Tensor, classes: Tensor) -> Tensor:
        """Logits [...,V] of the ego, of class rows [...], from what it was told [...,told_width] (:attr:`last_told`):
        the base network need not run again where only the goal's weights have changed."""
        x = told[..., : self.settings.width]
        return super().logits(x, classes) + self.goal_logits(self._speak(told))

    def _speak(self, told: Tensor) -> Tensor:
        """c [...,r]; 0 where neither goal nor way is known."""
        x, goal, way = told.split([self.settings.width, GOAL_NUMBERS, WAY_NUMBERS], dim=-1)
        known = (goal[..., -1] > 0) | (way[..., -len(WAY_M) :] > 0).any(dim=-1)
        c = self.goal_condition(torch.cat([self.goal_norm(x), goal, way], dim=-1))
        return torch.where(known[..., None], c, 0.0)

    def _with_condition(self, roadside: Roadside, agents: Agents, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B,N,K,d+r] of base features [B,N,K,d], what the egos were told [B,K,told_width])."""
        B, N, K, _ = x.shape
        worlds, ego = torch.arange(B, device=x.device), agents.ego.long().argmax(dim=1)
        pose = agents.pose[worlds, ego]  # [B,K,3]
        told = torch.cat([x[worlds, ego], self._goal(roadside, pose), self._way(roadside, pose)], dim=-1)
        c = x.new_zeros(B, N, K, self.goal_settings.width)
        if isinstance(roadside, GoalRoadside) and (roadside.goal is not None or roadside.way is not None):
            is_there = agents.ego.any(dim=1)[:, None, None]
            c = c.index_put((worlds, ego), torch.where(is_there, self._speak(told), 0.0))
        return torch.cat([x, c], dim=-1), told

    def _goal(self, roadside: Roadside, pose: Tensor) -> Tensor:
        """[B,K,F+1] relation of the goal, and whether there is one; a goal within 2 m is none."""
        if self.goal_settings.condition == "way" or getattr(roadside, "goal", None) is None:
            return pose.new_zeros(*pose.shape[:2], GOAL_NUMBERS)
        place = roadside.goal[:, None].expand_as(pose[..., :2])
        known = ~place.isnan().any(dim=-1) & ((place - pose[..., :2]).norm(dim=-1) > GOAL_RADIUS_M)
        place = torch.where(known[..., None], place, pose[..., :2])
        seen = relation(pose, torch.cat([place, pose[..., 2:]], dim=-1))  # a goal has no heading: it takes the ego's
        return torch.where(known[..., None], torch.cat([seen, torch.ones_like(seen[..., :1])], dim=-1), 0.0)

    def _way(self, roadside: Roadside, pose: Tensor) -> Tensor:
        """[B,K,W(F+1)] relations of the way's poses ahead, then which of them there are."""
        if self.goal_settings.condition == "goal" or getattr(roadside, "way", None) is None:
            return pose.new_zeros(*pose.shape[:2], WAY_NUMBERS)
        way, count = roadside.way, roadside.way_count
        beyond = torch.arange(way.shape[1], device=pose.device) >= count[:, None]
        apart = (way[:, None, :, :2] - pose[:, :, None, :2]).square().sum(dim=-1)
        nearest = apart.masked_fill(beyond[:, None], torch.inf).argmin(dim=-1)  # [B,K]
        index = nearest[..., None] + torch.tensor(WAY_M, device=pose.device)
        known = (index < count[:, None, None]) & (count > 0)[:, None, None]
        index = index.clamp_max(way.shape[1] - 1)
        place = way[torch.arange(len(way), device=pose.device)[:, None, None], index]
        seen = torch.where(known[..., None], relation(pose[:, :, None], place), 0.0)
        return torch.cat([seen.flatten(2), known.to(seen.dtype)], dim=-1)


def told(roadside: GoalRoadside, goal: Tensor | None, way: Tensor | None = None, count: Tensor | None = None):
    """The roadside whose egos are told a goal [B,2], a way [B,P,3] of ``count`` [B] poses, or both."""
    if (way is None) != (count is None):
        raise DataError("a way and the number of its poses go together")
    return replace(roadside, goal=goal, way=way, way_count=count)
