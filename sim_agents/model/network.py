"""The next-token network: p(A_t | A_<t, S) = prod_n p(a_t^n | A_<t, S).

Legend: S scenes, B = S R worlds, N road users, K poses half a second apart, M map pieces, L lights, P neighbours, W
window of tokens, d width, V tokens.

At each half second every road user has one feature. A block lets it look at its own past (temporal), at the map and the
lights around it, and at the others at the same moment; the head gives the logits of its next token. Everybody is
asked at once: given the past, road users choose independently. Sources: SMART (arXiv 2405.15677), MotionLM (arXiv
2309.16534).

Deviations: a road user's last motion enters as numbers, not as an embedding of its token, so any vocabulary and any
driver (also one without tokens) can be in the world; relations enter linearly; lights are looked at with their
state of the moment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from navsim_ext.closed_loop.kinematics import TOKEN_S, relative
from navsim_ext.errors import DataError
from sim_agents.data.scene_tokens import NUM_LIGHT_STATES, SceneTokens
from sim_agents.model.attention import RelativeAttention
from sim_agents.model.head import MotionEmbedding, TokenHead
from sim_agents.model.map_encoder import SCENE_FEATURES, EncodedMap, MapEncoder, scene_features
from sim_agents.model.relations import nearest_within, relation_to
from sim_agents.model.settings import NetworkSettings
from sim_agents.vocabulary.motion import CLASSES, MotionVocabulary, class_of

AGENT_FEATURES = 1 + 2 + len(CLASSES) + 1
"""Whether the last motion is known, size, class, ego."""


@dataclass(frozen=True)
class Roadside:
    """What does not change while the world moves: the encoded map, its keys and values in each block, lights. World b
    belongs to scene b // ``rollouts``."""

    context: EncodedMap
    key_values: tuple[Float[Tensor, "S M two_d"], ...]  # per block
    light_pose: Float[Tensor, "S L 3"]
    light_valid: Bool[Tensor, "S L"]
    rollouts: int = 1

    def repeat(self, rollouts: int) -> Roadside:
        """The same scenes, each driven by ``rollouts`` worlds; nothing is copied."""
        return replace(self, rollouts=rollouts)


@dataclass(frozen=True)
class Past:
    """The last W - 1 half seconds of every road user: ``pose`` [B, N, W-1, 3], ``valid`` [B, N, W-1], and keys and
    values ``key_values`` [B, N, W-1, 2 d] of each block; newest last."""

    pose: Float[Tensor, "B N past 3"]
    valid: Bool[Tensor, "B N past"]
    key_values: tuple[Float[Tensor, "B N past two_d"], ...]


@dataclass(frozen=True)
class Agents:
    """Road users at K moments: ``pose`` [B, N, K, 3], ``valid`` [B, N, K], ``motion`` [B, N, K, 4] (see
    :func:`last_motion`), ``light_state`` [B, L, K]; and what stays: ``kind`` [B, N], ``size`` [B, N, 2], ``ego`` [B,
    N]."""

    pose: Float[Tensor, "B N K 3"]
    valid: Bool[Tensor, "B N K"]
    motion: Float[Tensor, "B N K 4"]
    light_state: Int64[Tensor, "B L K"]
    kind: Int64[Tensor, "B N"]
    size: Float[Tensor, "B N 2"]
    ego: Bool[Tensor, "B N"]

    def moments(self, first: int, last: int) -> Agents:
        """Those from ``first`` to before ``last``."""
        span = slice(first, last)
        return replace(
            self,
            pose=self.pose[:, :, span],
            valid=self.valid[:, :, span],
            motion=self.motion[:, :, span],
            light_state=self.light_state[..., span],
        )


