"""V(feature of a road user at a decision): what return it may expect from there."""

from __future__ import annotations

from torch import Tensor, nn


class DrivingValueHead(nn.Module):
    """Mlp of the network's feature [..., d] -> one number [...].

    It sends no gradients into the features that the policy stands on. The last layer starts at zero.
    """

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU())
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(self.layers(features.detach().float()))[..., 0]
