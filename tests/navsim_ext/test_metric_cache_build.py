"""The build command: same bytes for any workers and order, kill -9 and resume, bad scenes counted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from damage import damages, judge_damage
from golden_scenes import unpack_small

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.metric_cache import build as build_module
from navsim_ext.metric_cache import journal, worker
from navsim_ext.metric_cache.build import NothingCached, build, settings_from
from navsim_ext.metric_cache.map_table import store_map_table
from navsim_ext.metric_cache.schema import MetricCache, MetricCacheMismatch
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.pdm import score
from navsim_ext.runtime import workers
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.lock import FolderBusy, FolderLock

TOKENS = ("2c0600315ee8ac41", "d7bcf217173232fe", "f3430b5b6f820060", "0e4a8e4b508d537c")
SCRATCH = {"locks", ".lock", "hydra", "build.log"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return unpack_small(tmp_path_factory.mktemp("small")) / "dataset"


@pytest.fixture(scope="module")
def built(dataset, tmp_path_factory) -> Path:
    """A cache of all four scenes."""
    output = tmp_path_factory.mktemp("built")
    assert build(BuildSettings(str(dataset), "trainval", str(output)))["cached"] == 4
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished cache but locks and logs."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder): path for path in files}
    return {str(name): path.read_bytes() for name, path in sorted(names.items()) if not SCRATCH & set(name.parts)}


def settings_for(dataset: Path, output: Path, **changes) -> BuildSettings:
    return BuildSettings(str(dataset), "trainval", str(output), **changes)


def edited(dataset: Path, folder: Path, change) -> Path:
    """A copy of the data set in which ``change(frames)`` was done to the first log."""
    copy = folder / "dataset"
    shutil.copytree(dataset, copy)
    log = min((copy / "navsim_logs" / "trainval").glob("*.pkl"))
    frames = pickle.loads(log.read_bytes())
    change(frames)
    log.write_bytes(pickle.dumps(frames))
    return copy


def test_the_cache_opens_scores_and_is_verified(built):
    cache = MetricCache(built)
    assert sorted(cache.tokens) == sorted(TOKENS)
    result = score(list(TOKENS), np.zeros((4, 8, 3)), cache)
    assert result.valid.all()
    doctor = cache.fingerprint.info["doctor"]
    assert doctor["right"] is True
    report = json.loads((built / "report.json").read_text())
    assert (report["cached"], report["invalid"], report["entries"]) == (4, 0, [])
    assert not (built / "progress").exists()


def test_two_processes_give_the_same_bytes_as_one(dataset, built, tmp_path):
    build(settings_for(dataset, tmp_path / "two"), workers="processes", num_workers=2)
    assert contents(tmp_path / "two") == contents(built)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(dataset, built, tmp_path):
    pytest.importorskip("ray")
    build(settings_for(dataset, tmp_path / "ray"), workers="ray", num_workers=2)
    assert contents(tmp_path / "ray") == contents(built)


def test_the_order_of_logs_does_not_matter(dataset, built, tmp_path, monkeypatch):
    forward = BuildSettings.log_files
    monkeypatch.setattr(BuildSettings, "log_files", lambda self: dict(reversed(list(forward(self).items()))))
    build(settings_for(dataset, tmp_path / "reversed"))
    assert contents(tmp_path / "reversed") == contents(built)


def test_a_second_run_has_nothing_to_do(dataset, built, monkeypatch):
    before = contents(built)
    monkeypatch.setattr(worker.LogWorker, "process", lambda *_: pytest.fail("a finished log was done again"))
    assert build(settings_for(dataset, built))["cached"] == 4
    assert contents(built) == before


@pytest.mark.parametrize("kill_at", ["record", "log", "map"])
def test_a_build_that_dies_anywhere_goes_on(dataset, built, tmp_path, monkeypatch, kill_at):
    """The work stops as a kill would stop it: after a record, before the log is noted, while the map table is new."""

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        if kill_at == "record":
            real = worker.build_scene
            count = iter(range(100))
            patch.setattr(worker, "build_scene", lambda *a: die() if next(count) == 1 else real(*a))
        elif kill_at == "log":
            patch.setattr(journal, "append", die)
        else:
            patch.setattr(worker, "store_map_table", lambda *a: (store_map_table(*a), die()))
        with pytest.raises(Killed):
            build(settings_for(dataset, tmp_path))
    build(settings_for(dataset, tmp_path))
    assert contents(tmp_path) == contents(built)


def test_kill_9_and_run_again(dataset, built, tmp_path):
    """The real command, killed as soon as anything is on disk; going on ends with the same bytes."""
    options = [f"data.root={dataset}", "data.split=trainval", f"output_dir={tmp_path}", "workers=sequential"]
    process = forked.start("-m", "navsim_ext.metric_cache.build", *options)
    deadline = time.monotonic() + 300
    while not stored_bytes(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "maps" / "us-ma-boston").mkdir(parents=True, exist_ok=True)
    (tmp_path / "maps" / "us-ma-boston" / ".xy.1.tmp").write_bytes(b"half")  # what a kill inside a write leaves
    build(settings_for(dataset, tmp_path))
    assert contents(tmp_path) == contents(built)


def stored_bytes(folder: Path) -> int:
    """Bytes of records and finished maps on disk."""
    return sum(path.stat().st_size for pattern in ("shard-*", "maps/*/*.npy") for path in folder.glob(pattern))


def test_a_torn_journal_line_counts_as_not_finished(tmp_path):
    done = journal.LogResult("a", ("1", "2"), (journal.Invalid("3", "RouteError", "no route"),))
    journal.append(tmp_path, "0", done)
    with open(tmp_path / "progress" / "0.jsonl", "a") as stream:
        stream.write(journal.LogResult("b", ()).to_line()[:-9])
    assert journal.finished_logs(tmp_path, {"1", "2"}) == {"a": done}
    assert journal.finished_logs(tmp_path, {"1"}) == {}


def read_everything(folder: Path) -> list:
    """All that scoring gets from a cache."""
    cache = MetricCache(folder)
    trajectories = np.zeros((len(TOKENS), 8, 3))
    trajectories[..., 0] = np.arange(1, 9)
    result = score(list(TOKENS), trajectories, cache)
    return [result.values.tobytes(), result.valid.tolist(), result.reason.tolist(), cache.why_missing("f" * 16)]


def test_no_damage_of_a_cache_changes_a_score_in_silence(built, tmp_path):
    """Every file of a finished cache, the maps that kernels follow blindly among them."""
    folder = tmp_path / "cache"
    shutil.copytree(built, folder)
    verdicts = judge_damage(folder, lambda: read_everything(folder), np.random.default_rng(0))
    named = {name for name, verdict in verdicts.items() if verdict["named"]}
    assert {
        f"maps/us-ma-boston/{name}.npy" for name in ("xy", "ring_offsets", "polygon_rings", "types", "ids")
    } <= named
    assert {"store.json", "fingerprint.json", "report.json", "maps/us-ma-boston/checksums.json"} <= named


@pytest.mark.parametrize(
    "part",
    ["maps/us-ma-boston/ring_offsets.npy", "maps/us-ma-boston/checksums.json", "logs.jsonl", "report.json"],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_the_build_command_mends_what_is_damaged(dataset, built, tmp_path, part, damage):
    """The remedy that the messages name."""
    folder = tmp_path / "cache"
    shutil.copytree(built, folder)
    content = bytearray((folder / part).read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "remove":
        (folder / part).unlink()
    else:
        (folder / part).write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    build(settings_for(dataset, folder))
    assert contents(folder) == contents(built)


def test_a_damaged_map_or_journal_of_a_killed_build_drops_no_scene(dataset, built, tmp_path, monkeypatch):
    """All files that a build leaves when it is killed before the end, each damaged: the rest of the build mends it, or
    names it; no scene becomes invalid, none is stored with other values."""

    def die(*_):
        raise KeyboardInterrupt

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "merge", die)
        with pytest.raises(KeyboardInterrupt):
            build(settings_for(dataset, killed))
    rng = np.random.default_rng(1)
    for path in sorted(path for path in killed.rglob("*") if path.is_file() and path.stat().st_size):
        name = path.relative_to(killed)
        for number, damaged in enumerate(damages(path.read_bytes(), rng, 4)):
            folder = tmp_path / f"{number}"
            shutil.copytree(killed, folder)
            (folder / name).write_bytes(damaged)
            try:
                build(settings_for(dataset, folder))
            except TriviumError as error:
                assert path.name in str(error) or str(folder) in str(error)  # noqa: PT017
            else:
                assert contents(folder) == contents(built), name
            shutil.rmtree(folder)


def test_invalid_scenes_are_listed_and_the_rest_is_cached(dataset, tmp_path):
    """Frame 3 (the first window's now) has no route that the map knows."""

    def change(frames):
        frames[3]["roadblock_ids"] = ["unheard-of"]

    report = build(settings_for(edited(dataset, tmp_path, change), tmp_path / "cache"))
    assert (report["cached"], report["invalid"], report["counts"]) == (3, 1, {"RouteError": 1})
    (entry,) = report["entries"]
    assert "unheard-of" in entry["reason"]
    cache = MetricCache(tmp_path / "cache")
    assert entry["token"] not in cache
    result = score([entry["token"]], np.zeros((1, 8, 3)), cache)
    assert not result.valid[0]
    assert "unheard-of" in result.reason[0]


def far_away(frames):
    for frame in frames:
        frame["ego2global_translation"] = np.asarray(frame["ego2global_translation"]) + np.array([50_000.0, 0.0, 0.0])


def no_route(frames):
    for frame in frames:
        frame["roadblock_ids"] = []


def degenerate_box(frames):
    boxes = np.array(frames[4]["anns"]["gt_boxes"])
    boxes[0, 3:6] = 0.0
    for frame in frames[3:]:
        frame["anns"]["gt_boxes"] = np.array(frame["anns"]["gt_boxes"])
        frame["anns"]["gt_boxes"][:, 3:6] = 0.0


def short_log(frames):
    del frames[13:]


@pytest.mark.parametrize(
    ("change", "counts", "word"),
    [
        (far_away, {"EmptyMapPatch": 2}, "nothing within 100 m"),
        (no_route, {"RouteError": 2}, "no route"),
        (degenerate_box, {"DataError": 2}, "degenerate size"),
        (short_log, {}, ""),
    ],
)
def test_bad_logs_never_become_scores(dataset, tmp_path, change, counts, word):
    report = build(settings_for(edited(dataset, tmp_path, change), tmp_path / "cache"))
    assert report["cached"] == 2
    assert report["counts"] == counts
    assert all(word in entry["reason"] for entry in report["entries"])


def test_an_unreadable_log_is_an_entry_without_token(dataset, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    log = min((copy / "navsim_logs" / "trainval").glob("*.pkl"))
    log.write_bytes(log.read_bytes()[:1000])
    report = build(settings_for(copy, tmp_path / "cache"))
    assert report["cached"] == 2
    assert [(entry["log"], entry["token"], entry["kind"]) for entry in report["entries"]] == [
        (log.stem, None, "DamagedPickle")
    ]


def test_nothing_cached_is_an_error(dataset, tmp_path):
    copy = edited(dataset, tmp_path, far_away)
    log = min((copy / "navsim_logs" / "trainval").glob("*.pkl"))
    for other in (copy / "navsim_logs" / "trainval").glob("*.pkl"):
        if other != log:
            other.unlink()
    with pytest.raises(NothingCached, match=r"0 scenes were cached of 1 logs; 2 were invalid .*EmptyMapPatch"):
        build(settings_for(copy, tmp_path / "cache"))


def test_tokens_choose_and_absent_ones_are_invalid(dataset, built, tmp_path):
    report = build(settings_for(dataset, tmp_path, tokens=(TOKENS[0], "f" * 16)))
    assert (report["cached"], report["invalid"]) == (1, 1)
    assert report["entries"][0]["token"] == "f" * 16
    ours, all_of_them = MetricCache(tmp_path), MetricCache(built)
    for name, array in all_of_them.load(TOKENS[0]).to_arrays().items():
        np.testing.assert_array_equal(ours.load(TOKENS[0]).to_arrays()[name], array)


def test_frame_interval_thins_the_windows(dataset, tmp_path):
    assert build(settings_for(dataset, tmp_path, frame_interval=2))["cached"] == 2


def test_another_selection_does_not_go_into_the_same_folder(dataset, built):
    with pytest.raises(FingerprintMismatch, match="frame_interval"):
        build(settings_for(dataset, built, frame_interval=2))


def test_two_builds_never_share_a_folder(dataset, built):
    with FolderLock(built), pytest.raises(FolderBusy):
        build(settings_for(dataset, built))


def test_a_missing_map_ends_the_build_instead_of_making_every_scene_invalid(dataset, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    next(copy.rglob("map.gpkg")).unlink()
    with pytest.raises(MissingError, match=r"map\.gpkg is missing"):
        build(settings_for(copy, tmp_path / "cache"))


def test_two_maps_of_one_name_are_refused(built, dataset):
    from dataclasses import replace

    from navsim_ext.maps.nuplan_gpkg import load_map

    vector_map = load_map(dataset / "maps", "us-ma-boston", built.parent / "maps")
    moved = replace(vector_map, roadblocks=replace(vector_map.roadblocks, xy=vector_map.roadblocks.xy + 1.0))
    with pytest.raises(MetricCacheMismatch, match="another map of the name"):
        store_map_table(built, "us-ma-boston", moved)


def test_bad_options_are_named(dataset, tmp_path):
    with pytest.raises(DataError, match="workers=magic"):
        build(settings_for(dataset, tmp_path), workers="magic")
    with pytest.raises(DataError, match="num_workers=0"):
        build(settings_for(dataset, tmp_path), workers="processes", num_workers=0)
    with pytest.raises(DataError, match="source=waymo"):
        build(settings_for(dataset, tmp_path, source="waymo"))
    with pytest.raises(MissingError, match="test"):
        build(BuildSettings(str(dataset), "test", str(tmp_path)))


def test_a_scene_filter_chooses_windows_and_logs(dataset, built, tmp_path):
    """The command reads the filter that an index is made with; what it cannot mean is refused."""
    options = ["data.split=trainval", f"data.root={dataset}", f"output_dir={tmp_path / 'cache'}"]
    path = tmp_path / "filter.yaml"
    path.write_text(f"tokens: [{TOKENS[0]}]\nnum_history_frames: 4\nnum_future_frames: 10\nframe_interval: 1\n")
    settings = settings_from(compose("metric_cache", [*options, f"data.scene_filter={path}"]))
    assert build(settings)["cached"] == 1
    assert MetricCache(tmp_path / "cache").tokens == [TOKENS[0]]
    logs = list(settings_for(dataset, tmp_path).log_files())
    path.write_text(f"log_names: [{logs[0]}]\n")
    assert list(settings_from(compose("metric_cache", [*options, f"data.scene_filter={path}"])).log_files()) == logs[:1]
    for text, word in (("num_future_frames: 6\n", r"4 \+ 6"), ("max_scenes: 3\n", "max_scenes=3")):
        path.write_text(text)
        with pytest.raises(DataError, match=word):
            settings_from(compose("metric_cache", [*options, f"data.scene_filter={path}"]))


def test_the_configuration_reads_navsims_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENSCENE_DATA_ROOT", "/data")
    monkeypatch.setenv("NUPLAN_MAPS_ROOT", "/maps")
    cfg = compose("metric_cache", ["data.split=mini", f"output_dir={tmp_path}"])
    settings = settings_from(cfg)
    assert (settings.root, settings.maps_root, settings.split) == ("/data", "/maps", "mini")
    assert (settings.frame_interval, settings.tokens, cfg.workers) == (1, None, "processes")
    monkeypatch.delenv("OPENSCENE_DATA_ROOT")
    with pytest.raises(MissingError, match="OPENSCENE_DATA_ROOT"):
        settings_from(compose("metric_cache", ["data.split=mini", f"output_dir={tmp_path}"]))


def test_a_dead_worker_process_is_named_and_the_next_run_goes_on(dataset, built, tmp_path, monkeypatch):
    """One pool process kills itself in the middle of a log; records so far are kept."""
    monkeypatch.setenv("TRIVIUM_TEST_DIE", "1")
    monkeypatch.setattr(workers, "_process", kill_yourself)
    with pytest.raises(workers.WorkerDied, match="run the same command again"):
        build(settings_for(dataset, tmp_path), workers="processes", num_workers=1)
    monkeypatch.undo()
    build(settings_for(dataset, tmp_path))
    assert contents(tmp_path) == contents(built)


def kill_yourself(log_name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_estimate_is_told_before_the_work(dataset, tmp_path, caplog):
    with caplog.at_level("INFO", logger=build_module.logger.name):
        build(settings_for(dataset, tmp_path))
    assert "2 logs (0 done before), about 4 scenes" in caplog.text


def test_scenario_files_are_cached_with_a_map_of_their_own_and_the_label_approx(reference, tmp_path):
    """Reconstructed maps of one place differ from drive to drive: each has its own table."""
    scenarios = tmp_path / "scenarios"
    scenarios.mkdir()
    for name in ("scene-1077.pkl", "scene-1100.pkl"):  # both in one place, 3 windows of the first leave the road
        shutil.copy(reference("real/nuscenes_mini") / name, scenarios)
    settings = BuildSettings(str(scenarios), "mini", str(tmp_path / "cache"), source="scenarionet", frame_interval=3)
    report = build(settings)
    assert report["cached"] > 10
    assert set(report["counts"]) <= {"InvalidWindow"}
    cache = MetricCache(tmp_path / "cache")
    records = [cache.load(token) for token in cache.tokens]
    assert {record.map_label for record in records} == {"approx"}
    assert len({record.map_location for record in records}) == 2
    human = score(cache.tokens, np.stack([record.human_poses for record in records]), cache)
    assert human.valid.all()
    assert set(human.map_label.tolist()) == {"approx"}
    assert human["v1_dac"].mean() > 0.9


def test_the_source_must_be_what_lies_there(dataset, tmp_path):
    with pytest.raises(DataError, match="holds navsim data: leave the source out"):
        build(settings_for(dataset, tmp_path, source="scenarionet"))
