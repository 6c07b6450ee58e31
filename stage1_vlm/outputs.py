"""What a fine-tuning run leaves: folders that transformers and Trivium load, beside the checkpoints it resumes from.

    <output_dir>/checkpoint-N/       weights (safetensors), config, tokeniser, picture settings, checksums.json of all
                                     that, trainer_state.json;
                                     state.ckpt links to the checkpoint of the same step (optimizer, data order)
    <output_dir>/                    the same of the last step, metrics.json, skipped.jsonl, training_log.txt,
                                     tensorboard/ with scalars.json
    <output_dir>/version_0/          what the runtime keeps: checkpoints, metrics.csv, hparams.yaml

With LoRA the weights are merged (a plain model), and adapter/ holds the adapters alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from navsim_ext.errors import MissingError
from navsim_ext.files import read_json, remove_temporaries, write_json_atomic
from navsim_ext.runtime.checkpoint_folder import discard, numbered, step_of
from navsim_ext.runtime.checkpoints import Checkpoints
from navsim_ext.runtime.csv_log import CsvLog
from navsim_ext.runtime.learning_rate import total_steps
from stage1_vlm.adapters import has_adapters, merged_state_dict
from stage1_vlm.folder import CheckpointError
from stage1_vlm.module import InstructionTuning
from stage1_vlm.weights import finish_model_folder

STATE_LINK = "state.ckpt"
METRICS_FILE = "metrics.json"


def gather_weights(trainer: Trainer, module: InstructionTuning) -> dict[str, Tensor]:
    """Whole weights by the names of ``module.model``, on the CPU of the first process; empty elsewhere."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(module.model, options=options)
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        import deepspeed

        weights = {}
        for name, parameter in module.model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if trainer.is_global_zero:
                    weights[name] = parameter.detach().cpu().clone()
        if trainer.is_global_zero:
            weights |= {name: buffer.detach().cpu() for name, buffer in module.model.named_buffers()}
            weights = {name: weights[name] for name in module.model.state_dict() if name in weights}
        return weights
    if not trainer.is_global_zero:
        return {}
    return {name: value.detach().cpu() for name, value in module.model.state_dict().items()}


