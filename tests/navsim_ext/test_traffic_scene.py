"""TrafficScene: what is derived from recorded poses, what validate refuses, and the neutral npz."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from navsim_ext.errors import DataError, MissingError
from navsim_ext.traffic import motion, scene_v1
from navsim_ext.traffic.codes import LaneType, LightState, PieceKind, Role
from navsim_ext.traffic.scene import FIELDS
from tests.navsim_ext.traffic_worlds import street, street_values
from tests.reference_data import reference_path


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (3, 12), elements=st.floats(-20.0, 20.0, width=32)),
    arrays(np.bool_, (3, 12)),
)
def test_unwrapped_headings_differ_by_whole_turns_and_never_jump(heading, valid):
    unwrapped = motion.unwrap_headings(heading, valid)
    turns = (unwrapped - heading.astype(np.float64)) / (2 * np.pi)
    assert np.allclose(turns, np.rint(turns), atol=1e-5)
    for row, seen in zip(unwrapped, valid):
        assert (np.abs(np.diff(row[seen].astype(np.float64))) <= np.pi + 1e-5).all()
    again = motion.unwrap_headings(unwrapped, valid)
    assert np.array_equal(again, unwrapped)


def test_a_track_that_needs_no_turn_keeps_its_headings_bit_by_bit():
    heading = np.array([[9.3, 9.4, -1.0, 9.5]], np.float32)
    valid = np.array([[True, True, False, True]])
    assert np.array_equal(motion.unwrap_headings(heading, valid), heading)


def test_speeds_are_exact_for_constant_acceleration_and_unknown_for_lone_observations():
    t = np.arange(11) * 0.1
    xy = np.stack([np.stack([3.0 * t + t**2, 4.0 * t + 0 * t], -1)] * 2)
    valid = np.ones((2, 11), bool)
    valid[1, [3, 5]] = False  # step 4 stands alone
    velocity = motion.velocities(xy, valid, 0.1)
    assert np.allclose(velocity[0, 1:-1, 0], 3.0 + 2.0 * t[1:-1], atol=1e-5)
    assert np.allclose(velocity[..., 1][motion.speed_known(valid)], 4.0, atol=1e-4)
    assert np.allclose(velocity[0, 0, 0], 3.1, atol=1e-4)  # one-sided at the ends: half a step off
    assert not motion.speed_known(valid)[1, 3:6].any()
    assert motion.speed_known(valid)[1, [2, 6]].all()
    assert not velocity[1, 3:6].any()


def test_scene_derives_speed_and_headings_and_keeps_gaps():
    scene = street()
    assert np.allclose(scene.speed[0], 8.0, atol=1e-4)
    assert scene.pose[1, 5:8].tolist() == [[0.0] * 3] * 3
    seen = scene.pose[1, scene.valid[1], 2]
    assert np.abs(np.diff(seen)).max() < 0.01
    assert np.abs(np.diff(scene.heading_as_recorded[1, scene.valid[1]])).max() > 6.0
    assert np.allclose(np.hypot(*np.moveaxis(scene.velocity(), -1, 0)), scene.speed)
    assert scene.ego == 0
    assert scene.successors(0).tolist() == [2]
    assert np.array_equal(scene.piece(6)[0], np.float32([10.0, -3.5]))
    assert scene.pieces(PieceKind.ROAD_EDGE).tolist() == [3, 4]
    assert scene.equals(street()) == []
    assert scene.equals(street(now=11)) == ["now"]


BROKEN = {
    "no ego": ({"role": np.zeros(4, np.uint8)}, "0 road users are the ego"),
    "two egos": ({"role": np.full(4, Role.EGO, np.uint8)}, "4 road users are the ego"),
    "unknown role bit": ({"role": np.array([1, 16, 0, 0], np.uint8)}, "role holds 16"),
    "repeated agent": ({"agent_id": np.array([1, 2, 2, 3])}, "two road users have the id 2"),
    "repeated piece": ({"piece_id": np.array([1, 2, 3, 4, 5, 5, 6, 7])}, "two map pieces have the id 5"),
    "size 0": ({"size": np.array([[4, 2, 1]] * 3 + [[4, 0, 1]], np.float32)}, "vehicle 4 has the size"),
    "size NaN": ({"size": np.full((4, 3), np.nan, np.float32)}, "size.* is nan"),
    "unknown kind": ({"kind": np.array([0, 9, 0, 0], np.uint8)}, "kind holds the code 9"),
    "unknown piece": ({"piece_kind": np.full(8, 77, np.uint8)}, "piece_kind holds the code 77"),
    "unknown light": ({"light_state": np.full((2, 31), 40, np.uint8)}, "light_state holds the code 40"),
    "light of a crosswalk": ({"light_piece": np.array([6, -1], np.int32)}, "not a lane"),
    "light of no piece": ({"light_piece": np.array([99, -1], np.int32)}, "piece 99 of 8"),
    "lane lit twice": ({"light_piece": np.array([0, 0], np.int32)}, "two lights control the lane 100"),
    "lights denied": ({"has_lights": False}, "said to tell none"),
    "edge to nowhere": ({"edges": np.array([[0, 2], [2, 0], [7, 9]], np.int32)}, "names piece 9"),
    "edge to a line": ({"edges": np.array([[0, 5], [2, 0], [7, 0]], np.int32)}, "joins piece 100 and piece 300"),
    "now too late": ({"now": 31}, "now is 31"),
    "ego unseen": ({"valid": np.arange(31)[None] > np.array([[10], [0], [0], [0]])}, "not observed at the present"),
    "dt 0": ({"dt": 0.0}, "dt is 0.0"),
    "speed limit 0": ({"speed_limit": np.zeros(8, np.float32)}, "speed limit"),
    "position NaN": ({"xy": np.full((4, 31, 2), np.nan)}, "pose.* is nan"),
    "far away": ({"points": street_values()["points"] + np.float32(5e4)}, "points reaches 5"),
    "teleport": ({"xy": np.cumsum(np.full((4, 31, 2), 30.0), axis=1)}, "road user 7 moves at"),
    "never seen": ({"valid": np.ones((4, 31), bool) & (np.arange(4) < 3)[:, None]}, "road user 4 is never observed"),
    "short tokens": ({"agent_tokens": ("a", "b")}, "agent_tokens has 2 entries"),
    "wrong dtype": ({"kind": np.zeros(4)}, "kind is float64"),
    "command": ({"command": np.full(31, 4, np.uint8)}, "command 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_validate_names_the_broken_promise(name):
    changes, message = BROKEN[name]
    with pytest.raises(DataError, match=message):
        street(**changes)


def test_one_step_no_map_and_junk_in_gaps_are_refused():
    values = street_values()
    one = {name: values[name][:, :1] for name in ("xy", "heading", "valid", "z", "light_state")}
    with pytest.raises(DataError, match="1 time step"):
        street(**one, now=0)
    empty = {name: values[name][:0] for name in ("points", "point_z", "piece_kind", "piece_subtype", "piece_closed")}
    empty |= {name: values[name][:0] for name in ("piece_id", "speed_limit", "edges", "edge_kind")}
    empty |= {"light_piece": np.array([-1, -1], np.int32), "piece_start": np.zeros(1, np.int32)}
    with pytest.raises(DataError, match="no map"):
        street(**empty)
    scene = street()
    pose = scene.pose.copy()
    pose[1, 5] = 3.0
    with pytest.raises(DataError, match="pose is not 0 everywhere where valid is False"):
        dataclasses.replace(scene, pose=pose).validate()


def neutral(**changes) -> dict[str, np.ndarray]:
    """Arrays of a scene.v1 file with the content of the street."""
    values = street_values()
    meta = {"schema": "scene.v1", "source": "test", "id": "street", "licence": "ours", "dt": 0.1, "cur": 10}
    meta["origin"] = values["origin"].tolist()
    return {
        "meta": np.array(json.dumps(meta)), "a_xy": values["xy"], "a_yaw": values["heading"], "a_z": values["z"],
        "a_ok": values["valid"], "a_size": values["size"], "a_type": values["kind"], "a_id": values["agent_id"],
        "a_role": values["role"], "p_xy": values["points"], "p_z": values["point_z"], "p_ptr": values["piece_start"],
        "p_type": values["piece_kind"], "p_closed": values["piece_closed"], "p_id": values["piece_id"],
        "p_lane": values["piece_subtype"], "l_poly": values["light_piece"], "l_xy": values["light_stop"],
        "l_raw": values["light_state"], "l_state": np.zeros_like(values["light_state"]), "e_ij": values["edges"],
        "e_type": values["edge_kind"],
    } | changes  # fmt: skip


def test_neutral_npz_reads_as_the_scene_it_holds(tmp_path):
    np.savez(tmp_path / "a.npz", **neutral())
    np.savez(tmp_path / "rollouts.npz", xyzh=np.zeros(3))  # another kind of file in the folder is none of ours
    (scene,) = scene_v1.read_scenes(tmp_path)
    assert set(scene.equals(street())) == {"speed_limit", "piece_subtype"}  # the format has no place for them
    assert scene.piece_subtype[:3].tolist() == [LaneType.SURFACE_STREET] * 2 + [LaneType.FREEWAY]


def test_coarse_light_states_stand_in_where_the_raw_ones_are_absent(tmp_path):
    content = neutral(l_state=np.tile([0, 1, 2, 3], (2, 8))[:, :31].astype(np.uint8))
    del content["l_raw"]
    np.savez(tmp_path / "a.npz", **content)
    state = scene_v1.read_scene(tmp_path / "a.npz").light_state
    assert state[0, :4].tolist() == [LightState.UNKNOWN, LightState.STOP, LightState.CAUTION, LightState.GO]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": np.array("{}")}, "schema"),
        ({"meta": np.array("not json")}, "not a file of schema"),
        ({"l_state": np.full((2, 31), 9, np.uint8), "l_raw": None}, "l_state holds"),
        ({"a_yaw": None}, "a_yaw are missing"),
        ({"a_ok": np.ones((3, 31), bool)}, "a.npz"),
        ({"p_ptr": np.arange(9, dtype=np.int32)}, "piece_start"),
    ],
)
def test_a_bad_npz_is_named(tmp_path, changes, message):
    content = {name: value for name, value in neutral(**changes).items() if value is not None}
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=message) as caught:
        scene_v1.read_scene(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


def test_a_truncated_or_absent_npz_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **neutral())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a\.npz cannot be read"):
        list(scene_v1.read_scenes(tmp_path))
    with pytest.raises(MissingError):
        scene_v1.read_scene(tmp_path / "b.npz")


@pytest.mark.parametrize("folder", ["real/womd", "golden/wosac"])
def test_reference_scenes_keep_what_their_files_hold(folder):
    files = scene_v1.scene_files(reference_path(folder))
    assert len(files) >= 7
    for file in files:
        scene = scene_v1.read_scene(file)
        with np.load(file) as arrays:
            assert np.array_equal(scene.pose[..., :2], arrays["a_xy"])
            assert np.array_equal(scene.heading_as_recorded, arrays["a_yaw"])
            assert np.array_equal(scene.points, arrays["p_xy"])
            if folder.startswith("golden"):
                assert np.array_equal(scene.light_stop, arrays["l_xy"])
            moving = scene.speed_known & (np.abs(arrays["a_vel"]).sum(-1) > 0)
            assert np.median(np.abs(np.hypot(*np.moveaxis(arrays["a_vel"], -1, 0)) - scene.speed)[moving]) < 0.1
        assert set(vars(scene)) == set(FIELDS)
