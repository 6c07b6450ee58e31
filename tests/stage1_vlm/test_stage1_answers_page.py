"""The page of answers: what it shows is what the two evaluations hold, evenly chosen, and safe to open."""

from __future__ import annotations

import json

import pytest

from navsim_ext.errors import CorruptFile, DataError, MissingError
from stage1_vlm.answers_page import KINDS, spread, write_page


@pytest.fixture
def world(tmp_path, make_picture):
    """Six decisions; before: 0 and 1 right, after: 1 and 2."""
    records = []
    for i in range(6):
        make_picture(i).save(tmp_path / f"{i}.png")
        records.append({
            "image": f"{i}.png", "type": "decision", "scene_id": f"s{i}", "answer": "KEEP, STRAIGHT",
            "conversations": [{"from": "human", "value": f"<image>\nQuestion <b>{i}</b>"},
                              {"from": "gpt", "value": "x"}],
        })  # fmt: skip
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "m.json").write_text(json.dumps({"q": {"root": ".", "annotation": "q.jsonl"}}))
    accuracy = {"mean": 1 / 3, "low": 0.1, "high": 0.6, "count": 6, "logs": 3}
    words = {"decisions": {"planning_accuracy": accuracy, "readable": 1.0, "well_formed": 0.5,
                           "f1": {"KEEP": {"f1": 0.5}, "STOP": {"f1": None}}}}  # fmt: skip
    for name, right in (("before", {0, 1}), ("after", {1, 2})):
        rows = [{"type": "decision", "scene_id": f"s{i}", "truth": "t", "correct": i in right,
                 "answer": f"<think>reason {i}</think><answer>{name} {i} <script></answer>"}
                for i in range(6)]  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / name / "words.json").write_text(json.dumps(words))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rewards.csv").write_text("step,rollout,reward,accuracy\n0,0,1.0,0.5\n1,1,2.0,0.6\n")
    return tmp_path


def page(world, **changes) -> str:
    options = {"recorder": world / "run", "count": 4} | changes
    return write_page(world / "before", world / "after", world / "m.json", world / "page", **options).read_text()


def test_each_kind_is_counted_and_shown_in_turn(world):
    text = page(world)
    for words in ("1 became right", "1 became wrong", "1 stayed right", "3 stayed wrong", "of 6 questions"):
        assert words in text
    assert text.count("data:image/jpeg") == 4
    assert text.count("data:image/svg+xml") == 1
    for number in (0, 1, 2, 3):
        assert f"before {number} " in text
        assert f"reason {number}" in text
    assert "33.3 [10.0, 60.0]" in text
    assert "F1 of STOP" in text


def test_words_of_a_model_are_text_not_code(world):
    text = page(world)
    assert "<script>" not in text
    assert "<b>1</b>" not in text


def test_without_a_run_there_are_no_curves(world):
    assert "svg" not in page(world, recorder=None)


def test_spreading_is_even():
    by_kind = {kind: [f"{kind} {i}" for i in range(3)] for kind in KINDS}
    by_kind["became wrong"] = []
    assert spread(by_kind, 4) == ["became right 0", "stayed right 0", "stayed wrong 0", "became right 1"]


def test_what_does_not_belong_together_is_refused(world):
    with pytest.raises(MissingError):
        write_page(world / "absent", world / "after", world / "m.json", world, recorder=None, count=1)
    lines = (world / "after" / "answers.jsonl").read_text().splitlines(keepends=True)
    (world / "after" / "answers.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(DataError, match="same mixture"):
        page(world)
    (world / "after" / "answers.jsonl").write_text("{")
    with pytest.raises(CorruptFile, match="line 1"):
        page(world)
