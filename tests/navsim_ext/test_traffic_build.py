"""The build command: same bytes whatever the workers, kill -9 and resume, bad scenes counted and listed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import forked
import numpy as np
import pytest

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.runtime.config import compose
from navsim_ext.traffic import build as build_module
from navsim_ext.traffic import record
from navsim_ext.traffic.build import NothingStored, UnitWorker, build, source_of
from navsim_ext.traffic.store import TrafficStore
from navsim_ext.traffic.tfrecord import CorruptRecord, write_records
from navsim_ext.traffic.womd import WomdRecords
from navsim_ext.traffic.womd_writer import scenario_of, write_womd
from tests.navsim_ext.test_traffic_womd import whole_street

FILES, SCENES = 4, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of WOMD files."""
    root = tmp_path_factory.mktemp("womd")
    for file in range(FILES):
        scenes = (whole_street(id=f"scene-{file}{k}") for k in range(SCENES))
        write_womd(root / f"validation.tfrecord-{file:05d}-of-{FILES:05d}", scenes)
    return root


@pytest.fixture(scope="module")
def built(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build(WomdRecords(str(data)), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a finished store consists of."""
    kept = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and "locks" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.suffix != ".log" and "hydra" not in p.parts}


def test_a_store_holds_every_scene(built):
    store = TrafficStore(built)
    assert store.ids == sorted(f"scene-{file}{k}" for file in range(FILES) for k in range(SCENES))
    assert store.load("scene-21").equals(whole_street(id="scene-21")) == []
    report = json.loads((built / "report.json").read_text())
    assert (report["stored"], report["units"], report["skipped"]) == (FILES * SCENES, FILES, 0)
    assert report["notes"] == {"lights of lanes outside the map": FILES * SCENES}


@pytest.mark.parametrize(("workers", "count"), [("processes", 2), pytest.param("ray", 2, marks=pytest.mark.slow)])
def test_workers_change_no_byte(data, built, tmp_path, workers, count):
    if workers == "ray":
        pytest.importorskip("ray")
    build(WomdRecords(str(data)), tmp_path, workers=workers, num_workers=count)
    assert contents(tmp_path) == contents(built)


@pytest.mark.parametrize("kill_at", ["scene", "unit", "merge"])
def test_a_build_that_dies_anywhere_goes_on(data, built, tmp_path, monkeypatch, kill_at):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    options, count = {}, iter(range(100))
    with monkeypatch.context() as patch:
        if kill_at == "scene":
            options["encode"] = lambda scene: die() if next(count) == 4 else record.encode(scene)
        elif kill_at == "unit":
            patch.setattr(build_module.UnitResult, "to_arrays", die)
        else:
            patch.setattr(build_module, "merge", die)
        with pytest.raises(Killed):
            build(WomdRecords(str(data)), tmp_path, **options)
    read = []
    real_read = WomdRecords.read
    monkeypatch.setattr(WomdRecords, "read", lambda self, unit: (read.append(unit), real_read(self, unit))[1])
    build(WomdRecords(str(data)), tmp_path)
    assert len(read) == {"scene": FILES - 1, "unit": FILES, "merge": 0}[kill_at]  # what was finished is not read again
    assert contents(tmp_path) == contents(built)


def test_kill_9_and_run_again(data, built, tmp_path):
    """The real command, killed as soon as anything is on disk; going on ends with the same bytes."""
    options = [f"data.root={data}", "data.source=womd", f"output_dir={tmp_path}", "workers=sequential"]
    process = forked.start("-m", "navsim_ext.traffic.build", *options)
    deadline = time.monotonic() + 300
    while not any(tmp_path.glob("shard-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    build(WomdRecords(str(data)), tmp_path)
    assert contents(tmp_path) == contents(built)


def test_scenes_lost_in_a_power_cut_are_read_again(data, built, tmp_path):
    build(WomdRecords(str(data)), tmp_path)
    for path in tmp_path.glob("part-*"):
        path.unlink()
    store = json.loads((tmp_path / "store.json").read_text())
    assert store["parts"]
    (tmp_path / "store.json").unlink()  # as if the scenes' folder had never got to disk
    build(WomdRecords(str(data)), tmp_path)
    assert contents(tmp_path) == contents(built)


def damage(root: Path, target: Path) -> None:
    """A copy of the data with one flipped bit, one record that is no scenario, one without an ego."""
    target.mkdir()
    for path in root.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    first, second, *_ = sorted(target.iterdir())
    content = bytearray(first.read_bytes())
    content[100] ^= 4
    first.write_bytes(content)
    blind = scenario_of(whole_street(id="blind"))
    blind.ClearField("sdc_track_index")
    good = scenario_of(whole_street(id="good"))
    write_records(second, [b"nonsense", blind.SerializeToString(), good.SerializeToString()])


def test_bad_scenes_stop_the_build_or_are_counted_and_listed(data, tmp_path):
    damage(data, tmp_path / "bad")
    source = WomdRecords(str(tmp_path / "bad"))
    with pytest.raises(CorruptRecord, match=r"byte 0: .* CRC-32C"):
        build(source, tmp_path / "store")
    report = build(source, tmp_path / "store", skip_bad=True)  # goes on in the same folder
    assert report["stored"] == FILES * SCENES - 1 - 2
    assert report["counts"] == {"CorruptRecord": 1, "DataError": 2}
    assert report == json.loads((tmp_path / "store" / "report.json").read_text())
    assert any("sdc_track_index is absent" in entry["reason"] for entry in report["entries"])
    assert "good" in TrafficStore(tmp_path / "store")


def test_nothing_stored_is_no_success(tmp_path):
    (tmp_path / "d").mkdir()
    write_records(tmp_path / "d" / "a.tfrecord", [b"nonsense"])
    with pytest.raises(NothingStored, match="0 traffic scenes were stored of 1 units; 1 were skipped"):
        build(WomdRecords(str(tmp_path / "d")), tmp_path / "o", skip_bad=True)
    write_records(tmp_path / "d" / "a.tfrecord", [])
    with pytest.raises(NothingStored):
        build(WomdRecords(str(tmp_path / "d")), tmp_path / "p")


def test_one_id_in_two_files_is_an_error_that_names_both(tmp_path):
    (tmp_path / "d").mkdir()
    for name in "ab":
        write_womd(tmp_path / "d" / f"{name}.tfrecord", [whole_street(id="same")])
    with pytest.raises(DataError, match=r"'same' occurs twice, in a\.tfrecord and in b\.tfrecord"):
        build(WomdRecords(str(tmp_path / "d")), tmp_path / "o")


def test_another_source_in_the_same_folder_is_refused(data, built, tmp_path):
    write_womd(tmp_path / "a.tfrecord", [whole_street(id="other")])
    with pytest.raises(FingerprintMismatch, match="names_and_sizes"):
        build(WomdRecords(str(tmp_path)), built)


def test_a_worker_is_told_of_bugs_as_bugs(data, tmp_path):
    class Broken(WomdRecords):
        def read(self, unit):
            raise ZeroDivisionError

    source = Broken(str(data))
    worker = UnitWorker(source, tmp_path, build_module.fingerprint_of(source.identity()), True, record.encode, "0")
    with pytest.raises(ZeroDivisionError):
        worker.process(source.units()[0])
    worker.close()


def test_sources_come_by_name_from_the_configuration(tmp_path, data):
    cfg = lambda *more: compose("traffic", [f"output_dir={tmp_path}", *more])  # noqa: E731
    for name in ("womd", "gpudrive", "scenarionet", "navsim", "npz"):
        source = source_of(cfg(f"data.source={name}", f"data.root={data}", "data.maps_root=/m"))
        assert source.identity is not None
        with pytest.raises(MissingError, match=r"data\.root"):
            source_of(cfg(f"data.source={name}"))
    with pytest.raises(DataError, match=r"data\.source=kitti: one of womd, gpudrive"):
        source_of(cfg("data.source=kitti"))
    with pytest.raises(DataError, match="workers=threads"):
        build(WomdRecords(str(data)), tmp_path, workers="threads")


def test_the_synthetic_world_is_a_source_like_the_others(tmp_path):
    options = [f"output_dir={tmp_path}", "data.source=synthetic", "sources.synthetic.scenes=2",
               "sources.synthetic.horizon_s=4", "sources.synthetic.mix={turn: 1, cruise: 1}"]  # fmt: skip
    report = build(source_of(compose("traffic", options)), tmp_path)
    assert report["stored"] == 2
    for scene in TrafficStore(tmp_path):
        assert scene.validate().num_steps == 56
        assert scene.law["state_s"].shape == (2, scene.num_agents)
        assert np.isfinite(scene.law["path_pose"]).all()
    assert (tmp_path / "maps" / "nuplan-maps-v1.0.json").is_file()
