"""Questions and answers: each answer follows the scene, a program can check it, and no answer rules its type."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from road_worlds import CAR, make_scene, make_town, objects

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.prompts import format_trajectory, trajectory_prompt
from navsim_ext.questions import write
from navsim_ext.questions.answers import is_correct
from navsim_ext.questions.catalogue import QUESTIONS, STANDARD_TYPES
from navsim_ext.questions.facts import EGO_FRONT_M, facts_of, lane_path
from navsim_ext.questions.meta_actions import DecisionRules
from navsim_ext.questions.write import balanced, scene_records, write_qa
from navsim_ext.readers import NavsimLogs, NothingSelected, SkipReport
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.scene import Scene

SIZE = (960, 540)
AT_JUNCTION_M = 45.0  # drives over it within 4 s


@pytest.fixture(scope="module")
def town():
    return make_town()


def car(gap: float, y=0.0, yaw=0.0, size=CAR) -> tuple:
    """A vehicle whose rear bumper is ``gap`` m ahead of the ego car's front bumper."""
    return ("vehicle", EGO_FRONT_M + gap + 0.5 * size[0], y, yaw, size)


def answers(scene: Scene, town) -> dict:
    return {record["type"]: record["answer"] for record in scene_records(scene, town, SIZE)}


@pytest.mark.parametrize(("gap", "word"), [(3, "near"), (9.4, "near"), (10.6, "medium"), (24, "medium"), (40, "far")])
def test_lead_distance(town, gap, word):
    facts = facts_of(make_scene(objects(car(30.0, 3.5), car(gap))), town)
    assert facts.lead_known
    assert facts.lead.gap == pytest.approx(gap, abs=0.01)
    record = next(r for r in scene_records(make_scene(objects(car(gap))), town, SIZE) if r["type"].endswith("distance"))
    assert record["answer"] == word
    assert record["conversations"][-1]["value"].startswith(word)
    assert f"{gap:.0f} m" in record["conversations"][-1]["value"]


def test_who_is_no_lead_vehicle(town):
    none = objects(
        car(10, 3.5), car(12, yaw=np.pi), ("vehicle", -9.0, 0.0, 0.0, CAR), ("pedestrian", 9.0, 0, 0, (1, 1, 2))
    )
    assert (facts_of(make_scene(none), town).lead, facts_of(make_scene(none), town).lead_known) == (None, True)
    assert not facts_of(make_scene(objects(car(65.0))), town).lead_known  # far enough to be argued about
    # Something in between hides it: nobody is asked.
    wall = ("generic_object", EGO_FRONT_M + 4.0, 0.0, 0.0, (0.5, 6.0, 4.0))
    assert not facts_of(make_scene(objects(car(12.0), wall)), town).lead_known
    assert "lead_vehicle_distance" not in answers(make_scene(objects(car(12.0), wall)), town)


def test_lead_speed_is_what_the_text_implies(town):
    now, earlier = objects(car(14.0)), objects(car(13.0))
    scene = make_scene(now, earlier=earlier, speed=8.0)
    record = next(r for r in scene_records(scene, town, SIZE) if r["type"] == "lead_vehicle_speed")
    question = record["conversations"][0]["value"]
    assert all(text in question for text in ("13.0 m", "14.0 m", "8.0 m/s"))
    assert record["answer"] == pytest.approx(8.0 + 1.0 / 0.5)
    assert not record["image_dependent"]


def test_brake_lights(town):
    slowing = replace(objects(car(14.0)), velocities=np.array([[5.0, 0, 0]]))
    before = replace(slowing, velocities=np.array([[7.0, 0, 0]]))
    assert answers(make_scene(slowing, earlier=before), town)["lead_vehicle_braking"] == "yes"
    assert answers(make_scene(slowing, earlier=slowing), town)["lead_vehicle_braking"] == "no"
    assert "lead_vehicle_braking" not in answers(make_scene(objects()), town)


@pytest.mark.parametrize(("lights", "answer"), [
    ([("11", True), ("12", True)], "red"), ([("11", False)], "green"), ([], "none"), ([("99", True)], "none"),
])  # fmt: skip
def test_traffic_light(town, lights, answer):
    assert answers(make_scene(objects(), lights=lights, x=25.0), town)["traffic_light"] == answer


def test_lights_that_disagree_or_are_far_leave_it_open(town):
    assert facts_of(make_scene(objects(), lights=[("11", True), ("12", False)], x=25.0), town).light is None
    assert facts_of(make_scene(objects(), lights=[("11", True)], x=-25.0), town).light is None
    assert facts_of(make_scene(objects(), lights=[("11", True)], x=100.0), town).light == "none"  # behind us


