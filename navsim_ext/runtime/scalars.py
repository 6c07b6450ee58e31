"""TensorBoard logs that leave a JSON beside them: ``tensorboard/scalars.json`` = {tag: [[wall time, step, value]]}."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from navsim_ext.files import write_json_atomic

FILE_NAME = "scalars.json"


class TensorBoardScalars(TensorBoardLogger):
    """TensorBoard logging into ``<run_dir>/tensorboard``, exported to JSON when the run ends or is interrupted."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        super().__init__(save_dir=str(run_dir), name="", version="tensorboard", default_hp_metric=False)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """What was logged up to a checkpoint is on disk before the run would continue from it."""
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if Path(self.log_dir).is_dir():
            export_scalars(self.log_dir)


def export_scalars(folder: str | os.PathLike[str]) -> Path:
    """Writes every scalar of a TensorBoard folder to its ``scalars.json`` and returns that path.

    Events that a resumed run wrote again replace those of the same step.
    """
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    content = {}
    for tag in events.Tags()["scalars"]:
        by_step = {event.step: [event.wall_time, event.step, event.value] for event in events.Scalars(tag)}
        content[tag] = [by_step[step] for step in sorted(by_step)]
    path = Path(folder) / FILE_NAME
    write_json_atomic(path, content)
    return path
