"""Law of the checksums: no byte of what they cover changes without a named error, and nothing undamaged is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import damages
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.errors import CorruptFile, MissingError
from navsim_ext.runtime import checksums
from navsim_ext.runtime.checksums import (
    PLACE,
    CheckedFiles,
    check_stamp,
    checked_line,
    checked_lines,
    file_checksums,
    read_checked_json,
    seal_folder,
    stamp,
    write_checked_json,
)

REMEDY = "make it again"


def test_any_damage_of_a_sealed_folder_is_named(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a.bin").write_bytes(rng.bytes(200_000))
    (tmp_path / "empty").touch()
    seal_folder(tmp_path, ["a.bin", "empty"])
    files = CheckedFiles.sealed(tmp_path, REMEDY)
    files.check_all()
    content = (tmp_path / "a.bin").read_bytes()
    for damaged in damages(content, rng, 120):
        (tmp_path / "a.bin").write_bytes(damaged)
        with pytest.raises(CorruptFile, match=r"a\.bin.*make it again"):
            files.check_all()
    (tmp_path / "a.bin").unlink()
    with pytest.raises(MissingError, match=r"a\.bin"):
        files.check_all()


def test_any_damage_of_checked_json_is_named(tmp_path):
    path = tmp_path / "x.json"
    content = {"text": "née", "number": 0.1, "list": [1, None, True]}
    write_checked_json(path, content)
    assert read_checked_json(path, REMEDY) == content
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CorruptFile, match=r"x\.json"):
                read_checked_json(path, REMEDY)
        path.write_bytes(whole[:position])
        with pytest.raises(CorruptFile, match=r"x\.json"):
            read_checked_json(path, REMEDY)


def test_a_journal_gives_its_intact_lines_and_tells_of_the_others():
    lines = [{"log": f"log-{i}", "tokens": ["a", "b"], "score": i / 3} for i in range(4)] + [{}]
    journal = "".join(map(checked_line, lines)).encode()
    assert [found for _, found in checked_lines(journal)] == lines
    second = journal.index(b"\n") + 1
    third = journal.index(b"\n", second) + 1
    for position in range(second, third - 1):
        for bit in range(8):
            damaged = bytearray(journal)
            damaged[position] ^= 1 << bit
            found = [line for _, line in checked_lines(bytes(damaged))]
            assert None in found
            assert [line for line in found if line is not None] == [lines[0], *lines[2:]]
    assert [line for _, line in checked_lines(journal[: third - 5])] == [lines[0], None]
    old = b'{"log": "of an earlier version"}\n'
    assert [line for _, line in checked_lines(old)] == [None]
    assert [line for _, line in checked_lines(old, required=False)] == [{"log": "of an earlier version"}]


def test_any_damage_of_a_stamped_table_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    rng = np.random.default_rng(1)
    table = pa.table({"x": rng.random(500), "name": [f"n{i}" for i in range(500)]})
    pq.write_table(table.replace_schema_metadata({"trivium_checksum": PLACE}), path)
    stamp(path)
    check_stamp(path, REMEDY)
    assert pq.read_table(path).equals(table)
    for damaged in damages(path.read_bytes(), rng, 200):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFile, match=r"t\.parquet"):
            check_stamp(path, REMEDY)


def test_a_file_of_somebody_else_may_be_without_a_stamp(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"nothing here")
    check_stamp(path, REMEDY, required=False)
    with pytest.raises(CorruptFile, match="carries no checksum"):
        check_stamp(path, REMEDY)
    with pytest.raises(CorruptFile, match="cannot be stamped"):
        stamp(path)


@pytest.mark.parametrize("shape", [(1000,), (3000, 4, 3), (0, 3), (5,)])
def test_an_array_reads_as_numpy_would_and_checks_what_is_read(tmp_path, shape):
    rng = np.random.default_rng(2)
    array = rng.random(shape).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    files = CheckedFiles(tmp_path, json.loads(json.dumps(file_checksums(tmp_path, ["a.npy"]))), REMEDY)
    mapped = files.array("a.npy")
    assert mapped.shape == array.shape
    assert mapped.dtype == array.dtype
    assert len(mapped) == len(array)
    slices = [slice(None), slice(2, 4), slice(-3, None), slice(0, None, 2), slice(7, 3)]
    if len(shape) > 1:
        slices += [(slice(0, 2), -1), (slice(None), slice(1, 2)), (..., 0)]
    for key in [*slices, ..., np.arange(min(len(array), 3))]:
        np.testing.assert_array_equal(files.array("a.npy")[key], array[key])
    for row in range(-len(array), len(array), 97):
        np.testing.assert_array_equal(mapped[row], array[row])
    with pytest.raises(IndexError):
        mapped[len(array)]
    np.testing.assert_array_equal(np.asarray(mapped), array)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_row_is_never_read(tmp_path_factory, data):
    """Whatever order rows are read in: the damaged block is refused each time, rows of other blocks are right."""
    folder = tmp_path_factory.mktemp("array")
    array = np.arange(60_000, dtype=np.int64).reshape(20_000, 3)
    np.save(folder / "a.npy", array)
    entries = file_checksums(folder, ["a.npy"])
    content = bytearray((folder / "a.npy").read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "a.npy").write_bytes(content)
    block = where // checksums.SMALLEST_BLOCK
    files = CheckedFiles(folder, entries, REMEDY)
    if block == 0:
        with pytest.raises(CorruptFile, match=r"a\.npy"):
            files.array("a.npy")
        return
    mapped = files.array("a.npy")
    for row in data.draw(st.lists(st.integers(0, len(array) - 1), min_size=1, max_size=8)):
        first, last = 128 + row * 24, 128 + row * 24 + 23
        if first // checksums.SMALLEST_BLOCK <= block <= last // checksums.SMALLEST_BLOCK:
            for key in (row, (row, 1), slice(row, row + 1), (slice(row, row + 1), slice(0, 1)), [row]):
                with pytest.raises(CorruptFile, match=r"a\.npy"):
                    mapped[key]
        else:
            np.testing.assert_array_equal(mapped[row], array[row])
    for whole in (slice(None), np.array([0])):
        with pytest.raises(CorruptFile):
            mapped[whole]


def test_blocks_grow_with_the_file():
    for size in (0, 1, 1 << 14, 1 << 24, (1 << 24) + 1, 1 << 34):
        step = checksums.block_bytes(size)
        assert step >= checksums.SMALLEST_BLOCK
        assert -(-size // step) <= checksums.MOST_BLOCKS
        assert step == checksums.SMALLEST_BLOCK or -(-size // (step // 2)) > checksums.MOST_BLOCKS
