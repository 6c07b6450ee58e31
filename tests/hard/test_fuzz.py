"""Files of every kind that a reader takes, with one thing wrong: it is a named error, or is read with a meaning.

A few cases of each run always; ``python -m pytest tests/hard/test_fuzz.py -m slow`` runs thousands, seeded. What is
read must hold what everything after relies on: scenes validate, poses are finite, pictures stay below their folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import lzma
import pickle
import random
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scene_worlds
import test_readers_nuscenes
import test_traffic_readers
import yaml
from golden_scenes import unpack_small
from navsim_pickles import LookAlikes, cache_of
from test_readers_scenarionet import waymo_scenario
from test_traffic_womd import whole_street
from wrong_values import with_one_wrong

from navsim_ext import pickles
from navsim_ext.devkit.cache_content import read_content
from navsim_ext.devkit.cache_pickle import read_cache
from navsim_ext.devkit.metric_cache_import import SharedPolygons, convert
from navsim_ext.errors import TriviumError
from navsim_ext.evaluation import submission_file
from navsim_ext.evaluation.score_file import read_trajectories
from navsim_ext.evaluation.submission_file import Trajectory, check_submission
from navsim_ext.files import inside
from navsim_ext.maps import nuplan_gpkg
from navsim_ext.maps.nuplan_gpkg import read_gpkg
from navsim_ext.pdm import observation
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pickles import Holder
from navsim_ext.pickles.writing import original_names
from navsim_ext.readers import NuScenes
from navsim_ext.readers.navsim_logs import NavsimLogs
from navsim_ext.readers.scenarionet import ScenarioNetScenes
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.second_stage import STAND_INS, read_scene
from navsim_ext.scene import Scene
from navsim_ext.traffic.gpudrive import GpuDriveJson
from navsim_ext.traffic.scenarionet import ScenarioNetTraffic
from navsim_ext.traffic.source import TrafficSource
from stage1_vlm.data.drivelm import convert_drivelm
from stage1_vlm.data.line_index import LineRules, build_index
from stage1_vlm.data.mixture import DatasetEntry, read_mixture
from stage1_vlm.data.questions import DrivingQuestions
from stage1_vlm.loading import load_processor
from stage1_vlm.tiny import build_tiny_internvl

GOLDEN = Path(__file__).parents[1] / "golden"
FEW, MANY = 12, 450  # cases of each reader
LONGEST_MESSAGE = 4000  # characters
READERS: dict[str, Callable[[Path], Any]] = {}


class Reader:
    """What one fuzz case needs: right content, whether numpy's values may stand in it, a way to write and read it."""

    def __init__(self, content: Any, write: Callable[[Path, Any], Path], read: Callable[[Path], object], *,
                 arrays: bool = False, share: float = 1.0, refused: float = 0.2) -> None:  # fmt: skip
        self.content, self.write, self.read, self.arrays = content, write, read, arrays
        self.share = share  # of the cases: slow to read, or full of like places
        self.refused = refused  # share of the cases that must be, at least; the rest is left out, dropped or not read


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
def nuscenes(folder: Path) -> Reader:
    """Tables of three windows; not every row is read."""

    def read(path: Path) -> None:
        source = NuScenes(path, "v1.0-mini", scene_filter=SceneFilter(num_future=8))
        check_scenes([source.scene(token) for token in source.tokens])

    return Reader(test_readers_nuscenes.tables(), write_tables, read, share=0.6, refused=0.1)


def write_tables(path: Path, content: Any) -> Path:
    (path / "v1.0-mini").mkdir(parents=True, exist_ok=True)
    for old in (path / "v1.0-mini").iterdir():
        old.unlink()
    for name, rows in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and name.isidentifier():
            json_text(path / "v1.0-mini" / f"{name}.json", rows)
    return path


def check_traffic(source: TrafficSource) -> None:
    for unit in source.units():
        for _, found in source.read(unit):
            if isinstance(found, Exception):
                raise found
            found.validate()


