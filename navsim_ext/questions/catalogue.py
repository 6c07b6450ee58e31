"""The questions: wording, short answers, whether the picture is needed, and what counts as right.

``answer`` of a record is the canonical form: a word of ``choices``, a number, or poses; for decisions the pair
``SPEED, PATH``. Wording varies in the question; the answer keeps one short form, so that exact and tolerant checks
(:func:`~navsim_ext.questions.answers.is_correct`) agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from navsim_ext.frames import NUM_HISTORY_POSES, POSE_INTERVAL_S
from navsim_ext.prompts import COMMAND_WORDS, format_pose, format_trajectory
from navsim_ext.questions.facts import HORIZON_POSES, Facts
from navsim_ext.questions.meta_actions import PAIRS, PATHS, SPEEDS
from navsim_ext.questions.reasoning import reasoning_from_facts
from navsim_ext.scene import Scene

NEAR_M, MEDIUM_M = 10.0, 25.0  # gap to the lead vehicle: near, medium, far
SPEED_TOLERANCE_MPS = 0.5
TRAJECTORY_TOLERANCE_M = 1.0  # mean distance over the 8 poses
PLACE_TOLERANCE_M, PLACE_TOLERANCE = 2.0, 0.15  # of a road user: the larger of a length and a share of its distance

Answer = str | float | list[list[float]] | list[list[str | int]]


@dataclass(frozen=True)
class Question:
    """One type. ``make`` returns (fields of the wording, text of the answer, canonical answer), or None."""

    name: str
    image_dependent: bool
    wordings: tuple[str, ...]
    make: Callable[[Scene, Facts], tuple[dict[str, Any], str, Answer] | None]
    choices: tuple[str, ...] = ()
    tolerance: float = 0.0
    decides: bool = False  # the answer states a decision
    standard: bool = True  # asked where no types are chosen


def _history(scene: Scene) -> str:
    poses = scene.history_poses()[-NUM_HISTORY_POSES:]
    steps = range(len(poses) - 1, -1, -1)
    return ", ".join(f"t-{step}: {format_pose(pose)}" for step, pose in zip(steps, poses, strict=True))


def _ego_speed(scene: Scene, facts: Facts) -> tuple[dict, str, Answer]:
    """From the poses in the question: distance of the last interval over its time."""
    poses = scene.history_poses()
    speed = round(float(np.linalg.norm(poses[-1, :2] - poses[-2, :2])) / POSE_INTERVAL_S, 1)
    return {"history": _history(scene)}, f"{speed:.1f} m/s", speed


def _lead_distance(scene: Scene, facts: Facts) -> tuple[dict, str, Answer] | None:
    if not facts.lead_known:
        return None
    if facts.lead is None:
        return {}, "none", "none"
    gap = facts.lead.gap
    word = "near" if gap < NEAR_M else "medium" if gap < MEDIUM_M else "far"
    return {}, f"{word}, {gap:.0f} m", word


def _lead_speed(scene: Scene, facts: Facts) -> tuple[dict, str, Answer] | None:
    """From the text: v_lead = v_ego + (gap now - gap before) / 0.5 s."""
    if facts.lead is None or facts.lead.earlier_gap is None:
        return None
    ego, before, now = round(facts.ego_speed, 1), round(facts.lead.earlier_gap, 1), round(facts.lead.gap, 1)
    speed = round(max(ego + (now - before) / POSE_INTERVAL_S, 0.0), 1)
    return {"ego": f"{ego:.1f}", "before": f"{before:.1f}", "now": f"{now:.1f}"}, f"{speed:.1f} m/s", speed


def _lead_braking(scene: Scene, facts: Facts) -> tuple[dict, str, Answer] | None:
    if facts.lead is None or facts.lead.gap > 40.0:
        return None
    word = "yes" if facts.lead.braking else "no"
    return {}, word, word


def _word(name: str, words: Mapping[Any, str]) -> Callable[[Scene, Facts], tuple[dict, str, Answer] | None]:
    def make(scene: Scene, facts: Facts) -> tuple[dict, str, Answer] | None:
        value = getattr(facts, name)
        return None if value is None else ({}, words[value], words[value])

    return make


def _command(scene: Scene, facts: Facts) -> tuple[dict, str, Answer] | None:
    if facts.command == "unknown":
        return None
    return {"command": COMMAND_WORDS[facts.command]}, facts.command, facts.command


def _meta_action(scene: Scene, facts: Facts) -> tuple[dict, str, Answer] | None:
    answer = str(facts.decision)
    fields = {"history": _history(scene), "command": COMMAND_WORDS[facts.command], "horizon": _horizon(facts)}
    return fields, answer, answer


def _horizon(facts: Facts) -> str:
    return f"{facts.rules.horizon_s:g}"


def _decision(scene: Scene, facts: Facts) -> tuple[dict, str, Answer]:
    answer = str(facts.decision)
    fields = {"speed": f"{facts.ego_speed:.1f}", "navigation": facts.navigation, "horizon": _horizon(facts)}
    return fields, with_reasoning(reasoning_from_facts(facts), answer), answer


def _decision_trajectory(scene: Scene, facts: Facts) -> tuple[dict, str, Answer]:
    answer = str(facts.decision)
    fields = {"history": _history(scene), "navigation": facts.navigation, "horizon": _horizon(facts)}
    stated = f"{answer} {format_trajectory(scene.future_poses(HORIZON_POSES))}"
    return fields, with_reasoning(reasoning_from_facts(facts), stated), answer


def with_reasoning(reasoning: str, answer: str) -> str:
    """The well-formed reply."""
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def _trajectory(scene: Scene, facts: Facts) -> tuple[dict, str, Answer]:
    poses = scene.future_poses(HORIZON_POSES)
    return {}, format_trajectory(poses), np.round(poses, 2).tolist()


def _road_users(scene: Scene, facts: Facts) -> tuple[dict, str, Answer]:
    places = [[user.kind, round(user.x), round(user.y)] for user in facts.road_users]
    return {}, ", ".join(f"{kind} ({x}, {y:+d})" for kind, x, y in places) or "none", places


_SPEEDS, _PATHS = ", ".join(SPEEDS), ", ".join(PATHS)
_LANE = {"same": "same direction", "oncoming": "oncoming", "none": "none"}

QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        Question(
            "ego_speed",
            False,
            (
                "Ego poses of the last 1.5 s, 0.5 s apart, as (x, y, heading): {history}. How fast does it drive now?",
                "Ego poses every 0.5 s, newest last: {history}. Give the present speed of the ego car in m/s.",
                "From these poses of the ego car at 2 Hz, {history}, what is its current speed?",
                "Work out the ego car's speed over the last half second from its poses: {history}.",
            ),
            _ego_speed,
            tolerance=SPEED_TOLERANCE_MPS,
        ),
        Question(
            "lead_vehicle_distance",
            True,
            (
                "How far ahead is the vehicle in our lane? Answer near (< 10 m), medium (10 to 25 m), far, or none.",
                "Is a vehicle ahead of us in our lane, and how far away: near (< 10 m), medium (< 25 m), far, or none?",
                "Judge the gap to the lead vehicle: near (under 10 m), medium (10 to 25 m), far (beyond), none.",
                "What is the distance to the car that we are following? near, medium, far or none, with metres.",
            ),
            _lead_distance,
            ("near", "medium", "far", "none"),
        ),
        Question(
            "lead_vehicle_speed",
            False,
            (
                "The ego car drives {ego} m/s. The gap to the vehicle ahead was {before} m half a second ago and is "
                "{now} m now. How fast does that vehicle drive?",
                "Half a second ago the lead vehicle was {before} m ahead, now it is {now} m; our speed is {ego} m/s. "
                "Give its speed.",
                "Gap to the lead vehicle: {before} m, then {now} m after 0.5 s, at an ego speed of {ego} m/s. Speed of "
                "the lead vehicle?",
            ),
            _lead_speed,
            tolerance=SPEED_TOLERANCE_MPS,
        ),
        Question(
            "lead_vehicle_braking",
            True,
            (
                "Are the brake lights of the vehicle ahead on? Answer yes or no.",
                "Is the lead vehicle braking? yes or no.",
                "Look at the car in front of us: does it brake? yes or no.",
            ),
            _lead_braking,
            ("yes", "no"),
        ),
        Question(
            "traffic_light",
            True,
            (
                "What does the traffic light ahead show? Answer red, green or none.",
                "Which colour is the traffic light for our lane: red, green, or none if there is no light?",
                "State of the traffic signal in front of us? red, green or none.",
                "Is there a traffic light ahead, and what does it show: red, green or none?",
            ),
            _word("light", {"red": "red", "green": "green", "none": "none"}),
            ("red", "green", "none"),
        ),
        Question(
            "crossing_pedestrian",
            True,
            (
                "Is a pedestrian ahead of us on the road, beside the road, or is there none?",
                "Do we have to watch out for a person on foot: on the road, beside the road, or none?",
                "Where is the pedestrian ahead that may cross: on the road, beside the road, or none?",
            ),
            _word("pedestrian", {"road": "on the road", "beside": "beside the road", "none": "none"}),
            ("on the road", "beside the road", "none"),
        ),
        Question(
            "lane_left",
            True,
            (
                "What is on the left of our lane: a lane in the same direction, oncoming traffic, or none?",
                "Drivable space to our left? Answer same direction, oncoming or none.",
                "Which kind of lane lies to the left of the ego car: same direction, oncoming, none?",
            ),
            _word("left", _LANE),
            tuple(_LANE.values()),
        ),
        Question(
            "lane_right",
            True,
            (
                "What is on the right of our lane: a lane in the same direction, oncoming traffic, or none?",
                "Drivable space to our right? Answer same direction, oncoming or none.",
                "Which kind of lane lies to the right of the ego car: same direction, oncoming, none?",
            ),
            _word("right", _LANE),
            tuple(_LANE.values()),
        ),
        Question(
            "navigation_command",
            False,
            (
                "The navigation says [{command}]. Which way do we go: left, straight or right?",
                "Navigation command: [{command}]. In one word, left, straight or right?",
                "Where does the route lead, given the instruction [{command}]? left, straight or right.",
            ),
            _command,
            ("left", "straight", "right"),
        ),
        Question(
            "meta_action",
            True,
            (
                "Ego poses at 2 Hz: {history}. Navigation command: [{command}]. What should the ego car do over the "
                f"next {{horizon}} s? Name a speed action ({_SPEEDS}) and a path action ({_PATHS}).",
                "Given the picture, the poses {history} and the command [{command}], what to do for {horizon} s: "
                f"{_SPEEDS}; and {_PATHS}.",
            ),
            _meta_action,
            PAIRS,
            decides=True,
        ),
        Question(
            "decision",
            True,
            (
                "Speed {speed} m/s. Navigation: {navigation}. Decide for the next {horizon} s: a speed of "
                f"{_SPEEDS} and a path of {_PATHS}. Say why, then answer in the form "
                "<think>...</think><answer>SPEED, PATH</answer>.",
            ),
            _decision,
            PAIRS,
            decides=True,
            standard=False,
        ),
        Question(
            "decision_trajectory",
            True,
            (
                "Ego poses at 2 Hz: {history}. Navigation: {navigation}. Decide for the next {horizon} s: a speed of "
                f"{_SPEEDS} and a path of {_PATHS}; then plan 8 poses, 0.5 s apart. Say why, then answer in the form "
                "<think>...</think><answer>SPEED, PATH [PT, (x, y, heading), ...]</answer>.",
            ),
            _decision_trajectory,
            PAIRS,
            decides=True,
            standard=False,
        ),
        Question(
            "road_users",
            True,
            (
                "Which vehicles, pedestrians and bicycles are in view? Nearest first, at most four, with their places "
                "(metres ahead, metres to the left), or none.",
                "List the nearest road users in view, at most four: kind (metres ahead, metres left), or none.",
            ),
            _road_users,
            standard=False,
        ),
        Question("trajectory", True, (), _trajectory, tolerance=TRAJECTORY_TOLERANCE_M),
    )
}
STANDARD_TYPES = tuple(name for name, question in QUESTIONS.items() if question.standard)
