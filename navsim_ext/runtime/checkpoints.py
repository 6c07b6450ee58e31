"""When a training saves, which checkpoints it keeps, and which of them it continues from."""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from navsim_ext.files import remove_temporaries
from navsim_ext.runtime.checkpoint_folder import (
    BEST_PATTERN,
    COMPLETE_MARK,
    LAST_NAME,
    LAST_STEM,
    NOTHING_YET,
    RunCheckpointError,
    discard,
    is_complete,
    numbered,
    relink,
    step_of,
)

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """The checkpoints that a run resumes from: ``epoch=E-step=S.ckpt``, the newest ``keep`` of them, ``last.ckpt``.

    Saves after every ``every_n_steps`` optimizer steps or ``every_minutes``, and at the end of each epoch; never in
    the middle of a gradient accumulation, whose gradients no checkpoint holds.

    ``last.ckpt`` is a link, and the point of no return: it moves to a new checkpoint only when the loggers have
    written that step too, and older checkpoints go only then; until the first one counts it points to nothing. What a
    kill leaves beyond it is removed when the run continues and done again, so that the folder ends as that of a run
    that nothing disturbed. No path is stored: a folder may be moved. (Lightning's ModelCheckpoint keeps absolute paths
    and, after a kill, a second ``last-v1``.)
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
            raise RunCheckpointError("every_n_steps and every_minutes exclude each other: set one of them to null")
        self.dirpath, self.keep = Path(dirpath), checked_keep(keep)
        self._every_n_steps = every_n_steps
        self._every_s = None if every_minutes is None else 60.0 * every_minutes
        self._saved_at_s = 0.0
        self._saved_step = 0
        self._uncommitted: Path | None = None

    def begin(self, trainer: Trainer, resumed: Path | None) -> None:
        """Removes what lies beyond the checkpoint that the run continues from (None: all), and older ones than kept."""
        if not trainer.is_global_zero or not self.dirpath.is_dir():
            return
        remove_temporaries(self.dirpath)
        for path in self.dirpath.glob(f"{LAST_STEM}-v*.ckpt"):  # of Lightning's own callback
            discard(path)
        own = resumed is not None and resumed.parent == self.dirpath.resolve()
        for path, step in numbered(self.dirpath):
            if not own or step > step_of(resumed) or not is_complete(path):
                log.info("removing %s, which is beyond the step that the run continues from, or not whole", path)
                self.remove(path)
        if own:
            self._settle(resumed.name)
        elif (last := self.dirpath / LAST_NAME).is_symlink():
            last.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._saved_at_s = time.monotonic()
        last = self.dirpath / LAST_NAME
        if trainer.is_global_zero and not trainer.fast_dev_run and not last.is_symlink():
            self.dirpath.mkdir(parents=True, exist_ok=True)
            relink(last, NOTHING_YET)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not resumable_after(trainer, batch_idx):
            return
        due = False
        if self._every_n_steps is not None:
            due = trainer.global_step - self._saved_step >= self._every_n_steps
        elif self._every_s is not None:  # clocks differ: the first process decides
            due = trainer.strategy.broadcast(time.monotonic() - self._saved_at_s >= self._every_s)
        if due:
            # where the last validation ended is of no use now, and a run that was continued since does not know it
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset_on_run()
            self.save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._commit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Saves the present step unless it is saved already; every process must call it."""
        if not trainer.fast_dev_run and self._saved_step != trainer.global_step:
            path = self.dirpath / f"epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
            self.write(trainer, path)
            self._uncommitted = path
            self._saved_step, self._saved_at_s = trainer.global_step, time.monotonic()

    def write(self, trainer: Trainer, path: Path) -> None:
        """Writes one checkpoint, and what goes with it."""
        write_checkpoint(trainer, path)

    def remove(self, path: Path) -> None:
        """Removes one checkpoint, and what goes with it; only the first process does."""
        discard(path)

    def _commit(self, trainer: Trainer) -> None:
        """The step that was saved has been logged by now: it is what the run continues from."""
        if self._uncommitted is None:
            return
        path, self._uncommitted = self._uncommitted, None
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)
        if trainer.is_global_zero:
            self._settle(path.name)
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, BestCheckpoints):
                    callback.prune()

    def _settle(self, name: str) -> None:
        relink(self.dirpath / LAST_NAME, name)
        for path, _ in numbered(self.dirpath)[self.keep :]:
            self.remove(path)


