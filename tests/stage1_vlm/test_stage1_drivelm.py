"""DriveLM: its form in a fixture of our own, and training on the real photographs when the reference data is there."""

import json

import pytest

from navsim_ext.errors import DataError, MissingError
from navsim_ext.runtime.config import compose
from stage1_vlm.data.drivelm import convert_drivelm
from stage1_vlm.data.line_index import LineRules, build_index
from stage1_vlm.data.mixture import read_mixture
from stage1_vlm.loading import load_processor
from stage1_vlm.train import train

VIEWS = ("CAM_FRONT", "CAM_BACK", "CAM_FRONT_LEFT")


@pytest.fixture
def small(tmp_path, make_picture):
    for number, view in enumerate(VIEWS):
        make_picture(number).save(tmp_path / f"{view}.jpg")
    questions = {
        "perception": [{"Q": "What is ahead?", "A": "A car."}, {"Q": "Is <c1,CAM_BACK,10.0,20.0> moving?", "A": "No."}],
        "planning": [{"Q": "Relate <c1,CAM_BACK,1.0,2.0> to <c2,CAM_FRONT_LEFT,3.0,4.0>.", "A": "None."}],
        "behavior": [{"Q": "What next?", "A": None}],
    }
    frame = {"QA": questions, "image_paths": {view: f"{view}.jpg" for view in VIEWS}}
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"scene": {"scene_description": "", "key_frames": {"frame": frame}}}))
    return path


def test_each_question_gets_the_views_that_it_names(small, tiny_internvl, tmp_path):
    assert convert_drivelm(small, tmp_path / "out") == {"perception": 2, "planning": 1, "behavior": 1}
    processor = load_processor(tiny_internvl, max_image_tokens=16)
    (entry,) = read_mixture(tmp_path / "out" / "mixture.json")
    index = build_index(entry, processor, LineRules(500), max_skipped_share=0.3)
    assert [index.record(i)["image"] for i in range(3)] == [
        ["CAM_FRONT.jpg"], ["CAM_BACK.jpg"], ["CAM_BACK.jpg", "CAM_FRONT_LEFT.jpg"],
    ]  # fmt: skip
    assert [(line.line, line.reason) for line in index.skipped] == [(4, "empty answer")]
    assert index.record(2)["conversations"][0]["value"].startswith("CAM_BACK: <image>\nCAM_FRONT_LEFT: <image>\nRelate")
    convert_drivelm(small, tmp_path / "all", cameras="all")
    assert (tmp_path / "all" / "drivelm.jsonl").read_text().count("CAM_FRONT_LEFT.jpg") == 4


@pytest.mark.parametrize(
    "content",
    [
        [], {}, [{"id": 1, "image": "a.jpg", "conversations": []}], {"scene": []}, {"scene": {"key_frames": None}},
        {"scene": {"key_frames": {"frame": {"QA": {}}}}},
        {"scene": {"key_frames": {"frame": {"QA": [], "image_paths": {}}}}},
        {"scene": {"key_frames": {"frame": {"QA": {"planning": {}}, "image_paths": {}}}}},
        {"scene": {"key_frames": {"frame": {"QA": {"planning": [{"question": "?"}]}, "image_paths": {}}}}},
        {"scene": {"key_frames": {"frame": {"QA": {"planning": [{"Q": 3}]}, "image_paths": {"CAM_FRONT": "a"}}}}},
        {"scene": {"key_frames": {"frame": {"QA": {"planning": [{"Q": "?"}]}, "image_paths": {"CAM_BACK": "a"}}}}},
        {"scene": {"key_frames": {"frame": {"QA": {"planning": [{"Q": "?"}]}, "image_paths": {"CAM_FRONT": 3}}}}},
    ],
)  # fmt: skip
def test_another_form_is_named_and_nothing_is_left(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"train\.json.*DriveLM's form"):
        convert_drivelm(path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_mistakes_are_named(small, tmp_path):
    with pytest.raises(MissingError, match="DriveLM's JSON"):
        convert_drivelm(tmp_path / "no.json", tmp_path)
    with pytest.raises(DataError, match="named or all"):
        convert_drivelm(small, tmp_path, cameras="some")


def test_real_questions_and_photographs_train(reference, tiny_internvl, tmp_path):
    counts = convert_drivelm(reference("real/drivelm/train_sample.json"), tmp_path)
    assert sum(counts.values()) == 530
    overrides = {
        "trainer": "cpu", "strategy": "single", "model_path": tiny_internvl, "output_dir": tmp_path / "run",
        "data.mixture": tmp_path / "mixture.json", "data.batch_size": 8, "global_batch_size": 8,
        "data.max_sequence_length": 3000, "data.max_image_tokens": 8, "data.num_workers": 0, "data.index_workers": 0,
        "module.learning_rate": 3e-3, "module.drop_path": 0.0, "trainer.max_steps": 24, "callbacks.progress": "null",
    }  # fmt: skip
    metrics = train(compose("stage1", [f"{key}={value}" for key, value in overrides.items()]))
    assert metrics["data"]["datasets"]["DriveLM"]["lines"] == 530
    assert metrics["data"]["datasets"]["DriveLM"]["skipped"] == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
