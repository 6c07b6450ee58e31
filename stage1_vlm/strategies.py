"""DeepSpeed ZeRO under Lightning with four things stock does not do: CPU, ``auto`` values, another world size, and
gradients of accumulated batches that are divided by their number once, not twice.

The JSON of the recipe says ``"auto"`` where Hugging Face's Trainer would fill in numbers; here every one is resolved
from the trainer, the module and the loader before DeepSpeed sees it, and a number that contradicts them is an error.
Deviation from that JSON: ``fp16`` with a loss scale and ``bf16`` exclude each other, so both blocks give way to the
trainer's ``precision``; the bucket sizes are bounded by the model's size.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from navsim_ext.errors import TriviumError
from navsim_ext.files import read_json
from navsim_ext.fingerprint import flatten_json

_log = logging.getLogger(__name__)
BUCKETS = ("allgather_bucket_size", "reduce_bucket_size")


class StrategyError(TriviumError):
    """A DeepSpeed configuration that contradicts the trainer or cannot be resolved."""


def resolve_auto(
    config: Mapping[str, Any],
    *,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    gradient_clipping: float,
    optimizer: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration with every ``"auto"`` replaced by its number.

    ``optimizer`` holds type, lr, weight_decay, betas and eps of the optimizer that the module builds; the JSON's own
    optimizer block must agree with it and is then left out (DeepSpeed takes the module's). Raises StrategyError naming
    key and both values at a contradiction, or a key that stays ``"auto"``.
    """
    resolved = deepcopy(dict(config))
    for block in ("fp16", "bf16"):
        resolved.pop(block, None)
    block = resolved.pop("optimizer", None)
    if block is not None:
        stated = {"type": block.get("type"), **block.get("params", {})}
        for key, value in stated.items():
            actual = optimizer.get(key)
            same = list(value) == list(actual) if isinstance(value, list | tuple) else value == actual
            if value != "auto" and not same:
                raise StrategyError(
                    f"deepspeed optimizer.{key} is {value!r}, the module's is {actual!r}: make them equal"
                )
    numbers = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "gradient_clipping": gradient_clipping,
    }
    for key, number in numbers.items():
        stated = resolved.get(key, "auto")
        if stated not in ("auto", number):
            raise StrategyError(f'deepspeed {key} is {stated}, the trainer gives {number}: write "auto" or that number')
        resolved[key] = number
    resolved.setdefault("zero_allow_untested_optimizer", True)
    left = [key for key, value in flatten_json(resolved).items() if value == "auto"]
    if left:
        raise StrategyError(f"deepspeed configuration: no value is known for {left}: write numbers")
    return resolved


def bound_buckets(config: dict[str, Any], parameters: int) -> None:
    """Limits the communication buckets to the model's size, rounded to the even numbers that DeepSpeed wants."""
    zero = config["zero_optimization"]
    for key in BUCKETS:
        if isinstance(zero.get(key), int | float):
            zero[key] = 2 * int(min(zero[key], parameters + 1) // 2)


class DeepSpeedZero(DeepSpeedStrategy):
    """ZeRO stage 1, 2 or 3 from a JSON file or mapping; runs on CPU over gloo as well.

    ``universal``: the checkpoint that is resumed is a universal one (``python -m stage1_vlm.universal``), which any
    number of processes can load as long as the global batch stays the same.
    """

    def __init__(self, config: str | Mapping[str, Any], *, stage: int | None = None, universal: bool = False) -> None:
        self._on_cpu = not torch.cuda.is_available()
        if self._on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            _no_compiled_communication()
        if isinstance(config, DictConfig):
            config = OmegaConf.to_container(config, resolve=True)
        content = read_json(config, "give a DeepSpeed configuration") if isinstance(config, str) else deepcopy(config)
        if not isinstance(content, Mapping):
            raise StrategyError(f"the DeepSpeed configuration {config!s:.200} is no JSON object")
        content = dict(content)
        if stage is not None:
            content["zero_optimization"] = {**content.get("zero_optimization", {}), "stage": stage}
        if universal:
            content["checkpoint"] = {**content.get("checkpoint", {}), "load_universal": True}
        self.universal = universal
        super().__init__(config=content, process_group_backend="gloo" if self._on_cpu else None)

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
        else:  # past the check for CUDA
            super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _format_batch_size_and_grad_accum_config(self) -> None:
        module = self.lightning_module
        if module is None:
            return
        trainer = module.trainer
        self.config = resolve_auto(
            self.config,
            micro_batch=trainer.datamodule.batch_size,
            accumulation=trainer.accumulate_grad_batches,
            world_size=self.world_size,
            gradient_clipping=float(trainer.gradient_clip_val or 0.0),
            optimizer={
                "type": "AdamW",
                "lr": module.learning_rate,
                "weight_decay": module.weight_decay,
                "betas": list(module.betas),
                "eps": module.epsilon,
            },
        )

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        if not self.zero_stage_3:  # whose parameters are partitioned, that is, empty, by now
            bound_buckets(self.config, sum(p.numel() for p in model.parameters()))
        if isinstance(self.accelerator, CUDAAccelerator):
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        import deepspeed

        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(
                device_rank=self.local_rank
            ),  # a CPU device has no index; -1 would mean one process
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero_optimizer

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the accumulated batches; DeepSpeed must not do so a second time."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Stage 3: transformers itself creates and fills partitioned weights once it knows the configuration.

        Lightning's ``zero.Init`` around ``from_pretrained`` would partition them before they can be initialised.
        """
        self._init_config_if_needed()
        if self.zero_stage_3:
            self._transformers_config = HfDeepSpeedConfig(self.config)  # transformers holds a weak reference to it
        try:
            yield
        finally:
            unset_hf_deepspeed_config()  # models that are made later, to be saved, are plain ones

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        client_state = super().load_checkpoint(checkpoint_path, weights_only)
        if self.universal:
            for name, state in client_state.get("callbacks", {}).items():
                if name.split("{")[0] == "RngState" and state["world_size"] != self.world_size:
                    _log.warning(
                        "continuing a run of %d processes with %d: dropout draws differ from here on",
                        state["world_size"],
                        self.world_size,
                    )
                    state["world_size"] = self.world_size
        return client_state


@rank_zero_only
def _say_no_compiled_communication() -> None:
    _log.info("DeepSpeed on CPU: collectives go through gloo, without its compiled shared-memory operator")


def _no_compiled_communication() -> None:
    """Keeps DeepSpeed from compiling its shared-memory operator at start (20 s, needs a compiler; same losses)."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    _say_no_compiled_communication()
