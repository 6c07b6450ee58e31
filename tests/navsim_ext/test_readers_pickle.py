"""The restricted unpickler: what it reads equals what was written; what it refuses was never built."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.errors import MissingError
from navsim_ext.readers import restricted_pickle
from navsim_ext.readers.restricted_pickle import DamagedPickle, RefusedObject

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
    loaded = restricted_pickle.load(path)
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
        restricted_pickle.load(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("module", "name"), [("builtins", "eval"), ("builtins", "getattr"), ("numpy", "load"), ("numpy.core", "ndarray")]
)
def test_nothing_outside_the_table_is_found(tmp_path, module, name):
    path = tmp_path / "log.pkl"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(RefusedObject, match=f"{module}.{name}"):
        restricted_pickle.load(path)


def test_dotted_names_do_not_reach_attributes(tmp_path):
    """Protocol 4 lets a name be a path of attributes; the table has whole names only."""
    path = tmp_path / "log.pkl"
    module, name = b"numpy", b"ndarray.__init__.__globals__"
    path.write_bytes(b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93.")
    with pytest.raises(RefusedObject, match=r"ndarray\.__init__"):
        restricted_pickle.load(path)


def test_object_scalars_and_giant_headers_are_refused(tmp_path):
    path = tmp_path / "log.pkl"
    path.write_bytes(b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntR(S'x'\ntR.")
    with pytest.raises(DamagedPickle):
        restricted_pickle.load(path)
    path.write_bytes(b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000000\ntS'b'\ntR.")
    with pytest.raises(DamagedPickle, match="array header"):
        restricted_pickle.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(MissingError, match=r"nowhere\.pkl"):
        restricted_pickle.load(tmp_path / "nowhere.pkl")


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 0.999), protocol=st.sampled_from([2, 4, 5]))
def test_truncation_anywhere_is_one_named_error(tmp_path_factory, cut, protocol):
    data = pickle.dumps([CONTENT] * 3, protocol=protocol)
    path = tmp_path_factory.getbasetemp() / "cut.pkl"
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(DamagedPickle, match=r"cut\.pkl is truncated or damaged.*byte"):
        restricted_pickle.load(path)
