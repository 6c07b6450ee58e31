"""FSDP2 for the planners: weights, gradients and optimizer states cut into W parts, one per process.

    strategy=fsdp2        on stages 2 and 3; python -m torch.distributed.run, or trainer.devices=N

A sharded module is gathered for each pass and let go after it, so that what a process holds between passes is a W-th.
Checkpoints are put together again as they are written: the same file as of any other strategy, which scoring reads and
from which a run goes on exactly. Its weights are those of DDP up to rounding: gradients are added in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes, without tensor parallelism; checkpoints are whole files."""

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            data_parallel_size=1,  # of all processes: known once they are counted
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def is_sharded(module: nn.Module) -> bool:
    """Whether some weight of a module is cut among processes."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def shard_whole(module: nn.Module, mesh: Any, methods: Sequence[str] = ()) -> None:
    """Makes a module one sharded unit that is gathered for ``forward`` and for each of ``methods``, and let go after.

    All processes get the weights of the first.
    """
    group = mesh.get_group()
    source = torch.distributed.get_global_rank(group, 0)
    for each in (*module.parameters(), *module.buffers()):
        torch.distributed.broadcast(each.data, source, group=group)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # so that weights lie in their parts between passes
    for name in methods:
        register_fsdp_forward_method(module, name)


def own_part(value: Tensor) -> Tensor:
    """The part of this process, sharing its memory; any other tensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process (all must ask); any other tensor as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def cut_like(value: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor cut as ``weight`` is; the part of this process lies on the weight's device."""
    if isinstance(value, DTensor) or not isinstance(weight, DTensor):
        return value.to(weight.device)
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
