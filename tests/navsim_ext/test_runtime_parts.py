"""Laws of the pieces that a run is made of: data order, average, tables, preflight, progress."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import os
import random
import select
import signal
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from damage import judge_damage
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from navsim_ext.errors import CorruptFile, DataError, TriviumError
from navsim_ext.runtime.checkpoint_file import AtomicCheckpointIO, load_checkpoint, require_undamaged
from navsim_ext.runtime.checkpoint_folder import RunCheckpointError
from navsim_ext.runtime.csv_log import CsvLog
from navsim_ext.runtime.ema import EMA, EmaError
from navsim_ext.runtime.lock import FolderBusy, FolderLock
from navsim_ext.runtime.preflight import PreflightError, measure_slice, preflight
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.rng import ResumeMismatch, derive_seed
from navsim_ext.runtime.sampler import LengthGrouped, PositionSampler, ResumableLoader
from navsim_ext.runtime.throughput import count_samples
from navsim_ext.runtime.torch_file import NotAdmitted
from navsim_ext.scene import SceneBatch


def epoch_of(sampler: PositionSampler) -> list[list[tuple[int, int]]]:
    return list(iter(sampler))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 9), st.data())
def test_order_depends_on_position_alone(items, batch, world, shuffle, seed, data):
    make = lambda **other: PositionSampler(  # noqa: E731
        items, seed=seed, shuffle=shuffle, drop_last=False, **other
    )
    whole = make(batch_size=batch * world, rank=0, world_size=1)
    whole.set_epoch(2)
    parts = [make(batch_size=batch, rank=rank, world_size=world) for rank in range(world)]
    for part in parts:
        part.set_epoch(2)
    joined = [list(itertools.chain(*batches)) for batches in zip(*(epoch_of(part) for part in parts))]
    assert joined == epoch_of(whole)  # W processes see what one process with W times the batch sees
    start = data.draw(st.integers(0, len(whole)))
    whole.load_state_dict(whole.state_dict() | {"position": start})
    assert epoch_of(whole) == joined[start:]  # starting anywhere is the tail of the whole
    seen = Counter(index for batches in joined for index, _ in batches)
    assert set(seen) == set(range(items))
    assert sum(seen.values()) == len(joined) * batch * world


def test_epochs_and_seeds_differ():
    sampler = PositionSampler(100, 10, seed=0, rank=0, world_size=1)
    first = sampler.order(0)
    assert sorted(first) == list(range(100))
    assert (first != sampler.order(1)).any()
    assert (first != PositionSampler(100, 10, seed=1, rank=0, world_size=1).order(0)).any()
    assert (PositionSampler(7, 3, seed=0, shuffle=False, rank=0, world_size=1).order(0) == np.arange(6)).all()


def test_sampler_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match=r"5 items do not fill one global batch of 6 \(3 x 2 processes\)"):
        PositionSampler(5, 3, seed=0, rank=0, world_size=2)
    with pytest.raises(DataError, match="0 items"):
        PositionSampler(0, 3, seed=0, drop_last=False, rank=0, world_size=2)
    sampler = PositionSampler(8, 2, seed=0, rank=0, world_size=1)
    with pytest.raises(ResumeMismatch, match=r"num_items: 9 \| 8"):
        sampler.load_state_dict(sampler.state_dict() | {"num_items": 9})


def test_grouping_by_length_wastes_less_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(10, 1000, size=1024)
    plain = PositionSampler(1024, 16, seed=0, rank=0, world_size=1)
    grouped = PositionSampler(1024, 16, seed=0, rank=0, world_size=1, grouping=LengthGrouped(lengths, mega=8))
    order = grouped.order(0)
    assert sorted(order) == list(range(1024))
    padded = lambda order: lengths[order].reshape(-1, 16).max(axis=1).sum() * 16  # noqa: E731
    assert padded(order) < 1.15 * lengths.sum() < 1.5 * lengths.sum() < padded(plain.order(0))
    assert lengths[order[:16]].max() == lengths.max()  # the largest batch comes first
    assert (order != grouped.order(1)).any()


class Random(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index + random.random(), np.random.rand(), torch.rand(()).item()])  # noqa: NPY002


def test_loader_state_counts_what_was_handed_out():
    make = lambda workers: ResumableLoader(  # noqa: E731
        Random(), PositionSampler(12, 2, seed=4, rank=0, world_size=1), num_workers=workers
    )
    plain = make(0)
    state = torch.get_rng_state()
    whole = [*plain, *plain]  # two epochs
    assert torch.equal(state, torch.get_rng_state())  # the training stream is untouched
    loader = make(2)
    first = [batch for _, batch in zip(range(3), loader)]
    saved = loader.state_dict()
    assert (saved["epoch"], saved["position"]) == (0, 3)  # although the workers are further on
    resumed = make(1)
    resumed.load_state_dict(saved)
    both = torch.stack([*first, *resumed, *resumed])
    assert torch.equal(both, torch.stack(whole))
    end = plain.state_dict()
    assert (end["epoch"], end["position"]) == (1, 6)
    assert len(torch.unique(both[:, :, 2])) == 24  # augmentation differs between items and epochs


def test_seeds_are_spread():
    seeds = {derive_seed(base, kind, index) for base in range(4) for kind in ("a", "b") for index in range(500)}
    assert len(seeds) == 4000
    assert derive_seed(1, 11) != derive_seed(11, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_average_follows_its_recursion_and_swaps_exactly():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    with torch.no_grad():
        module.bias.fill_(float("inf"))  # a frozen parameter may be anything
    ema = EMA(decay=0.8)
    expected = module.weight.detach().clone()
    ema.swap_in(module)
    ema.swap_out(module)
    for _ in range(5):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        expected = 0.8 * expected + 0.2 * module.weight.detach()
        ema.update(module)
    torch.testing.assert_close(ema.shadow["weight"], expected)
    live = module.weight.detach().clone()
    ema.swap_in(module)
    assert torch.equal(module.weight, ema.shadow["weight"])
    ema.swap_out(module)
    assert torch.equal(module.weight, live)
    other = EMA(decay=0.8)
    other.load_state_dict(ema.state_dict())
    other.update(module)
    ema.update(module)
    assert torch.equal(other.shadow["weight"], ema.shadow["weight"])
    with pytest.raises(EmaError, match=r"lacks.*other"):
        other.update(nn.ModuleDict({"other": nn.Linear(1, 1)}))


def test_average_keeps_float32_of_bfloat16_weights():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    ema = EMA(decay=0.999)
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema.update(module)
    with torch.no_grad():
        module.weight.fill_(2.0)
    for _ in range(1000):
        ema.update(module)
    assert ema.shadow["weight"].item() == pytest.approx(2.0 - 0.999**1000, rel=1e-4)  # in bfloat16 it would stay 1


def test_warm_up_follows_early_weights():
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(decay=0.999, warmup=True)
    ema.update(module)
    with torch.no_grad():
        module.weight.add_(1.0)
    before = ema.shadow["weight"].item()
    ema.update(module)
    assert ema.shadow["weight"].item() == pytest.approx(before + 1.0 * (1 - 3 / 12))
    with pytest.raises(EmaError, match=r"1\.0"):
        EMA(decay=1.0)


def test_table_survives_a_cut_line_and_a_replay(tmp_path):
    table = CsvLog(tmp_path / "a.csv")
    for step in range(4):
        table.write({"step": step, "loss": 0.5 * step})
    table.write({"step": 3, "score": 9.0})  # a new column
    with open(tmp_path / "a.csv", "a") as stream:
        stream.write("4,0.")  # killed while writing
    again = CsvLog(tmp_path / "a.csv")
    again.truncate(3)
    again.write({"step": 3, "loss": 7.0})
    again.write({"step": 3, "loss": 8.0})  # written twice: the first stands
    rows = CsvLog(tmp_path / "a.csv").read()
    assert [(row["step"], row["loss"], row["score"]) for row in rows] == [
        ("0", "0.0", ""), ("1", "0.5", ""), ("2", "1.0", ""), ("3", "7.0", ""),
    ]  # fmt: skip


def test_a_row_after_a_cut_line_is_a_line_of_its_own(tmp_path):
    CsvLog(tmp_path / "a.csv").write({"step": 0, "loss": 1.0})
    with open(tmp_path / "a.csv", "a") as stream:
        stream.write("1,0.")
    CsvLog(tmp_path / "a.csv").write({"step": 1, "loss": 2.0})
    assert (tmp_path / "a.csv").read_text().split() == ["step,loss", "0,1.0", "1,2.0"]


@pytest.mark.parametrize(
    "content",
    [b"step,loss\n0,1.0,2.0\n", b"step,loss\n0\n", b"step,loss\nx,1.0\n", b"stop,loss\n0,1.0\n", b"step,lo\xff\n0,1\n"],
)  # fmt: skip
def test_a_damaged_table_is_named(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"a\.csv.*restore it, or delete it"):
        CsvLog(tmp_path / "a.csv").truncate(1)


def test_preflight_lists_every_problem_at_once(tmp_path):
    with pytest.raises(PreflightError) as caught:
        preflight(output_dir=tmp_path / "new", items=10, bytes_per_item=1e17, memory_bytes=1e15,
                  files=[tmp_path / f"{i}.jpg" for i in range(25)])  # fmt: skip
    message = str(caught.value)
    assert "3 problem(s)" in message
    assert "25 of 25 input files are missing" in message
    assert "and 5 more" in message
    assert "GiB are free" in message
    with pytest.raises(PreflightError, match="0 items"):
        preflight(output_dir=tmp_path, items=0)
    console = Console(file=io.StringIO(), width=100)
    estimate = preflight(output_dir=tmp_path / "a/b", items=7200, seconds_per_item=2.0, workers=4, console=console)
    assert estimate.hours == 1.0
    assert "1.00 h" in console.file.getvalue()
    assert not (tmp_path / "a").exists()


def test_measuring_a_slice_leaves_out_the_first_call():
    calls = []
    seconds = measure_slice(calls.append, list(range(5)))
    assert calls == [0, 1, 2, 3, 4]
    assert seconds >= 0
    with pytest.raises(PreflightError, match="0 items"):
        measure_slice(calls.append, [])


def test_progress_passes_items_through_and_tells(caplog):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert list(track(range(5), "scoring", done=2, console=console)) == [0, 1, 2, 3, 4]
    assert "scoring" in console.file.getvalue()
    assert "7/7" in console.file.getvalue()
    with caplog.at_level(logging.INFO):
        list(track(iter("abc"), "caching", console=Console(file=io.StringIO())))
    assert "caching: 3/3 done" in caplog.text


def test_samples_are_counted_in_any_batch():
    scenes = SceneBatch(["a"] * 3, ["l"] * 3, torch.zeros(3, 4, 3), torch.zeros(3, 8))
    assert count_samples((scenes, None)) == 3
    assert count_samples({"x": torch.zeros(4, 2)}) == 4
    assert count_samples([]) == 0


def test_taking_a_lock_removes_what_killed_writers_left_but_not_where_others_work(tmp_path):
    kept = [tmp_path / "run" / "data", tmp_path / "run" / "scores" / ".b.parquet.77.tmp", tmp_path / "run" / ".mine"]
    left = [tmp_path / "run" / ".a.json.1-aaaaaa.tmp", tmp_path / "run" / "maps" / "x" / ".map.gpkg.5-0f0f0f.tmp.gpkg",
            tmp_path / "run" / "maps" / "x" / ".map.gpkg.5-0f0f0f.tmp.gpkg-journal"]  # fmt: skip
    for path in (*kept, *left):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with FolderLock(tmp_path / "run" / "scores"):
        kept[1].touch()
        with FolderLock(tmp_path / "run"):
            assert all(path.exists() for path in kept)
            assert not any(path.exists() for path in left)
    with FolderLock(tmp_path / "run"):
        assert [path.exists() for path in kept] == [True, False, True]


def test_lock_is_released_and_reports_its_holder(tmp_path):
    with (
        FolderLock(tmp_path / "run"),
        pytest.raises(FolderBusy, match=rf"process {os.getpid()} .*since"),
        FolderLock(tmp_path / "run"),
    ):
        pass
    with FolderLock(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(TriviumError, match="choose another output_dir"), FolderLock(tmp_path / "file"):
        pass


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "epoch=0-step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(2)}, path)

    class Bad:
        def __reduce__(self):
            raise RuntimeError("no space left on device")

    with pytest.raises(RunCheckpointError, match="no space left on device"):
        AtomicCheckpointIO().save_checkpoint({"a": Bad()}, path)
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    torch.save({"a": TriviumError("x")}, tmp_path / "bad.ckpt")
    with pytest.raises(RunCheckpointError, match="not admitted"):
        load_checkpoint(tmp_path / "bad.ckpt")


POOL = """
import sys, time
from navsim_ext.runtime.processes import process_pool

