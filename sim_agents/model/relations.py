"""How two poses lie to each other, as numbers that attention reads.

Legend: [...] any leading shape, F features of a relation. Everything is relative to the asking pose, so turning or
moving a whole scene changes nothing but rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from sim_agents.model import kernels

_CENTRES_M = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Distances (m) around which bumps of the logarithm of distance lie."""
RELATION_FEATURES = 11 + len(_CENTRES_M)
SHORTEST_M = 0.5
_LOG_CENTRES = np.log(np.array(_CENTRES_M, np.float32) + np.float32(SHORTEST_M))
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


def relation_to(
    asking: Float[Tensor, "G Q 3"],
    asked: Float[Tensor, "G C 3"],
    rows: Int64[Tensor, "G Q P"],
    gap_s: Float[Tensor, " P"] | None = None,
) -> Float[Tensor, "G Q P F"]:
    """Features [G, Q, P, F] of the poses ``asked`` [G, C, 3] of ``rows`` [G, Q, P] seen from ``asking`` [G, Q, 3];
    ``gap_s`` [P] (None: 0). The same numbers as :func:`relation`, compiled on the CPU."""
    if not compiled(asking, asked) or asking.requires_grad or asked.requires_grad:
        return relation(asking[:, :, None], gather_rows(asked, rows), 0.0 if gap_s is None else gap_s)
    out = asking.new_empty(*rows.shape, RELATION_FEATURES)
    gap = np.zeros(rows.shape[2], np.float32) if gap_s is None else gap_s.numpy()
    kernels.relate(asking.numpy(), asked.numpy(), rows.numpy(), gap, _LOG_CENTRES, np.float32(SHORTEST_M),
                   np.float32(NEAREST_M), out.numpy())  # fmt: skip
    return out


def nearest_within(
    asking: Float[Tensor, "G Q 3"],
    asked: Float[Tensor, "G C 3"],
    allowed: Bool[Tensor, "G _ C"],
    most: int,
    radius: float,
) -> tuple[Int64[Tensor, "G Q P"], Bool[Tensor, "G Q P"]]:
    """The ``most`` nearest of C candidates: rows [G, Q, P] and which of them count [G, Q, P], P <= C.

    Poses ``asking`` [G, Q, 3] and ``asked`` [G, C, 3], ``allowed`` [G, Q, C] or [G, 1, C]; beyond ``radius`` m nobody
    counts. Rows that do not count are any.
    """
    most = min(most, asked.shape[1])
    if not compiled(asking, asked):
        apart = torch.hypot(
            asking[..., :, None, 0] - asked[..., None, :, 0], asking[..., :, None, 1] - asked[..., None, :, 1]
        )
        found = apart.masked_fill(~allowed, torch.inf).topk(most, dim=-1, largest=False)
        return found.indices, found.values <= radius
    rows = torch.empty(*asking.shape[:2], most, dtype=torch.int64)
    near = torch.empty(rows.shape, dtype=torch.bool)
    kernels.nearest(asking.detach().numpy(), asked.detach().numpy(), allowed.numpy(), np.float32(radius), rows.numpy(),
                    near.numpy())  # fmt: skip
    return rows, near


def gather_rows(table: Shaped[Tensor, "G C w"], rows: Int64[Tensor, "G Q P"]) -> Shaped[Tensor, "G Q P w"]:
    """Rows [G, Q, P] of tables [G, C, w] -> [G, Q, P, w]."""
    group = torch.arange(len(table), device=table.device)[:, None, None]
    return table[group, rows]


def compiled(*tensors: Tensor) -> bool:
    """Whether the compiled loops take these."""
    return all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)
