"""Building blocks of the planner: norms, embeddings, Mlp's, rotary positions, attention.

Legend: R rows (one trajectory each, scene-major), S scenes, G = R / S rows of a scene, F poses, N context tokens,
d inner width = h heads x k head width, c channels. Shapes are suffixes of names where they help: ``query_RhFk``.
Parameter names are those of the published checkpoints, so that conversion is a matter of prefixes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6  # of every RMSNorm
ROPE_THETA = 10000.0
TIME_CHANNELS = 256  # of the sinusoidal time embedding


class Mlp(nn.Module):
    """fc2(LN(GELU(fc1 x))): the LayerNorm stands between activation and second layer."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class SwiGLU(nn.Module):
    """w3(SiLU(u) v) with [u, v] = w12 z; the hidden width equals the inner width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * width)
        self.w3 = nn.Linear(width, width)

    def forward(self, z: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        u, v = self.w12(z).chunk(2, dim=-1)
        return self.w3(F.silu(u) * v)


class TimestepEmbedder(nn.Module):
    """linear_2(SiLU(linear_1(x))); a module of its own only for the published parameter names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


class TimestepEncoder(nn.Module):
    """T(t) = linear_2(SiLU(linear_1([cos(t u), sin(t u)]))), u_k = 10000^(-k / 127), k < 128; t is the raw time."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)
        half = TIME_CHANNELS // 2
        exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32) / (half - 1)
        self.register_buffer("frequencies", torch.exp(exponent), persistent=False)

    def forward(self, time_R: Shaped[Tensor, " R"]) -> Float[Tensor, "R d"]:
        angle = time_R.float()[:, None] * self.frequencies
        embedding = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
        return self.timestep_embedder(embedding.to(self.timestep_embedder.linear_1.weight.dtype))


class ActionEncoder(nn.Module):
    """a_j = fc3(SiLU(fc2([fc1(x_j); S(t)]))), S(t) = [sin(t w), cos(t w)], w_k = 10000^(-k / (d/2)), k < d/2."""

    frequencies: Tensor

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(2 * width, width)
        self.fc3 = nn.Linear(width, width)
        half = width // 2
        exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half
        self.register_buffer("frequencies", torch.exp(exponent), persistent=False)

    def forward(self, x_RFc: Float[Tensor, "R F c"], time_R: Shaped[Tensor, " R"]) -> Float[Tensor, "R F d"]:
        angle = time_R.float()[:, None] * self.frequencies
        time = torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
        action = self.fc1(x_RFc.to(self.fc1.weight.dtype))
        time = time.to(action.dtype)[:, None].expand(-1, action.shape[1], -1)
        return self.fc3(F.silu(self.fc2(torch.cat([action, time], dim=-1))))


class EgoStatusAttention(nn.Module):
    """Ego status by attention: each of its numbers is a token, one learned query pools them (4 heads).

    In training each number after the command one-hot is hidden with probability ``dropout``, so that the planner
    does not merely extrapolate its own speed (PLUTO, arXiv 2404.14327, section III-D).
    """

    def __init__(self, channels: int, width: int, *, dropout: float, always_visible: int = 4) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(1, width) for _ in range(channels))
        self.attn = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.pos_embed = nn.Parameter(torch.empty(1, channels, width).normal_(std=0.02))
        self.query = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.dropout, self.always_visible = dropout, always_visible

    def forward(self, status_Sc: Float[Tensor, "S c"]) -> Float[Tensor, "S d"]:
        tokens = torch.stack([layer(status_Sc[:, i, None]) for i, layer in enumerate(self.linears)], dim=1)
        tokens = tokens + self.pos_embed
        hidden = None
        if self.training and self.dropout > 0:
            hidden = torch.rand(status_Sc.shape, device=status_Sc.device) < self.dropout
            hidden[:, : self.always_visible] = False
        query = self.query.expand(len(status_Sc), -1, -1)
        pooled, _ = self.attn(query, tokens, tokens, key_padding_mask=hidden, need_weights=False)
        return pooled[:, 0]


class RotaryEmbedding(nn.Module):
    """Half-split rotation of queries and keys by their position 0 ... F - 1."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, positions: int) -> None:
        super().__init__()
        frequency = ROPE_THETA ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
        angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x_RhFk: Float[Tensor, "R h F k"]) -> Float[Tensor, "R h F k"]:
        first, second = x_RhFk.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x_RhFk * self.cos.to(x_RhFk.dtype) + turned * self.sin.to(x_RhFk.dtype)


class RMSNorm(nn.RMSNorm):
    """x * rsqrt(mean(x^2) + eps) in float32, cast back, times the weight."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight.to(x.dtype)
