"""The build: same seed same bytes, splits by log, kill -9 and go on, one process per folder, clear errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import yaml
from damage import damages
from PIL import Image

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.files import CannotWrite
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.readers import open_source
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.lock import FolderBusy, FolderLock
from navsim_ext.synthetic import produce
from navsim_ext.synthetic.build import build, recipe_of
from navsim_ext.synthetic.manifest import Manifest
from navsim_ext.synthetic.recipe import Recipe

BLIND = ["recipe.cameras=[]", "recipe.qa=false"]


def recipe(*overrides: str) -> Recipe:
    return recipe_of(compose("synthetic", ["output_dir=unused", *overrides]))


def digests(folder: Path, *names: str) -> dict[str, str]:
    files = [path for name in names for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build(folder, recipe("scenes=46", *BLIND))
    return folder


def test_scene_filters_part_the_logs_and_keep_one_town_for_test(world):
    manifest = Manifest(world)
    tokens: dict[str, list[str]] = {}
    for part in ("train", "val", "test"):
        content = yaml.safe_load((world / f"train_test_split/scene_filter/{part}.yaml").read_text())
        assert content["_target_"] == "navsim.common.dataclasses.SceneFilter"
        tokens[part] = content["tokens"]
        records = [record for record in manifest.ordered() if record.part == part]
        assert content["log_names"] == [record.name for record in records]
        towns = {record.location for record in records}
        assert ("us-pa-pittsburgh-hazelwood" in towns) == (part == "test")
        assert len(towns) == 1 or part != "test"
        folder = "test" if part == "test" else "trainval"
        scene_filter = SceneFilter.from_yaml(world / f"train_test_split/scene_filter/{part}.yaml")
        assert sorted(open_source(world, folder, scene_filter=scene_filter).tokens) == sorted(tokens[part])
    everything = [token for part in tokens.values() for token in part]
    assert len(everything) == len(set(everything)) == 46
    everywhere = open_source(world, "trainval").tokens + open_source(world, "test").tokens
    assert sorted(everywhere) == sorted(everything)  # no window outside the filters


def test_two_workers_and_a_fresh_folder_give_the_same_bytes(world, tmp_path):
    build(tmp_path, recipe("scenes=46", *BLIND), workers=2)
    names = ("navsim_logs", "maps", "train_test_split")
    assert digests(tmp_path, *names) == digests(world, *names)
    assert not (tmp_path / produce.WORK_FOLDER).exists()


def test_a_larger_build_extends_a_smaller_one(world, tmp_path):
    build(tmp_path, recipe("scenes=6", *BLIND))  # the second log has two windows only
    before = digests(tmp_path, "navsim_logs")
    build(tmp_path, recipe("scenes=46", *BLIND))
    after = digests(tmp_path, "navsim_logs")
    assert after == digests(world, "navsim_logs")
    assert sum(name.endswith(".pkl") for name in before) == 2
    assert sum(after[name] == digest for name, digest in before.items()) == 1


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(world, tmp_path):
    process = forked.start("-m", "navsim_ext.synthetic.build", f"output_dir={tmp_path}", "scenes=46", *BLIND)
    manifest = tmp_path / "manifest.jsonl"
    deadline = time.monotonic() + 240.0
    while not (manifest.exists() and manifest.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = manifest.read_bytes().count(b"\n")
    with open(manifest, "ab") as stream:  # and the last line was being written
        stream.write(b'{"index": 9, "name": "2021')
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "navsim_logs").rglob("*.pkl")}
    build(tmp_path, recipe("scenes=46", *BLIND))
    assert digests(tmp_path, "navsim_logs", "maps") == digests(world, "navsim_logs", "maps")
    assert sum(path.stat().st_mtime_ns == when for path, when in kept.items()) >= finished
    assert len(Manifest(tmp_path).records) == 12


def test_a_damaged_log_or_map_is_named_and_made_again(world, tmp_path):
    """As the message says: delete the file, run the same command."""
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    rng = np.random.default_rng(0)
    for path in (min((copy / "navsim_logs" / "trainval").glob("*.pkl")), min((copy / "maps").rglob("map.gpkg"))):
        source = open_source(copy, "trainval", scene_filter=SceneFilter(log_names=[log_on(copy, path)]))
        content = path.read_bytes()
        for damaged in damages(content, rng, 12):
            path.write_bytes(damaged)
            with pytest.raises(CorruptFile, match=rf"{path.name}.*delete the file"):
                source.map_for(source.scenes_of(source.log_names[0])[0])
        path.unlink()
        build(copy, recipe("scenes=46", *BLIND))
        assert path.read_bytes() == content
        source.map_for(source.scenes_of(source.log_names[0])[0])
    manifest = copy / "manifest.jsonl"
    whole = manifest.read_bytes()
    for damaged in damages(whole, rng, 12):
        manifest.write_bytes(damaged)
        try:
            records = Manifest(copy).records
        except DataError as error:
            assert "manifest.jsonl, line" in str(error)  # noqa: PT017
        else:
            assert records.items() <= Manifest(world).records.items()


def log_on(root, path) -> str:
    """The log itself, or one on the map."""
    if path.suffix == ".pkl":
        return path.stem
    location = path.relative_to(root / "maps").parts[0]
    return next(r.name for r in Manifest(root).ordered() if r.location == location and r.part in ("train", "val"))


def test_no_process_of_a_build_loads_torch():
    """It would hold 130 MB in the build and as much again in its workers: half of what they all need."""
    program = "import sys; import navsim_ext.synthetic.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_finished_build_is_left_alone(world):
    stamps = {path: path.stat().st_mtime_ns for path in (world / "navsim_logs").rglob("*.pkl")}
    build(world, recipe("scenes=46", *BLIND))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_another_recipe_is_refused_with_both_values(world):
    with pytest.raises(FingerprintMismatch, match=r"recipe.seed: 1 \| 0"):
        build(world, recipe("scenes=46", "seed=1", *BLIND))


def test_one_process_per_folder(world):
    with FolderLock(world), pytest.raises(FolderBusy, match="in use by another run"):
        build(world, recipe("scenes=46", *BLIND))


def test_a_full_disk_is_one_clear_error_and_no_half_file(tmp_path, monkeypatch):
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".pkl." in path.name:
            real(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CannotWrite, match=r"navsim_logs.*the disk is full.*make room.*run the same command"):
        build(tmp_path, recipe("scenes=4", *BLIND))
    assert not list((tmp_path / "navsim_logs").rglob("*.pkl"))
    monkeypatch.undo()
    assert len(build(tmp_path, recipe("scenes=4", *BLIND)).records) == 1


def test_an_unwritable_folder_ends_the_command_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    result = forked.run("-m", "navsim_ext.synthetic.build", f"output_dir={tmp_path}/file/data", "scenes=4")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "cannot write" in result.stderr
    assert "choose another output_dir" in result.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scenes=0", "scenes is 0; at least 1"),
        ("recipe.cameras=[CAM_X]", "CAM_X"),
        ("recipe.test_location=atlantis", "atlantis"),
        ("recipe.test_share=0.95", "test_share"),
        ("recipe.camera_frames=none", "camera_frames"),
    ],
)
def test_options_that_make_no_sense_are_refused(override, words):
    with pytest.raises(DataError, match=words):
        recipe(override)


def test_a_template_that_does_not_exist_is_refused_before_the_drives():
    with pytest.raises(MissingError, match="prompt template terse does not exist"):
        recipe("recipe.template=terse")
    assert recipe("recipe.template=brief").template == "brief"


@pytest.mark.parametrize("mix", [{"cruise": 0.0}, {"flying": 1.0}, {"turn": -1.0, "cruise": 3.0}])
def test_a_mix_needs_known_situations_and_some_weight(mix):
    with pytest.raises(DataError, match="mix is"):
        replace(recipe("scenes=4"), mix=mix).validate()


def test_logs_of_a_recipe_do_not_depend_on_how_many_there_are():
    small, large = recipe("scenes=40", *BLIND), recipe("scenes=4000", *BLIND)
    for index in range(10):
        assert small.name_of(index) == large.name_of(index)
        assert small.part_of(index) == large.part_of(index)
        assert small.kinds_of(index) == large.kinds_of(index)
    parts = [large.part_of(index) for index in range(large.logs)]
    assert parts.count("test") / large.logs == pytest.approx(large.test_share, abs=0.01)
    assert parts.count("val") / large.logs == pytest.approx(large.val_share, abs=0.01)
    kinds = [large.kinds_of(index)[0] for index in range(large.logs)]
    total = sum(large.mix.values())
    for kind, weight in large.mix.items():
        assert kinds.count(kind) / large.logs == pytest.approx(weight / total, abs=0.01)


def test_pictures_and_questions_belong_to_the_windows(tmp_path):
    small = replace(
        recipe("scenes=4", "recipe.cameras=[CAM_F0,CAM_L1]"), image_size=(160, 90), test_share=0.0, val_share=0.0
    )
    build(tmp_path, small)
    source = open_source(tmp_path, "trainval", required_cameras=("CAM_F0", "CAM_L1"))
    assert len(source.tokens) == 4
    for token in source.tokens:
        scene = source.scene(token)
        for view in ("CAM_F0", "CAM_L1"):
            with Image.open(source.sensor_root / scene.cameras[view].path) as picture:
                assert picture.size == (160, 90)
                assert np.asarray(picture).std() > 10.0
            assert scene.cameras[view].intrinsics[0, 2] == pytest.approx(80.0, abs=1.0)
    assert len(list((tmp_path / "sensor_blobs").rglob("*.jpg"))) == 8
    meta = json.loads((tmp_path / "qa/train.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "qa" / meta["train_trajectory"]["annotation"]).open()]
    assert len(rows) == meta["train_trajectory"]["length"] == 4
    assert {row["scene_id"] for row in rows} == set(source.tokens)
    assert (tmp_path / "qa" / meta["train_trajectory"]["root"] / rows[0]["image"]).is_file()
