"""A planner in the ego's seat, the closed-loop score, the ceiling, and the drive command: resume, bad planners."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from navsim_ext.closed_loop import check, drive, score
from navsim_ext.closed_loop.drives import drive_scene
from navsim_ext.closed_loop.ego import EgoSeat
from navsim_ext.closed_loop.moves import BadMoves, Moves
from navsim_ext.closed_loop.policies import ConstantVelocity, Idm, Replay
from navsim_ext.closed_loop.policies.panel import NAMES, member, panel
from navsim_ext.closed_loop.policy import Mixed
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.planners import ConstantVelocityAgent, Human, StandingStill
from navsim_ext.runtime.config import compose
from navsim_ext.traffic.store import TrafficStore, fingerprint_of, write_scenes
from tests.navsim_ext.closed_loop_worlds import Car, road
from tests.reference_data import reference_path

SMALL = {"half_length": 120.0}
EGO = {"size": (5.176, 2.297, 1.777)}


def driven(scene, ego, agents=None, horizon_s=8.0):
    world = World(horizon_s=horizon_s)
    state = world.reset([scene] if not isinstance(scene, list) else scene)
    policy = Mixed({"all": agents or Replay(), "ego": ego})
    policy.start(state, state.scenes.sources)
    while state.steps_left >= 5:
        world.step(state, policy.act(state))
    return state


def scored(scene, ego, **options):
    columns = score.score_drives(driven(scene, ego, **options))
    return {name: float(values[0]) for name, values in columns.items()}


def test_a_clean_recorded_drive_scores_one_and_what_is_not_known_takes_no_part():
    found = scored(road([Car(0, -1.75, speed=8, **EGO), Car(60, -5.25, speed=8)], red=False, **SMALL), Replay())
    assert all(found[name] == 1.0 for name in score.COLUMNS)
    assert found["unknown"] == 0.0
    assert abs(found["progress_m"] - 64.0) < 0.5
    assert found["contacts"] == 0.0
    assert math.isnan(found["first_fault_s"])
    without = scored(road([Car(0, -1.75, speed=8, **EGO)], **SMALL), Replay())
    assert math.isnan(without["tlc"])
    assert without["unknown"] == 1.0
    assert without["score"] == 1.0


def test_fault_is_told_apart_as_in_navsim():
    ahead = scored(road([Car(0, -1.75, speed=8, **EGO), Car(30, -1.75)], **SMALL), ConstantVelocity())
    assert ahead["nc"] == 0.0
    assert ahead["score"] == 0.0
    assert abs(ahead["first_fault_s"] - math.ceil((30 - 2.588 - 2.3) / 0.8) * 0.1) < 0.11
    assert ahead["ttc"] < 1.0
    rear = scored(road([Car(0, -1.75, speed=3, **EGO), Car(-20, -1.75, speed=12)], **SMALL), ConstantVelocity())
    assert rear["contacts"] == 1.0
    assert rear["nc"] == 1.0
    standing = scored(road([Car(0, -1.75, **EGO), Car(30, -1.75, math.pi, speed=8)], **SMALL), ConstantVelocity())
    assert standing["contacts"] == 1.0
    assert standing["nc"] == 1.0
    cone = scored(
        road([Car(0, -1.75, speed=8, **EGO), Car(30, -1.75, kind=3, size=(0.4, 0.4, 0.8))], **SMALL), ConstantVelocity()
    )
    assert cone["nc"] == 0.5


def test_gates_of_road_direction_and_light_and_progress_and_comfort():
    assert scored(road([Car(0, -5.25, heading=-0.1, speed=8, **EGO)], **SMALL), Replay())["dac"] == 0.0
    wrong = scored(road([Car(0, 1.75, speed=8, **EGO)], **SMALL), Replay())
    assert wrong["ddc"] == 0.0
    assert wrong["clean"] == pytest.approx(0.3 / 8.0, abs=0.03)  # 2 m at 8 m/s
    late = scored(road([Car(0, -1.75, speed=8, **EGO)], red=True, **SMALL), Replay())
    assert late["clean"] == pytest.approx((40 - 2.588) / 8 / 8, abs=0.02)  # the front passes the stop point at x = 40
    assert scored(road([Car(0, -1.75, speed=8, **EGO)], **SMALL), Replay())["clean"] == 1.0
    into = road([Car(0, -1.75, speed=8, **EGO), Car(30, -1.75, **EGO)], **SMALL)
    assert scored(into, Replay())["clean"] == pytest.approx((30 - 5.176) / 8 / 8, abs=0.02)
    slow = scored(road([Car(0, 1.75, speed=3, **EGO)], **SMALL), Replay())
    assert slow["ddc"] == 0.5  # 3.3 m within 1.1 s
    assert scored(road([Car(0, -1.75, speed=8, **EGO)], red=True, **SMALL), Replay())["tlc"] == 0.0
    braking = road([Car(0, -1.75, speed=12, acceleration=-2.0, **EGO)], **SMALL)
    half = scored(braking, EgoSeat(StandingStill()))
    assert 0.0 < half["ep"] < 0.8
    assert half["c"] < 1.0
    still = scored(road([Car(0, -1.75, **EGO)], **SMALL), Replay())
    assert still["ep"] == 1.0  # nothing was to be driven


def test_formula():
    columns = {"nc": [1, 0.5, 1], "dac": [1, 1, np.nan], "ddc": [1, 1, 0.5], "tlc": [1, 1, 1]}
    columns |= {"ep": [0.5, 1, 1], "ttc": [1, 1, 0], "c": [0, 1, np.nan]}
    found = score.combine({name: np.array(values, float) for name, values in columns.items()})
    assert np.allclose(found, [(2.5 + 5) / 12, 0.5, 0.5 * 5 / 10])


def test_the_recorded_plan_through_tracker_and_bicycle_stays_near_the_record():
    scenes = [
        road([Car(0, -1.75, speed=8, **EGO)], id="steady", **SMALL),
        road([Car(0, -1.75, speed=12, acceleration=-2.0, **EGO), Car(60, -1.75)], id="stops", **SMALL),
        road([Car(0, -1.75, speed=1, acceleration=1.2, **EGO)], id="starts", **SMALL),
    ]
    state = driven(scenes, EgoSeat(Human()))
    log, now = state.scenes.log_pose, state.scenes.now
    for b in range(3):
        gap = (state.poses[b, 0, now:, :2] - log[b, 0, now : now + state.step + 1, :2]).norm(dim=-1)
        assert float(gap.max()) < 0.8, scenes[b].id
    found = check.ceiling(scenes)
    assert abs(found.difference) < 0.5
    assert len(found.rows) == 3
    with pytest.raises(DataError, match="0 scenes"):
        check.ceiling([road([Car(0, 0, seen=(0, 12)), Car(5, 0)])])


def test_a_world_whose_loop_costs_more_than_is_accepted_is_refused_with_its_worst_scenes():
    rows = pd.DataFrame({"id": list("abc"), "score_replay": [1.0, 0.9, 0.5], "score_loop": [1.0, 0.9, 0.486]})
    found = check.Ceiling(rows, {})
    assert found.difference == pytest.approx(100 * 0.014 / 3)
    check.refuse(found, 0.5)
    with pytest.raises(check.CeilingMissed, match=r"\+0.47 points .* 0.4 are accepted: c \(50.0 -> 48.6\), "):
        check.refuse(found, 0.4)
    better = rows.rename(columns={"score_replay": "score_loop", "score_loop": "score_replay"})
    with pytest.raises(check.CeilingMissed, match=r"-0\.47 points"):
        check.refuse(check.Ceiling(better, {}), 0.4)


def test_ceiling_holds_on_real_recordings():
    _, scenes = check.open_scenes(reference_path("real/womd"))
    found = check.ceiling(list(scenes)[:4])
    assert abs(found.difference) < 1.0  # of four scenes; the bound of 0.5 is for all of them


def test_what_a_planner_sees():
    seen = []

    class Watching(ConstantVelocityAgent):
        def plan(self, batch, hidden=None):
            seen.append(batch)
            return super().plan(batch, hidden)

    scene = road([Car(0, -1.75, heading=0.0, speed=8, **EGO)], now=20, **SMALL)
    command = np.full(scene.num_steps, 1, np.uint8)
    scene = dataclasses.replace(scene, command=command, ego_dynamics=np.tile(np.float32([8, 0, 0, 0]), (91, 1)))
    driven([scene, scene], EgoSeat(Watching()), horizon_s=2.0)
    assert len(seen) == 4
    assert seen[0].token == ["road@0", "road@0"]
    assert seen[3].token[0] == "road@15"
    for batch in seen:
        assert torch.allclose(batch.history[0, :, 0], torch.tensor([-12.0, -8.0, -4.0, 0.0]), atol=0.1)
        assert torch.allclose(batch.status[0, :5], torch.tensor([0.0, 1.0, 0.0, 0.0, 8.0]), atol=0.05)
        assert torch.allclose(batch.target[0, :, 0], 4.0 * torch.arange(1.0, 9.0), atol=0.3)
    asked = []

    class Counting(ConstantVelocityAgent):
        def plan(self, batch, hidden=None):
            asked.append(len(batch))
            return super().plan(batch, hidden)

    driven([scene], EgoSeat(Counting(), ask_every_s=1.0), horizon_s=4.0)
    assert len(asked) == 4
    with pytest.raises(DataError, match="multiple"):
        EgoSeat(StandingStill(), ask_every_s=0.3)


class Flaky:
    """Raises, or gives NaN, for one scene from some step on."""

    name = "flaky"

    def __init__(self, how: str, id: str = "b") -> None:
        self.how, self.id = how, id

    def plan(self, batch, hidden=None):
        poses = ConstantVelocityAgent().plan(batch)
        for row, token in enumerate(batch.token):
            name, _, step = token.partition("@")
            if name == self.id and int(step) >= 10:
                if self.how == "raises":
                    raise ValueError("no idea")
                poses[row, 3, 1] = torch.nan
        return poses


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_planner_that_fails_in_one_scene_leaves_the_others_as_they_were(how):
    scenes = [road([Car(0, -1.75, speed=5 + k, **EGO)], id=name, **SMALL) for k, name in enumerate("abc")]
    rows, drives = drive.drive_batch(scenes, EgoSeat(Flaky(how)), Replay(), 3.0)
    by_id = {row["id"]: row for row in rows}
    assert [by_id[name]["valid"] for name in "abc"] == [True, False, True]
    assert "1.0 s" in by_id["b"]["reason"]
    assert math.isnan(by_id["b"]["score"])
    _, alone = drive.drive_batch(scenes[:1], EgoSeat(Flaky(how)), Replay(), 3.0)
    assert np.array_equal(alone[0].pose, drives[0].pose)


class Silent(ConstantVelocityAgent):
    """Has no plan at some questions of scene "b"."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def plan(self, batch, hidden=None):
        poses = super().plan(batch)
        for row, token in enumerate(batch.token):
            name, _, step = token.partition("@")
            if name == "b" and int(step) in self.steps:
                poses[row] = torch.nan
        return poses


