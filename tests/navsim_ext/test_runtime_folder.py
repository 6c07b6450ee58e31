"""After any history of kills, resumes and moves a run's folder is that of an undisturbed run.

A child process is killed with -9 right before its n-th change of the file system, for every n; then the same command is
given until it ends.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from runtime_toy import config

from navsim_ext.runtime.checkpoint_file import load_checkpoint
from navsim_ext.runtime.checkpoint_folder import RunCheckpointError
from navsim_ext.runtime.checkpoints import BestCheckpoints, Checkpoints
from navsim_ext.runtime.run import run

CHANGES = ("replace", "rename", "symlink", "unlink", "fsync", "mkdir", "rmdir")
SMALL = ["trainer.max_epochs=2", "datamodule.size=20", "callbacks.checkpoint.every_n_steps=2"]  # 5 steps an epoch
LAST_CHANGE = 110  # a run makes fewer changes of the file system
BEST = ["callbacks.best={_target_: navsim_ext.runtime.checkpoints.BestCheckpoints, dirpath: '${run_dir}/checkpoints', "
        "monitor: val/loss, mode: min, keep: 1, link: best_loss.ckpt}"]  # fmt: skip
TIMES = ("samples_per_s", "data_wait")
WORK = (".lock", ".lock.json", "training_log.txt", "config.yaml", "hparams.yaml", "identity.json", "tensorboard")


def in_a_child(work: Callable[[], object], kill_at: int | None = None) -> int:
    """Exit status of ``work`` in a fork of this process; killed before its ``kill_at``-th change of the file system."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        count = 0

        def counting(change: Callable) -> Callable:
            def counted(*arguments, **options):
                nonlocal count
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **options)

            return counted

        for name in CHANGES:
            setattr(os, name, counting(getattr(os, name)))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    """What every name below a folder is: a link's target, the rows of a table without times, the digest of a file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any(part in WORK for part in path.relative_to(folder).parts) or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.suffix == ".csv":
            with open(path, newline="") as stream:
                rows = [{key: value for key, value in sorted(row.items()) if value and key not in TIMES}
                        for row in csv.DictReader(stream)]  # fmt: skip
            found[name] = str(rows)
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def scalars(folder: Path) -> dict:
    import json

    content = json.loads((folder / "version_0/tensorboard/scalars.json").read_text())
    return {tag: [event[1:] for event in events] for tag, events in content.items() if tag not in TIMES}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert in_a_child(lambda: run(config(folder, [*SMALL, *BEST]))) == 0
    return folder


def test_every_name_says_what_it_is(undisturbed):
    folder = undisturbed / "version_0/checkpoints"
    names = {path.name for path in folder.iterdir()}
    best = os.readlink(folder / "best_loss.ckpt")
    assert names == {"epoch=1-step=9.ckpt", "epoch=1-step=10.ckpt", "last.ckpt", "best_loss.ckpt", best}
    assert os.readlink(folder / "last.ckpt") == "epoch=1-step=10.ckpt"
    for name in names - {"last.ckpt", "best_loss.ckpt"}:
        content = load_checkpoint(folder / name)
        stem = name.removeprefix("best-").removesuffix(".ckpt")
        assert stem == f"epoch={content['epoch']}-step={content['global_step']}"


def every(step: int) -> list:
    """Moments of a kill: some in the suite, all in the slow one."""
    return [pytest.param(n, marks=() if n % step == 5 else pytest.mark.slow) for n in range(1, LAST_CHANGE + 1)]


@pytest.mark.parametrize("kill_at", every(20))
def test_killed_at_any_change_of_the_file_system(undisturbed, tmp_path, kill_at):
    folder = tmp_path / "run"
    status = in_a_child(lambda: run(config(folder, [*SMALL, *BEST])), kill_at)
    assert status == (0 if kill_at == LAST_CHANGE else -signal.SIGKILL) or kill_at > 80
    if status:
        assert in_a_child(lambda: run(config(folder, [*SMALL, *BEST]))) == 0
    assert contents(folder) == contents(undisturbed)
    assert scalars(folder) == scalars(undisturbed)


@pytest.mark.parametrize("which", [1, 2])
def test_killed_between_a_checkpoint_and_its_row(undisturbed, tmp_path, which):
    """A step that the loggers have not written yet is not what the run continues from, not even where it is the first
    checkpoint of all."""
    folder, write, written = tmp_path / "run", Checkpoints.write, []

    def dying(self, trainer, path):
        write(self, trainer, path)
        written.append(path)
        if len(written) == which:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        Checkpoints.write = dying
        run(config(folder, [*SMALL, *BEST]))

    assert in_a_child(work) == -signal.SIGKILL
    assert in_a_child(lambda: run(config(folder, [*SMALL, *BEST]))) == 0
    assert contents(folder) == contents(undisturbed)
    assert scalars(folder) == scalars(undisturbed)


def test_killed_moved_killed_again_and_moved_back(undisturbed, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert in_a_child(lambda: run(config(first, [*SMALL, *BEST])), 45) == -signal.SIGKILL
    first.rename(second)
    assert in_a_child(lambda: run(config(second, [*SMALL, *BEST])), 30) == -signal.SIGKILL
    second.rename(first)
    assert in_a_child(lambda: run(config(first, [*SMALL, *BEST]))) == 0
    assert contents(first) == contents(undisturbed)


def test_a_finished_run_that_was_moved_stays_as_it_is(undisturbed, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(undisturbed, moved, symlinks=True)
    before = contents(moved)
    assert in_a_child(lambda: run(config(moved, [*SMALL, *BEST]))) == 0
    assert contents(moved) == before
    assert in_a_child(lambda: run(config(moved, ["resume_ignore=[trainer.max_epochs]", *SMALL[1:], *BEST]))) == 0
    assert os.readlink(moved / "version_0/checkpoints/last.ckpt") == "epoch=2-step=15.ckpt"
    assert len(list((moved / "version_0/checkpoints").glob("epoch=*"))) == 2


def test_leftovers_of_another_time_are_removed_and_what_is_not_ours_stays(undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert in_a_child(lambda: run(config(folder, [*SMALL, *BEST])), 60) == -signal.SIGKILL
    inside = folder / "version_0/checkpoints"
    for name in (".epoch=0-step=2.ckpt.77.tmp", "epoch=7-step=99.ckpt", "last-v1.ckpt", "best-epoch=7-step=99.ckpt"):
        (inside / name).write_bytes(b"half")
    (inside / "epoch=8-step=111.ckpt").mkdir()  # a folder of DeepSpeed's without its mark
    (folder / ".config.yaml.4.tmp").write_text("half")
    (folder / "version_0/.metrics.csv.tmp").write_text("half")
    (inside / "notes.txt").write_text("mine")
    assert in_a_child(lambda: run(config(folder, [*SMALL, *BEST]))) == 0
    (inside / "notes.txt").unlink()
    assert contents(folder) == contents(undisturbed)


def test_a_best_that_nothing_reports_is_named(tmp_path):
    wrong = [part.replace("val/loss", "val/los") for part in BEST]
    with pytest.raises(RunCheckpointError, match=r"'val/los'.*val/loss"):
        run(config(tmp_path, [*SMALL, *wrong]))


@pytest.mark.parametrize("keep", [0, -1])
def test_nothing_to_keep_is_refused(tmp_path, keep):
    with pytest.raises(RunCheckpointError, match=f"keep is {keep}"):
        Checkpoints(tmp_path, keep=keep)
    with pytest.raises(RunCheckpointError, match=f"keep is {keep}"):
        BestCheckpoints(tmp_path, monitor="val/loss", mode="min", keep=keep)


def test_scores_that_are_no_numbers_are_never_best(tmp_path):
    best = BestCheckpoints(tmp_path, monitor="val/loss", mode="max", keep=2)
    for step, score in enumerate((0.1, float("nan"), 0.3, 0.2, float("inf"))):
        best.consider(f"best-epoch=0-step={step}.ckpt", torch.tensor(score))
    assert list(best.scores) == ["best-epoch=0-step=2.ckpt", "best-epoch=0-step=3.ckpt"]
