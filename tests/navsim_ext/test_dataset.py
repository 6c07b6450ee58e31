"""Scene index, dataset and data module: what comes out is what the scenes say, in a reproducible order."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import signal
import subprocess
import sys

import forked
import numpy as np
import pytest
import torch
from damage import judge_damage
from omegaconf import OmegaConf
from scene_worlds import make_frame, token, write_log

from navsim_ext import scene_index
from navsim_ext.datamodule import JoinHidden, SceneDataModule
from navsim_ext.dataset import SceneDataset, build_index, main, part_indices
from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import CannotWrite
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.readers import NavsimLogs, NothingSelected, SceneFilter
from navsim_ext.runtime.checksums import write_checked_json
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.preflight import PreflightError
from navsim_ext.runtime.sampler import PositionSampler, ResumableLoader
from navsim_ext.scene import collate_scenes
from navsim_ext.scene_index import COPIES, FORMAT, tell_cost

LOGS = ("log-a", "log-b", "log-c")
FRAMES = 22  # 9 windows of 14 in each log
VIEWS = ("CAM_F0", "CAM_L0", "CAM_R0")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for log in LOGS:
        write_log(root, [make_frame(i, log) for i in range(FRAMES)], log)
    return root


@pytest.fixture(scope="module")
def index(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "all"
    build_index(NavsimLogs(world, "mini"), folder, cameras=VIEWS)
    return folder


def test_samples_equal_scenes(world, index):
    source, dataset = NavsimLogs(world, "mini"), SceneDataset(index, cameras=("CAM_R0", "CAM_F0"))
    assert dataset.tokens == source.tokens
    assert dataset.sensor_root == source.sensor_root
    for i in range(len(dataset)):
        sample, scene = dataset[i].validate(), source.scene(dataset.tokens[i])
        assert (sample.token, sample.log_name) == ([scene.token], [scene.log_name])
        np.testing.assert_array_equal(sample.history[0], scene.history_poses().astype(np.float32))
        np.testing.assert_array_equal(sample.status[0], scene.status())
        np.testing.assert_array_equal(sample.target[0], scene.future_poses(8).astype(np.float32))
        assert list(sample.cameras[0]) == ["CAM_R0", "CAM_F0"]
        assert sample.cameras[0]["CAM_R0"] == scene.cameras["CAM_R0"].path


def test_history_horizon_and_views_by_configuration(index):
    whole, short = SceneDataset(index, horizon=10, cameras=VIEWS)[3], SceneDataset(index, num_history=2, horizon=3)[3]
    assert whole.target.shape == (1, 10, 3)
    torch.testing.assert_close(short.history, whole.history[:, -2:])
    torch.testing.assert_close(short.target, whole.target[:, :3])
    assert (list(short.cameras[0]), list(whole.cameras[0])) == (["CAM_F0"], list(VIEWS))
    assert SceneDataset(index, horizon=0)[3].target is None
    with pytest.raises(DataError, match=r"4 history and 10 future.* 4 and 11"):
        SceneDataset(index, horizon=11)
    with pytest.raises(DataError, match=r"no camera CAM_B0.*CAM_F0, CAM_L0, CAM_R0"):
        SceneDataset(index, cameras=["CAM_B0"])


def test_chosen_tokens(index):
    wanted = [token(5, "log-c"), token(3, "log-a")]
    dataset = SceneDataset(index, tokens=wanted)
    assert [dataset[i].token[0] for i in range(2)] == dataset.tokens == wanted
    with pytest.raises(MissingError, match=r"1 of 2 tokens.*first: ffff"):
        SceneDataset(index, tokens=[wanted[0], "f" * 16])
    with pytest.raises(MissingError, match="0 of 0"):
        SceneDataset(index, tokens=[])
    with pytest.raises(IndexError):
        dataset[2]


def test_pickled_dataset_carries_no_arrays_and_is_the_same(index):
    dataset = SceneDataset(index, tokens=[token(5, "log-c"), token(3, "log-a")], horizon=6)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy.tokens == dataset.tokens
    torch.testing.assert_close(copy[1].target, dataset[1].target)


def test_same_batches_for_any_number_of_workers(index):
    def batches(workers: int) -> list:
        module = SceneDataModule(index, batch_size=4, seed=3, num_workers=workers)
        return [(scenes.token, scenes.target) for scenes, hidden in module.train_dataloader() if hidden is None]

    alone, helped = batches(0), batches(2)
    assert len(alone) == 27 // 4
    for (mine, target), (theirs, other) in zip(alone, helped, strict=True):
        assert mine == theirs
        torch.testing.assert_close(target, other)


def test_two_processes_see_what_one_with_twice_the_batch_sees(index):
    dataset = SceneDataset(index)

    def tokens(batch_size: int, rank: int, world_size: int) -> list[list[str]]:
        sampler = PositionSampler(len(dataset), batch_size, seed=5, rank=rank, world_size=world_size)
        return [scenes.token for scenes in ResumableLoader(dataset, sampler, collate_fn=collate_scenes)]

    one, first, second = tokens(6, 0, 1), tokens(3, 0, 2), tokens(3, 1, 2)
    assert one == [a + b for a, b in zip(first, second, strict=True)]
    assert len({t for batch in one for t in batch}) == 24  # each sample once per epoch


class FakeHidden:
    """Hidden states that only say which tokens were asked for."""

    def fetch(self, tokens):
        return list(tokens)


def test_hidden_states_travel_with_their_tokens(index):
    module = SceneDataModule(index, val=index, batch_size=4, eval_batch_size=5, hidden=FakeHidden())
    module.setup("fit")
    for scenes, hidden in [*module.train_dataloader(), *module.val_dataloader()]:
        assert hidden == scenes.token
    in_order = [t for scenes, _ in module.val_dataloader() for t in scenes.token]
    assert in_order == SceneDataset(index).tokens
    with pytest.raises(DataError, match=r"datamodule\.test"):
        module.test_dataloader()
    assert SceneDataModule(index).val_dataloader() == []


def test_missing_hidden_states_are_found_before_training(index):
    class Stored(FakeHidden):
        def __contains__(self, item):
            return item != token(5, "log-b")

    module = SceneDataModule(index, hidden=Stored())
    with pytest.raises(MissingError, match=rf"1 of 27 samples .*first: {token(5, 'log-b')}"):
        module.setup("fit")


def test_collate_refuses_targets_of_some():
    with pytest.raises(DataError, match="0 samples"):
        JoinHidden(None)([])


def test_finished_index_is_not_built_again_and_another_one_is_refused(world, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    build_index(NavsimLogs(world, "mini"), folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    build_index(NavsimLogs(world, "mini"), folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    with pytest.raises(FingerprintMismatch, match=r"fields\.cameras.*CAM_L0"):
        build_index(NavsimLogs(world, "mini"), folder, cameras=["CAM_L0"])
    with pytest.raises(FingerprintMismatch, match=r"fields\.filter"):
        build_index(NavsimLogs(world, "mini", scene_filter=SceneFilter(max_scenes=2)), folder)


def build_in_process(world, folder, kill_after: int) -> subprocess.CompletedProcess:
    """Builds in a process of its own that is killed with SIGKILL once ``kill_after`` parts exist."""
    code = f"""
