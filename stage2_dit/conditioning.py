"""What the denoiser knows of S scenes: computed once, asked by every row and every denoising step.

Legend: S scenes, N context tokens, f width of the VLM, d inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stage2_dit.attention import LayerContext

Padding = Literal["masked", "upstream"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded scenes. Rows are scene-major: row r of R = S G belongs to scene r // G; nothing is copied per row.

    ``tokens`` [S,N,d] projected VLM tokens; ``bias`` [S,N] logit added to each token (0, -inf for padding, log(count)
    for a row that stands for count equal ones) or None; ``layers`` keys and values of each cross layer.
    ``history``, ``mean``, ``ego`` [S,d]: history token, mean feature, ego status.
    """

    tokens: Float[Tensor, "S N d"]
    bias: Float[Tensor, "S N"] | None
    history: Float[Tensor, "S d"]
    mean: Float[Tensor, "S d"]
    ego: Float[Tensor, "S d"]
    layers: tuple[LayerContext, ...]

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.tokens)

    def select(self, scenes: Tensor | Sequence[int] | slice) -> Conditioning:
        """The conditioning of some scenes (an index tensor, list or slice); gradients flow through."""
        if not isinstance(scenes, slice):
            scenes = torch.as_tensor(scenes, device=self.tokens.device)
        return self._map(lambda tensor: tensor[scenes])

    def detach(self) -> Conditioning:
        return self._map(torch.Tensor.detach)

    def _map(self, change) -> Conditioning:
        apply = lambda tensor: None if tensor is None else change(tensor)  # noqa: E731
        layers = tuple(LayerContext(*(apply(tensor) for tensor in layer)) for layer in self.layers)
        return Conditioning(
            apply(self.tokens), apply(self.bias), *map(apply, (self.history, self.mean, self.ego)), layers
        )


def token_weights(
    mask_SN: Bool[Tensor, "S N"] | None, padding: Padding, padded_length: int | None
) -> tuple[Float[Tensor, "S rows"] | None, bool]:
    """How often each context row counts, [S,N] float32 (None: all once), and whether a zero row is to be appended.

    ``masked``: padding counts 0 times. ``upstream``: the published weights were trained without a mask on records
    padded to a fixed length, so zero rows took part in the mean and in every cross attention. With ``padded_length``
    L all padding of a scene becomes one zero row that counts L - (valid rows) times, which is equal to L rows (a
    row longer than L has none); without it every row of the batch counts once, as it stands.
    """
    if padding == "masked":
        return (None if mask_SN is None else mask_SN.float()), False
    if padded_length is None or mask_SN is None:
        return None, False
    valid = mask_SN.float()
    missing = (padded_length - valid.sum(dim=1, keepdim=True)).clamp_min(0)
    return torch.cat([valid, missing], dim=1), True
