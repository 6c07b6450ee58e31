"""The map as features, encoded once per scene however many rollouts drive on it.

Legend: S scenes, M pieces, L lights, P neighbours, d width, Z latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sim_agents.data.pieces import NUM_KINDS, PIECE_M, PIECE_POINTS
from sim_agents.data.scene_tokens import NUM_LIGHT_STATES, SceneTokens
from sim_agents.model.attention import RelativeAttention
from sim_agents.model.relations import nearest_within, relation_to
from sim_agents.model.settings import NetworkSettings

SCENE_SCALE_M = 50.0
"""Unit of positions in the frame of the scene."""


def scene_features(pose: Float[Tensor, "*any 3"]) -> Float[Tensor, "*any 8"]:
    """Poses [..., 3] of the scene's frame as numbers [..., 8]: scaled position, its sines and cosines, heading."""
    xy = pose[..., :2] / SCENE_SCALE_M
    heading = torch.stack([torch.cos(pose[..., 2]), torch.sin(pose[..., 2])], dim=-1)
    return torch.cat([xy, torch.sin(torch.pi * xy), torch.cos(torch.pi * xy), heading], dim=-1)


SCENE_FEATURES = 8


@dataclass(frozen=True)
class EncodedMap:
    """``features`` [S, M, d] (or [S, Z, d]); ``pose`` [S, M, 3] and ``valid`` [S, M] of the pieces."""

    features: Float[Tensor, "S M d"]
    pose: Float[Tensor, "S M 3"]
    valid: Bool[Tensor, "S M"]


class MapEncoder(nn.Module):
    """Pieces of the map attend to their neighbours (relative), or are summed up by latent queries (scene)."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        d = settings.width
        in_scene = settings.geometry == "scene"
        self.shape = nn.Sequential(nn.Linear(2 * PIECE_POINTS, d), nn.GELU(), nn.Linear(d, d))
        self.kind = nn.Embedding(NUM_KINDS, d)
        self.route = nn.Embedding(2, d)
        self.place = nn.Linear(SCENE_FEATURES, d) if in_scene else None
        self.light = nn.Embedding(NUM_LIGHT_STATES, d) if in_scene else None
        self.layers = nn.ModuleList(
            RelativeAttention(d, settings.heads, dropout=settings.dropout, relative=not in_scene)
            for _ in range(settings.map_layers)
        )
        self.latents = nn.Parameter(torch.randn(settings.latents, d) * 0.02) if in_scene else None

    def forward(self, scenes: SceneTokens, now: int) -> EncodedMap:
        """``now`` is the index of the present; only scene geometry reads it, for the states of the lights."""
        x = self.shape(scenes.piece_shape.flatten(-2) / PIECE_M)
        x = x + self.kind(scenes.piece_kind) + self.route(scenes.piece_route.long())
        if self.latents is not None:
            return self._sum_up(x, scenes, now)
        pose, valid = scenes.piece_pose, scenes.piece_valid
        if x.shape[1] == 0:
            return EncodedMap(x, pose, valid)
        near_pieces, radius = self.settings.near_pieces, self.settings.radius_pieces
        rows, near = nearest_within(pose, pose, valid[:, None] & valid[:, :, None], near_pieces, radius)
        features = relation_to(pose, pose, rows)
        for layer in self.layers:
            x = layer(x, layer.project(x), near, rows, features)
        return EncodedMap(x, pose, valid)

    def _sum_up(self, x: Tensor, scenes: SceneTokens, now: int) -> EncodedMap:
        lights = self.light(scenes.light_state[..., now]) + self.place(scene_features(scenes.light_pose))
        everything = torch.cat([x + self.place(scene_features(scenes.piece_pose)), lights], dim=1)
        valid = torch.cat([scenes.piece_valid, scenes.light_valid], dim=1)
        z = self.latents.expand(len(x), -1, -1)
        asked = valid[:, None].expand(-1, z.shape[1], -1)
        for layer in self.layers:
            z = layer(z, layer.project(everything), asked)
        return EncodedMap(z, z.new_zeros(*z.shape[:2], 3), torch.ones_like(z[..., 0], dtype=torch.bool))
