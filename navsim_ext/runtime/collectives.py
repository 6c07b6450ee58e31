"""How many processes work together, and what they tell each other: W processes see one global batch.

Collective operations return their argument unchanged in a single process, and must be called by all. Tensors must have
equal shapes on all processes.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


def launched_rank() -> int:
    """Rank that the launcher (torchrun, SLURM, Lightning itself) gave this process, known at the start; else 0."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def launched_processes() -> int:
    """Processes that the launcher started, known at the start; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def connected() -> bool:
    """Whether this process has joined a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world() -> tuple[int, int]:
    """(rank, number of processes) of the process group; (0, 1) without one."""
    if connected():
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


def gather_by_token(mine: dict[str, Value]) -> dict[str, Value]:
    """The union over all processes; a token that several have (a padded last batch) is there once."""
    _, size = world()
    if size == 1:
        return mine
    parts: list[dict[str, Value] | None] = [None] * size
    torch.distributed.all_gather_object(parts, mine)
    return {token: value for part in parts for token, value in (part or {}).items()}


def share_of_count(mask: Tensor) -> Tensor:
    """(sum of the mask over all processes) / W: the denominator that makes averaged gradients global means."""
    total = mask.sum().float()
    _, size = world()
    if size > 1:
        torch.distributed.all_reduce(total)
    return total / size