class BestCheckpoints(Checkpoint):
    """The ``keep`` best checkpoints by a validation metric, ``best-epoch=E-step=S.ckpt``, saved after each validation.

    ``monitor``: name of the metric; ``mode`` "min" or "max"; ``link``: a name for the best of them, e.g.
    ``best_pdm_score.ckpt``. Scores that are not finite are never best; of equal ones the earlier is. A checkpoint that
    is no longer among the best stays until the run can only continue from a later step.
    """

    def __init__(
        self, dirpath: str | os.PathLike[str], *, monitor: str, mode: str, keep: int = 1, link: str | None = None
    ) -> None:
        if mode not in ("min", "max"):
            raise RunCheckpointError(f"mode is {mode!r}: choose min or max")
        self.dirpath, self.keep = Path(dirpath), checked_keep(keep)
        self.monitor, self.mode, self.link = monitor, mode, link
        self.scores: dict[str, float] = {}  # by file name, the best first
        self._trainer: Trainer | None = None

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}{{'monitor': {self.monitor!r}}}"

    @property
    def link_path(self) -> Path | None:
        return None if self.link is None else self.dirpath / self.link

    @property
    def best(self) -> Path | None:
        """Path of the best checkpoint (its link where there is one), None before the first."""
        return self.dirpath / (self.link or next(iter(self.scores))) if self.scores else None

    @property
    def best_score(self) -> float | None:
        return next(iter(self.scores.values()), None)

    def begin(self, trainer: Trainer, resumed: Path | None) -> None:
        """A fresh run has no best yet; one that continues learns it from its checkpoint (:meth:`load_state_dict`)."""
        self._trainer = trainer
        if resumed is None:
            self._settle()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise RunCheckpointError(
                f"callbacks.best goes by {self.monitor!r}, which validation did not report (there are: {known}): set "
                "its monitor to one of these, or callbacks.best=null"
            )
        name = f"best-epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        if self.consider(name, trainer.callback_metrics[self.monitor]):
            write_checkpoint(trainer, self.dirpath / name)
            if trainer.is_global_zero:
                self._relink()
                if not any(isinstance(each, Checkpoints) for each in trainer.checkpoint_callbacks):
                    self.prune()

    def consider(self, name: str, score: Tensor) -> bool:
        """Whether a checkpoint is among the best; if so it takes its place."""
        value = float(score)
        if not math.isfinite(value):
            log.warning("%s is %s: %s is not among the best", self.monitor, value, name)
            return False
        sign = 1.0 if self.mode == "min" else -1.0
        ranked = sorted((self.scores | {name: value}).items(), key=lambda item: sign * item[1])[: self.keep]
        if name not in dict(ranked):
            return False
        self.scores = dict(ranked)
        return True

    def prune(self) -> None:
        """Removes the files that are not among the best."""
        for path in self.dirpath.glob("best-*.ckpt"):
            if BEST_PATTERN.fullmatch(path.name) and path.name not in self.scores:
                discard(path)

    def _relink(self) -> None:
        if self.link is not None and self.scores:
            relink(self.dirpath / self.link, next(iter(self.scores)))
        elif self.link is not None:
            (self.dirpath / self.link).unlink(missing_ok=True)

    def _settle(self) -> None:
        if self._trainer is not None and self._trainer.is_global_zero and self.dirpath.is_dir():
            self._relink()
            self.prune()

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those of the best that are here: in another folder than the checkpoint's there is none."""
        here = {name: float(score) for name, score in state_dict["scores"].items() if (self.dirpath / name).exists()}
        self.scores = here
        self._settle()


def checked_keep(keep: int) -> int:
    if keep < 1:
        raise RunCheckpointError(f"keep is {keep}: a run must keep 1 checkpoint or more to continue from")
    return keep


def write_checkpoint(trainer: Trainer, path: Path) -> None:
    """Writes the trainer's state; a folder (DeepSpeed) gets its mark when all processes have written their part."""
    trainer.save_checkpoint(path)
    trainer.strategy.barrier("checkpoint")
    if trainer.is_global_zero and path.is_dir():
        (path / COMPLETE_MARK).touch()


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
