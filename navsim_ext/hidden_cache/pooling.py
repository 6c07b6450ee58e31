"""Optional pooling of image tokens: each 2x2 square of a tile's patch grid becomes its mean ("lite" caches).

Legend: L tokens, D width, S spans of image tokens, G side of a tile's patch grid (16 for InternVL's 448-pixel tiles
after its pixel shuffle: 256 tokens a tile, row by row), T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from navsim_ext.errors import DataError

POOLINGS = ("image_2x2",)
TILE_SIDE = 16  # G
Spans = Sequence[tuple[int, int]]


def check_pooling(name: str | None) -> str | None:
    """Raises DataError for a pooling that does not exist."""
    if name is not None and name not in POOLINGS:
        raise DataError(f"pooling {name!r} does not exist; choose one of {', '.join(POOLINGS)} or null")
    return name


def check_spans(spans: Spans, length: int, tile_side: int = TILE_SIDE) -> None:
    """Raises DataError unless the spans [start, stop) are ordered, disjoint, inside and made of whole tiles."""
    end = 0
    for start, stop in spans:
        if not end <= start < stop <= length or (stop - start) % tile_side**2:
            raise DataError(
                f"image span [{start}, {stop}) of {length} tokens: spans must be in order, disjoint and whole tiles of "
                f"{tile_side**2} tokens"
            )
        end = stop


def pool_image_tokens(states: Tensor, spans: Spans, tile_side: int = TILE_SIDE) -> Tensor:
    """[L,D] -> [L - 3/4 of the image tokens, D]; mean in float32, order kept, other tokens untouched."""
    check_spans(spans, len(states), tile_side)
    pieces, end = [], 0
    for start, stop in spans:
        half = tile_side // 2
        tiles = states[start:stop].float().unflatten(0, (-1, half, 2, half, 2))  # [T, G/2, 2, G/2, 2, D]
        pieces += [states[end:start], tiles.mean((2, 4)).flatten(0, 2).to(states.dtype)]
        end = stop
    return torch.cat([*pieces, states[end:]])
