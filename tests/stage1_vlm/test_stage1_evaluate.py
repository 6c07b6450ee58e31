"""Accuracy by type, the most-frequent-answer baseline and the picture swap, with models whose skill is known."""

import json

import numpy as np
import pytest
import torch

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError
from navsim_ext.prompts import format_trajectory
from navsim_ext.runtime import preflight as runtime_preflight
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.preflight import PreflightError
from navsim_ext.scene import collate_scenes
from stage1_vlm import evaluate as evaluation
from stage1_vlm.evaluate import evaluate, majority_answers, normalised, read_questions, swapped
from stage1_vlm.loading import load_backbone
from stage1_vlm.text_planner import VlmText


@pytest.fixture(scope="module")
def seen(tmp_path_factory, make_picture):
    """24 scenes of 8 logs, each with two questions; the light's colour is the picture's brightness."""
    folder = tmp_path_factory.mktemp("seen")
    with open(folder / "q.jsonl", "w") as stream:
        for i in range(24):
            light = ("red", "green", "none")[i % 3]
            path = folder / f"log{i // 3}" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            base = make_picture(0).point(lambda value, light=light: {"red": 20, "green": 120, "none": 230}[light])
            base.save(path)
            for kind, question, answer in (
                ("traffic_light", "What does the light show?", light),
                ("parity", f"Is {i} even?", "No." if i % 2 else "Yes."),
            ):
                record = {
                    "image": f"log{i // 3}/{i}.png", "scene_id": str(i), "type": kind, "answer": answer,
                    "image_dependent": kind == "traffic_light",
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}
                    ],
                }  # fmt: skip
                stream.write(json.dumps(record) + "\n")
    (folder / "m.json").write_text(json.dumps({"seen": {"root": ".", "annotation": "q.jsonl"}}))
    return folder / "m.json"


def config(model, mixture, folder, **changes):
    values = {"model_path": model, "mixture": mixture, "output_dir": folder, "dtype": "float32", "max_image_tokens": 16}
    return compose("stage1_eval", [f"{key}={value}" for key, value in (values | changes).items()])


class Watcher:
    """Answers from the mean brightness of the picture, in words."""

    def __init__(self, backbone):
        self.processor, self.model, self.cache_bytes = backbone.processor, backbone.model, backbone.cache_bytes

    def answer(self, examples, max_new_tokens):
        words = []
        for example in examples:
            brightness = float(example.pixels["pixel_values"].mean())
            asked = self.processor.tokenizer.decode(example.input_ids)
            light = "red" if brightness < -1 else "green" if brightness < 0.9 else "none"
            words.append(f"It shows {light}." if "light show" in asked else "yes")
        return words


def test_a_model_that_looks_beats_the_baseline_and_the_swap_takes_it_away(seen, tiny_internvl, tmp_path, monkeypatch):
    watcher = Watcher(load_backbone(tiny_internvl, max_image_tokens=16))
    monkeypatch.setattr(evaluation, "load_backbone", lambda *_, **__: watcher)
    result = evaluate(config(tiny_internvl, seen, tmp_path))
    look = result["image-dependent"]
    assert (look["accuracy"].mean, look["accuracy"].count, look["accuracy"].logs) == (1.0, 24, 8)
    assert look["majority"].mean == pytest.approx(1 / 3)
    assert look["gain"].mean == pytest.approx(2 / 3)
    assert look["swapped"].mean < 0.6
    assert result["parity"]["accuracy"].mean == result["parity"]["swapped"].mean == 0.5
    assert result["parity"]["gain"].mean == 0.0
    assert json.loads((tmp_path / "accuracy.json").read_text())["all"]["accuracy"]["count"] == 48
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sum(line["correct"] for line in lines) == 24 + 12


