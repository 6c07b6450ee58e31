"""The restricted unpickler: what it reads equals what was written; what it refuses was never built."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext import pickles
from navsim_ext.errors import DataError, MissingError
from navsim_ext.pickles import DamagedPickle, RefusedObject
from navsim_ext.pickles import machine as pickle_machine
from navsim_ext.pickles.machine import MAX_DEPTH

CONTENT = {
    "boxes": np.arange(14, dtype=np.float32).reshape(2, 7),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "names": np.array(["vehicle", "pedestrian"]),
    "objects": np.array(["vehicle", None], dtype=object),
    "empty": np.zeros((0, 3)),
    "scalar": np.float64(1.5),
    "flag": np.bool_(True),
    "plain": [1, 2.5, "text", None, True, b"bytes", (1, 2), {3, 4}, frozenset({5}), 1 + 2j, bytearray(b"x")],
    "ordered": OrderedDict(a=1),
    "structured": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
}


def same(mine, theirs) -> bool:
    if isinstance(theirs, np.ndarray):
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and bool((mine == theirs).all())
    return type(mine) is type(theirs) and bool(mine == theirs)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("old_names", [False, True])
def test_round_trip_of_every_protocol_and_both_numpy_names(tmp_path, protocol, old_names):
    data = pickle.dumps(CONTENT, protocol=protocol)
    if old_names and protocol < 4:  # text opcodes without a length prefix: the module can be renamed in place
        data = data.replace(b"numpy._core.", b"numpy.core.")
        assert b"numpy.core.multiarray" in data
    path = tmp_path / "log.pkl"
    path.write_bytes(data)
    loaded = pickles.load(path)
    assert loaded.keys() == CONTENT.keys()
    assert all(same(loaded[key], CONTENT[key]) for key in CONTENT)
    loaded["boxes"][0, 0] = 7  # a reader may correct values in place


class Evil:
    built = False

    def __init__(self, argument):
        self.argument = argument

    def __reduce__(self):
        return (os.mkdir, (self.argument,))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_foreign_object_is_refused_by_name_and_not_run(tmp_path, protocol):
    target, path = tmp_path / "made", tmp_path / "log.pkl"
    path.write_bytes(pickle.dumps([{"token": Evil(str(target))}], protocol=protocol))
    with pytest.raises(RefusedObject, match=r"log\.pkl.*(posix|nt)\.mkdir"):
        pickles.load(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("module", "name"), [("builtins", "eval"), ("builtins", "getattr"), ("numpy", "load"), ("numpy.core", "ndarray")]
)
def test_nothing_outside_the_table_is_found(tmp_path, module, name):
    path = tmp_path / "log.pkl"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(RefusedObject, match=f"{module}.{name}"):
        pickles.load(path)


def test_dotted_names_do_not_reach_attributes(tmp_path):
    """Protocol 4 lets a name be a path of attributes; the table has whole names only."""
    path = tmp_path / "log.pkl"
    module, name = b"numpy", b"ndarray.__init__.__globals__"
    path.write_bytes(b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93.")
    with pytest.raises(RefusedObject, match=r"ndarray\.__init__"):
        pickles.load(path)


def test_object_scalars_and_giant_headers_are_refused(tmp_path):
    path = tmp_path / "log.pkl"
    path.write_bytes(b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntR(S'x'\ntR.")
    with pytest.raises(DamagedPickle):
        pickles.load(path)
    path.write_bytes(b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000000\ntS'b'\ntR.")
    with pytest.raises(DamagedPickle, match="array header"):
        pickles.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(MissingError, match=r"nowhere\.pkl"):
        pickles.load(tmp_path / "nowhere.pkl")


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 0.999), protocol=st.sampled_from([2, 4, 5]))
def test_truncation_anywhere_is_one_named_error(tmp_path_factory, cut, protocol):
    data = pickle.dumps([CONTENT] * 3, protocol=protocol)
    path = tmp_path_factory.getbasetemp() / "cut.pkl"
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(DamagedPickle, match=r"cut\.pkl is truncated or damaged.*byte"):
        pickles.load(path)


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 300), max_size=4), min_size=1, max_size=6),
    code=st.sampled_from(["f8", "f4", "i8", "u1", "b1", "U3", "S2", ">f8"]),
    protocol=st.sampled_from([0, 2, 4, 5]),
    fortran=st.booleans(),
)
def test_arrays_read_whole_equal_arrays_read_opcode_by_opcode(shapes, code, protocol, fortran):
    """The usual twenty opcodes of an array are taken at once; that must change nothing."""
    arrays = [np.zeros([min(length, 300 if len(shape) < 3 else 6) for length in shape], code) for shape in shapes]
    for number, array in enumerate(arrays):
        array.reshape(-1)[...] = (np.arange(array.size) * (number + 1) % 2).astype(code)
    arrays = [np.asfortranarray(array) if fortran else array for array in arrays]
    data = pickle.dumps([*arrays, arrays, (arrays[0].shape, b"b", 0)], protocol=protocol)
    whole = pickles.loads(data, "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle_machine.Machine, "_whole_array", lambda self, position, memo: None)
        single = pickles.loads(data, "single")
    for mine, other, array in zip(whole, single, arrays):
        native = array.astype(array.dtype.newbyteorder("="))
        assert same(mine, native)
        assert same(other, native)
    assert all(a is b for a, b in zip(whole[len(arrays)], whole)), "shared arrays stay shared"
    assert whole[-1] == single[-1] == (arrays[0].shape, b"b", 0)


class Kept:
    """A class that the reader does not have."""

    def __init__(self) -> None:
        self._x, self.kind, self.args = 1.5, "other", [2]


def test_holders_take_the_place_of_named_classes(tmp_path):
    """Fields are data: none of them reaches what the holder itself is made of."""
    path = tmp_path / "kept.pkl"
    both = Kept()
    path.write_bytes(pickle.dumps({"a": both, "b": both, "c": PurePosixPath("x/y")}))
    names = {(__name__, "Kept"), ("pathlib", "PurePosixPath")}
    loaded = pickles.load(path, also_allowed=pickles.holders(names))
    assert loaded["a"] is loaded["b"]
    assert (loaded["a"].x, loaded["a"].kind, loaded["a"].fields["args"]) == (1.5, "Kept", [2])
    assert loaded["c"].args == ("x", "y")
    with pytest.raises(DataError, match=r"Kept has no field 'y'.*'x'"):
        _ = loaded["a"].y
    with pytest.raises(RefusedObject, match="Kept"):
        pickles.load(path)


def test_what_is_shared_may_not_be_larger_written_out_than_the_file_could_hold():
    line = list(range(1000))
    content = [[line] * 20] * 20  # 400,000 elements in 2 kB
    assert pickles.loads(pickle.dumps(content), "x") == content
    with pytest.raises(DamagedPickle, match="shared parts that would be"):
        pickles.loads(pickle.dumps([[[line] * 20] * 20] * 20), "x")


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH + 1])
def test_depth(depth):
    content: list = []
    for _ in range(depth):
        content = [content]
    if depth < MAX_DEPTH:
        assert pickles.loads(pickle.dumps(content), "x") == content
    else:
        with pytest.raises(DamagedPickle, match="nested more than"):
            pickles.loads(pickle.dumps(content), "x")


@pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_integers_of_64_bits_are_read_larger_ones_refused(number):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickles.loads(pickle.dumps(number, protocol), "x") == number
        with pytest.raises(DamagedPickle, match="64 bits"):
            pickles.loads(pickle.dumps(2**64 + abs(number), protocol), "x")
