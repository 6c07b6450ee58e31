"""A file is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from navsim_ext.errors import TriviumError
from navsim_ext.files import (
    CannotWrite,
    atomic_file,
    atomic_stream,
    disk_errors,
    remove_temporaries,
    write_atomic,
    write_json_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_bytes_and_streams_arrive_in_folders_that_are_made(tmp_path):
    write_atomic(tmp_path / "a" / "text", "ä\n")
    write_atomic(tmp_path / "a" / "bytes", b"\x00\xff")
    with atomic_stream(tmp_path / "a" / "stream") as stream:
        stream.write(b"12")
    assert (tmp_path / "a" / "text").read_text(encoding="utf-8") == "ä\n"
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "a") == ["bytes", "stream", "text"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "file"
    write_atomic(target, "old")
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError("broken off"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_nothing(tmp_path, error):
    write_atomic(tmp_path / "file", "old")
    with pytest.raises(type(error)), atomic_file(tmp_path / "file") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_kill_9_leaves_the_old_file_and_a_temporary_one_that_can_be_swept(tmp_path):
    write_atomic(tmp_path / "file", "old")
    program = (
        "import os, sys\nfrom navsim_ext.files import atomic_stream\n"
        "with atomic_stream(sys.argv[1]) as stream:\n"
        "    stream.write(b'half'); stream.flush(); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "file"], check=False).returncode == -9
    assert (tmp_path / "file").read_text() == "old"
    assert len(names(tmp_path)) == 2
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["file"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with atomic_file(tmp_path / "file") as first, atomic_file(tmp_path / "file") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"  # the outer block ended last
    assert names(tmp_path) == ["file"]


def test_a_workshop_keeps_half_files_out_of_the_target_folder(tmp_path):
    with atomic_file(tmp_path / "data" / "file", workshop=tmp_path / "work", suffix=".tmp.gpkg") as temporary:
        assert temporary.parent == tmp_path / "work"
        assert temporary.suffix == ".gpkg"
        assert names(tmp_path / "data") == []
        temporary.touch()
    assert names(tmp_path / "data") == ["file"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"file: the disk is full \(\d+ MiB free\): make room"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "not writable: choose another output_dir"),
        (errno.EROFS, "not writable: choose another output_dir"),
    ],
)
def test_what_the_disk_says_becomes_one_named_error(tmp_path, number, words):
    with pytest.raises(CannotWrite, match=words) as caught, atomic_file(tmp_path / "file") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert isinstance(caught.value, TriviumError)
    assert isinstance(caught.value, OSError)
    assert names(tmp_path) == []


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "absent").read_bytes()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="choose another output_dir"):
        write_json_atomic(tmp_path / "file" / "deep" / "x.json", {})
