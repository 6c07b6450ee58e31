"""Figures of words, by hand: F1 by class, accuracy, confusion, agreement, choices; nothing outside <answer>."""

from __future__ import annotations

import json

import numpy as np
import pytest

from navsim_ext.prompts import format_trajectory
from navsim_ext.questions.catalogue import with_reasoning
from navsim_ext.questions.meta_actions import Decision, LaneAhead
from navsim_ext.runtime.config import compose
from stage1_vlm.evaluate import evaluate
from stage1_vlm.qa_engine.answer_judge import judge_answers
from stage1_vlm.qa_engine.client import ChatClient, NoUsableAnswer, ServerSettings
from stage1_vlm.words_report import (
    NO_TRAJECTORY,
    UNREADABLE,
    Decided,
    choice_letter,
    choices_report,
    decision_report,
    language_report,
    reasoning_pairs,
)

ROAD = LaneAhead(np.array([[0.0, 0.0], [90.0, 0.0]]), np.zeros(2, bool), True)
CRUISE = format_trajectory(np.stack([np.arange(1, 9) * 4.0, np.zeros(8), np.zeros(8)], axis=1))


def row(true: str, answer: str, log="log", think="KEEP, STRAIGHT", **more) -> Decided:
    return Decided(Decision.parse(true), with_reasoning(think, answer), log, **more)


ROWS = [
    row("KEEP, STRAIGHT", "KEEP, STRAIGHT", "a"),
    row("KEEP, STRAIGHT", "STOP, STRAIGHT", "a"),
    row("STOP, LEFT_TURN", "KEEP, STRAIGHT", "b"),
    row("STOP, STRAIGHT", "STOP, STRAIGHT", "b"),
    row("KEEP, STRAIGHT", "KEEP, STOP, STRAIGHT", "c"),  # names two speeds
    row("KEEP, STRAIGHT", "drive on", "c"),
]


def test_decisions_by_hand():
    report = decision_report(ROWS)
    assert report["questions"] == 6
    assert report["planning_accuracy"]["mean"] == pytest.approx(2 / 6)
    assert report["planning_accuracy"]["logs"] == 3
    f1 = report["f1"]
    assert f1["KEEP"] == {"f1": pytest.approx(2 * 2 / (4 + 3)), "driven": 4, "named": 3}
    assert f1["STOP"] == {"f1": pytest.approx(2 * 1 / (2 + 3)), "driven": 2, "named": 3}
    assert f1["STRAIGHT"]["f1"] == pytest.approx(2 * 4 / (5 + 5))
    assert f1["LEFT_TURN"] == {"f1": 0.0, "driven": 1, "named": 0}
    assert f1["RIGHT_CHANGE"] == {"f1": None, "driven": 0, "named": 0}  # never occurs: no figure, not 0
    assert report["pairs"]["KEEP, STRAIGHT"] == {"questions": 4, "accuracy": 0.25}
    assert "ACCELERATE, STRAIGHT" not in report["pairs"]
    assert report["readable"] == pytest.approx(4 / 6)
    assert report["confusion"]["speed"]["KEEP"] == {"KEEP": 1, "STOP": 1, UNREADABLE: 2}
    assert report["confusion"]["path"]["LEFT_TURN"] == {"STRAIGHT": 1}
    assert report["well_formed"] == 1.0
    json.dumps(report, allow_nan=False)


def test_words_in_the_reasoning_count_nowhere():
    report = decision_report([row("KEEP, STRAIGHT", "STOP, LEFT_TURN", think="KEEP, STRAIGHT")])
    assert report["planning_accuracy"]["mean"] == 0.0
    assert report["f1"]["KEEP"] == {"f1": 0.0, "driven": 1, "named": 0}
    cut = decision_report([Decided(Decision.parse("KEEP, STRAIGHT"), "<think>KEEP, STRAIGHT", "log")])
    assert cut["faults"] == {"not closed": 1}
    assert cut["readable"] == 0.0


def test_agreement_by_hand():
    known = {"speed_mps": 8.0, "road": ROAD}
    report = decision_report([
        row("KEEP, STRAIGHT", f"KEEP, STRAIGHT {CRUISE}", **known),
        row("KEEP, STRAIGHT", f"STOP, STRAIGHT {CRUISE}", **known),
        row("KEEP, STRAIGHT", "STOP, STRAIGHT [PT, broken", **known),
        row("KEEP, STRAIGHT", "KEEP, STRAIGHT", **known),  # no trajectory was written: no agreement is asked for
    ])  # fmt: skip
    assert report["agreement"]["mean"] == pytest.approx(1 / 3)
    assert report["agreement_confusion"] == {
        "KEEP, STRAIGHT": {"KEEP, STRAIGHT": 1}, "STOP, STRAIGHT": {"KEEP, STRAIGHT": 1, NO_TRAJECTORY: 1},
    }  # fmt: skip
    assert report["planning_accuracy"]["mean"] == pytest.approx(2 / 4)


