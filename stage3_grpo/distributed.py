"""The few collective operations of stage 3: W processes together see one global batch.

All return their argument unchanged in a single process. Tensors must have equal shapes on all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather_rows(value: Tensor) -> Tensor:
    """[N,...] of each process -> [W N,...], in order of rank; no gradients."""
    _, size = world()
    if size == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(size)]
    torch.distributed.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def own_rows(value: Tensor) -> Tensor:
    """The rows of this process out of a gathered tensor."""
    rank, size = world()
    count = len(value) // size
    return value[rank * count : (rank + 1) * count]


def share_of_count(mask: Tensor) -> Tensor:
    """(sum of the mask over all processes) / W: the denominator that makes averaged gradients global means."""
    total = mask.sum().float()
    _, size = world()
    if size > 1:
        torch.distributed.all_reduce(total)
    return total / size