def save_plain_model(module: InstructionTuning, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes weights, config, tokeniser and picture settings; raises CheckpointError when a weight is missing."""
    backbone = module.backbone
    plain = merged_state_dict(weights, module.lora_scaling) if has_adapters(weights) else dict(weights)
    config = type(backbone.model.config).from_dict(backbone.model.config.to_dict())
    with init_empty_weights():
        model = type(backbone.model)(config)
    expected = set(model.state_dict())
    if problems := expected ^ set(plain):
        raise CheckpointError(f"the weights to save do not fit the plain model: {sorted(problems)[:8]}")
    model.config.use_cache = True
    model.config.dtype = next(iter(plain.values())).dtype
    if model.can_generate():
        model.generation_config = backbone.model.generation_config
    model.save_pretrained(str(folder), state_dict=plain)
    backbone.processor.save_pretrained(folder)
    if has_adapters(weights):
        adapter = folder / "adapter"
        adapter.mkdir()
        named = {f"base_model.model.{name}": value for name, value in weights.items()}
        own = get_peft_model_state_dict(backbone.adapter, state_dict=named)
        save_file({name: value.contiguous() for name, value in own.items()}, adapter / "adapter_model.safetensors")
        backbone.adapter.peft_config["default"].save_pretrained(str(adapter))
    finish_model_folder(folder)


def trainer_state(run_dir: Path, *, step: int, epoch: float, max_steps: int) -> dict[str, Any]:
    """Hugging Face's ``trainer_state.json``, from the run's metrics.csv: one entry of log_history per logged step."""
    table = CsvLog(run_dir / "metrics.csv")
    rows = table.read() if table.path.is_file() else []
    history: dict[int, dict[str, float]] = {}
    for row in rows:
        number = int(row["step"]) + 1  # Lightning counts the step that is being taken, Hugging Face those taken
        if number <= step:
            numbers = {name: float(value) for name, value in row.items() if value and name != "step"}
            history.setdefault(number, {"step": number}).update(numbers)
    return {"global_step": step, "epoch": epoch, "max_steps": max_steps, "log_history": list(history.values())}


class HuggingFaceCheckpoints(Checkpoints):
    """The runtime's checkpoints with a ``checkpoint-N`` folder for each; both go by the same ``keep``."""

    def __init__(
        self,
        dirpath: str,
        output_dir: str,
        *,
        every_n_steps: int | None = 200,
        every_minutes: float | None = None,
        keep: int = 2,
    ) -> None:
        super().__init__(dirpath, every_n_steps=every_n_steps, every_minutes=every_minutes, keep=keep)
        self.output_dir = Path(output_dir)

    def begin(self, trainer: Trainer, resumed: Path | None) -> None:
        super().begin(trainer, resumed)
        if not trainer.is_global_zero:
            return
        remove_temporaries(self.output_dir)
        kept = {step for _, step in numbered(self.dirpath)}
        for folder in self.output_dir.glob("checkpoint-*"):
            number = folder.name.removeprefix("checkpoint-")
            if number.isdigit() and int(number) not in kept:
                shutil.rmtree(folder)

    def write(self, trainer: Trainer, path: Path) -> None:
        """The folder first: what a kill leaves of it alone is removed, a checkpoint alone would be continued from."""
        module = trainer.lightning_module
        weights = gather_weights(trainer, module)
        if trainer.is_global_zero:
            step = trainer.global_step
            target = self.output_dir / f"checkpoint-{step}"
            temporary = self.output_dir / f".checkpoint-{step}.tmp"
            for stale in (temporary, target):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_plain_model(module, weights, temporary)
            epoch = trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_idx / max(1, trainer.num_training_batches)
            state = trainer_state(self.dirpath.parent, step=step, epoch=epoch, max_steps=total_steps(trainer))
            write_json_atomic(temporary / "trainer_state.json", state)
            (temporary / STATE_LINK).symlink_to(os.path.relpath(path, target))
            os.replace(temporary, target)
        trainer.strategy.barrier("checkpoint folder")
        super().write(trainer, path)

    def remove(self, path: Path) -> None:
        folder = self.output_dir / f"checkpoint-{step_of(path)}"
        if folder.is_dir():
            doomed = folder.with_name(f".{folder.name}.tmp")  # so that no half of one bears its name
            discard(doomed)
            os.replace(folder, doomed)
            discard(doomed)
        super().remove(path)


def last_metrics(run_dir: Path) -> dict[str, float]:
    """The last value of each column of the run's metrics.csv."""
    table = CsvLog(run_dir / "metrics.csv")
    rows = table.read() if table.path.is_file() else []
    counters = ("step", "epoch")
    return {name: float(value) for row in rows for name, value in row.items() if value and name not in counters}


def publish(output_dir: Path, run_dir: Path, step: int) -> None:
    """Puts the files of ``checkpoint-<step>`` into the output folder itself, weights first.

    Does nothing when they are there already, so a run that was killed here is finished by starting it again.
    """
    source = output_dir / f"checkpoint-{step}"
    if not source.is_dir():
        raise MissingError(f"{source} is missing: the run ended without a checkpoint of its last step")
    files = sorted(source.rglob("*"), key=lambda path: path.name == "trainer_state.json")
    for path in files:
        if path.is_dir() or path.name == STATE_LINK:
            continue
        target = output_dir / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, target)
    # The loggers write a step's numbers after its checkpoint: now the history is whole.
    saved = read_json(source / "trainer_state.json")
    state = trainer_state(run_dir, step=step, epoch=saved["epoch"], max_steps=saved["max_steps"])
    write_json_atomic(output_dir / "trainer_state.json", state)
