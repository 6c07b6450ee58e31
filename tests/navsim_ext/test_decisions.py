"""Decisions in words: what a trajectory decides, what a reply states, and that no form of reply is read as another."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from road_worlds import make_scene, make_town, objects

from navsim_ext.errors import DataError
from navsim_ext.frames import to_local
from navsim_ext.prompts import format_trajectory
from navsim_ext.questions.answers import (
    FAULTS,
    read_decision,
    read_reply,
    read_trajectory,
    stated_actions,
)
from navsim_ext.questions.catalogue import with_reasoning
from navsim_ext.questions.facts import facts_of
from navsim_ext.questions.meta_actions import (
    PAIRS,
    PATHS,
    SPEEDS,
    Decision,
    DecisionRules,
    LaneAhead,
    action_weights,
    decide,
    frequencies,
)
from navsim_ext.questions.write import scene_records

STRAIGHT_ROAD = LaneAhead(np.array([[0.0, 0.0], [90.0, 0.0]]), np.array([False, False]), True)
JUNCTION = LaneAhead(np.array([[0.0, 0.0], [10.0, 0.0], [90.0, 0.0]]), np.array([False, True, False]), True)


def drive(speeds, heading=0.0, shift=0.0) -> np.ndarray:
    """[F,3] along x at these speeds [m/s] of each half second, heading and shift growing evenly."""
    x = np.cumsum(np.asarray(speeds, float) * 0.5)
    part = np.arange(1, len(x) + 1) / len(x)
    return np.stack([x, shift * part, heading * part], axis=1)


@pytest.mark.parametrize(("start", "speeds", "word"), [
    (8, [8] * 6, "KEEP"), (8, [8, 8, 9, 9, 9, 9.1], "KEEP"), (8, [8, 8, 9, 9, 9, 9.3], "ACCELERATE"),
    (8, [8, 7, 7, 7, 7, 6.7], "DECELERATE"), (8, [6, 4, 2, 1, 0.4, 0.4], "STOP"), (0, [0] * 6, "STOP"),
    (0, [0, 0, 0, 0, 0, 1.0], "KEEP"), (8, [8, 8, 8, 8, 8, 8, 0, 0], "KEEP"),
])  # fmt: skip
def test_speed_words(start, speeds, word):
    assert decide(drive(speeds), start, STRAIGHT_ROAD).speed == word


@pytest.mark.parametrize(("road", "heading", "shift", "word"), [
    (STRAIGHT_ROAD, 0.0, 0.0, "STRAIGHT"), (STRAIGHT_ROAD, 0.4, 0.0, "STRAIGHT"), (JUNCTION, 0.4, 0.0, "LEFT_TURN"),
    (JUNCTION, -0.4, 0.0, "RIGHT_TURN"), (STRAIGHT_ROAD, 0.0, 3.5, "LEFT_CHANGE"),
    (STRAIGHT_ROAD, 0.0, -3.5, "RIGHT_CHANGE"), (STRAIGHT_ROAD, 0.0, 1.5, "STRAIGHT"),
    (LaneAhead(STRAIGHT_ROAD.centre, STRAIGHT_ROAD.junction, False), 0.4, 0.0, "LEFT_TURN"),
])  # fmt: skip
def test_path_words(road, heading, shift, word):
    assert decide(drive([8] * 6, heading, shift), 8.0, road).path == word


def test_a_bend_of_the_road_is_no_decision():
    angle = np.linspace(0.0, 1.2, 40)
    bend = LaneAhead(30.0 * np.stack([np.sin(angle), 1 - np.cos(angle)], axis=1), np.zeros(40, bool), True)
    turned = np.arange(1, 7) * 4.0 / 30.0
    poses = np.stack([30.0 * np.sin(turned), 30.0 * (1 - np.cos(turned)), turned], axis=1)
    assert decide(poses, 8.0, bend) == Decision("KEEP", "STRAIGHT")


@given(st.floats(0, 15), st.floats(-0.6, 0.6), st.floats(-4, 4), st.floats(0, 15))
@settings(max_examples=50, deadline=None)
def test_mirrored_drives_decide_alike_with_left_and_right_swapped(end, heading, shift, start):
    swap = {"LEFT_TURN": "RIGHT_TURN", "LEFT_CHANGE": "RIGHT_CHANGE"}
    swap |= {right: left for left, right in swap.items()}
    poses = drive(np.linspace(start, end, 6), heading, shift)
    one, other = decide(poses, start, JUNCTION), decide(poses * [1, -1, -1], start, JUNCTION)
    assert (other.speed, other.path) == (one.speed, swap.get(one.path, one.path))


def test_a_road_survives_its_record():
    town = make_town()
    facts = facts_of(make_scene(objects(), x=45.0), town)
    assert facts.road.known
    assert facts.road.junction.any()
    assert not facts.road.junction[0]
    again = LaneAhead.from_json(json.loads(json.dumps(facts.road.to_json())))
    np.testing.assert_allclose(again.centre, facts.road.centre, atol=0.006)
    np.testing.assert_array_equal(again.junction, facts.road.junction)
    for bad in (None, {}, {"centre": [[0, 0]], "junction": "0", "known": True},
                {"centre": [[0, 0], [1, float("nan")]], "junction": "00", "known": True},
                {"centre": [[0, 0], [1, 1]], "junction": "02", "known": True}):  # fmt: skip
        with pytest.raises(DataError):
            LaneAhead.from_json(bad)


@pytest.mark.parametrize("poses", [np.zeros((5, 3)), np.zeros((6, 2)), np.full((6, 3), np.nan)])
def test_what_has_no_decision_is_refused(poses):
    with pytest.raises(DataError):
        decide(poses, 5.0, STRAIGHT_ROAD)


@pytest.mark.parametrize("wrong", [{"horizon_s": 0.7}, {"horizon_s": 0.5}, {"turn_rad": 0.0}, {"stop_mps": np.nan}])
def test_rules_that_cannot_be_followed_are_refused(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        DecisionRules(**wrong)


def test_the_records_of_decisions_carry_what_a_reward_needs():
    scene, town = make_scene(objects(), x=45.0, end_speed=14.0), make_town()
    short, full = scene_records(scene, town, (960, 540), types=["decision", "decision_trajectory"])
    for record in (short, full):
        reply = read_reply(record["conversations"][-1]["value"])
        assert reply.well_formed
        assert record["reasoning_source"] == "facts"
        assert record["answer"] == "ACCELERATE, STRAIGHT"
        assert read_decision(reply.text) == Decision.parse(record["answer"])
        road = LaneAhead.from_json(record["road"])
        driven = decide(scene.future_poses(8), record["speed_mps"], road)
        assert driven == Decision.parse(record["answer"])
    assert format_trajectory(scene.future_poses(8)) in full["conversations"][-1]["value"]
    planned = read_trajectory(full["conversations"][-1]["value"]).poses
    np.testing.assert_allclose(planned, scene.future_poses(8), atol=0.006)
    assert "no turn for" in short["conversations"][0]["value"]


def test_navigation_tells_where_the_route_turns():
    from navsim_ext.questions.facts import navigation

    corner = np.array([[0, 0], [20, 0], [40, 0], [44, 1], [46, 5], [46, 20], [46, 60.0]])
    at = np.array([0, 0, 1, 1, 1, 0, 0], bool)
    assert navigation("left", LaneAhead(corner, at, True)) == "TURN LEFT, left turn in 40 m"
    assert navigation("right", LaneAhead(corner * [1, -1], at, True)) == "TURN RIGHT, right turn in 40 m"
    assert navigation("straight", LaneAhead(corner, at, False)) == "GO STRAIGHT"
    assert navigation("straight", STRAIGHT_ROAD) == "GO STRAIGHT, no turn for 90 m"


# ---- replies


@pytest.mark.parametrize(("text", "answer", "fault"), [
    ("<think>a</think><answer>KEEP, STRAIGHT</answer>", "KEEP, STRAIGHT", ""),
    (" <think>a\nb</think>\n<answer> KEEP, STRAIGHT </answer>\n", "KEEP, STRAIGHT", ""),
    ("", None, "empty"), ("  \n", None, "empty"), ("KEEP, STRAIGHT", "KEEP, STRAIGHT", "no tags"),
    ("<think>a</think><answer></answer>", None, "no answer"), ("<think></think><answer></answer>", None, "no answer"),
    ("<think> </think><answer>KEEP</answer>", "KEEP", "no reasoning"),
    ("<answer>KEEP</answer>", "KEEP", "no reasoning"),
    ("<think>a</think>", None, "no answer"), ("<think>a</think><answer>KEEP", None, "not closed"),
    ("<answer>KEEP</answer><think>a</think>", "KEEP", "wrong order"),
    ("<think>a</think><answer>KEEP</answer><answer>STOP</answer>", None, "repeated tags"),
    ("<think>a</think><think>a</think><answer>KEEP</answer>", None, "repeated tags"),
    ("<think>a<answer>KEEP</answer></think>", None, "nested tags"),
    ("<answer><answer>KEEP</answer></answer>", None, "repeated tags"),
    ("</answer>KEEP<answer>", None, "wrong order"),
    ("well <think>a</think><answer>KEEP</answer>", "KEEP", "text outside"),
    ("<think>a</think> so <answer>KEEP</answer>", "KEEP", "text outside"),
])  # fmt: skip
def test_replies_are_cut_and_their_faults_named(text, answer, fault):
    reply = read_reply(text)
    assert (reply.answer, reply.fault) == (answer, fault)
    assert reply.well_formed == (not fault)


@given(st.text(alphabet="<>/thinkanswer KEP,\n", max_size=80))
@settings(max_examples=200, deadline=None)
def test_whatever_is_said_has_an_answer_or_a_named_fault(text):
    reply = read_reply(text)
    assert reply.fault in ("", *FAULTS)
    assert reply.answer is None or reply.answer.strip()
    assert not reply.well_formed or (reply.answer and reply.reasoning)


@given(st.sampled_from(PAIRS), st.text(alphabet="abc ,.KEEP", min_size=1).filter(str.strip))
def test_every_pair_is_read_back_from_the_well_formed_reply_whatever_the_reasoning(pair, reasoning):
    assert read_decision(with_reasoning(reasoning, pair)) == Decision.parse(pair)


@pytest.mark.parametrize("answer", [
    "", "KEEP", "STRAIGHT", ", ".join(SPEEDS + PATHS), "KEEP, STOP, STRAIGHT", "KEEP, STRAIGHT, maybe", "直行, 保持",
    "KEEPSTRAIGHT", "KEEP_STRAIGHT", "LEFT TURN, KEEP", "5, STRAIGHT",
])  # fmt: skip
def test_what_is_not_exactly_two_words_is_no_decision(answer):
    assert read_decision(f"<think>KEEP, STRAIGHT</think><answer>{answer}</answer>") is None


def test_the_words_of_an_answer_end_where_its_trajectory_begins():
    stated = stated_actions("STOP, STRAIGHT [PT, (+1.00, +0.00, +0.00)]")
    assert stated.decision == Decision("STOP", "STRAIGHT")
    assert read_decision("straight, keep") == Decision("KEEP", "STRAIGHT")


# ---- weights


def test_weights_follow_the_frequencies():
    decisions = [Decision("KEEP", "STRAIGHT")] * 8 + [Decision("STOP", "LEFT_TURN")] * 2
    counts = frequencies(decisions)
    assert counts["ACCELERATE"] == 0
    weights = action_weights(counts)
    assert weights["KEEP"] == weights["STRAIGHT"] == pytest.approx(0.8)
    assert weights["STOP"] == weights["LEFT_TURN"] == pytest.approx(1 - 0.2 * 2 / 8)
    assert weights["ACCELERATE"] == weights["RIGHT_CHANGE"] == 1.0
    for wrong in ({}, dict.fromkeys((*SPEEDS, *PATHS), 0), counts | {"KEEP": -1}):
        with pytest.raises(DataError):
            action_weights(wrong)


def test_decide_agrees_with_the_scene_in_any_frame():
    """The road of the ego frame and the map of the global one tell the same lateral shift."""
    scene = make_scene(objects(), shift=3.5)
    facts = facts_of(scene, make_town(), rules=DecisionRules(horizon_s=4.0))
    poses = to_local(scene.ego_global[4:], scene.ego_global[3])
    assert decide(poses, 8.0, facts.road, DecisionRules(horizon_s=4.0)) == facts.decision


def test_there_is_one_reader_of_replies():
    """Nothing else in the project cuts tags or searches action words."""
    root = Path(__file__).resolve().parents[2]
    files = [path for package in ("navsim_ext", "stage1_vlm", "stage2_dit", "stage3_grpo")
             for path in (root / package).rglob("*.py")]  # fmt: skip
    found = {path.name for path in files if any("think|answer" in text or "</answer" in text for text in told(path))}
    assert found - {"catalogue.py", "forms.py"} == {"answers.py"}  # those two write replies


def told(path: Path) -> list[str]:
    """The texts of a module that are no docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [node.value for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs]  # fmt: skip
