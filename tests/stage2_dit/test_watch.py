"""Checkpoints of a run are scored while it goes on: whole ones, each once, the newest first; a bad one is named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from planner_world import VLM, WIDTH, build_world

from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation import watch as watching
from navsim_ext.evaluation.report import training_sections
from navsim_ext.evaluation.scoring import NothingScored
from navsim_ext.evaluation.watch import WatchedRun, watch
from navsim_ext.evaluation.watched import figures_of, joined, read_watched, watched_table
from navsim_ext.files import write_json_atomic
from navsim_ext.hidden_cache import states_fingerprint
from navsim_ext.runtime.checkpoint_folder import NOTHING_YET, relink
from navsim_ext.runtime.lock import FolderLock, in_use
from navsim_ext.runtime.options import OptionError
from stage2_dit import DiffusionPlanner, PlannerConfig, planner_record

CONFIG = PlannerConfig(hidden_width=WIDTH, num_heads=2, head_width=8, num_layers=2, output_width=16, encoder_width=16)
QUIET = {"until": "once", "poll_s": 0.0, "patience_s": 0.0, "give_up_after": 3}
ANY = ["planner=diffusion", "data.index=nowhere", "protocol=open_loop"]


def save(run: Path, step: int, *, version: int = 0, link: bool = True) -> Path:
    """A checkpoint as a training of stage 2 leaves it."""
    folder = run / f"version_{version}" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(step)
    planner = DiffusionPlanner(CONFIG)
    state = {f"planner.{name}": value for name, value in planner.state_dict().items()}
    path = folder / f"epoch=0-step={step}.ckpt"
    torch.save({"state_dict": state, "planner": planner_record(planner, states_fingerprint(VLM))}, path)
    if link:
        relink(folder / "last.ckpt", path.name)
    return path


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """Stands for the scoring command: notes the step, fails at 13, and finds score step / 100."""
    seen: list[int] = []

    def stand_in(cfg, console) -> None:
        step = int(cfg.planner.checkpoint.partition("step=")[2].partition("/")[0])
        seen.append(step)
        assert Path(cfg.planner.checkpoint).is_file()
        if step == 13:
            raise DataError("no good\nat all")
        estimate = {"mean": step / 100, "low": 0.0, "high": None, "count": 1, "logs": 1}
        write_json_atomic(Path(cfg.output_dir) / "aggregate.json", {"estimates": {"diffusion": {"pdms_v1": estimate}}})

    monkeypatch.setattr(watching, "score_configured", stand_in)
    return seen


def test_each_whole_checkpoint_is_scored_once_and_the_newest_first(tmp_path, scored):
    for step in (2, 4, 6):
        save(tmp_path, step)
    run = WatchedRun(tmp_path, ANY, tensorboard=False)
    watch(run, Console(quiet=True), **QUIET)
    watch(run, Console(quiet=True), **QUIET)
    assert scored == [6]
    save(tmp_path, 8, link=False)  # whole, but the run could not continue from it yet
    watch(run, Console(quiet=True), **QUIET)
    assert scored == [6]
    save(tmp_path, 8)
    watch(run, Console(quiet=True), **QUIET)
    table = read_watched(tmp_path)
    assert table["step"].tolist() == scored == [6, 8]
    assert table["pdms_v1"].tolist() == [0.06, 0.08]
    assert not list((tmp_path / "watch").rglob("*.ckpt"))
    assert sorted(path.name for path in (tmp_path / "version_0").iterdir()) == ["checkpoints"]


def test_a_new_version_has_a_table_of_its_own(tmp_path, scored):
    save(tmp_path, 4)
    run = WatchedRun(tmp_path, ANY, tensorboard=False)
    watch(run, Console(quiet=True), **QUIET)
    save(tmp_path, 2, version=1)
    watch(run, Console(quiet=True), **QUIET)
    assert scored == [4, 2]
    assert read_watched(tmp_path)["step"].tolist() == [2]


@pytest.mark.parametrize("how", ["half written", "nothing yet", "gone", "no run"])
def test_what_is_not_whole_is_never_scored(tmp_path, scored, how):
    if how != "no run":
        path = save(tmp_path, 4)
    if how == "half written":
        path.write_bytes(path.read_bytes()[:2000])
    if how == "nothing yet":
        relink(path.with_name("last.ckpt"), NOTHING_YET)
    if how == "gone":
        path.unlink()
    with pytest.raises(MissingError if how == "no run" else NothingScored):
        watch(WatchedRun(tmp_path, ANY, tensorboard=False), Console(quiet=True), **QUIET)
    assert scored == []


def test_a_checkpoint_that_is_removed_meanwhile_is_scored_all_the_same(tmp_path, scored):
    run = WatchedRun(tmp_path, ANY, tensorboard=False)
    path = save(tmp_path, 4)
    version, linked = run.pending()
    path.unlink()
    save(tmp_path, 6)
    assert linked.is_file()
    assert run.pending() == (version, linked)  # what was begun is ended first, also by another process after a kill
    watch(WatchedRun(tmp_path, ANY, tensorboard=False), Console(quiet=True), **QUIET)
    assert scored == [4, 6]


def test_a_bad_checkpoint_is_named_and_the_next_one_scored(tmp_path, scored, capsys):
    run = WatchedRun(tmp_path, ANY, tensorboard=False)
    for step in (13, 14):
        save(tmp_path, step)
        watch_once = {**QUIET, "give_up_after": 2}
        if step == 13:
            with pytest.raises(NothingScored):
                watch(run, Console(), **watch_once)
            assert "step 13: DataError: no good at all" in " ".join(capsys.readouterr().out.split())
        else:
            watch(run, Console(quiet=True), **watch_once)
    table = read_watched(tmp_path)
    assert table["status"].tolist() == ["failed", "scored"]
    assert "no good at all" in table["reason"][0]
    save(tmp_path / "other", 13)
    with pytest.raises(DataError, match="check the options in score="):
        watch(WatchedRun(tmp_path / "other", ANY), Console(quiet=True), **{**QUIET, "give_up_after": 1})


def test_it_waits_while_the_run_is_at_work_and_ends_with_it(tmp_path, scored, monkeypatch):
    save(tmp_path, 2)
    lock, slept = FolderLock(tmp_path), []
    lock.acquire()
    assert in_use(tmp_path)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            save(tmp_path, 4)
        if len(slept) == 3:
            lock.release()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    run = WatchedRun(tmp_path, ANY, tensorboard=False)
    watch(run, Console(quiet=True), **{**QUIET, "until": "run_ends", "poll_s": 5.0})
    assert scored == [2, 4]
    assert slept == [5.0] * 3


def test_a_lock_of_a_process_that_is_gone_is_not_touched(tmp_path, monkeypatch):
    assert not in_use(tmp_path)
    with FolderLock(tmp_path):
        pass
    (tmp_path / ".lock").write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename, "since": ""}))
    monkeypatch.setattr("navsim_ext.runtime.lock._is_held", lambda folder: pytest.fail("the lock was asked"))
    assert not in_use(tmp_path)


def test_options_are_checked_before_anything_is_waited_for(tmp_path):
    with pytest.raises(OptionError, match=r"data\.indx"):
        WatchedRun(tmp_path, ["planner=diffusion", "data.indx=x"])
    with pytest.raises(DataError, match="cannot be watched"):
        WatchedRun(tmp_path, ["planner=diffusion", "data.index=x", "protocol=two_stage"])


def test_figures_are_the_planners_not_its_probes():
    estimate = {"mean": 0.5, "low": None, "high": None}
    aggregate = {"estimates": {"probe_blind": {"pdms_v1": {"mean": 0.9}}, "mine": {"pdms_v1": estimate}}}
    assert figures_of(aggregate) == {"pdms_v1": 0.5}
    assert figures_of({"estimates": {"ade_3s": estimate}}) == {"ade_3s": 0.5}


def test_scores_of_the_command_are_joined_to_what_the_run_logged(tmp_path):
    """The whole way: a planner in a checkpoint, scored in open loop, beside the loss, in table and report."""
    world, run = build_world(tmp_path / "world", logs=2, frames=20), tmp_path / "run"
    save(run, 4)
    logged = pd.DataFrame({"step": [1, 3, 5], "train/loss": [0.9, 0.7, 0.5], "epoch": 0})
    logged.to_csv(run / "version_0" / "metrics.csv", index=False)
    options = ["planner=diffusion", "hidden=cached", f"hidden.folder={world}/hidden", "protocol=open_loop",
               f"data.index={world}/index", f"data.root={world}/data", "data.split=mini",
               "data.cameras=[]"]  # fmt: skip
    watch(WatchedRun(run, options), Console(quiet=True), **QUIET)
    aggregate = json.loads((run / "watch/version_0/step=4/aggregate.json").read_text())
    (row,) = joined(run).to_dict("records")
    assert row["status"] == "scored", row["reason"]
    assert row["l2_at_3s"] == pytest.approx(aggregate["estimates"]["l2_at_3s"]["mean"])
    assert row["train/loss"] == 0.7
    console = Console(record=True, width=80, quiet=True)
    console.print(watched_table(run))
    assert list((run / "watch/version_0").glob("events.out.tfevents*"))
    sections = training_sections("stage 2", str(run), None)
    assert [section["title"] for section in sections] == ["stage 2", "stage 2, scored while it trained"]