@reader
def gpudrive(folder: Path) -> Reader:
    """Most values are points of lanes and tracks."""
    content = test_traffic_readers.gpudrive(whole_street())
    return Reader(content, lambda path, content: json_text(path.with_suffix(".json"), content),
                  lambda path: check_traffic(GpuDriveJson(str(folder))), refused=0.1)  # fmt: skip


@reader
def scenarionet_traffic(folder: Path) -> Reader:
    return Reader(
        waymo_scenario(), lambda path, content: pickled(folder / "sn" / "scenario.pkl", content),
        lambda path: check_traffic(ScenarioNetTraffic(str(folder / "sn"))), arrays=True, share=0.6,
    )  # fmt: skip


@reader
def submissions(folder: Path) -> Reader:
    poses = np.cumsum(np.ones((8, 3), dtype=np.float32), axis=0)
    content = {
        **dict.fromkeys(submission_file.TEAM_FIELDS, "team"),
        "first_stage_predictions": [
            {f"{number:016x}": {"poses": poses, "sampling": [8, 4.0, 0.5]} for number in range(2)}
        ],
        "second_stage_predictions": [{}],
    }

    def write(path: Path, content: Any) -> Path:
        with original_names(submission_file.STAND_INS):
            return pickled(path, _with_trajectories(content))

    return Reader(content, write, check_submission, arrays=True)


def _with_trajectories(content: Any) -> Any:
    """Dictionaries of poses and sampling turned into NAVSIM's objects, however wrong they are inside."""
    if isinstance(content, dict) and set(content) & {"poses", "sampling"}:
        made = Trajectory.__new__(Trajectory)
        made.__dict__.update({name: value for name, value in content.items() if isinstance(name, str) and name})
        sampling = content.get("sampling")
        if isinstance(sampling, list) and len(sampling) == 3:
            made.trajectory_sampling = submission_file.TrajectorySampling()
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

    return Reader([record], write, read, refused=0.0)  # left out and counted


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


@reader
def second_stage(folder: Path) -> Reader:
    """The first is a scene without objects of the devkit, so that everything in it can be wrong."""
    content = _plain(pickles.load(GOLDEN / "two_stage" / "pickles" / "inline_future.pkl", also_allowed=STAND_INS))

    def read(path: Path) -> None:
        scene = read_scene(path)
        check_scenes([scene])
        observation.tracks(scene, 9)

    return Reader(content, pickled, read, arrays=True, share=0.4)


def _plain(value: Any) -> Any:
    """Without holders: their fields, or their arguments."""
    if isinstance(value, Holder):
        return _plain(value.fields or list(value.args))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