import os, signal
from navsim_ext import scene_index
from navsim_ext.readers import NavsimLogs
build, parts = scene_index._build_part, 0
def part(*arguments):
    global parts
    if parts == {kill_after}:
        os.kill(os.getpid(), signal.SIGKILL)
    parts += 1
    return build(*arguments)
scene_index._build_part = part
scene_index.build_index(NavsimLogs({str(world)!r}, "mini"), {str(folder)!r}, cameras={VIEWS!r})
"""
    return forked.run("-c", code)


def test_killed_build_goes_on_and_gives_the_same_bytes(world, index, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    assert build_in_process(world, folder, 2).returncode == -signal.SIGKILL
    with pytest.raises(MissingError, match="not a finished scene index"):
        SceneDataset(folder)
    read: list[str] = []
    build = scene_index._build_part
    monkeypatch.setattr(
        scene_index, "_build_part", lambda source, name, *rest: read.append(name) or build(source, name, *rest)
    )
    build_index(NavsimLogs(world, "mini"), folder, cameras=VIEWS)
    assert read == ["log-c"]
    for name in ("index.json", "fingerprint.json", *(f"{array}.npy" for array in scene_index.ARRAYS)):
        assert (folder / name).read_bytes() == (index / name).read_bytes(), name


def test_two_worker_processes_give_the_same_bytes(world, index, tmp_path):
    folder = tmp_path / "index"
    build_index(NavsimLogs(world, "mini"), folder, cameras=VIEWS, workers=2)
    for name in scene_index.ARRAYS:
        assert (folder / f"{name}.npy").read_bytes() == (index / f"{name}.npy").read_bytes(), name


def test_limit_and_skipping_over_interruptions(tmp_path, monkeypatch):
    for log in LOGS:
        frames = [make_frame(i, log) for i in range(FRAMES)]
        frames[0]["driving_command"] = np.zeros(4)  # spoils the first window of each log
        write_log(tmp_path, frames, log)
    limited = NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(max_scenes=10), skip_bad=True)
    assert len(build_index(limited, tmp_path / "limited")) == 10
    assert SceneDataset(tmp_path / "limited").tokens == limited.tokens

    def source() -> NavsimLogs:
        return NavsimLogs(tmp_path, "mini", skip_bad=True, report_path=tmp_path / "skipped.json")

    build = scene_index._build_part

    def stop_at_last(*arguments):
        if arguments[1] == "log-c":
            raise KeyboardInterrupt
        return build(*arguments)

    monkeypatch.setattr(scene_index, "_build_part", stop_at_last)
    with pytest.raises(KeyboardInterrupt):
        build_index(source(), tmp_path / "index")
    monkeypatch.setattr(scene_index, "_build_part", build)
    assert len(build_index(source(), tmp_path / "index")) == 3 * 8
    report = json.loads((tmp_path / "skipped.json").read_text())
    assert [entry["log"] for entry in report["entries"]] == list(LOGS)


def test_token_in_two_logs(tmp_path):
    for log in ("log-a", "log-b"):
        write_log(tmp_path, [make_frame(i) for i in range(14)], log)
    with pytest.raises(DataError, match=rf"token {token(3)} of log log-b is in log log-a"):
        build_index(NavsimLogs(tmp_path, "mini"), tmp_path / "index")
    assert len(build_index(NavsimLogs(tmp_path, "mini", skip_bad=True), tmp_path / "other")) == 1


def test_nothing_left_is_an_error(tmp_path):
    write_log(tmp_path, [make_frame(i, map_location="mars") for i in range(14)])
    with pytest.raises(NothingSelected, match="0 scenes"):
        build_index(NavsimLogs(tmp_path, "mini", skip_bad=True), tmp_path / "index")
    assert not (tmp_path / "index" / "index.json").exists()


def test_full_disk_and_unwritable_folder(world, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scene_index.os, "replace", full)
        with pytest.raises(CannotWrite, match=r"disk is full \(\d+ MiB free\).*what is finished is kept"):
            build_index(NavsimLogs(world, "mini"), tmp_path / "index")
    assert len(build_index(NavsimLogs(world, "mini"), tmp_path / "index")) == 27
    (tmp_path / "file").write_text("")
    with pytest.raises(TriviumError, match="another output_dir"):
        build_index(NavsimLogs(world, "mini"), tmp_path / "file" / "index")


@pytest.mark.parametrize("damage", ["truncate", "remove", "shorten"])
def test_damaged_index_is_refused(world, tmp_path, damage):
    folder = tmp_path / "index"
    build_index(NavsimLogs(world, "mini"), folder)
    path = folder / "target.npy"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "remove":
        path.unlink()
    else:
        np.save(path, np.load(path)[:-1])
    with pytest.raises(TriviumError, match=r"target\.npy.*build"):
        SceneDataset(folder)


def test_an_index_of_an_earlier_format_is_refused_by_name(world, tmp_path):
    build_index(NavsimLogs(world, "mini"), tmp_path)
    path = tmp_path / "index.json"
    content = json.loads(path.read_text())
    del content["checksum"], content["files"]  # as the second format was
    path.write_text(json.dumps(content | {"format": "trivium-scene-index-2"}))
    with pytest.raises(DataError, match=r"scene-index-2'.*scene-index-3'.*python -m navsim_ext\.dataset"):
        SceneDataset(tmp_path)
    write_checked_json(path, content | {"format": FORMAT})
    with pytest.raises(DataError, match=r"index\.json.*files.*build the index again"):
        SceneDataset(tmp_path)


def read_all(folder) -> list:
    """Everything that the samples of an index say."""
    dataset = SceneDataset(folder, cameras=VIEWS)
    samples = [dataset[i] for i in range(len(dataset))]
    return [dataset.tokens, dataset.fingerprint.digest] + [
        (s.token, s.log_name, s.cameras, *(a.numpy().tobytes() for a in (s.history, s.status, s.target)))
        for s in samples
    ]


def test_no_damage_of_an_index_changes_a_sample_in_silence(index, tmp_path):
    """Each file of an index: a flipped bit or a cut is named, or changes nothing that is read."""
    folder = tmp_path / "index"
    shutil.copytree(index, folder)
    verdicts = judge_damage(folder, lambda: read_all(folder), np.random.default_rng(0))
    named = {name for name, verdict in verdicts.items() if verdict["named"]}
    read = {"index.json", "fingerprint.json", *(f"{array}.npy" for array in scene_index.ARRAYS)}
    assert named >= read - {"timestamp_us.npy"}  # no sample has its time


def test_cost_and_missing_files_are_told_from_the_first_logs(world, tmp_path):
    options = {"cameras": VIEWS, "workers": 2}
    estimate = tell_cost(NavsimLogs(world, "mini"), tmp_path / "index", **options)
    assert (estimate.items, estimate.files_checked) == (3, 3)
    assert estimate.hours > 0
    assert not (tmp_path / "index").exists()
    arrays = build_index(NavsimLogs(world, "mini"), tmp_path / "index", cameras=VIEWS).arrays
    assert estimate.bytes_needed == pytest.approx(COPIES * sum(array.nbytes for array in arrays.values()), rel=0.05)
    assert tell_cost(NavsimLogs(world, "mini"), tmp_path / "index", **options) is None  # nothing is left to do
    few = NavsimLogs(world, "mini", scene_filter=SceneFilter(max_scenes=2))
    assert tell_cost(few, tmp_path / "few", **options).items == 1
    with pytest.raises(PreflightError, match=r"81 of 84 input files are missing:\n.*log-a/CAM_F0/3\.jpg"):
        tell_cost(NavsimLogs(world, "mini"), tmp_path / "new", check_pictures=True, **options)
    more = {"scene_filter": SceneFilter(log_names=["log-b", "log-z"])}
    with pytest.raises(PreflightError, match=r"1 of 2 input files are missing:\n.*mini/log-z\.pkl"):
        tell_cost(NavsimLogs(world, "mini", **more), tmp_path / "new", **options)
    assert tell_cost(NavsimLogs(world, "mini", skip_bad=True, **more), tmp_path / "new", **options).items == 1


def test_indices_of_the_parts_of_an_experiment(world, index, tmp_path):
    file = tmp_path / "filter.yaml"
    file.write_text("{log_names: [log-b], frame_interval: 1}")
    chosen = {"split": "mini", "scene_filter": str(file), "index": None}
    data = OmegaConf.create(
        {"root": str(world), "train": chosen, "val": chosen, "test": chosen | {"index": str(index)}}
    )
    folders = part_indices(data, tmp_path / "index")
    assert folders == {"train": tmp_path / "index/train", "val": tmp_path / "index/val", "test": index}
    assert SceneDataset(folders["train"], cameras=()).index.logs == ("log-b",)
    for part in ("train", "val"):  # the trainings open them in processes of their own, minutes later
        wrong = OmegaConf.merge(data, {part: {"index": str(tmp_path / "nowhere")}})
        with pytest.raises(MissingError, match="nowhere is not a finished scene index"):
            part_indices(wrong, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_command_line_and_configuration(world, tmp_path, monkeypatch, capsys):
    quiet = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    options = [f"data.root={world}", "data.split=mini"]
    assert compose("dataset", [*options, f"output_dir={tmp_path}"]).data.cameras == ["CAM_F0"]

    def run(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dataset", *options, *quiet, *more])
        main()

    with pytest.raises(SystemExit) as ended:
        run(f"output_dir={tmp_path / 'index'}")
    assert ended.value.code == 2
    assert "log-a/CAM_F0/3.jpg" in capsys.readouterr().err  # this world has no pictures
    with pytest.raises(SystemExit) as ended:
        run(f"output_dir={tmp_path / 'index'}", "skip_bad=true")
    assert ended.value.code == 2
    assert "0 scenes were selected; 27 bad entries" in capsys.readouterr().err
    run(f"output_dir={tmp_path / 'other'}", "check_pictures=false")
    said = capsys.readouterr().err
    assert "scene index: 3 of 3 logs to read, about 27 samples" in " ".join(said.split())
    assert "27 samples of 3 logs" in said
    assert len(SceneDataset(tmp_path / "other")) == 27
    with pytest.raises(SystemExit) as ended:
        run(f"output_dir={tmp_path / 'none'}", "data.root=null")
    assert ended.value.code == 2
    assert "OPENSCENE_DATA_ROOT" in capsys.readouterr().err
