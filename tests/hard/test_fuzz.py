"""Files of every kind that a reader takes, with one thing wrong: it is a named error, or is read with a meaning.

A few cases of each run always; ``python -m pytest tests/hard/test_fuzz.py -m slow`` runs thousands, seeded. What is
read must hold what everything after relies on: scenes validate, poses are finite, pictures stay below their folder.
"""

from __future__ import annotations

import json
import logging
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scene_worlds
import yaml
from test_readers_scenarionet import waymo_scenario
from wrong_values import with_one_wrong

from navsim_ext.devkit import submission
from navsim_ext.devkit.submission import Trajectory, check_submission
from navsim_ext.errors import TriviumError
from navsim_ext.evaluation.score_file import read_trajectories
from navsim_ext.files import inside
from navsim_ext.readers.navsim_logs import NavsimLogs
from navsim_ext.readers.scenarionet import ScenarioNetScenes
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.scene import Scene
from stage1_vlm.backbone import load_processor
from stage1_vlm.data.drivelm import convert_drivelm
from stage1_vlm.data.line_index import LineRules, build_index
from stage1_vlm.data.mixture import DatasetEntry, read_mixture
from stage1_vlm.data.questions import DrivingQuestions
from stage1_vlm.tiny import build_tiny_internvl

FEW, MANY = 12, 450  # cases of each reader
LONGEST_MESSAGE = 4000  # characters
READERS: dict[str, Callable[[Path], Any]] = {}


class Reader:
    """What one fuzz case needs: right content, whether numpy's values may stand in it, a way to write and read it."""

    def __init__(self, content: Any, write: Callable[[Path, Any], Path], read: Callable[[Path], object], *,
                 arrays: bool = False) -> None:  # fmt: skip
        self.content, self.write, self.read, self.arrays = content, write, read, arrays


def reader(make: Callable[[Path], Reader]) -> Callable[[Path], Reader]:
    READERS[make.__name__] = make
    return make


def pickled(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def json_text(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, default=str))
    return path


def check_scenes(scenes: list[Scene]) -> None:
    for scene in scenes:
        scene.validate()
        assert all(type(block) is str for block in scene.roadblock_ids)
        for camera in scene.cameras.values():
            inside(camera.path, "camera")
        assert np.isfinite(scene.status()).all()


@reader
def navsim(folder: Path) -> Reader:
    frames = [scene_worlds.make_frame(index) for index in range(5)]

    def read(path: Path) -> None:
        source = NavsimLogs(folder, "mini", scene_filter=SceneFilter(num_future=1))
        check_scenes(source.scenes_of(path.stem))

    return Reader(
        frames, lambda path, content: pickled(folder / "navsim_logs/mini/log-a.pkl", content), read, arrays=True
    )


@reader
def scenarionet(folder: Path) -> Reader:
    scenario = waymo_scenario()

    def read(path: Path) -> None:
        source = ScenarioNetScenes(folder / "sn")
        scenes = source.scenes_of(path.stem)
        check_scenes(scenes)
        for scene in scenes[:1]:
            source.map_for(scene)

    return Reader(scenario, lambda path, content: pickled(folder / "sn" / "scenario.pkl", content), read, arrays=True)


@reader
def submissions(folder: Path) -> Reader:
    poses = np.cumsum(np.ones((8, 3), dtype=np.float32), axis=0)
    content = {
        **dict.fromkeys(submission.TEAM_FIELDS, "team"),
        "first_stage_predictions": [
            {f"{number:016x}": {"poses": poses, "sampling": [8, 4.0, 0.5]} for number in range(2)}
        ],
        "second_stage_predictions": [{}],
    }

    def write(path: Path, content: Any) -> Path:
        with submission._original_names():
            return pickled(path, _with_trajectories(content))

    return Reader(content, write, check_submission, arrays=True)


def _with_trajectories(content: Any) -> Any:
    """Dictionaries of poses and sampling turned into NAVSIM's objects, however wrong they are inside."""
    if isinstance(content, dict) and set(content) & {"poses", "sampling"}:
        made = Trajectory.__new__(Trajectory)
        made.__dict__.update({name: value for name, value in content.items() if isinstance(name, str) and name})
        sampling = content.get("sampling")
        if isinstance(sampling, list) and len(sampling) == 3:
            made.trajectory_sampling = submission.TrajectorySampling()
            keys = ("num_poses", "time_horizon", "interval_length")
            made.trajectory_sampling.__dict__.update(zip(keys, sampling))
        elif "sampling" in content:
            made.trajectory_sampling = sampling
        return made
    if isinstance(content, dict):
        return {key: _with_trajectories(value) for key, value in content.items()}
    return [_with_trajectories(value) for value in content] if isinstance(content, list) else content


