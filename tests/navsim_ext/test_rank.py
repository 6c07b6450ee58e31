"""Ranking planners among several kinds of traffic: who drives, what the truth is, resume, bad input; drivers astray."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from navsim_ext.closed_loop import drive
from navsim_ext.closed_loop.policies import Distorted, Replay
from navsim_ext.closed_loop.policy import Mixed
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.evaluation import rank
from navsim_ext.runtime.config import compose
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from tests.navsim_ext.closed_loop_worlds import Car, road

EGO = {"size": (5.176, 2.297, 1.777)}
PANEL = "panel=[idm_0,late,stopping,hasty]"


def driven(policy, speed=8.0, horizon_s=8.0):
    world = World(horizon_s=horizon_s)
    state = world.reset([road([Car(0, -1.75, speed=speed, **EGO)])])
    mixed = Mixed({"all": Replay(at_end="stay"), "ego": policy})
    mixed.start(state, state.scenes.sources)
    while state.steps_left >= 5:
        world.step(state, mixed.act(state))
    return state.poses[0, 0, state.scenes.now :].double().numpy()


def test_drivers_astray_do_what_their_equations_say():
    t = 0.1 * np.arange(81)
    plain = driven(Distorted())
    assert np.abs(plain[:, 0] - 8.0 * t).max() < 0.02  # the recording itself
    assert np.abs(driven(Distorted(delay_s=2.0))[:, 0] - 8.0 * t).max() < 0.02  # steady: being late shows nothing
    slow = driven(Distorted(speed_share=0.5))
    ramp = np.where(t < 3.0, t - 0.5 * t**2 / 6.0, 2.25 + 0.5 * (t - 3.0))
    assert np.abs(slow[:, 0] - 8.0 * ramp).max() < 0.05
    stopped = driven(Distorted(stop_after_s=2.0))
    assert np.abs(np.diff(stopped[65:, 0])).max() < 1e-4
    assert stopped[-1, 0] == pytest.approx(8.0 * (2.0 + 2.0), abs=0.05)
    swerved = driven(Distorted(swerve_m=1.0))
    assert np.abs(swerved[:, 1]).max() == pytest.approx(1.0, abs=0.05)
    assert np.abs(swerved[:, 2]).max() > 0.1
    with pytest.raises(DataError, match="speed_share"):
        Distorted(speed_share=0.0)


def test_a_late_driver_brakes_late():
    world = World(horizon_s=6.0)
    scene = road([Car(0, -1.75, speed=8.0, acceleration=-2.0, **EGO)])
    ends = []
    for delay in (0.0, 1.0):
        state = world.reset([scene])
        policy = Mixed({"all": Replay(), "ego": Distorted(delay_s=delay)})
        policy.start(state, [scene])
        while state.steps_left >= 5:
            world.step(state, policy.act(state))
        ends.append(float(state.pose[0, 0, 0]))
    v0 = 8.0
    assert ends[0] == pytest.approx(v0**2 / 4.0, abs=0.1)
    assert ends[1] - ends[0] == pytest.approx(v0 * 1.0, abs=0.1)


@pytest.fixture
def store(tmp_path):
    """The car ahead stands after a while; in a second kind of traffic it goes on."""
    scenes = [
        road([Car(0, -1.75, speed=6.0 + 0.5 * k, **EGO), Car(30.0 + k, -1.75, speed=6, acceleration=-1.5)], id=f"s{k}",
             half_length=120.0)
        for k in range(4)
    ]  # fmt: skip
    write_scenes(tmp_path / "scenes", iter(scenes), fingerprint_of({"test": 1}))
    return tmp_path


def settings(store, *overrides, out="out"):
    return compose("rank", [f"output_dir={store / out}", f"scenes={store / 'scenes'}", "horizon_s=6", *overrides])


def test_rank_command_resumes_and_says_which_traffic_agrees(store, monkeypatch):
    quiet = Console(quiet=True)
    options = (PANEL, "agents=[idm,constant_velocity]", "truth=replay", "batch_size=4")
    real, calls = drive.drive_batch, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(drive, "drive_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        rank.rank(settings(store, *options), quiet)
    found = rank.rank(settings(store, *options), quiet)
    assert len(calls) == 4 * 3 + 1  # nothing was driven twice
    content = json.loads((store / "out" / rank.RESULT_FILE).read_text())
    assert content["planners"] == ["idm_0", "late", "stopping", "hasty"]
    assert content["truth"] == "replay"
    assert set(content["agreement"]) == {"idm", "constant_velocity"}
    assert content["scenes"] == 4
    assert content["means"]["replay"]["idm_0"] > content["means"]["replay"]["hasty"]
    assert found.values["idm"]["error"].mean >= 0.0
    assert "constant_velocity - idm" in content["differences"]
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))
    rank.rank(settings(store, *options), console)
    assert max(map(len, console.export_text().splitlines())) <= 80


def test_workers_do_not_change_the_ranking(store):
    quiet = Console(quiet=True)
    options = (PANEL, "agents=[constant_velocity]", "truth=replay")
    alone = rank.rank(settings(store, *options), quiet)
    spread = rank.rank(settings(store, *options, "workers=processes", "num_workers=2", out="two"), quiet)
    assert alone.values == spread.values


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("agents=[nobody]",), "no traffic 'nobody'"),
        (("agents=[law]",), "'law' comes twice"),
        (("agents=[]",), "no traffic to judge"),
        (("panel=[idm_0,idm_1]",), "at least 3 planners"),
        (("panel=[idm_0,idm_77,late]",), "no planner 'idm_77'"),
        (("+more_planners.late._target_=x.Y",), "'late' is a planner of the panel already"),
    ],
)
def test_bad_rankings_are_refused_before_anybody_drives(store, overrides, words):
    with pytest.raises(DataError, match=words):
        rank.rank(settings(store, *overrides), Console(quiet=True))
    assert not (store / "out" / "drives").exists()


def test_the_panel_grades_and_leaves_the_recording():
    planners = rank.panel(compose("rank", ["output_dir=x", "scenes=y"]))
    assert len(planners) == 25
    assert {"late", "slow", "hasty", "stopping", "swerving"} <= set(planners)