def test_reasons_are_compared_with_reasons():
    truths = [with_reasoning("The light is red, so we stop.", "STOP, STRAIGHT"), "<answer>KEEP, STRAIGHT</answer>"]
    texts = [with_reasoning("The light is red, so we stop.", "KEEP, STRAIGHT"), "anything"]
    candidates, references = reasoning_pairs(truths, texts)
    assert candidates == ["The light is red, so we stop."]
    assert language_report(candidates, references, meteor=False)["bleu_4"] == pytest.approx(1.0)
    silent, known = reasoning_pairs(truths[:1], ["STOP, STRAIGHT"])
    report = language_report(silent, known, meteor=False)
    assert report["rouge_l"] == 0.0
    assert "not asked for" in report["meteor_1_5"]


def test_absent_meteor_is_named(monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "METEOR 1.5 needs" in language_report(["a"], [["a"]], meteor=True)["meteor_1_5"]


@pytest.mark.parametrize(("text", "letter"), [
    ("B", "B"), ("(b)", "B"), ("B. the bus", "B"), ("c) a car", "C"), ("B - bus", "B"), ("A car", None),
    ("because", None), ("", None), (None, None), ("Z", None),
])  # fmt: skip
def test_choice_letters(text, letter):
    assert choice_letter(text) == letter


def test_choices_by_hand():
    texts = ["a. YES", "<think>A</think><answer>b</answer>", "yes"]
    report = choices_report(["A. yes", "B. no", "C"], texts, ["x"] * 3)
    assert report["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert report["match"]["mean"] == pytest.approx(1 / 3)
    assert report["unreadable"] == pytest.approx(1 / 3)


def test_one_command_tells_all_of_it(tiny_internvl, tmp_path, make_picture, monkeypatch):
    make_picture(0).save(tmp_path / "0.png")
    shared = {"image": "0.png", "image_dependent": True}
    records = [
        shared | {"type": "decision", "answer": "KEEP, STRAIGHT", "scene_id": f"s{i}", "conversations": [
            {"from": "human", "value": f"<image>\nSpeed {i}. Decide."},
            {"from": "gpt", "value": with_reasoning("The road is free.", "KEEP, STRAIGHT")}]}
        for i in range(3)
    ]  # fmt: skip
    records += [
        shared | {"type": "lingoqa", "references": ["A car.", "One car."], "conversations": [
            {"from": "human", "value": "<image>\nWhat is ahead?"}, {"from": "gpt", "value": "A car."}]},
        shared | {"type": "perception", "conversations": [
            {"from": "human", "value": "<image>\nA or B?"}, {"from": "gpt", "value": "B. the bus"}]},
    ]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "m.json").write_text(json.dumps({"q": {"root": ".", "annotation": "q.jsonl"}}))
    asked = []

    async def complete(self, messages, parse, *, temperature=None):
        asked.append(messages[0]["content"][-1]["text"])
        return parse('{"score": 8, "reason": "near"}')

    monkeypatch.setattr(ChatClient, "complete", complete)
    evaluate(compose("stage1_eval", [
        f"model_path={tiny_internvl}", f"mixture={tmp_path / 'm.json'}", f"output_dir={tmp_path / 'out'}",
        "dtype=float32", "max_image_tokens=16", "samples=2", "max_new_tokens=4", "swap_pictures=false", "batch_size=4",
        "judge.url=http://127.0.0.1:1/v1",
    ]))  # fmt: skip
    report = json.loads((tmp_path / "out" / "words.json").read_text())
    assert set(report) == {"decisions", "decisions_sampled", "reasoning", "choices", "free_answers", "judge"}
    assert report["decisions"]["questions"] == report["reasoning"]["texts"] == 3
    assert report["decisions_sampled"]["samples"] == 2
    assert report["judge"]["score"]["mean"] == 8.0
    assert "A car. | One car." in asked[0]


def test_answers_that_the_judge_cannot_score_are_counted(monkeypatch):
    async def complete(self, messages, parse, *, temperature=None):
        if "first" in messages[0]["content"][-1]["text"]:
            raise NoUsableAnswer("six tries")
        return parse('{"score": "3/10"}')

    monkeypatch.setattr(ChatClient, "complete", complete)
    scores = judge_answers([("first?", ["a"], "b"), ("second?", ["a"], "")], ServerSettings("http://x/v1", "m"))
    assert scores == [None, 3]