def test_an_ego_without_a_plan_goes_on_with_its_last_one_where_that_is_asked_for_and_is_counted():
    scenes = [road([Car(0, -1.75, speed=5 + k, **EGO)], id=name, **SMALL) for k, name in enumerate("ab")]
    run = lambda steps, **options: drive.drive_batch(  # noqa: E731
        scenes, EgoSeat(Silent(steps), **options), Replay(), 6.0
    )
    whole, drives = run(())
    rows, gaps = run((10, 25, 30), without_plan="last")
    assert [row["valid"] for row in rows] == [True, True]
    assert [row["unanswered"] for row in rows] == [0.0, 3.0]
    assert np.array_equal(gaps[0].pose, drives[0].pose)
    assert np.abs(gaps[1].pose[0] - drives[1].pose[0]).max() < 0.05  # constant velocity is what it had planned
    assert rows[1]["score"] == pytest.approx(whole[1]["score"], abs=0.01)
    rows, _ = run((10,))
    assert [row["valid"] for row in rows] == [True, False]
    assert rows[1]["unanswered"] == 1.0
    rows, _ = run(tuple(range(5, 60, 5)), without_plan="last")
    assert rows[1]["reason"] == "plan not finite at 4.0 s, and the last plan was used up"
    rows, _ = run((0,), without_plan="last")
    assert rows[1]["reason"].startswith("plan not finite at 0.0 s")
    with pytest.raises(DataError, match="without_plan"):
        EgoSeat(StandingStill(), without_plan="guess")


