"""The diffusion transformer: blocks with adaptive norms, even ones self attention, odd ones cross attention.

Legend: R rows scene-major, S scenes, F poses, N context tokens, d inner width, o output width, c the conditioning
vector T(t) + ego of a row.

Block (Peebles & Xie, arXiv 2212.09748, adaLN-Zero; RMSNorm and SwiGLU in place of LayerNorm and GELU):

    (shift1, scale1, gate1, shift2, scale2, gate2) = adaLN_modulation(SiLU(c))
    y += gate1 Attention(rms(y) (1 + scale1) + shift1)
    y += gate2 SwiGLU(rms(y) (1 + scale2) + shift2)
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stage2_dit.attention import Attention, LayerContext
from stage2_dit.layers import RMSNorm, RotaryEmbedding, SwiGLU, TimestepEncoder


class DitBlock(nn.Module):
    """One layer; the kind of attention is the caller's choice through ``layer`` (None: self attention)."""

    def __init__(self, num_heads: int, head_width: int) -> None:
        super().__init__()
        width = num_heads * head_width
        self.norm1 = RMSNorm(width)
        self.attn = Attention(num_heads, head_width)
        self.norm2 = RMSNorm(width)
        self.ffn = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def forward(
        self,
        y_RFd: Float[Tensor, "R F d"],
        c_Rd: Float[Tensor, "R d"],
        rope: RotaryEmbedding,
        layer: LayerContext | None,
        tokens_SNd: Float[Tensor, "S N d"],
        bias_SN: Float[Tensor, "S N"] | None,
    ) -> Float[Tensor, "R F d"]:
        modulation = self.adaLN_modulation(c_Rd)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        z = self.norm1(y_RFd) * (1 + scale1) + shift1
        if layer is None:
            attended = self.attn.attend_self(z, rope)
        else:
            attended = self.attn.attend_cross(z, rope, layer, tokens_SNd, bias_SN)
        y = y_RFd + gate1 * attended
        z = self.norm2(y) * (1 + scale2) + shift2
        return y + gate2 * self.ffn(z)


class FinalLayer(nn.Module):
    """linear(rms(y) (1 + scale) + shift), (shift, scale) = modulation_proj(SiLU(c))."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, outputs)
        self.modulation_proj = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        nn.init.zeros_(self.modulation_proj[1].weight)
        nn.init.zeros_(self.modulation_proj[1].bias)

    def forward(self, y_RFd: Float[Tensor, "R F d"], c_Rd: Float[Tensor, "R d"]) -> Float[Tensor, "R F o"]:
        shift, scale = self.modulation_proj(c_Rd)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(y_RFd) * (1 + scale) + shift)


class DiT(nn.Module):
    """Pose tokens [R,F,d] -> [R,F,o] under time and ego state, asking the context of each scene."""

    def __init__(self, num_heads: int, head_width: int, num_layers: int, outputs: int, positions: int) -> None:
        super().__init__()
        width = num_heads * head_width
        self.timestep_encoder = TimestepEncoder(width)
        self.rotary_embedder = RotaryEmbedding(head_width, positions)
        self.transformer_blocks = nn.ModuleList(DitBlock(num_heads, head_width) for _ in range(num_layers))
        self.final_layer = FinalLayer(width, outputs)

    @property
    def cross_blocks(self) -> list[DitBlock]:
        """The odd layers, which ask the context."""
        return [block for i, block in enumerate(self.transformer_blocks) if i % 2]

    def context(self, tokens_SNd: Float[Tensor, "S N d"], *, project_values: bool) -> tuple[LayerContext, ...]:
        """Keys (and values) of every cross layer, in layer order."""
        attentions = [block.attn for block in self.cross_blocks]
        if project_values:
            return tuple(attention.context(tokens_SNd) for attention in attentions)
        return tuple(attention.deferred_context(tokens_SNd) for attention in attentions)

    def forward(
        self,
        y_RFd: Float[Tensor, "R F d"],
        time_R: Shaped[Tensor, " R"],
        ego_Rd: Float[Tensor, "R d"],
        tokens_SNd: Float[Tensor, "S N d"],
        bias_SN: Float[Tensor, "S N"] | None,
        layers: Sequence[LayerContext],
    ) -> tuple[Float[Tensor, "R F o"], list[Float[Tensor, "R F d"]]]:
        """Returns the output [R,F,o] and the states before each block and after the last ([R,F,d] each)."""
        c = self.timestep_encoder(time_R) + ego_Rd
        y, states = y_RFd, [y_RFd]
        for i, block in enumerate(self.transformer_blocks):
            layer = layers[i // 2] if i % 2 else None
            y = block(y, c, self.rotary_embedder, layer, tokens_SNd, bias_SN)
            states.append(y)
        return self.final_layer(y, c), states


def deferred_is_cheaper(queries_per_scene: int, num_heads: int, width: int) -> bool:
    """Multiplications per context token: Q h d (average of tokens) against d d + Q d (values first)."""
    return queries_per_scene * num_heads < width + queries_per_scene
