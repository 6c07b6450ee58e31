"""The sharded store under faults: flipped bytes, cut files, lost shards, full disks, kill -9."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
from damage import kill_storm

from navsim_ext.errors import MissingError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards import CorruptShard, ShardStore, ShardWriter, StorageFull, merge, verify

FINGERPRINT = Fingerprint("test", {"seed": 1}, info={"host": "somewhere"})


def arrays_of(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    return {"values": rng.integers(0, 256, 40 + i % 7, dtype=np.uint8), "score": rng.normal(size=3)}


def fill(folder: Path, tokens, **options) -> None:
    with ShardWriter(folder, FINGERPRINT, **options) as writer:
        for i in tokens:
            writer.put(f"{i:04x}", arrays_of(i))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read_all(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    store = ShardStore(folder)
    return {token: store.get(token) for token in store.tokens}


def flip(path: Path, position: int, mask: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ mask]))


@pytest.mark.parametrize("merged", [False, True])
def test_every_flipped_byte_is_detected_and_never_read(tmp_path, merged):
    """Exhaustive over headers' text, indices, records and identity; header padding is sampled."""
    fill(tmp_path, range(4))
    if merged:
        merge(tmp_path)
    assert verify(tmp_path).ok
    rng = random.Random(0)
    shard = next(tmp_path.glob("*.safetensors"))
    tried = 0
    for path in (shard, tmp_path / "fingerprint.json", tmp_path / "store.json"):
        for position in range(path.stat().st_size):
            if path == shard and 1500 < position < 4080 and position % 101:
                continue
            mask = 1 << rng.randrange(8) if position % 2 else rng.randrange(1, 256)
            flip(path, position, mask)
            assert not verify(tmp_path).ok, f"byte {position} of {path.name} ^ {mask:#x}"
            with pytest.raises(TriviumError):
                read_all(tmp_path)
            flip(path, position, mask)
            tried += 1
    assert tried > 2000
    assert verify(tmp_path).ok


def test_a_flipped_byte_is_named_and_other_records_stay_readable(tmp_path):
    fill(tmp_path, range(5))
    path = tmp_path / "shard-0-000000.safetensors"
    start, stop = ShardStore(tmp_path).locate("0002")[0].span(2)
    flip(path, start + 5, 0x10)
    store = ShardStore(tmp_path)
    assert store.get("0001")["values"].tobytes() == arrays_of(1)["values"].tobytes()
    with pytest.raises(CorruptShard, match=rf"shard-0-000000.*token 0002 at bytes {start}\.\.{stop}"):
        store.get("0002")
    with pytest.raises(CorruptShard, match="0002"):
        merge(tmp_path)
    assert path.exists()
    report = verify(tmp_path)
    assert len(report.problems) == 1
    with pytest.raises(CorruptShard, match="1 problems"):
        report.require_ok()


def test_the_remedy_works_a_damaged_shard_deleted_and_made_again(tmp_path):
    fill(tmp_path, range(20), shard_bytes=300)
    before = contents(tmp_path)
    (tmp_path / "shard-0-000001.safetensors").unlink()
    with pytest.raises(MissingError, match="shard-0-000001"):
        ShardStore(tmp_path)
    with ShardWriter(tmp_path, FINGERPRINT, shard_bytes=300) as writer:
        for i in range(20):
            if f"{i:04x}" not in writer.done:
                writer.put(f"{i:04x}", arrays_of(i))
    assert contents(tmp_path) == before


def test_a_lost_part_of_a_merged_store_is_missed(tmp_path):
    fill(tmp_path, range(20))
    merge(tmp_path, part_bytes=300)
    before = contents(tmp_path)
    parts = sorted(tmp_path.glob("part-*"))
    parts[-1].unlink()
    assert parts[-1].name in verify(tmp_path).problems[0]
    for use in (ShardStore, merge):
        with pytest.raises(MissingError, match=parts[-1].name):
            use(tmp_path)
    with ShardWriter(tmp_path, FINGERPRINT) as writer:
        for i in range(20):
            if f"{i:04x}" not in writer.done:
                writer.put(f"{i:04x}", arrays_of(i))
    merge(tmp_path, part_bytes=300, accept_missing=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kept", [0, 7, 100, 4095, 4096, 4200, -1])
def test_a_shard_cut_short_is_refused(tmp_path, kept):
    fill(tmp_path, range(3))
    path = tmp_path / "shard-0-000000.safetensors"
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(CorruptShard, match=path.name):
        ShardStore(tmp_path)
    assert path.name in verify(tmp_path).problems[0]


def test_a_shard_of_another_store_is_refused(tmp_path):
    fill(tmp_path / "a", range(2))
    with ShardWriter(tmp_path / "b", Fingerprint("test", {"seed": 2}), writer="z") as writer:
        writer.put("x", arrays_of(0))
    shutil.copy(tmp_path / "b" / "shard-z-000000.safetensors", tmp_path / "a")
    with pytest.raises(CorruptShard, match="another store"):
        ShardStore(tmp_path / "a")


@pytest.mark.parametrize("victim", ["data", "journal"])
def test_a_full_disk_keeps_what_was_acknowledged_and_goes_on(tmp_path, monkeypatch, victim):
    """The disk fills in the middle of a record or of its journal line; later there is room again."""
    writer = ShardWriter(tmp_path, FINGERPRINT)
    writer.put("0000", arrays_of(0))
    real = os.pwritev
    calls = []

    def full(descriptor, buffers, position):
        calls.append(descriptor)
        if len(set(calls)) == (1 if victim == "data" else 2):
            if calls.count(descriptor) == 1:
                return real(descriptor, [memoryview(buffers[0])[:10]], position)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, buffers, position)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageFull, match=r"1 records are kept"):
        writer.put("0001", arrays_of(1))
    monkeypatch.setattr(os, "pwritev", real)
    assert "0001" not in writer.done
    writer.put("0002", arrays_of(2))
    writer.put("0001", arrays_of(1))
    writer.close()
    assert verify(tmp_path).require_ok().records == 3
    for i in range(3):
        np.testing.assert_array_equal(ShardStore(tmp_path).get(f"{i:04x}")["score"], arrays_of(i)["score"])