class Broken:
    """A policy whose moves nobody can make."""

    name = "broken"

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def start(self, state, scenes) -> None: ...

    def act(self, state):
        return Moves.poses(self.spoil(Replay().act(state).values.clone()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda poses: poses.index_fill_(1, torch.tensor([1]), torch.nan), r"not finite for 1 road users \(s row 1\)"),
        (lambda poses: poses.index_fill_(3, torch.tensor([2]), -torch.inf), "not finite for 2 road users"),
        (lambda poses: poses[:, :, :4], "shape"),
        (lambda poses: poses[:, :1], "shape"),
    ],
)
def test_a_policy_of_the_others_that_is_broken_stops_the_drive_by_name(spoil, message):
    scene = road([Car(0, -1.75, speed=8, **EGO), Car(40, -1.75, speed=8)], id="s", **SMALL)
    with pytest.raises(BadMoves, match=message):
        drive.drive_batch([scene], EgoSeat(Human()), Broken(spoil), 2.0)


def test_the_table_of_drives_keeps_long_names_whole_at_80_columns():
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    row = {"id": "a", "valid": True, **dict.fromkeys(drive.NUMBERS, 0.928), "dac": 1.0, "unanswered": 2.0}
    rows = pd.DataFrame([row, {**row, "id": "b", "score": 0.861}])
    drive.print_drives(console, {"diffusion_rl": rows, "human": rows}, "law")
    text = console.export_text()
    assert "diffusion_rl" in text
    assert " 100 " in text
    assert "diffusion_rl: no plan at 4 questions" in text
    assert max(map(len, text.splitlines())) <= 80


