"""Writing checkpoints so that one is either whole or absent, and reading weights back from them."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from navsim_ext.errors import MissingError, TriviumError

STEP_PATTERN = re.compile(r"epoch=(\d+)-step=(\d+)\.ckpt")
COMPLETE_MARK = ".complete"  # inside a checkpoint that is a folder (DeepSpeed); files are complete when they exist
ZERO_WEIGHTS = "checkpoint/mp_rank_00_model_states.pt"  # in such a folder: all weights, and the state of callbacks


class CheckpointError(TriviumError):
    """A checkpoint cannot be written or read."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, renames: kill -9 or a full disk never leaves half a checkpoint.

    (Lightning's own writer holds a second copy in memory and moves it from the temporary folder, which is a plain
    copy when that is another file system.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
            raise CheckpointError(
                f"cannot write {target}: {error} ({free / 2**30:.2f} GiB free): make room; the last complete "
                "checkpoint beside it is untouched and the same command continues from it"
            ) from error


class Checkpoints(ModelCheckpoint):
    """The checkpoints that a run resumes from: ``epoch=E-step=S.ckpt``, the newest ``keep`` of them, ``last.ckpt``.

    Saves after every ``every_n_steps`` optimizer steps or ``every_minutes``, and at the end of each epoch; never in
    the middle of a gradient accumulation, whose gradients no checkpoint holds.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        every_n_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 2,
    ) -> None:
        if every_n_steps is not None and every_minutes is not None:
            raise CheckpointError("every_n_steps and every_minutes exclude each other: set one of them to null")
        super().__init__(
            dirpath, "{epoch}-{step}", monitor="step", mode="max", save_top_k=keep, save_last="link",
            every_n_epochs=1, save_on_exception=False,
        )  # fmt: skip
        self._every_n_steps = every_n_steps
        self._every_s = None if every_minutes is None else 60.0 * every_minutes
        self._saved_at_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        self._saved_at_s = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not resumable_after(trainer, batch_idx):
            return
        due = False
        if self._every_n_steps is not None:
            due = trainer.global_step - self._last_global_step_saved >= self._every_n_steps
        elif self._every_s is not None:  # clocks differ: the first process decides
            due = trainer.strategy.broadcast(time.monotonic() - self._saved_at_s >= self._every_s)
        if due:
            self.save_now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: validation changes no state that a resume needs."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Saves the present step unless it is saved already; every process must call it."""
        if not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
            self._saved_at_s = time.monotonic()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        trainer.strategy.barrier("checkpoint")
        if trainer.is_global_zero and Path(filepath).is_dir():
            (Path(filepath) / COMPLETE_MARK).touch()


def resumable_after(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint of the end of this batch continues exactly.

    Not within a gradient accumulation (no checkpoint holds those gradients), and not right before a validation
    (Lightning would leave it out when it continues); the end of an epoch is saved after its validation.
    """
    if batch_idx + 1 >= trainer.num_training_batches or (batch_idx + 1) % trainer.accumulate_grad_batches:
        return False
    per_epoch = trainer.check_val_every_n_epoch is not None
    batches = batch_idx + 1 if per_epoch else trainer.fit_loop.total_batch_idx + 1
    return not trainer.val_check_batch or batches % trainer.val_check_batch != 0


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end (its name alone already says so for files that we wrote)."""
    return (path / COMPLETE_MARK).is_file() if path.is_dir() else zipfile.is_zipfile(path)


def newest_complete(folder: Path) -> Path | None:
    """The complete ``epoch=E-step=S.ckpt`` with the highest step in a checkpoints folder."""
    found = [(int(match[2]), int(match[1]), path) for path in folder.glob("epoch=*-step=*.ckpt")
             if (match := STEP_PATTERN.fullmatch(path.name)) and is_complete(path)]  # fmt: skip
    return max(found)[2] if found else None


def step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint stands for, from its name (links are followed)."""
    match = STEP_PATTERN.fullmatch(path.resolve().name)
    if match is None:
        raise CheckpointError(f"{path} is not named epoch=E-step=S.ckpt: resume from one that a run wrote")
    return int(match[2])


def load_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """Contents of a checkpoint, read without executing anything in it: a file, or a folder that ZeRO 1 or 2 wrote.

    Raises MissingError if it does not exist, CheckpointError if it is not whole or holds objects beyond tensors and
    plain containers.
    """
    path = Path(path)
    if not path.exists():
        raise MissingError(f"checkpoint {path} does not exist: check the path or train it first")
    if path.is_dir():
        if not (path / ZERO_WEIGHTS).is_file():
            raise CheckpointError(
                f"{path} is a folder without {ZERO_WEIGHTS} (ZeRO 3): convert it to one file with its zero_to_fp32.py"
            )
        content = load_checkpoint(path / ZERO_WEIGHTS, map_location)
        return content | {"state_dict": content["module"]}
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is not one, or holds objects that are not admitted: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}): it was cut short") from error


def ema_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor] | None:
    """The averaged weights that the EMA callback stored in a checkpoint, by parameter name; None without EMA."""
    for name, state in checkpoint.get("callbacks", {}).items():
        if name.split("{")[0] == "EMA":
            return state["shadow"]
    return None


def load_weights(path: str | os.PathLike[str], *, ema: bool | None = None) -> dict[str, Tensor]:
    """The module's state dict of a run's checkpoint: the averaged weights where there are any, else the live ones.

    ``ema=False`` asks for the live weights, ``ema=True`` raises CheckpointError when there is no average.
    """
    checkpoint = load_checkpoint(path)
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} has no 'state_dict' but {sorted(checkpoint)[:6]}: it is not a run's checkpoint")
    weights = dict(checkpoint["state_dict"])
    average = ema_weights(checkpoint)
    if ema is True and average is None:
        raise CheckpointError(f"{path} holds no EMA weights: use ema=false, or train with callbacks.ema")
    if ema is not False and average is not None:
        weights |= {name: value.to(weights[name].dtype) for name, value in average.items()}
    return weights