@pytest.mark.parametrize(("x", "y", "answer"), [
    (15, 0, "road"), (25, 3, "road"), (15, -3.5, "beside"), (15, -5, None), (15, -9, "none"), (39, 0, None),
    (-5, 0, "none"),
])  # fmt: skip
def test_pedestrian_on_and_beside_the_road(town, x, y, answer):
    person = ("pedestrian", x, y, 0.0, (0.6, 0.6, 1.8))
    assert facts_of(make_scene(objects(person)), town).pedestrian == answer
    if answer == "beside":  # another one on the road matters more
        on_road = ("pedestrian", 20.0, 0.0, 0.0, (0.6, 0.6, 1.8))
        assert facts_of(make_scene(objects(person, on_road)), town).pedestrian == "road"


def test_hidden_pedestrian_leaves_it_open(town):
    person = ("pedestrian", 20.0, 0.0, 0.0, (0.6, 0.6, 1.8))
    lorry = ("vehicle", 13.0, 0.0, 0.0, (9.0, 2.5, 3.4))
    assert facts_of(make_scene(objects(person, lorry)), town).pedestrian is None


def test_lanes_beside(town):
    facts = facts_of(make_scene(objects()), town)
    assert (facts.left, facts.right) == ("same", "none")
    left = facts_of(make_scene(objects(), shift=0.0), town)
    assert answers(make_scene(objects()), town)["lane_left"] == "same direction"
    assert left.right == "none"
    assert facts_of(make_scene(objects(), x=55.0), town).left is None  # before the junction


@pytest.mark.parametrize(("start", "end", "word"), [
    (8, 8, "KEEP"), (8, 12, "ACCELERATE"), (10, 5, "DECELERATE"), (6, 0, "STOP"), (0, 0, "STOP"),
])  # fmt: skip
def test_speed_actions(town, start, end, word):
    scene = make_scene(objects(), speed=start, end_speed=end)
    assert facts_of(scene, town, rules=DecisionRules(horizon_s=4.0)).decision.speed == word


@pytest.mark.parametrize(("shift", "turn", "word"), [
    (0, 0, "STRAIGHT"), (3.5, 0, "LEFT_CHANGE"), (-3.5, 0, "RIGHT_CHANGE"), (0, 0.8, "LEFT_TURN"),
    (0, -0.8, "RIGHT_TURN"), (1.0, 0.05, "STRAIGHT"),
])  # fmt: skip
def test_path_actions(town, shift, turn, word):
    scene = make_scene(objects(), shift=shift, turn=turn, x=AT_JUNCTION_M)
    assert facts_of(scene, town, rules=DecisionRules(horizon_s=4.0)).decision.path == word


def test_the_lane_is_followed_over_the_junction_and_without_a_map_straight_on(town):
    scene = make_scene(objects(), x=40.0)
    path = lane_path(town, scene.ego_global[3], scene.roadblock_ids)
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).sum() == pytest.approx(90.0, abs=0.1)
    far_away = np.array([0.0, 0.0, 0.5])
    np.testing.assert_allclose(lane_path(town, far_away, ())[-1], 90.0 * np.array([np.cos(0.5), np.sin(0.5)]))


def test_records_are_complete_and_in_the_conversation_format(town):
    scene = make_scene(objects(car(12.0)), lights=[("11", True)])
    records = scene_records(scene, town, SIZE)
    assert {record["type"] for record in records} == set(STANDARD_TYPES)
    for record in records:
        assert set(record) == {
            "image", "conversations", "image_size", "scene_id", "type", "image_dependent", "answer",
        }  # fmt: skip
        assert (record["image"], record["image_size"], record["scene_id"]) == (
            "log/CAM_F0/now.jpg",
            [960, 540],
            scene.token,
        )
        turns = record["conversations"]
        assert [turn["from"] for turn in turns[-2:]] == ["human", "gpt"]
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
        assert "{" not in turns[-2]["value"]
        assert record["image_dependent"] == QUESTIONS[record["type"]].image_dependent
        assert is_correct(record["type"], record["answer"], turns[-1]["value"]), record["type"]
        json.dumps(record)
    trajectory = next(record for record in records if record["type"] == "trajectory")
    assert trajectory["conversations"][0]["from"] == "system"
    assert trajectory["conversations"][-1]["value"] == format_trajectory(scene.future_poses(8))


