"""Names and paths out of data or options; what libraries say of files they cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.files import inside, plain_name, reading

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "../x", "/x", "a\\b", "a\0b", "a\nb", "x" * 300, None, 3])
def test_a_name_is_no_path(name):
    with pytest.raises(DataError, match="name="):
        plain_name(name, "name=")


@pytest.mark.parametrize("name", ["questions", "nuscenes-v1.0", "a b", "epoch=1-step=4", "#1 [x]", "路口"])
def test_names_that_are_names_stay(name):
    assert plain_name(name, "name=") == name


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a/..", "..", ".", "a\0b", "\\x", "C:\\x",
                                  "a\\..\\..\\x", "./../x", None, 3])  # fmt: skip
def test_a_path_out_of_data_stays_below_its_folder(path):
    with pytest.raises(DataError, match="cams"):
        inside(path, "cams")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "b.jpg", ""]), max_size=8).map("/".join))
def test_inside_means_what_the_file_system_means(path):
    root = Path("/root/folder")
    depth, stays = 0, True
    for part in Path(path).parts if not path.startswith("/") else ():
        depth += -1 if part == ".." else 1
        stays &= depth >= 0
    if path.startswith("/") or not stays or depth == 0:
        with pytest.raises(DataError):
            inside(path, "x")
    else:
        assert str((root / inside(path, "x")).resolve()).startswith(f"{root}/")


@pytest.mark.parametrize("error", [KeyError("x"), OSError("x"), ValueError("x"), RuntimeError("x"), Exception("x")])
def test_whatever_a_library_raises_names_the_file(error):
    with (
        pytest.raises(CorruptFile, match=r"table\.parquet.*x.*score it again"),
        reading("table.parquet", "score it again"),
    ):
        raise error


def test_a_missing_file_is_missing_and_our_own_errors_pass():
    with pytest.raises(MissingError, match="nowhere"), reading("nowhere"):
        open("/nowhere/at/all")
    with pytest.raises(DataError, match="ours"), reading("x"):
        raise DataError("ours")
