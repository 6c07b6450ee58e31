"""Self attention among the poses, and cross attention to the VLM tokens with keys and values shared by a scene.

Legend: R rows scene-major, S scenes, G = R / S, F poses, N context tokens, h heads, k head width, d = h k.

The keys and values of the cross layers depend on the context alone, not on noise, time or ego state. So they are
computed once per scene (:meth:`Attention.context`), and all rows of a scene ask the same keys: the G F queries of
a scene stand in one attention call, nothing is copied.

With few queries the value projection is cheaper after the average than before it (exact algebra: the weights of an
average sum to 1):

    sum_n a_n (W_v e_n + b_v)  =  W_v (sum_n a_n e_n) + b_v
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from stage2_dit.layers import NORM_EPS, RMSNorm, RotaryEmbedding


class LayerContext(NamedTuple):
    """What one cross layer needs of S scenes.

    Projected: ``key`` [S,h,N,k] normed, ``value`` [S,h,N,k]. Deferred: ``key`` [S,h,k,N] not yet normed,
    ``key_scale`` [S,h,1,N] = rsqrt(mean(key^2) + eps), and ``value`` None (applied after the average).
    """

    key: Tensor
    value: Tensor | None
    key_scale: Tensor | None


class Attention(nn.Module):
    """Multi-head attention with per-head RMS norm of queries and keys; scale 1 / sqrt(k)."""

    def __init__(self, num_heads: int, head_width: int) -> None:
        super().__init__()
        width = num_heads * head_width
        self.num_heads, self.head_width = num_heads, head_width
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.q_norm = RMSNorm(head_width)
        self.k_norm = RMSNorm(head_width)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def split(self, x: Float[Tensor, "S N d"]) -> Float[Tensor, "S h N k"]:
        """[S,N,d] -> [S,h,N,k]."""
        return x.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)

    def attend_self(self, z_RFd: Float[Tensor, "R F d"], rope: RotaryEmbedding) -> Float[Tensor, "R F d"]:
        query = rope(self.q_norm(self.split(self.to_q(z_RFd))))
        key = rope(self.k_norm(self.split(self.to_k(z_RFd))))
        out = F.scaled_dot_product_attention(query, key, self.split(self.to_v(z_RFd)))
        return self.to_out(out.transpose(1, 2).flatten(2))

    def context(self, tokens_SNd: Float[Tensor, "S N d"]) -> LayerContext:
        """Keys and values of S scenes, computed once for every row and step that will ask them."""
        key = self.k_norm(self.split(self.to_k(tokens_SNd)))
        return LayerContext(key, self.split(self.to_v(tokens_SNd)), None)

    def deferred_context(self, tokens_SNd: Float[Tensor, "S N d"]) -> LayerContext:
        """Keys only, unnormed and transposed, for few queries: the norm is applied to the logits instead."""
        weight = self.to_k.weight
        if torch.is_autocast_enabled(tokens_SNd.device.type):
            weight = weight.to(torch.get_autocast_dtype(tokens_SNd.device.type))
        key_SdN = torch.matmul(weight, tokens_SNd.to(weight.dtype).transpose(1, 2))
        key_SdN = key_SdN + self.to_k.bias.to(key_SdN.dtype)[:, None]
        key = key_SdN.unflatten(1, (self.num_heads, self.head_width))
        scale = torch.rsqrt(key.float().pow(2).mean(dim=2, keepdim=True) + NORM_EPS)
        return LayerContext(key, None, scale)

    def attend_cross(
        self,
        z_RFd: Float[Tensor, "R F d"],
        rope: RotaryEmbedding,
        layer: LayerContext,
        tokens_SNd: Float[Tensor, "S N d"],
        bias_SN: Float[Tensor, "S N"] | None,
    ) -> Float[Tensor, "R F d"]:
        """Rows [R,F,d] ask the context of their scene; ``bias_SN`` is added to the logits (-inf hides a token)."""
        scenes, poses = len(tokens_SNd), z_RFd.shape[1]
        query = rope(self.q_norm(self.split(self.to_q(z_RFd))))
        # [S G, h, F, k] -> [S, h, G F, k]: the rows of a scene stand side by side as queries
        query = query.unflatten(0, (scenes, -1)).transpose(1, 2).flatten(2, 3)
        if layer.value is not None:
            bias = None if bias_SN is None else bias_SN[:, None, None].to(query.dtype)
            out = F.scaled_dot_product_attention(query, layer.key, layer.value, attn_mask=bias)
        else:
            out = self._attend_deferred(query, layer, tokens_SNd, bias_SN)
        # [S, h, G F, k] -> [R, F, d]
        out = out.unflatten(2, (-1, poses)).permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1)
        return self.to_out(out)

    def _attend_deferred(
        self,
        query_ShQk: Float[Tensor, "S h Q k"],
        layer: LayerContext,
        tokens_SNd: Float[Tensor, "S N d"],
        bias_SN: Float[Tensor, "S N"] | None,
    ) -> Float[Tensor, "S h Q k"]:
        """Attention over raw keys, values projected after the average; returns [S,h,Q,k]."""
        query = query_ShQk * (self.k_norm.weight.to(query_ShQk.dtype) * self.head_width**-0.5)
        logits = torch.matmul(query, layer.key).float() * layer.key_scale
        if bias_SN is not None:
            logits = logits + bias_SN[:, None, None]
        weights = logits.softmax(dim=-1).to(tokens_SNd.dtype)
        average = torch.bmm(weights.flatten(1, 2), tokens_SNd).unflatten(1, weights.shape[1:3])  # [S,h,Q,d]
        weight_v = self.to_v.weight.unflatten(0, (self.num_heads, self.head_width))  # [h,k,d]
        bias_v = self.to_v.bias.unflatten(0, (self.num_heads, 1, self.head_width))  # [h,1,k]
        return torch.matmul(average, weight_v.transpose(1, 2).to(average.dtype)) + bias_v.to(average.dtype)