def last_motion(
    pose: Float[Tensor, "*any 3"], before: Float[Tensor, "*any 3"], known: Bool[Tensor, "*any"]
) -> Float[Tensor, "*any 4"]:
    """[..., 4]: the motion of the last half second, told as a token is (``pose`` [..., 3] seen from ``before``), and
    whether it is ``known`` [...]."""
    seen = relative(before, pose[..., None, :])[..., 0, :]
    return torch.cat([torch.where(known[..., None], seen, 0.0), known[..., None].to(pose.dtype)], dim=-1)


def agents_of(scenes: SceneTokens, pose: Float[Tensor, "S N K 3"] | None = None) -> Agents:
    """All moments of a batch of scenes; ``pose`` [S, N, K, 3] replaces the recorded poses (rolled ones, say)."""
    pose = scenes.pose if pose is None else pose
    known = scenes.valid.clone()
    known[..., 0] = False
    known[..., 1:] &= scenes.valid[..., :-1]
    motion = last_motion(pose, torch.roll(pose, 1, dims=2), known)
    return Agents(pose, scenes.valid, motion, scenes.light_state, scenes.kind, scenes.size, scenes.ego)


class Block(nn.Module):
    """Own past, map and lights, others."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        d, heads, dropout = settings.width, settings.heads, settings.dropout
        everywhere = settings.geometry == "relative"
        self.past = RelativeAttention(d, heads, dropout=dropout)
        self.map = RelativeAttention(d, heads, dropout=dropout, relative=everywhere)
        self.others = RelativeAttention(d, heads, dropout=dropout, relative=everywhere)


class NextTokenNetwork(nn.Module):
    """``forward`` gives the logits of all moments of recorded scenes at once; ``begin`` and ``advance`` those of one
    moment after another, with the map encoded once and the past kept. Both give the same numbers."""

    def __init__(self, settings: NetworkSettings, vocabulary: MotionVocabulary) -> None:
        super().__init__()
        if vocabulary.size != settings.tokens:
            raise DataError(f"the network has {settings.tokens} tokens, the vocabulary {vocabulary.size}")
        self.settings = settings
        d = settings.width
        self.map_encoder = MapEncoder(settings)
        self.motion = MotionEmbedding(d)
        self.agent = nn.Sequential(nn.Linear(AGENT_FEATURES, d), nn.GELU(), nn.Linear(d, d))
        self.light = nn.Embedding(NUM_LIGHT_STATES, d)
        self.place = nn.Linear(SCENE_FEATURES, d) if settings.geometry == "scene" else None
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.blocks))
        self.head = TokenHead(d, vocabulary)

    # -- the map, once per scene

    def roadside(self, scenes: SceneTokens, now: int) -> Roadside:
        """Encodes map and lights of S scenes; ``now`` is the index of the present."""
        context = self.map_encoder(scenes, now)
        key_values = tuple(block.map.project(context.features) for block in self.blocks)
        return Roadside(context, key_values, scenes.light_pose, scenes.light_valid)

    # -- all moments at once

    def forward(
        self, scenes: SceneTokens, now: int, pose: Float[Tensor, "S N K 3"] | None = None
    ) -> Float[Tensor, "S N K V"]:
        """Logits [S, N, K, V] of the token after each moment; ``pose`` [S, N, K, 3] replaces the recorded poses."""
        features = self.features(self.roadside(scenes, now), agents_of(scenes, pose))
        return self.logits(features, class_of(scenes.kind)[..., None].expand(features.shape[:-1]))

    def logits(
        self, features: Float[Tensor, "*any d"], classes: Int64[Tensor, "*any"]
    ) -> Float[Tensor, "*any V"]:
        """Logits [..., V] of features [..., d] of road users of class rows [...]."""
        return self.head(features, classes, self.motion)

    def features(
        self, roadside: Roadside, agents: Agents, hidden: Bool[Tensor, "B N K"] | None = None
    ) -> Float[Tensor, "B N K d"]:
        """Features [B, N, K, d] of all moments, each seeing nothing later than itself.

        ``hidden`` [B, N, K]: moments that a road user does not see of its own past (in training).
        """
        B, N, K, _ = agents.pose.shape
        moments = torch.arange(K, device=agents.pose.device)
        W = min(self.settings.window, K)
        rows = moments[:, None] - torch.arange(W, device=moments.device)  # [K, W], newest first
        there = rows >= 0
        rows = rows.clamp_min(0)  # masked
        pose, valid = agents.pose.flatten(0, 1), agents.valid.flatten(0, 1)  # [B N, K, ...]
        mask = there & valid[:, rows]
        if hidden is not None:
            mask = mask & (~hidden.flatten(0, 1)[:, rows] | (rows == moments[:, None]))
        rows = rows.expand(B * N, -1, -1)
        own = relation_to(pose, pose, rows, torch.arange(W, device=moments.device) * TOKEN_S)
        x, sight = self._embed(agents), self._sight(roadside, agents)
        for number, block in enumerate(self.blocks):
            x = x.flatten(0, 1)
            x = block.past(x, block.past.project(x), mask, rows, own).unflatten(0, (B, N))
            x = self._around(x, block, roadside.key_values[number], sight)
        return x

    # -- one moment after another

    def begin(self, roadside: Roadside, agents: Agents) -> tuple[Float[Tensor, "B N d"], Past]:
        """Features [B, N, d] of the last of K moments, and the past from which :meth:`advance` goes on."""
        empty = self.no_past(agents.pose, agents.valid)
        moments = [agents.moments(k, k + 1) for k in range(agents.pose.shape[2])]
        features, past = self.advance(roadside, empty, moments[0])
        for moment in moments[1:]:
            features, past = self.advance(roadside, past, moment)
        return features, past

    def advance(self, roadside: Roadside, past: Past, agents: Agents) -> tuple[Float[Tensor, "B N d"], Past]:
        """Features [B, N, d] of one further moment (K = 1), and the past with it."""
        B, N = agents.kind.shape
        pose = torch.cat([past.pose, agents.pose], dim=2)
        valid = torch.cat([past.valid, agents.valid], dim=2)
        W = pose.shape[2]
        gap = torch.arange(W - 1, -1, -1, device=pose.device) * TOKEN_S
        rows = torch.arange(W, device=pose.device).expand(B * N, 1, W)
        own = relation_to(agents.pose.flatten(0, 1), pose.flatten(0, 1), rows, gap)  # [B N, 1, W, F]
        mask = valid.flatten(0, 1)[:, None]
        x, sight = self._embed(agents), self._sight(roadside, agents)
        kept = []
        for number, block in enumerate(self.blocks):
            key_value = torch.cat([past.key_values[number], block.past.project(x)], dim=2)
            x = block.past(x.flatten(0, 1), key_value.flatten(0, 1), mask, None, own).unflatten(0, (B, N))
            x = self._around(x, block, roadside.key_values[number], sight)
            kept.append(key_value)
        first = max(pose.shape[2] - (self.settings.window - 1), 0)
        later = Past(pose[:, :, first:], valid[:, :, first:], tuple(one[:, :, first:] for one in kept))
        return x[:, :, 0], later

    # -- parts

    def no_past(self, pose: Float[Tensor, "B N K 3"], valid: Bool[Tensor, "B N K"]) -> Past:
        """A past of no moment, of road users with poses [B, N, ., 3] and ``valid`` [B, N, .]."""
        nothing = pose.new_zeros(*pose.shape[:2], 0, 2 * self.settings.width)
        return Past(pose[:, :, :0], valid[:, :, :0], (nothing,) * len(self.blocks))

    def _embed(self, agents: Agents) -> Tensor:
        K = agents.pose.shape[2]
        classes = nn.functional.one_hot(class_of(agents.kind), len(CLASSES)).to(agents.pose.dtype)
        fixed = torch.cat([agents.size / 5.0, classes, agents.ego[..., None].to(agents.pose.dtype)], dim=-1)
        moved, known = agents.motion.split([3, 1], dim=-1)
        x = self.agent(torch.cat([known, fixed[:, :, None].expand(-1, -1, K, -1)], dim=-1))
        x = x + torch.where(known > 0, self.motion(moved), 0.0)
        return x if self.place is None else x + self.place(scene_features(agents.pose))

    def _sight(self, roadside: Roadside, agents: Agents) -> _Sight:
        """Who sees which pieces, lights and others at each moment; the same in every block."""
        settings, pose = self.settings, agents.pose
        B, N = agents.kind.shape
        everybody = torch.arange(N, device=pose.device)
        by_moment = pose.transpose(1, 2).flatten(0, 1)  # [B K, N, 3]
        allowed = agents.valid.transpose(1, 2).flatten(0, 1)[:, None] & (everybody != everybody[:, None])
        if settings.geometry == "scene":
            latents = torch.ones(len(roadside.context.features), 1, roadside.context.valid.shape[1], dtype=torch.bool)
            return _Sight(_Seen(allowed), _Seen(latents.to(pose.device)), None)
        rows, near = nearest_within(by_moment, by_moment, allowed, settings.near_agents, settings.radius_agents)
        others = _Seen(near, rows, relation_to(by_moment, by_moment, rows))
        askers = pose.reshape(B // roadside.rollouts, -1, 3)  # [S, R N K, 3]
        around = torch.cat([roadside.context.pose, roadside.light_pose], dim=1)
        pieces = roadside.context.pose.shape[1]
        in_map, map_near = nearest_within(
            askers, roadside.context.pose, roadside.context.valid[:, None], settings.near_map, settings.radius_map
        )
        if around.shape[1] == pieces:
            return _Sight(others, _Seen(map_near, in_map, relation_to(askers, around, in_map)), None)
        lit, lit_near = nearest_within(
            askers, roadside.light_pose, roadside.light_valid[:, None], settings.near_lights, settings.radius_map
        )
        states = agents.light_state.transpose(1, 2)[:, None].expand(-1, N, -1, -1)  # [B, N, K, L]
        states = states.reshape(*askers.shape[:2], -1).gather(-1, lit)
        # Every light stands in the table once for each of its states.
        rows = torch.cat([in_map, pieces + states * (around.shape[1] - pieces) + lit], dim=-1)
        seen = torch.cat([in_map, pieces + lit], dim=-1)
        near = torch.cat([map_near, lit_near], dim=-1)
        return _Sight(others, _Seen(near, rows, relation_to(askers, around, seen)), around.shape[1] - pieces)

    def _around(self, x: Tensor, block: Block, key_value: Tensor, sight: _Sight) -> Tensor:
        """Map and lights, then the others: [B, N, K, d] -> [B, N, K, d]; ``key_value`` [S, M, 2 d] of the map."""
        B, N, K, _ = x.shape
        if sight.lights is not None:
            states = block.map.project(self.light.weight)  # [4, 2 d]
            lit = states[:, None].expand(-1, sight.lights, -1).flatten(0, 1)
            key_value = torch.cat([key_value, lit.expand(len(key_value), -1, -1)], dim=1)
        askers = x.reshape(len(key_value), -1, x.shape[-1])
        seen = sight.map
        mask = seen.mask.expand(-1, askers.shape[1], -1)
        x = block.map(askers, key_value, mask, seen.rows, seen.relation).view(B, N, K, -1)
        by_moment = x.transpose(1, 2).flatten(0, 1)
        seen = sight.others
        x = block.others(by_moment, block.others.project(by_moment), seen.mask, seen.rows, seen.relation)
        return x.unflatten(0, (B, K)).transpose(1, 2)


@dataclass(frozen=True)
class _Seen:
    """Neighbours of askers, as :class:`RelativeAttention` takes them."""

    mask: Tensor
    rows: Tensor | None = None
    relation: Tensor | None = None


@dataclass(frozen=True)
class _Sight:
    others: _Seen
    map: _Seen
    lights: int | None  # L, where lights are looked at