def test_swapping_gives_every_question_another_scenes_picture(seen, internvl, tmp_path):
    asked = read_questions(config("x", seen, tmp_path), internvl)
    others = swapped(asked, seed=0)
    assert all(a.record["image"] != b.record["image"] for a, b in zip(asked, others))
    assert all(a.record["conversations"] == b.record["conversations"] for a, b in zip(asked, others))
    assert sorted(a.record["image"] for a in asked) == sorted(b.record["image"] for b in others)
    assert majority_answers(asked)["parity"] == "Yes."
    assert normalised(" Yes. ") == "yes"
    with pytest.raises(DataError, match="no question of types"):
        read_questions(config("x", seen, tmp_path, types="[weather]"), internvl)


def test_a_real_tiny_model_is_asked_in_batches(seen, tiny_internvl, tmp_path):
    result = evaluate(config(tiny_internvl, seen, tmp_path, limit=6, batch_size=4, max_new_tokens=3))
    assert result["all"]["accuracy"].count == 6


def test_cost_is_said_before_the_questions_are_asked(seen, tiny_internvl, tmp_path, monkeypatch):
    told = {}
    real = evaluation.preflight
    monkeypatch.setattr(evaluation, "preflight", lambda **given: (told.update(given), real(**given)))
    evaluate(config(tiny_internvl, seen, tmp_path, batch_size=16, max_new_tokens=2))
    loaded = load_backbone(tiny_internvl, max_image_tokens=16)
    lengths = [one.tokens for one in read_questions(config("x", seen, tmp_path, max_image_tokens=16), loaded)]
    assert told["items"] == 2 * 48
    assert len(told["files"]) == 24
    assert f"{sum(lengths):,} tokens" in told["title"]
    assert told["memory_bytes"] == 16 * (max(lengths) + 2) * loaded.cache_bytes()
    assert (tmp_path / "answers.jsonl").stat().st_size <= 2 * 48 * told["bytes_per_item"]
    assert told["seconds_per_item"] > 0
    monkeypatch.setattr(runtime_preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(PreflightError, match="make room"):
        evaluate(config(tiny_internvl, seen, tmp_path / "full"))
    assert not (tmp_path / "full" / "answers.jsonl").exists()


def test_a_question_that_cannot_be_asked_is_listed(seen, internvl, tmp_path):
    lines = [json.loads(line) for line in (seen.parent / "q.jsonl").read_text().splitlines()]
    lines[5]["image"] = "log0/absent.png"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"root": str(seen.parent), "annotation": "q.jsonl"}
    (tmp_path / "m.json").write_text(json.dumps({"seen": entry}))
    assert len(read_questions(config("x", tmp_path / "m.json", tmp_path), internvl)) == 47
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in skipped] == [(6, "missing picture")]


def test_text_planner_drives_by_what_it_says_and_counts_what_it_does_not(
    tiny_internvl, scene_index, tmp_path, monkeypatch
):
    planner = VlmText(
        str(tiny_internvl), str(scene_index), dtype="float32", max_image_tokens=16, max_new_tokens=4, batch_size=2,
        answers=str(tmp_path / "answers.jsonl"),
    )  # fmt: skip
    dataset = SceneDataset(scene_index)
    batch = collate_scenes([dataset[i] for i in range(3)])
    poses = planner.plan(batch)  # random weights: no words that mean anything
    assert poses.shape == (3, 8, 3)
    assert torch.isnan(poses).all()
    assert planner.failure_rate == 1.0
    plan = np.stack([np.arange(1.0, 9.0), np.zeros(8), np.zeros(8)], axis=1)
    said = iter([[format_trajectory(plan), "**PT** = " + format_trajectory(plan)[4:120]], ["I would rather walk."]])
    monkeypatch.setattr(planner._encoder.backbone, "answer", lambda *_: next(said))
    poses = planner.plan(batch)
    np.testing.assert_allclose(poses[0], plan)
    assert torch.isfinite(poses[:2]).all()
    assert torch.isnan(poses[2]).all()
    assert planner.failure_rate == pytest.approx(4 / 6)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["valid"] for line in lines] == [False] * 3 + [True, True, False]
    assert lines[4]["repairs"] == ["truncated"]
    assert lines[5]["token"] == batch.token[2]
    assert planner.fingerprint.parents["vlm"].fields["prompt"]
