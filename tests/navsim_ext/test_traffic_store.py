"""Records of traffic scenes: without loss, small, of one kind, refused when they are something else."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.scene import Camera
from navsim_ext.shards import ShardWriter
from navsim_ext.traffic import record, scene_v1
from navsim_ext.traffic.store import TrafficStore, fingerprint_of, write_scenes
from tests.navsim_ext.traffic_worlds import street
from tests.reference_data import reference_path

DTYPES = (np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)


def full_street(**changes):
    """The street with every optional field filled."""
    camera = Camera("a/b.jpg", np.eye(3) * 0.1, np.eye(3), np.arange(3.0) / 7, np.zeros(5))
    options = {
        "route": np.arange(8) < 3, "goal": np.array([[1, 2], [np.nan, np.nan], [3, 4], [5, 6]], np.float32),
        "command": np.arange(31, dtype=np.uint8) % 4, "ego_dynamics": np.full((31, 4), 0.1, np.float32),
        "rear_axle": 1.461, "map_location": "us-ma-boston", "agent_tokens": tuple("abcd"),
        "piece_tokens": tuple("12345678"), "frame_tokens": tuple(f"t{k}" for k in range(31)),
        "cameras": {"CAM_F0": camera}, "images": {"CAM_F0": tuple(f"{k}.jpg" for k in range(31))},
        "law": {"clock": np.array([3.0, 4.5]), "path_pose": np.cumsum(np.full((9, 3), 0.1), axis=0)},
        "recipe": {"town": "x", "seed": 3}, "notes": {"odd": 2},
    }  # fmt: skip
    return street(**options | changes)


@pytest.mark.parametrize("scene", [street(), full_street()], ids=["least", "all"])
def test_a_record_holds_the_scene_without_loss_and_always_the_same_bytes(scene):
    arrays_ = record.encode(scene)
    again = record.decode(arrays_, "here")
    assert again.equals(scene) == []
    again.validate()
    other = record.encode(again)
    assert all(np.array_equal(arrays_[name], other[name]) for name in arrays_)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(DTYPES).flatmap(lambda d: arrays(d, array_shapes(max_dims=3, max_side=7, min_side=0))),
    st.integers(0, 2),
)
def test_packing_is_invertible_for_any_array(array, order):
    if array.dtype.itemsize < 4:
        order = 0
    blob = record._pack(array, order)
    content = np.frombuffer(record.zstandard.ZstdCompressor().compress(blob), np.uint8)
    back = record._unpack_all([["x", array.dtype.str, list(array.shape), order]], content)["x"]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("folder", ["real/womd", "golden/wosac"])
def test_reference_scenes_survive_storing_and_are_small(folder):
    for scene in scene_v1.read_scenes(reference_path(folder)):
        arrays_ = record.encode(scene)
        assert record.decode(arrays_, "here").equals(scene) == []
        assert sum(array.nbytes for array in arrays_.values()) < 250_000


def test_a_store_gives_scenes_by_id(tmp_path):
    scenes = [full_street(id=name) for name in ("b", "a", "c")]
    fingerprint = fingerprint_of({"made": "by hand"})
    assert write_scenes(tmp_path / "s", iter(scenes), fingerprint) == 3
    assert write_scenes(tmp_path / "s", iter(scenes), fingerprint) == 3  # what is there is left alone
    store = TrafficStore(tmp_path / "s")
    assert store.ids == ["a", "b", "c"]
    assert "a" in store
    assert len(store) == 3
    assert [scene.id for scene in store] == ["a", "b", "c"]
    assert pickle.loads(pickle.dumps(store)).load("b").equals(scenes[0]) == []
    with pytest.raises(MissingError, match="'d'"):
        store.load("d")


def test_a_store_of_something_else_and_a_damaged_record_are_refused(tmp_path):
    other = Fingerprint("metric-cache", {})
    with ShardWriter(tmp_path / "o", other) as writer:
        writer.put("a", {"x": np.zeros(3)})
    with pytest.raises(DataError, match="holds metric-cache"):
        TrafficStore(tmp_path / "o")
    with pytest.raises(DataError, match="holds metric-cache"):
        write_scenes(tmp_path / "n", iter([street()]), other)
    arrays_ = record.encode(street())
    with pytest.raises(DataError, match="here: not a record"):
        record.decode({"header": arrays_["header"], "content": arrays_["content"][:-9]}, "here")
    with pytest.raises(DataError, match="here: not a record"):
        record.decode({"header": arrays_["header"][:-9], "content": arrays_["content"]}, "here")
    text = arrays_["header"].tobytes().replace(b'"version":1', b'"version":7')
    with pytest.raises(DataError, match="record of version 7"):
        record.decode({"header": np.frombuffer(text, np.uint8), "content": arrays_["content"]}, "here")