def test_the_trajectory_task_is_worded_by_the_template(tmp_path, town):
    write_qa(Source(tmp_path, town), tmp_path / "qa", name="train", template="brief")
    scene = next(iter(Source(tmp_path, town).scenes_of("log-a")))
    prompt = trajectory_prompt(scene.history_poses(), int(scene.commands[scene.now].argmax()), template="brief")
    turns = json.loads((tmp_path / "qa" / "train_trajectory.jsonl").open().readline())["conversations"]
    assert [turn["value"] for turn in turns[:2]] == [prompt.system, prompt.user]


def test_wording_varies_with_the_scene_and_is_repeatable(town):
    scenes = [make_scene(objects(), token=f"{k:016x}") for k in range(40)]

    def ask(scene: Scene, seed: int = 0) -> str:
        (record,) = scene_records(scene, town, SIZE, types=["traffic_light"], seed=seed)
        return record["conversations"][0]["value"]

    asked = [ask(scene) for scene in scenes]
    assert len(set(asked)) == len(QUESTIONS["traffic_light"].wordings)
    assert ask(scenes[7]) == asked[7]
    other = [ask(scene, seed=1) for scene in scenes]
    assert other != asked


@pytest.mark.parametrize(("kind", "answer", "text", "right"), [
    ("traffic_light", "red", "The light is RED.", True),
    ("traffic_light", "red", "green", False),
    ("traffic_light", "none", "I see a light", False),
    ("lead_vehicle_distance", "near", "near, 9 m", True),
    ("lead_vehicle_distance", "near", "linear", False),
    ("lane_left", "same direction", "A lane in the same  direction.", True),
    ("ego_speed", 8.4, "about 8.1 m/s", True),
    ("ego_speed", 8.4, "9.1", False),
    ("ego_speed", 8.4, "fast", False),
    ("meta_action", "DECELERATE, LEFT_TURN", "left_turn, decelerate", True),
    ("meta_action", "DECELERATE, LEFT_TURN", "DECELERATE, RIGHT_TURN", False),
    ("meta_action", "STOP, STRAIGHT", "STOP, KEEP, STRAIGHT", False),
    ("decision", "STOP, STRAIGHT", "<think>KEEP?</think><answer>STOP, STRAIGHT</answer>", True),
    ("decision", "STOP, STRAIGHT", "<think>STOP, STRAIGHT</think><answer>KEEP, STRAIGHT</answer>", False),
    ("decision", "STOP, STRAIGHT", "<answer>STOP, STRAIGHT</answer><answer>STOP, STRAIGHT</answer>", False),
    ("traffic_light", "red", "<think>green?</think><answer>red</answer>", True),
    ("trajectory", [[1.0, 0, 0]] * 8, "[PT, " + ", ".join(["(+1.20, +0.00, +0.00)"] * 8) + "]", True),
    ("road_users", [["vehicle", 12, 3]], "vehicle (13, +3)", True),
    ("road_users", [["vehicle", 12, 3]], "Vehicle (12,+3).", True),
    ("road_users", [["vehicle", 40, 3]], "vehicle (45, +3)", True),
    ("road_users", [["vehicle", 12, 3]], "vehicle (17, +3)", False),
    ("road_users", [["vehicle", 12, 3]], "pedestrian (12, +3)", False),
    ("road_users", [["vehicle", 12, 3]], "vehicle (12, +3), vehicle (30, +0)", False),
    ("road_users", [["vehicle", 12, 3]], "none", False),
    ("road_users", [], "none", True),
    ("road_users", [], "", False),
    ("road_users", [], "a tree", False),
    ("trajectory", [[1.0, 0, 0]] * 8, "[PT, (+1.00, +0.00, +0.00)]", False),
    ("trajectory", [[1.0, 0, 0]] * 8, "[PT, " + ", ".join(["(+9.00, +0.00, +0.00)"] * 8) + "]", False),
])  # fmt: skip
def test_answers_are_checked(kind, answer, text, right):
    assert is_correct(kind, answer, text) is right


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["red", "green", "none"]), min_size=3, max_size=120), st.floats(0.35, 0.9))
def test_no_answer_rules_its_type(words, share):
    records = [{"type": "traffic_light", "answer": word, "scene_id": f"{k:016x}"} for k, word in enumerate(words)]
    numbers = [{"type": "ego_speed", "answer": 1.0, "scene_id": "x"}] * 3
    kept = balanced([*records, *numbers], share)
    assert kept[-3:] == numbers
    counts = Counter(record["answer"] for record in kept[:-3])
    total = sum(counts.values())
    assert set(counts) == set(words)  # no answer disappears
    allowed = max(share, 1.0 / len(counts)) + 1e-6
    assert max(counts.values()) <= allowed * total
    before = Counter(words)
    cap = max(counts.values())
    assert all(counts[word] == min(before[word], cap) for word in before)
    if cap < max(before.values()):  # one more of each would be too many
        assert cap + 1 > max(share, 1.0 / len(counts)) * sum(min(n, cap + 1) for n in before.values()) - 1e-6
    order = [records.index(record) for record in kept[:-3]]
    assert order == sorted(order)
    assert balanced(records, 1.0) == records
    with pytest.raises(DataError, match="max_share"):
        balanced(records, 0.0)


