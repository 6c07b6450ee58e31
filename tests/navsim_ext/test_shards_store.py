"""The sharded store: round trips, resuming, merging to one canonical form, locks, workers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.shards import (
    DuplicateToken,
    ShardError,
    ShardStore,
    ShardWriter,
    WriterLocked,
    merge,
    records,
    verify,
)

FINGERPRINT = Fingerprint("test", {"seed": 1})


def arrays_of(i: int) -> dict[str, np.ndarray]:
    """A small record that depends on nothing but ``i``."""
    rng = np.random.default_rng(i)
    return {
        "polygon": rng.normal(size=(i % 5 + 1, 2)),
        "label": rng.integers(0, 9, i % 3).astype(np.uint8),
        "bits": rng.integers(0, 65536, (3, 4), dtype=np.uint16),
        "time": np.float32(i) * np.ones((), np.float32),
        "valid": rng.random((2, 2)) > 0.5,
    }


def fill(folder: Path, tokens: range, **options) -> None:
    with ShardWriter(folder, FINGERPRINT, **options) as writer:
        for i in tokens:
            writer.put(f"{i:016x}", arrays_of(i))


def assert_holds(folder: Path, tokens: range) -> None:
    store = ShardStore(folder)
    assert set(store.tokens) == {f"{i:016x}" for i in tokens}
    for i in tokens:
        found, expected = store.get(f"{i:016x}"), arrays_of(i)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array, strict=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_round_trip_over_many_shards(tmp_path):
    fill(tmp_path, range(40), shard_bytes=1000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert_holds(tmp_path, range(40))
    assert verify(tmp_path).require_ok().records == 40
    stats = ShardStore(tmp_path).stats()
    assert stats.records == 40
    assert stats.array_bytes["bits"] == 40 * 24
    assert stats.record_bytes_min <= stats.record_bytes_mean <= stats.record_bytes_max


array = hnp.arrays(
    dtype=st.sampled_from(sorted(records.DTYPES)),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1, max_size=5), array, min_size=1, max_size=4), st.booleans())
def test_any_arrays_encode_and_decode(arrays, fortran):
    if fortran:
        arrays = {name: np.asfortranarray(value) for name, value in arrays.items()}
    record = records.encode("token", arrays)
    blob = np.frombuffer(b"".join(record.pieces), np.uint8)
    assert len(blob) == record.num_bytes == records.record_bytes(record.layout, record.shapes)
    assert record.num_bytes % records.RECORD_ALIGNMENT == 0
    assert records.checksum(blob) == record.checksum
    decoded = records.decode(record.layout, record.shapes, blob, 0)
    for name, value in arrays.items():
        assert decoded[name].shape == value.shape
        assert decoded[name].tobytes() == value.tobytes()


def test_big_endian_arrays_are_stored_in_little_endian(tmp_path):
    with ShardWriter(tmp_path, FINGERPRINT) as writer:
        writer.put("a", {"x": np.arange(5, dtype=">i4")})
    np.testing.assert_array_equal(ShardStore(tmp_path).get("a")["x"], np.arange(5))


def test_views_are_read_only_and_outlive_the_store(tmp_path):
    fill(tmp_path, range(3))
    view = ShardStore(tmp_path).get(f"{1:016x}")["polygon"]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    np.testing.assert_array_equal(view, arrays_of(1)["polygon"])


def test_a_shard_is_a_safetensors_file(tmp_path):
    fill(tmp_path, range(4))
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "np") as file:
        assert file.metadata()["records"] == "4"
        assert bytes(file.get_tensor("tokens")).decode() == "".join(f"{i:016x}" for i in range(4))
        start, stop = file.get_tensor("starts")[1:3]
        assert records.checksum(file.get_tensor("data")[start:stop].tobytes()) == file.get_tensor("checksums")[1]


def test_resume_writes_only_what_is_missing(tmp_path):
    fill(tmp_path, range(5))
    with ShardWriter(tmp_path, FINGERPRINT, writer="other") as writer:
        assert writer.done == {f"{i:016x}" for i in range(5)}
        with pytest.raises(DuplicateToken, match=f"{3:016x}"):
            writer.put(f"{3:016x}", arrays_of(3))
        writer.put(f"{5:016x}", arrays_of(5))
    assert_holds(tmp_path, range(6))


def test_an_abandoned_shard_is_taken_up_by_its_own_and_by_other_writers(tmp_path):
    writers = [ShardWriter(tmp_path, FINGERPRINT, writer=writer_id) for writer_id in "ab"]
    for writer, tokens in zip(writers, (range(3), range(3, 6)), strict=True):
        for i in tokens:
            writer.put(f"{i:016x}", arrays_of(i))
        writer.abandon()  # what is left on disk is what a killed process leaves
    assert len(ShardStore(tmp_path)) == 0
    assert len(ShardStore(tmp_path).unfinished) == 2
    assert not verify(tmp_path).ok
    with pytest.raises(MissingError, match="run merge"):
        ShardStore(tmp_path).get(f"{1:016x}")
    with ShardWriter(tmp_path, FINGERPRINT, writer="a") as writer:
        assert len(writer.done) == 6
        writer.put(f"{6:016x}", arrays_of(6))
    assert_holds(tmp_path, range(7))
    assert verify(tmp_path).ok


@pytest.mark.parametrize("seed", range(3))
def test_merge_is_canonical_whatever_the_writers(tmp_path, seed):
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    fill(plain, range(30), shard_bytes=1500)
    shuffled = list(range(30))
    random.Random(seed).shuffle(shuffled)
    for writer in range(3):
        fill(mixed, shuffled[writer::3], writer=f"rank-{writer}", shard_bytes=700)
    fill(plain, range(0))
    reports = [merge(folder, part_bytes=2000) for folder in (plain, mixed)]
    assert reports[0].records == reports[1].records == 30
    assert contents(plain) == contents(mixed)
    assert_holds(mixed, range(30))
    assert ShardStore(mixed).tokens == sorted(ShardStore(mixed).tokens)
    assert merge(mixed, part_bytes=2000).parts_written == 0


def test_merge_after_more_writing_and_from_other_folders(tmp_path):
    here, there, new = tmp_path / "here", tmp_path / "there", tmp_path / "new"
    fill(here, range(10))
    merge(here, part_bytes=600)
    fill(here, range(10, 14))
    fill(there, range(12, 20))
    before = contents(there)
    report = merge(here, [there], part_bytes=600)
    assert (report.records, report.identical_duplicates) == (20, 2)
    assert_holds(here, range(20))
    assert contents(there) == before
    merge(new, [there, here], part_bytes=600)
    assert contents(new) == contents(here)


def test_a_merge_cut_off_anywhere_loses_nothing(tmp_path, monkeypatch):
    """Before each rename (parts, then store.json) and before each removal of an old shard."""
    reference = tmp_path / "reference"
    fill(reference, range(20))
    merge(reference, part_bytes=600)
    real = {"replace": (os, os.replace), "unlink": (Path, Path.unlink)}
    for cut in range(100):
        folder = tmp_path / str(cut)
        fill(folder, range(0, 20, 2), writer="a", shard_bytes=500)
        fill(folder, range(1, 20, 2), writer="b", shard_bytes=500)
        calls = []

        def interrupted(function, calls=calls, cut=cut):
            def call(*arguments, **options):
                if len(calls) == cut:
                    raise KeyboardInterrupt
                calls.append(arguments)
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name, (owner, function) in real.items():
                patch.setattr(owner, name, interrupted(function))
            try:
                merge(folder, part_bytes=600)
                break
            except KeyboardInterrupt:
                pass
        assert_holds(folder, range(20))
        merge(folder, part_bytes=600)
        assert contents(folder) == contents(reference)
    assert cut > 10  # parts, store.json and old shards: it was cut off at all of these


def test_identical_records_of_two_writers_are_counted_and_different_ones_refused(tmp_path):
    first = ShardWriter(tmp_path, FINGERPRINT, writer="a")
    second = ShardWriter(tmp_path, FINGERPRINT, writer="b")
    first.put("same", arrays_of(1))
    second.put("same", arrays_of(1))
    first.finish_shard()
    second.finish_shard()
    assert ShardStore(tmp_path).stats().identical_duplicates == 1
    assert verify(tmp_path).require_ok().identical_duplicates == 1
    first.put("different", arrays_of(2))
    second.put("different", arrays_of(3))
    first.close()
    second.close()
    for use in (ShardStore, merge):
        with pytest.raises(DuplicateToken, match=r"different.*shard-a-000001.*shard-b-000001"):
            use(tmp_path)
    assert "different" in verify(tmp_path).problems[0]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4  # the refused merge removed nothing


def test_one_process_per_writer_id_and_no_merge_beside_writers(tmp_path):
    with ShardWriter(tmp_path, FINGERPRINT, writer="a") as writer:
        writer.put("x", arrays_of(0))
        with pytest.raises(WriterLocked, match=rf"process {os.getpid()} .*since"):
            ShardWriter(tmp_path, FINGERPRINT, writer="a")
        with pytest.raises(WriterLocked, match="merging"):
            merge(tmp_path)
        ShardWriter(tmp_path, FINGERPRINT, writer="b").close()
    assert merge(tmp_path).records == 1


def hold_a_writer_and_die(folder: Path) -> None:
    ShardWriter(folder, FINGERPRINT, writer="a").put("x", arrays_of(0))
    os._exit(1)


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=hold_a_writer_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / "locks" / "writer-a").read_text()  # it still names its last holder
    with ShardWriter(tmp_path, FINGERPRINT, writer="a") as writer:
        assert writer.done == {"x"}


def test_a_forked_writer_refuses(tmp_path):
    writer = ShardWriter(tmp_path, FINGERPRINT)
    child = os.fork()
    if child == 0:
        try:
            writer.put("x", arrays_of(0))
        except ShardError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    writer.close()
    with pytest.raises(ShardError, match="closed"):
        writer.put("x", arrays_of(0))


def test_another_fingerprint_is_refused_naming_both(tmp_path):
    fill(tmp_path / "a", range(2))
    other = Fingerprint("test", {"seed": 2})
    with pytest.raises(FingerprintMismatch, match=r"fields.seed: 1 \| 2"):
        ShardWriter(tmp_path / "a", other)
    ShardWriter(tmp_path / "b", other).close()
    with pytest.raises(FingerprintMismatch):
        merge(tmp_path / "a", [tmp_path / "b"])


@pytest.mark.parametrize(
    ("token", "arrays", "message"),
    [
        ("", {"x": np.zeros(1)}, "at least one character"),
        ("a\nb", {"x": np.zeros(1)}, "one line"),
        ("a", {}, "at least one array"),
        ("a", {"x": np.array(["text"])}, "dtype <U4"),
        ("a", {"x": np.array([object()])}, "dtype object"),
        ("a", {"x": np.zeros(1, np.complex64)}, "dtype complex64"),
    ],
)
def test_records_that_cannot_be_stored_are_refused(tmp_path, token, arrays, message):
    with ShardWriter(tmp_path, FINGERPRINT) as writer:
        with pytest.raises(DataError, match=message):
            writer.put(token, arrays)
        writer.put("good", {"x": np.zeros(1)})
    assert ShardStore(tmp_path).tokens == ["good"]


def test_a_folder_that_is_no_store_and_a_bad_writer_id(tmp_path):
    for use in (ShardStore, merge):
        with pytest.raises(MissingError, match="not a store"):
            use(tmp_path / "absent")
    with pytest.raises(DataError, match="writer id"):
        ShardWriter(tmp_path, FINGERPRINT, writer="../x")


class Records(torch.utils.data.Dataset):
    """A dataset over a store, as a training job has it."""

    def __init__(self, store: ShardStore) -> None:
        self.store, self.tokens = store, store.tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor(self.store.get(self.tokens[i])["bits"].astype(np.int64))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_read_the_same(tmp_path, method):
    fill(tmp_path, range(12), shard_bytes=1000)
    dataset = Records(ShardStore(tmp_path))
    alone = [dataset[i] for i in range(12)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    for a, b in zip(alone, loader, strict=True):
        assert torch.equal(a, b)


def test_a_pickled_store_reopens_itself(tmp_path):
    fill(tmp_path, range(3))
    store = ShardStore(tmp_path, check="always")
    store.prefetch(store.tokens)
    again = pickle.loads(pickle.dumps(store))
    assert again.check == "always"
    assert again.tokens == store.tokens
    assert len(pickle.dumps(store)) < 1000
    assert again.record_bytes(again.tokens[0]) == store.record_bytes(again.tokens[0])


def test_threads_that_open_a_shard_at_the_same_moment_both_see_all_of_it(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, Fingerprint("test", {})) as writer:
        writer.put("a", {"x": np.arange(100)})
    shard = ShardStore(tmp_path).shards[0]
    size, seen, frombuffer = shard.path.stat().st_size, [], np.frombuffer

    def while_another_looks(*arguments, **options):
        if not seen and threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: seen.append(len(shard.data)))
            other.start()
            other.join()
        return frombuffer(*arguments, **options)

    monkeypatch.setattr(np, "frombuffer", while_another_looks)
    assert len(shard.data) == size
    assert seen == [size]