@reader
def metric_cache_pickle(folder: Path) -> Reader:
    """A cache as NAVSIM 2 pickles it, with look-alikes of the devkit's classes: their fields and arguments go wrong."""
    records, _ = MemoryMetricCache.load_npz(GOLDEN / "pdm" / "scenes.npz")
    record = records.load(min(records.tokens))
    make = LookAlikes()
    whole = cache_of(folder / "file", make, record, records.polygons(record.map_location), "v2")
    content = _unmade(whole, make)

    def write(path: Path, content: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            make.install(patch)
            with lzma.open(path, "wb", preset=0) as stream:
                pickle.dump(_made(content, make), stream, protocol=4)
        return path

    def read(path: Path) -> None:
        found = read_content(read_cache(path), path)
        convert(record.token, "log-a", record.map_location, {"v2": found}, SharedPolygons())

    return Reader(content, write, read, arrays=True, share=0.2, refused=0.02)


def _unmade(value: Any, make: LookAlikes) -> Any:
    """Objects as dictionaries of their class, arguments and fields."""
    if type(value).__name__ in make.classes:
        fields = dict(value.__dict__)
        args = list(fields.pop("_args", ()))
        return {"class": type(value).__name__, "args": _unmade(args, make), "fields": _unmade(fields, make)}
    if isinstance(value, dict):
        return {key: _unmade(item, make) for key, item in value.items()}
    return [_unmade(item, make) for item in value] if isinstance(value, list) else value


def _made(value: Any, make: LookAlikes) -> Any:
    if isinstance(value, dict) and isinstance(value.get("fields"), dict) and str(value.get("class")) in make.classes:
        args, fields = value.get("args"), _made(value["fields"], make)
        made = object.__new__(make.classes[str(value["class"])])
        made.__dict__.update({key: item for key, item in fields.items() if isinstance(key, str)})
        if isinstance(args, list) and args:
            made.__dict__["_args"] = tuple(_made(args, make))
        return made
    if isinstance(value, dict):
        return {key: _made(item, make) for key, item in value.items() if key is None or isinstance(key, str | int)}
    return [_made(item, make) for item in value] if isinstance(value, list) else value


@reader
def geopackage(folder: Path) -> Reader:
    """Three rows of every layer of a map; a column that is absent or renamed is so in the file."""
    whole = nuplan_gpkg.map_file(unpack_small(folder / "small") / "dataset" / "maps", "us-ma-boston")
    with closing(sqlite3.connect(whole)) as base:
        layers = [name for (name,) in base.execute("SELECT table_name FROM gpkg_contents")]
        content = {}
        for layer in layers:
            columns = [row[1] for row in base.execute(f'PRAGMA table_info("{layer}")') if not row[5]]
            rows = base.execute(f'SELECT * FROM "{layer}" LIMIT 3').fetchall()
            names = [row[1] for row in base.execute(f'PRAGMA table_info("{layer}")')]
            content[layer] = {name: [row[names.index(name)] for row in rows] for name in columns}

    def write(path: Path, changed: Any) -> Path:
        path = path.with_suffix(".gpkg")
        shutil.copy(whole, path)
        with closing(sqlite3.connect(path)) as base, contextlib.suppress(sqlite3.Error, OverflowError, TypeError):
            for (trigger,) in base.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall():
                base.execute(f'DROP TRIGGER "{trigger}"')  # they keep the spatial index, with functions of GDAL
            _set_rows(base, content, changed)
            base.commit()
        return path

    def read(path: Path) -> None:
        found = read_gpkg(path.with_suffix(".gpkg"), "us-ma-boston")
        assert np.isfinite(found.lanes.xy).all()

    return Reader(content, write, read, share=0.2, refused=0.0)  # features are dropped with a warning


def _set_rows(base: sqlite3.Connection, content: Any, changed: Any) -> None:
    """Makes the file what ``changed`` says, as far as SQLite can."""
    changed = changed if isinstance(changed, dict) else {}
    for layer, columns in content.items():
        if layer not in changed:
            base.execute(f'DROP TABLE "{layer}"')
            base.execute("DELETE FROM gpkg_contents WHERE table_name = ?", [layer])
            base.execute("DELETE FROM gpkg_geometry_columns WHERE table_name = ?", [layer])
            continue
        rows = changed[layer] if isinstance(changed[layer], dict) else {}
        ids = [row for (row,) in base.execute(f'SELECT rowid FROM "{layer}" LIMIT 3')]
        for column, right in columns.items():
            values = rows.get(column)
            if values == right:
                continue
            if column not in rows:
                base.execute(f'ALTER TABLE "{layer}" RENAME COLUMN "{column}" TO "other"')
                continue
            values = values if isinstance(values, list) else [values] * len(ids)
            for row, value in zip(ids, values):
                base.execute(f'UPDATE "{layer}" SET "{column}" = ? WHERE rowid = ?', [value, row])


def fuzz(name: str, folder: Path, cases: int, seed: int) -> list[str]:
    """What went wrong in ``cases`` cases."""
    case = READERS[name](folder)
    cases = max(round(cases * case.share), FEW // 3)
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
    assert named >= int(case.refused * cases), f"only {named} of {cases} wrong contents of {name} were refused"
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
