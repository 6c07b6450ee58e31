"""The one way in which per-decision values become a loss: a mean over what counts, also across processes."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from navsim_ext.errors import TriviumError

LEAST_COUNT = 1e-6  # below 1 / W of any number of processes


class ZeroMask(TriviumError):
    """A mean over nothing was asked for."""


def masked_mean(
    value: Float[Tensor, "*any"], mask: Bool[Tensor, "*any"], count: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """sum(value mask) / count, [] ; ``count`` None: sum(mask).

    Values under a False mask do not matter, not even NaN. With data parallelism each of W processes passes
    count = (sum of all masks) / W: the average of their gradients is then that of one process with all the data.
    A ``count`` of 0 (nothing counts on any process, so the sum is 0 too) gives 0 with gradient 0. Raises ZeroMask
    when nothing counts and no ``count`` was given.
    """
    if count is None:
        count = mask.sum()
        if int(count) == 0:
            raise ZeroMask("a mean over 0 decisions: every trajectory is masked; drop the batch before")
    total = value.masked_fill(~mask, 0.0).sum()
    return total / (count.clamp_min(LEAST_COUNT) if isinstance(count, Tensor) else max(count, LEAST_COUNT))


def sequence_mean(
    value: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], count: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """Mean over rows of each row's mean over its decisions that count, []; ``count`` counts rows (None: here)."""
    steps = mask.sum(dim=1, keepdim=True)
    row = value.masked_fill(~mask, 0.0).sum(dim=1, keepdim=True) / steps.clamp_min(1)
    return masked_mean(row, steps > 0, count)
