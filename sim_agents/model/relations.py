"""How two poses lie to each other, as numbers that attention reads.

Legend: [...] any leading shape, F features of a relation. Everything is relative to the asking pose, so turning or
moving a whole scene changes nothing but rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

_CENTRES_M = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Distances (m) around which bumps of the logarithm of distance lie."""
RELATION_FEATURES = 11 + len(_CENTRES_M)
SHORTEST_M = 0.5
NEAREST_M = 0.1
"""Below this distance a direction fades out: between poses that coincide it would be rounding noise."""


def relation(
    asking: Float[Tensor, "... 3"], asked: Float[Tensor, "... 3"], gap_s: Shaped[Tensor, "*_"] | float = 0.0
) -> Float[Tensor, "... F"]:
    """Features [..., F] of poses ``asked`` [..., 3] seen from poses ``asking`` [..., 3] (they broadcast), ``gap_s``
    seconds ago.

    Offset along and across the asking heading (in tens of metres, tanh), log distance, direction and relative
    heading as cosine and sine (direction also doubled), time gap, and Gaussian bumps of log distance.
    """
    dx, dy = asked[..., 0] - asking[..., 0], asked[..., 1] - asking[..., 1]
    cosine, sine = torch.cos(asking[..., 2]), torch.sin(asking[..., 2])
    along, across = cosine * dx + sine * dy, cosine * dy - sine * dx
    distance = torch.sqrt(along * along + across * across + NEAREST_M**2)
    c, s = along / distance, across / distance
    turn = asked[..., 2] - asking[..., 2]
    logarithm = torch.log(distance + SHORTEST_M)
    gap = torch.as_tensor(gap_s, dtype=dx.dtype, device=dx.device).expand(dx.shape)
    flat = [
        torch.tanh(along / 10.0), torch.tanh(across / 10.0), logarithm / 4.0, c, s, c * c - s * s, 2.0 * c * s,
        torch.cos(turn), torch.sin(turn), gap, torch.tanh(across / 2.0),
    ]  # fmt: skip
    centres = torch.log(torch.tensor(_CENTRES_M, device=dx.device, dtype=dx.dtype) + SHORTEST_M)
    bumps = torch.exp(-2.0 * (logarithm[..., None] - centres) ** 2)
    return torch.cat([torch.stack(flat, dim=-1), bumps], dim=-1)


def nearest_within(
    distance: Float[Tensor, "*asker C"], allowed: Bool[Tensor, "... C"], most: int, radius: float
) -> tuple[Int64[Tensor, "*asker P"], Bool[Tensor, "*asker P"]]:
    """The ``most`` nearest of C candidates: rows [..., P] and which of them count [..., P].

    ``distance`` [..., C] m, ``allowed`` [..., C]; beyond ``radius`` nobody counts.
    """
    hidden = distance.masked_fill(~allowed, torch.inf)
    found = hidden.topk(min(most, distance.shape[-1]), dim=-1, largest=False)
    return found.indices, found.values <= radius