def test_merge_without_room_removes_nothing(tmp_path, monkeypatch):
    fill(tmp_path, range(5))
    before = contents(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(StorageFull, match="1 are free"):
        merge(tmp_path)
    assert contents(tmp_path) == before


def test_a_torn_end_is_cut_off(tmp_path):
    """Half a record and half a journal line, as a power cut leaves them."""
    writer = ShardWriter(tmp_path, FINGERPRINT)
    for i in range(4):
        writer.put(f"{i:04x}", arrays_of(i))
    writer.abandon()
    data, journal = tmp_path / "shard-0-000000.open", tmp_path / "shard-0-000000.journal"
    saved = data.read_bytes(), journal.read_bytes()
    for data_cut, journal_cut in ((1, 0), (0, 1), (0, 300), (4000, 0), (200, 0), (130, 130)):
        data.write_bytes(saved[0][: max(0, len(saved[0]) - data_cut)])
        journal.write_bytes(saved[1][: len(saved[1]) - journal_cut])
        kept = min(journal.read_bytes().count(b"\n"), max(0, data.stat().st_size - 4096) // 128)  # 128 bytes a record
        writer = ShardWriter(tmp_path, FINGERPRINT)
        assert writer.done == {f"{i:04x}" for i in range(kept)}, (data_cut, journal_cut)
        writer.put("zz", arrays_of(9))
        writer.abandon()
        for path in (data, journal):
            assert path.exists()
    ShardWriter(tmp_path, FINGERPRINT).close()
    assert verify(tmp_path).ok


def test_bytes_that_a_power_cut_lost_are_not_taken_for_a_record(tmp_path):
    """The journal line survived, the record's pages did not: they read as zeros."""
    writer = ShardWriter(tmp_path, FINGERPRINT)
    for i in range(4):
        writer.put(f"{i:04x}", arrays_of(i))
    writer.abandon()
    data = tmp_path / "shard-0-000000.open"
    content = bytearray(data.read_bytes())
    content[4096 + 2 * 128 : 4096 + 3 * 128] = bytes(128)
    data.write_bytes(content)
    with ShardWriter(tmp_path, FINGERPRINT) as writer:
        assert writer.done == {"0000", "0001"}
    assert verify(tmp_path).require_ok().records == 2


WRITE = """
import sys, numpy as np
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards import ShardWriter
folder, writer, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with ShardWriter(folder, Fingerprint("test", {"seed": 1}), writer=writer, shard_bytes=40_000) as out:
    for i in range(count):
        if f"{i:04x}" not in out.done:
            rng = np.random.default_rng(i)
            out.put(f"{i:04x}", {"values": rng.integers(0, 256, 3000 + i, dtype=np.uint8)})
            print(f"{i:04x}", flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_9_storm_ends_in_the_undisturbed_store(tmp_path, kills):
    """Writers are killed after a random number of acknowledged records: each of those is there afterwards."""
    count = 130 * kills
    script, storm, calm = tmp_path / "write.py", tmp_path / "storm", tmp_path / "calm"
    script.write_text(WRITE)
    promised = kill_storm(script, storm, kills, count, (30, 100))
    assert len(promised) < count
    with ShardWriter(storm, Fingerprint("test", {"seed": 1})) as writer:
        assert promised <= writer.done
    for folder in (storm, calm):
        assert forked.run(script, folder, 0, count).returncode == 0
        merge(folder, part_bytes=1 << 20)
        assert verify(folder).require_ok().records == count
    assert contents(storm) == contents(calm)
