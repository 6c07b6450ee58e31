"""The network that reads an observation: every thing seen is a vector, all look at each other, the ego's is kept.

Legend: B observations, Q = 1 + A + M + L vectors (ego, road users, pieces of the map, lights), d width.

Road users, pieces and lights each have a small network of their own; past, way and goal go into the ego's vector.
Vectors that stand for nothing are masked, so an empty road is a case like any other; no vector knows its place in the
list, so the order of road users changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from navsim_ext.errors import DataError
from sim_agents.ego.observation import EGO, GOAL, LIGHT, OTHER, PAST, PIECE, WAY, EgoObservation, Sight


@dataclass(frozen=True)
class EncoderSettings:
    """``layers`` 0: the ego's vector alone, which sees neither traffic nor map (a planner without eyes)."""

    width: int = 64
    heads: int = 4
    layers: int = 2

    def __post_init__(self) -> None:
        if self.width < 1 or self.heads < 1 or self.layers < 0 or self.width % self.heads:
            raise DataError(f"{self}: positive sizes, and a width that is a multiple of heads, were expected")


class EgoEncoder(nn.Module):
    """Observation -> the ego's vector [B,d]."""

    def __init__(self, settings: EncoderSettings, sight: Sight) -> None:
        super().__init__()
        d = settings.width
        self.settings = settings
        inputs = EGO + sight.history * PAST + sight.way * (WAY + 1) + GOAL + 1
        self.ego = mlp(inputs, d, d)
        if settings.layers:
            self.others, self.pieces, self.lights = mlp(OTHER, d, d), mlp(PIECE, d, d), mlp(LIGHT, d, d)
            layer = nn.TransformerEncoderLayer(
                d, settings.heads, 2 * d, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(d)

    def forward(self, seen: EgoObservation) -> Tensor:
        return self.vectors(seen)[0][:, 0]

    def vectors(self, seen: EgoObservation) -> tuple[Tensor, Tensor]:
        """(vectors [B,Q,d], which of them stand for something [B,Q]), the ego's first."""
        way = torch.cat([seen.way, seen.way_valid[..., None].float()], dim=-1)
        numbers = [seen.ego, seen.past.flatten(1), way.flatten(1), seen.goal, seen.goal_valid[:, None].float()]
        ego = self.ego(torch.cat(numbers, dim=-1))
        if not self.settings.layers:
            return self.norm(ego)[:, None], torch.ones_like(seen.goal_valid)[:, None]
        parts = [ego[:, None], self.others(seen.others), self.pieces(seen.pieces), self.lights(seen.lights)]
        there = [torch.ones_like(seen.goal_valid)[:, None], seen.others_valid, seen.pieces_valid, seen.lights_valid]
        valid = torch.cat(there, dim=1)
        return self.norm(self.layers(torch.cat(parts, dim=1), src_key_padding_mask=~valid)), valid


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two layers with GELU between."""
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))
