"""Validation in the background: scores the newest checkpoint of a run while training goes on.

    python -m navsim_ext.evaluation.watch run=RUN \\
        score=[planner=diffusion,hidden=cached,hidden.folder=HIDDEN,data.index=INDEX,metric_cache=CACHE]

``run`` is the output_dir of stage2_dit.train or stage3_grpo.train, ``score`` options of navsim_ext.evaluation.score;
the checkpoint and the output folder are set for each. Nothing of the run's own is touched: what is found stands in
``RUN/watch/version_N`` (``validation.csv``, TensorBoard events, a score folder per checkpoint), and the report and
``navsim_ext.evaluation.show runs=[RUN]`` join it to the run's own tables.

A checkpoint counts once the run could continue from it (``last.ckpt`` points to it, which moves after the file is whole
and the loggers have written that step). It is linked first, so that the run may remove it meanwhile. Only the newest is
scored: where scoring is slower than training, those in between are left out. One that cannot be scored is named, in the
table too, and the next one is waited for. Killed and started again, the command goes on with what it had begun.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.evaluation.score import AGGREGATE_FILE, score_configured
from navsim_ext.evaluation.scoring import NothingScored
from navsim_ext.evaluation.watched import COLUMNS, FAILED, FOLDER, SCORED, TABLE_NAME, figures_of, watched_table
from navsim_ext.files import read_json
from navsim_ext.runtime.checkpoint_folder import is_complete, numbered, step_of
from navsim_ext.runtime.config import configured, job
from navsim_ext.runtime.csv_log import CsvLog
from navsim_ext.runtime.lock import FolderLock, in_use
from navsim_ext.runtime.resume import plan_run

log = logging.getLogger(__name__)

PROTOCOLS = ("single_stage", "open_loop", "rater_feedback")
LINKED = "checkpoint"  # folder of the checkpoint that is being scored


class WatchedRun:
    """One run, what of it is scored, and where that stands. ``scored``: options of the scoring command.

    Raises OptionError for options that the scoring command refuses, DataError for a protocol without one table of
    means.
    """

    def __init__(self, run: Path, scored: Sequence[str], *, tensorboard: bool = True) -> None:
        self.run, self.scored, self.tensorboard = run, list(scored), tensorboard
        protocol = self._configured(Path("unknown yet.ckpt"), Path("unknown yet")).protocol
        if protocol not in PROTOCOLS:
            raise DataError(f"protocol={protocol} cannot be watched; one of {', '.join(PROTOCOLS)} was expected")

    def folder(self, version: str) -> Path:
        return self.run / FOLDER / version

    def table(self, version: str) -> CsvLog:
        table = CsvLog(self.folder(version) / TABLE_NAME, identified_by=("step",))
        self.folder(version).mkdir(parents=True, exist_ok=True)
        table.begin(COLUMNS)
        return table

    def pending(self) -> tuple[str, Path] | None:
        """(version, linked checkpoint) to score next: what an earlier watch had begun, else the newest of the run."""
        plan = plan_run(self.run, "auto")
        version = plan.run_dir.name
        known = {int(row["step"]) for row in self.table(version).read()} if plan.run_dir.is_dir() else set()
        for begun in sorted(self.folder(version).glob(f"step=*/{LINKED}")):
            for path, step in numbered(begun):
                if step not in known and is_complete(path):
                    return version, path
        if plan.checkpoint is None or step_of(plan.checkpoint) in known:
            return None
        linked = self._link(version, plan.checkpoint)
        return None if linked is None else (version, linked)

    def _link(self, version: str, checkpoint: Path) -> Path | None:
        """The checkpoint under a name of our own; None where the run has removed it meanwhile."""
        folder = self.folder(version) / f"step={step_of(checkpoint)}" / LINKED
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        target, beside = folder / checkpoint.name, folder / ".begun.tmp"
        try:
            if checkpoint.is_dir():
                shutil.copytree(checkpoint, beside)
            else:
                try:
                    os.link(checkpoint, beside)
                except OSError:  # another file system, or one without links
                    shutil.copy(checkpoint, beside)
            os.replace(beside, target)
        except FileNotFoundError:
            return None
        return target if is_complete(target) else None

    def score(self, version: str, checkpoint: Path, console: Console) -> bool:
        """Scores a linked checkpoint and writes its row; whether that went well."""
        step, output = step_of(checkpoint), checkpoint.parents[1]
        row: dict[str, Any] = {"step": step, "checkpoint": checkpoint.name, "status": SCORED, "reason": ""}
        try:
            with FolderLock(output):
                score_configured(self._configured(checkpoint, output), Console(quiet=True))
            row |= figures_of(read_json(output / AGGREGATE_FILE))
        except (TriviumError, OSError, RuntimeError, MemoryError) as error:
            row |= {"status": FAILED, "reason": f"{type(error).__name__}: {' '.join(str(error).split())!s:.300}"}
            console.print(f"{self.run}, step {step}: {row['reason']}", soft_wrap=True, markup=False, highlight=False)
        if self.tensorboard:
            self._events(version, row)
        self.table(version).write(row)
        shutil.rmtree(checkpoint.parent)
        return row["status"] == SCORED

    def _configured(self, checkpoint: Path, output: Path) -> DictConfig:
        return configured("score", [*self.scored, f"planner.checkpoint={checkpoint}", f"output_dir={output}"])

    def _events(self, version: str, row: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder(version))) as writer:
            for name, value in row.items():
                if name not in COLUMNS:
                    writer.add_scalar(f"watch/{name}", value, row["step"])

    def scored_steps(self, version: str) -> list[int]:
        return [int(row["step"]) for row in self.table(version).read() if row["status"] == SCORED]


def watch(
    watched: WatchedRun, console: Console, *, until: str, poll_s: float, patience_s: float, give_up_after: int
) -> None:
    """Scores checkpoints until the run ends (its lock is free for ``patience_s``), once, or forever.

    Raises MissingError where no run is or comes, DataError when ``give_up_after`` checkpoints in a row failed.
    """
    failures, idle_since = 0, time.monotonic()
    while True:
        found = watched.pending()
        if found is not None:
            version, checkpoint = found
            log.info("scoring step %d of %s", step_of(checkpoint), watched.run)
            good = watched.score(version, checkpoint, console)
            failures = 0 if good else failures + 1
            if failures >= give_up_after:
                raise DataError(
                    f"{failures} checkpoints of {watched.run} in a row could not be scored, the last reasons stand in "
                    f"{watched.folder(version) / TABLE_NAME}: check the options in score="
                )
            idle_since = time.monotonic()
            continue
        running = in_use(watched.run)
        if running:
            idle_since = time.monotonic()
        if until == "once" or (until == "run_ends" and not running and time.monotonic() - idle_since >= patience_s):
            break
        time.sleep(min(poll_s, patience_s) if not running else poll_s)
    version = plan_run(watched.run, "auto").run_dir.name
    if not (watched.run / version).is_dir():
        raise MissingError(f"run={watched.run} holds no run of Trivium (version_0): give a training's output_dir")
    if not watched.scored_steps(version):
        raise NothingScored(f"run={watched.run}: no checkpoint was scored; {watched.folder(version) / TABLE_NAME}")
    console.print(watched_table(watched.run))


@job("watch")
def main(cfg: DictConfig) -> None:
    run = Path(cfg.run)
    if not run.is_dir():
        raise MissingError(f"run={run} does not exist: give the output_dir of a training")
    watched = WatchedRun(run, list(cfg.score), tensorboard=cfg.tensorboard)
    with FolderLock(run / FOLDER):
        watch(
            watched, Console(), until=cfg.until, poll_s=cfg.poll_s, patience_s=cfg.patience_s,
            give_up_after=cfg.give_up_after,
        )  # fmt: skip


if __name__ == "__main__":
    main()