@reader
def drivelm(folder: Path) -> Reader:
    questions = {
        "planning": [{"Q": "Is <c1,CAM_BACK,1.0,2.0> near?", "A": "No."}],
        "behavior": [{"Q": "What?", "A": "Go."}],
    }
    frame = {"QA": questions, "image_paths": {"CAM_FRONT": "a.jpg", "CAM_BACK": "b.jpg"}, "key_object_infos": {}}
    content = {"scene": {"scene_description": "", "key_frames": {"frame": frame}}}
    return Reader(content, json_text, lambda path: convert_drivelm(path, folder / "out"))


@reader
def mixture(folder: Path) -> Reader:
    entry = {"root": ".", "annotation": "a.jsonl", "repeat_time": 0.5, "data_augment": False, "length": 3}
    return Reader({"one": entry, "two": {"root": ".", "annotation": "b.jsonl"}}, json_text, read_mixture)


@reader
def question_records(folder: Path) -> Reader:
    from PIL import Image

    Image.new("RGB", (64, 32), (200, 30, 30)).save(folder / "a.jpg")
    build_tiny_internvl(folder / "vlm", ["What is it? red <image>"], seed=0)
    processor = load_processor(folder / "vlm", max_image_tokens=16)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    record = {"id": 1, "image": "a.jpg", "image_size": [64, 32], "conversations": turns}
    plain = {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]}

    def read(path: Path) -> None:
        entry = DatasetEntry("toy", path, folder)
        index = build_index(entry, processor, LineRules(900), max_skipped_share=0.9)
        questions = DrivingQuestions([index], processor)
        assert all(len(questions[i]) == questions.lengths[i] for i in range(len(questions)))

    def write(path: Path, content: Any) -> Path:
        lines = content if isinstance(content, list) else [content]
        path.write_text("".join(json.dumps(line, default=str) + "\n" for line in [*lines, plain]))
        return path

    return Reader([record], write, read)


@reader
def scene_filter(folder: Path) -> Reader:
    content = {
        "_target_": "x", "_convert_": "all", "num_history_frames": 4, "num_future_frames": 10, "frame_interval": 1,
        "has_route": True, "max_scenes": None, "log_names": ["log-a"], "tokens": ["0123456789abcdef"],
    }  # fmt: skip

    def write(path: Path, content: Any) -> Path:
        path.write_text(yaml.safe_dump(json.loads(json.dumps(content, default=str))))
        return path

    def read(path: Path) -> None:
        found = SceneFilter.from_yaml(path)
        assert found.stride >= 1
        assert found.num_frames >= 1
        json.dumps(found.describe())

    return Reader(content, write, read)


@reader
def trajectories(folder: Path) -> Reader:
    content = {"token": ["a" * 16, "b" * 16], "name": ["human", "human"], "poses": [[0.5] * 24, [1.5] * 24]}

    def write(path: Path, content: Any) -> Path:
        try:
            table = pa.table({str(name): pa.array(values) for name, values in content.items()})
        except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            pd.DataFrame({"token": [str(content)]}).to_parquet(path)  # no table can hold it
            return path
        pq.write_table(table, path)
        return path

    def read(path: Path) -> None:
        found = read_trajectories(path)
        assert found.poses.shape[1:] == (8, 3)
        assert len(found.tokens) == len(found.names) == len(found.poses)

    return Reader(content, write, read)


def fuzz(name: str, folder: Path, cases: int, seed: int) -> list[str]:
    """What went wrong in ``cases`` cases."""
    case = READERS[name](folder)
    path = case.write(folder / "file", case.content)
    case.read(path)  # the right content is read
    raw, named = [], 0
    for number in range(cases):
        generator = random.Random(f"{name} {seed} {number}")
        content, change = with_one_wrong(case.content, generator, arrays=case.arrays)
        path = case.write(folder / "file", content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.read(path)
        except TriviumError as error:
            named += 1
            if len(str(error)) > LONGEST_MESSAGE:
                raw.append(f"case {number}: {change}: a message of {len(str(error))} characters")
        except Exception as error:  # noqa: BLE001  (the verdict is made of what came through)
            raw.append(f"case {number}: {change}: {type(error).__name__}: {error!s:.200}")
    skips = name == "question_records"  # wrong ones are left out and counted, which is no error
    assert skips or named > cases // 5, f"only {named} of {cases} wrong contents of {name} were refused"
    return raw


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("name", READERS)
def test_a_few_wrong_values(name, tmp_path):
    raw = fuzz(name, tmp_path, FEW, seed=0)
    assert not raw, "\n".join(raw)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_wrong_values(name, tmp_path):
    raw = fuzz(name, tmp_path, MANY, seed=1)
    assert not raw, f"{len(raw)} of {MANY} raw:\n" + "\n".join(raw[:60])