class Source:
    """Two logs of three scenes in the town, with pictures."""

    def __init__(self, root, town, bad: bool = False) -> None:
        self.sensor_root, self._town = root / "blobs", town
        self.scene_filter, self.report = SceneFilter(), SkipReport(skip_bad=bad, path=root / "skipped.json")
        self.log_names, self.read = ["log-a", "log-b"], []
        self.sensor_root.mkdir(exist_ok=True)

    def scenes_of(self, log_name):
        self.read.append(log_name)
        scenes = []
        for k in range(3):
            scene = make_scene(objects(car(8.0 + 10 * k)), token=f"{log_name[-1]}{k:015x}", lights=[("11", k == 0)])
            path = f"{log_name}/{k}.jpg"
            (self.sensor_root / log_name).mkdir(exist_ok=True)
            Image.new("RGB", (64, 36)).save(self.sensor_root / path)
            camera = replace(scene.cameras["CAM_F0"], path=path)
            scenes.append(replace(scene, log_name=log_name, cameras={"CAM_F0": camera}))
        return scenes

    def map_for(self, scene):
        return self._town


def test_files_meta_and_counts(tmp_path, town):
    source = Source(tmp_path, town)
    counts = write_qa(source, tmp_path / "qa", name="train", max_share=1.0)
    meta = json.loads((tmp_path / "qa" / "train.json").read_text())
    assert set(meta) == {"train_qa", "train_trajectory"}
    for name, entry in meta.items():
        lines = [json.loads(line) for line in (tmp_path / "qa" / entry["annotation"]).read_text().splitlines()]
        assert entry["length"] == len(lines) > 0
        assert set(entry) == {"annotation", "root", "repeat_time", "data_augment", "length", "checksum"}
        assert all((tmp_path / "qa" / entry["root"] / line["image"]).is_file() for line in lines)
        assert all(line["image_size"] == [64, 36] for line in lines)
        assert all((line["type"] == "trajectory") == (name == "train_trajectory") for line in lines)
    assert meta["train_trajectory"]["repeat_time"] == 2
    assert counts["trajectory"]["records"] == 6
    assert counts["lead_vehicle_distance"]["answers"] == {"near": 2, "medium": 2, "far": 2}
    before = source.read.copy()
    assert write_qa(source, tmp_path / "qa", name="train", max_share=1.0) == counts
    assert source.read == before  # a finished data set is left alone
    with pytest.raises(FingerprintMismatch, match="max_share"):
        write_qa(source, tmp_path / "qa", name="train", max_share=0.5)
    with pytest.raises(FingerprintMismatch, match="prompt"):
        write_qa(source, tmp_path / "qa", name="train", max_share=1.0, template="brief")


def test_road_users_are_the_nearest_that_show(town):
    pedestrian = ("pedestrian", 14.0, -4.0, 0.0, (0.7, 0.7, 1.75))
    hidden = ("pedestrian", EGO_FRONT_M + 30.0, 0.0, 0.0, (0.7, 0.7, 1.75))  # behind the lorry
    behind = ("vehicle", -9.0, 0.0, 0.0, CAR)
    lorry = (7.0, 2.4, 3.2)
    scene = make_scene(objects(car(18.0, size=lorry), pedestrian, hidden, behind, car(90.0, 3.5)))
    record = scene_records(scene, town, SIZE, types=["road_users"])[0]
    ahead = round(EGO_FRONT_M + 18.0 + 0.5 * lorry[0])
    assert record["answer"] == [["pedestrian", 14, -4], ["vehicle", ahead, 0]]
    text = record["conversations"][-1]["value"]
    assert text == f"pedestrian (14, -4), vehicle ({ahead}, +0)"
    assert is_correct("road_users", record["answer"], text)
    nobody = scene_records(make_scene(objects(behind)), town, SIZE, types=["road_users"])[0]
    assert (nobody["answer"], nobody["conversations"][-1]["value"]) == ([], "none")
    many = scene_records(make_scene(objects(*(car(5.0, y) for y in (-9, -6, -3, 3, 6, 9)))), town, SIZE)
    assert "road_users" not in {one["type"] for one in many}  # only where it is asked for