def work(seconds):
    print("working", flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    with process_pool(2) as pool:
        print(list(pool.map(abs, [-1, -2])), flush=True)
        list(pool.map(work, [600, 600]))
"""


@pytest.mark.parametrize("form", ["file", "folder"])
def test_no_damage_of_a_checkpoint_changes_it_in_silence(tmp_path, form):
    """PyTorch reads flipped bits as other weights."""
    path = tmp_path / "last.ckpt"
    content = {"state_dict": {f"w{i}": torch.randn(20, 20) for i in range(8)}, "epoch": 3, "callbacks": {"a": [1, 2.5]}}
    if form == "folder":
        (path / "checkpoint").mkdir(parents=True)
        weights = content | {"module": content["state_dict"]}
        torch.save(weights, path / "checkpoint" / "mp_rank_00_model_states.pt")
    else:
        torch.save(content, path)

    def read():
        found = load_checkpoint(path)
        weights = {name: value.numpy().tobytes() for name, value in found["state_dict"].items()}
        return weights, found["epoch"], found["callbacks"]

    verdicts = judge_damage(tmp_path, read, np.random.default_rng(0), 400)
    (verdict,) = verdicts.values()
    assert verdict["named"] > 300  # the rest is padding that nothing reads
    (file,) = (each for each in tmp_path.rglob("*") if each.is_file())
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(b"state_dict") + 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(RunCheckpointError, match="not as it was written"):
        require_undamaged(path)


def packed_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.writestr("archive/data/0", bytes(50_000_000))
    return path


def shared_bomb(path):
    """Two thousand entries that are all the same bytes of the file: a kilobyte each, read as a gigabyte in all."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.writestr("archive/data/0", bytes(500_000))
        first = archive.infolist()[1]
        for number in range(1, 2000):
            entry = copy.copy(first)
            entry.filename = f"archive/data/{number}"
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
    return path


@pytest.mark.parametrize("make", [packed_bomb, shared_bomb])
@pytest.mark.parametrize("read", [require_undamaged, load_checkpoint])
def test_a_checkpoint_that_unpacks_to_much_is_refused_before_it_is_read(tmp_path, monkeypatch, make, read):
    path = make(tmp_path / "epoch=0-step=1.ckpt")
    assert path.stat().st_size < 1_000_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("an entry was read"))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda *_: pytest.fail("an entry was read"))
    with pytest.raises(NotAdmitted, match=r"no file of torch.save: [02] packed entries, \d+ bytes in a file of"):
        read(path)


def test_workers_end_with_their_command(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(POOL)
    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline() for _ in range(3)] == ["[1, 2]\n", "working\n", "working\n"]
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    ended, _, _ = select.select([parent.stdout], [], [], 120.0)
    assert ended, "workers hold the pipe two minutes after their command was killed"
    assert parent.stdout.read() == ""
