"""A run that continues from the checkpoint of an epoch's end goes on at the start of the next epoch.

Where ``max_steps`` is set, Lightning 2.6 takes such a run for one inside the finished epoch: it passes over that epoch
once more, without a batch but with every hook of its end, and counts one epoch and one logged step too many from then
on. The next epoch's data are left out, and ``max_epochs`` is reached one epoch early.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import RestartStage


def start_next_epoch(trainer: Trainer) -> None:
    """Completes the epoch that the checkpoint ended; changes nothing for a run that began or continues elsewhere.

    A run that ``max_steps`` ended within an epoch, and that may go on further now, goes on within it.

    To be called from ``on_train_start`` before any other callback's: Lightning has restored its loops by then, and the
    training itself has not begun.
    """
    loop = trainer.fit_loop
    if not loop.restarted_on_epoch_end:
        return
    if not loop.epoch_loop._num_ready_batches_reached():  # noqa: SLF001
        # max_steps ended that run within the epoch, which counts as processed all the same: it is gone on with
        for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
            progress.processed -= 1
        loop._restart_stage = RestartStage.RESTARTED_MID_EPOCH  # noqa: SLF001
        return
    loop.epoch_progress.increment_completed()
    loop.reset_restart_stage()
    loop._restarting = False  # noqa: SLF001  (its setter would take a run with max_steps for one that restarts)
    loop.epoch_loop.restarting = False  # and all loops in it