def config(tmp_path, *overrides):
    return compose("closed_loop_drive", [f"output_dir={tmp_path / 'out'}", f"scenes={tmp_path / 'scenes'}", *overrides])


@pytest.fixture
def store(tmp_path):
    scenes = [road([Car(0, -1.75, speed=4 + k, **EGO), Car(40, -1.75, speed=2)], id=f"s{k}", **SMALL) for k in range(5)]
    write_scenes(tmp_path / "scenes", iter(scenes), fingerprint_of({"test": 1}))
    return tmp_path


def test_drive_command_resumes_where_it_was_killed_and_refuses_other_settings(store, monkeypatch):
    quiet = Console(quiet=True)
    cfg = config(store, "planner=constant_velocity", "horizon_s=4", "batch_size=2")
    real, calls = drive.drive_batch, []

    def dies(sources, *rest):
        calls.append([scene.id for scene in sources])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(sources, *rest)

    monkeypatch.setattr(drive, "drive_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        drive.drive(cfg, quiet)
    calls.append(None)
    rows = drive.drive(cfg, quiet)
    assert calls[4:] == [["s4"]]
    assert sorted(rows["id"]) == [f"s{k}" for k in range(5)]
    whole = drive.drive(compose("closed_loop_drive", [f"output_dir={store / 'two'}", f"scenes={store / 'scenes'}",
                                "planner=constant_velocity", "horizon_s=4", "batch_size=5"]), quiet)  # fmt: skip
    assert np.array_equal(
        rows.set_index("id").sort_index()["score"], whole.set_index("id").sort_index()["score"], equal_nan=True
    )
    content = json.loads((store / "out" / drive.AGGREGATE_FILE).read_text())
    assert content["scenes"] == 5
    assert content["estimates"]["score"]["count"] == 5
    with pytest.raises(FingerprintMismatch, match="planner"):
        drive.drive(config(store, "planner=human", "horizon_s=4"), quiet)
    drives = TrafficStore(store / "out" / drive.DRIVES_FOLDER)
    assert drives.ids == [f"s{k}" for k in range(5)]
    scene = drives.load("s3")
    assert scene.num_steps == 11 + 40
    again = scored(scene, Replay(), horizon_s=4.0)  # a drive is a scene: replayed, it scores what it scored
    assert abs(again["nc"] - float(rows.set_index("id").loc["s3", "nc"])) < 1e-9
    with pytest.raises(MissingError, match="no traffic scenes"):
        drive.drive(compose("closed_loop_drive", [f"output_dir={store / 'x'}", f"scenes={store / 'nothing'}"]), quiet)


def test_every_scene_invalid_is_no_success(store, monkeypatch):
    monkeypatch.setattr(drive, "instantiate", lambda node: Flaky("nan", "any") if "Constant" in str(node) else Replay())
    real = Flaky.plan

    def always(self, batch, hidden=None):
        return real(self, batch) * torch.nan

    monkeypatch.setattr(Flaky, "plan", always)
    with pytest.raises(drive.NothingDriven, match="not finite"):
        drive.drive(config(store, "planner=constant_velocity", "horizon_s=1"), Console(quiet=True))


@pytest.mark.parametrize("planner", ["human", "idm", "frenet", "replay", "standing_still", "constant_deceleration"])
def test_every_planner_of_the_command_drives(store, planner):
    rows = drive.drive(
        config(store, f"planner={planner}", "agents=idm", "horizon_s=1", "batch_size=5"), Console(quiet=True)
    )
    assert rows["valid"].all()


def test_drive_keeps_its_source_and_says_who_was_there():
    scene = road(
        [Car(0, -1.75, speed=8, **EGO), Car(20, -5.25, speed=5, seen=(0, 40))], move=(50.0, -20.0, 1.0), **SMALL
    )
    state = driven(scene, Replay(), horizon_s=6.0)
    made = drive_scene(state, 0)
    assert np.abs(made.pose[0] - scene.pose[0, : made.num_steps]).max() < 1e-3
    assert made.valid[1, :46].all()
    assert not made.valid[1, 46:].any()
    assert np.array_equal(made.points, scene.points)


def test_panel_has_twenty_graded_planners():
    found = panel()
    assert [policy.name for policy in found] == list(NAMES)
    assert len(set(NAMES)) == 20
    headways = [member(f"idm_{k}").parameters.headway for k in range(10)]
    assert headways[0] == 2.5
    assert headways[9] == pytest.approx(0.8)
    with pytest.raises(DataError, match="frenet_9"):
        member("idm_10")
    scene = road([Car(0, -1.75, speed=8, **EGO), Car(35, -1.75, speed=2)], **SMALL)
    careful, blind = scored(scene, member("frenet_2")), scored(scene, member("frenet_9"))
    assert careful["nc"] == 1.0
    assert blind["nc"] == 0.0
    assert scored(scene, Idm())["nc"] == 1.0


def test_who_would_come_after_the_drive_is_not_in_it():
    """Recordings are longer than drives of them: a car that is first seen later was never in the world."""
    cars = [Car(0.0, -1.75, 5.0), Car(60.0, -5.25, 3.0, seen=(60, 90)), Car(30.0, -1.75, 5.0)]
    scene = road(cars)
    world = World(horizon_s=2.0)
    state, policy = world.reset([scene]), Replay()
    policy.start(state, [scene])
    while state.steps_left >= 5:
        world.step(state, policy.act(state))
    made = drive_scene(state, 0)
    assert made.agent_id.tolist() == scene.agent_id[[0, 2]].tolist()
    assert made.valid.any(axis=1).all()
    assert made.ego == 0