def test_together_picture_questions_are_turns_of_one_conversation(tmp_path, town):
    apart, together = tmp_path / "apart", tmp_path / "together"
    counts = write_qa(Source(tmp_path, town), apart, name="train")
    assert write_qa(Source(tmp_path, town), together, name="train", together=True) == counts
    assert set(json.loads((together / "train.json").read_text())) == {"train_dialogues", "train_qa", "train_trajectory"}
    assert not (apart / "train_dialogues.jsonl").exists()

    def lines(folder, part):
        return [json.loads(line) for line in (folder / f"train_{part}.jsonl").read_text().splitlines()]

    assert lines(apart, "trajectory") == lines(together, "trajectory")
    turns = {"lead_vehicle_distance", "lead_vehicle_braking", "traffic_light", "crossing_pedestrian", "lane_left"}
    turns |= {"lane_right"}
    assert lines(together, "qa") == [record for record in lines(apart, "qa") if record["type"] not in turns]
    asked: dict[str, set] = {}
    for record in lines(apart, "qa"):
        if record["type"] in turns:
            question, answer = (turn["value"] for turn in record["conversations"])
            pair = (record["type"], question.removeprefix("<image>\n"), answer)
            asked.setdefault(record["scene_id"], set()).add((record["image"], *pair))
    told = lines(together, "dialogues")
    assert [record["scene_id"] for record in told] == list(asked)  # one conversation for each picture
    for record in told:
        texts = [turn["value"] for turn in record["conversations"]]
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * len(record["types"])
        assert texts[0].startswith("<image>\n")
        assert sum(text.count("<image>") for text in texts) == 1
        texts[0] = texts[0].removeprefix("<image>\n")
        pairs = zip(record["types"], texts[::2], texts[1::2], strict=True)
        assert {(record["image"], *pair) for pair in pairs} == asked[record["scene_id"]]
    assert len({tuple(record["types"]) for record in told}) > 1  # not always in the same order
    with pytest.raises(FingerprintMismatch, match="together"):
        write_qa(Source(tmp_path, town), together, name="train")


def test_interrupted_writing_goes_on_and_gives_the_same_bytes(tmp_path, town, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_qa(Source(tmp_path, town), whole, name="val")
    source, make = Source(tmp_path, town), write.scene_records

    def stop_at(scene, *arguments, **options):
        if scene.token == "b" + f"{1:015x}":
            raise KeyboardInterrupt
        return make(scene, *arguments, **options)

    monkeypatch.setattr(write, "scene_records", stop_at)
    with pytest.raises(KeyboardInterrupt):
        write_qa(source, broken, name="val")
    assert not (broken / "val.json").exists()
    monkeypatch.setattr(write, "scene_records", make)
    again = Source(tmp_path, town)
    write_qa(again, broken, name="val")
    assert again.read == ["log-b"]
    for file in ("val.json", "val.counts.json", "val_qa.jsonl", "val_trajectory.jsonl"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()


def test_bad_input(tmp_path, town):
    scene = make_scene(objects())
    with pytest.raises(DataError, match="'weather' does not exist"):
        scene_records(scene, town, SIZE, types=["weather"])
    with pytest.raises(DataError, match="not CAM_B0"):
        scene_records(scene, town, SIZE, camera="CAM_B0")

    class Broken(Source):
        def scenes_of(self, log_name):
            scenes = super().scenes_of(log_name)
            if log_name == "log-a":
                (self.sensor_root / "log-a/0.jpg").unlink()
                (self.sensor_root / "log-a/1.jpg").write_bytes(b"no picture")
            return scenes

    with pytest.raises(MissingError, match=r"log log-a, frame a0+: cams\.CAM_F0 .*0\.jpg does not exist"):
        write_qa(Broken(tmp_path, town), tmp_path / "one", name="train")
    source = Broken(tmp_path, town, bad=True)
    assert write_qa(source, tmp_path / "two", name="train")["trajectory"]["records"] == 4
    assert source.report.counts == {"MissingError": 1, "DataError": 1}

    class Empty(Source):
        def scenes_of(self, log_name):
            return []

    with pytest.raises(NothingSelected, match="0 scenes"):
        write_qa(Empty(tmp_path, town), tmp_path / "three", name="train")


def test_reference_logs(reference, tmp_path):
    root = reference("golden/navsim/dataset")
    counts = write_qa(NavsimLogs(root, "trainval"), tmp_path, name="train", max_share=1.0)
    assert counts["trajectory"]["records"] == 32
    assert set(counts["traffic_light"]["answers"]) == {"red", "green", "none"}
