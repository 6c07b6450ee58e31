"""WOMD without TensorFlow: framing, messages, scenes written and read again, all that can be wrong with a file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.errors import DataError, MissingError
from navsim_ext.realism.features import log_features
from navsim_ext.realism.scenario import scenario_of as realism_scenario
from navsim_ext.traffic import scene_v1, tfrecord
from navsim_ext.traffic.codes import EdgeKind, LightState, PieceKind, Role
from navsim_ext.traffic.messages import FlatMessages, fill, message_types
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.source import TrafficSource
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from navsim_ext.traffic.womd import WomdRecords, scene_of
from navsim_ext.traffic.womd_messages import FULL, READ
from navsim_ext.traffic.womd_writer import scenario_of, write_womd
from tests.navsim_ext.traffic_worlds import street
from tests.reference_data import reference_path

# Origin in whole metres at the ego's present position, values that are multiples of 2^-10 m: nothing is rounded.
EXACT = {"origin": np.array([1234.0, -876.0, 12.0])}


def whole_street(**changes) -> TrafficScene:
    """The street as WOMD would hold it: coordinates around the ego, states of parked cars known."""
    scene = street()
    shift = np.rint(scene.pose[0, scene.now, :2].astype(np.float64))
    xy = np.round((scene.pose[..., :2] - shift) * 1024) / 1024
    points = np.round((scene.points - shift) * 1024) / 1024
    options = {
        "xy": xy, "points": points.astype(np.float32), "point_z": np.zeros(len(points), np.float32),
        "z": np.zeros(scene.valid.shape), "light_stop": scene.light_stop - shift, "source": "womd",
        "licence": "Waymo Open Motion Dataset: non-commercial use only, not to be passed on",
        "notes": {"lights of lanes outside the map": 1},
    }  # fmt: skip
    return street(**options | EXACT | changes)


def test_crc32c_against_known_values():
    assert tfrecord.crc32c(b"") == 0
    assert tfrecord.crc32c(b"123456789") == 0xE3069283
    assert tfrecord.crc32c(bytes(32)) == 0x8A9136AA
    assert tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tfrecord.crc32c(bytes(range(32))) == 0x46DD794E


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=70), max_size=5))
def test_records_come_back_as_they_were_written(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("r") / "a.tfrecord"
    assert tfrecord.write_records(path, records) == len(records)
    assert [data for _, data in tfrecord.read_records(path)] == records


def test_framing_is_that_of_the_specification(tmp_path):
    path = tmp_path / "a.tfrecord"
    tfrecord.write_records(path, [b"123456789"])
    mask = lambda c: (((c >> 15) | (c << 17)) + 0xA282EAD8) & 0xFFFFFFFF  # noqa: E731
    length = (9).to_bytes(8, "little")
    expected = length + struct.pack("<I", mask(tfrecord.crc32c(length))) + b"123456789"
    assert path.read_bytes() == expected + struct.pack("<I", mask(0xE3069283))


@pytest.mark.parametrize(
    ("damage", "message", "follows"),
    [
        (lambda b: b[:5] + bytes([b[5] ^ 1]) + b[6:], r"byte 0: the length .* CRC-32C 0x.* is stored", 0),
        (lambda b: b[:14] + bytes([b[14] ^ 1]) + b[15:], r"byte 0: its 20 bytes .* CRC-32C 0x.* is stored", 1),
        (lambda b: b[:-3], r"byte 36: its data needs 24 bytes, 21 are left", 1),
        (lambda b: b[:40], r"byte 36: its header needs 12 bytes, 4 are left", 1),
    ],
)
def test_damage_is_named_with_offset_and_crc_and_costs_no_more_than_it_must(tmp_path, damage, message, follows):
    path = tmp_path / "a.tfrecord"
    tfrecord.write_records(path, [b"x" * 20, b"y" * 20])
    path.write_bytes(damage(path.read_bytes()))
    found = [data for _, data in tfrecord.read_records(path)]
    (error,) = [data for data in found if isinstance(data, tfrecord.CorruptRecord)]
    assert len(found) - 1 == follows
    with pytest.raises(tfrecord.CorruptRecord, match=message):
        raise error
    with pytest.raises(MissingError):
        list(tfrecord.read_records(tmp_path / "absent"))


def test_every_flipped_bit_of_a_file_is_noticed(tmp_path):
    path = tmp_path / "a.tfrecord"
    tfrecord.write_records(path, [b"abcdefg", b"hijk"])
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert any(isinstance(data, tfrecord.CorruptRecord) for _, data in tfrecord.read_records(path))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=False), st.floats(width=32, allow_nan=False), st.booleans(),
            st.integers(-(2**31), 2**31 - 1), st.booleans(),
        ),
        max_size=6,
    )
)  # fmt: skip
def test_flat_messages_read_what_protobuf_writes(rows):
    table = "2 a:double, 5 b:float, 11 c:bool, 900 d:int32"
    kind = message_types("test.flat", {"Flat": table})["Flat"]
    messages = []
    for a, b, c, d, with_d in rows:
        message = fill(kind(), a=a, b=b, c=c)
        if with_d:
            message.d = d
        messages.append(message.SerializeToString())
    values, unknown = FlatMessages(table).decode(messages, "here")
    assert unknown == 0
    assert values.tolist() == [[a, b, float(c), float(d) if with_d else 0.0] for a, b, c, d, with_d in rows]
    fewer, skipped = FlatMessages("2 a:double, 11 c:bool").decode(messages, "here")
    assert fewer[:, 0].tolist() == [row[0] for row in rows]
    assert skipped == sum(1 + row[4] for row in rows)


def test_flat_messages_name_what_does_not_fit():
    kind = message_types("test.flat2", {"Flat": "2 a:double"})["Flat"]
    data = fill(kind(), a=1.5).SerializeToString()
    flat = FlatMessages("2 a:double")
    for broken in (data[:-1], data[:1], b"\x12\x09abc", b"\x17", b"\xff" * 11):
        with pytest.raises(DataError, match="here: message 1 of 2"):
            flat.decode([data, broken], "here")
    with pytest.raises(DataError, match="field a is cut short or of another type"):
        FlatMessages("2 a:float").decode([data], "here")


def test_both_sets_of_messages_are_the_same_on_the_wire():
    data = scenario_of(whole_street()).SerializeToString()
    assert READ["Scenario"].FromString(data).SerializeToString() == data
    assert FULL["Scenario"].FromString(data).SerializeToString() == data


def test_a_scene_written_as_womd_reads_as_itself():
    scene = whole_street()
    again = scene_of(scenario_of(scene).SerializeToString(), "here")
    assert set(again.equals(scene)) <= {"speed_limit"}
    assert np.allclose(again.speed_limit, scene.speed_limit, rtol=1e-6, equal_nan=True)
    assert again.successors(0).tolist() == [2]
    assert [2, 0, EdgeKind.PREDECESSOR] in np.column_stack([again.edges, again.edge_kind]).tolist()


@pytest.mark.parametrize("folder", ["real/womd", "golden/wosac"])
def test_reference_scenes_written_and_read_again_stand_where_they_stood(tmp_path, folder):
    scenes = list(scene_v1.read_scenes(reference_path(folder)))
    assert write_womd(tmp_path / "a.tfrecord-00000-of-00001", scenes) == len(scenes)
    source = WomdRecords(str(tmp_path))
    assert isinstance(source, TrafficSource)
    (unit,) = source.units()
    for scene, (_, again) in zip(scenes, source.read(unit), strict=True):
        assert isinstance(again, TrafficScene), again
        world = lambda one, xy: xy.astype(np.float64) + one.origin[:2]  # noqa: E731
        seen = scene.valid
        assert np.array_equal(again.valid, seen)
        assert np.abs(world(again, again.pose[..., :2]) - world(scene, scene.pose[..., :2]))[seen].max() < 2e-5
        assert np.array_equal(again.pose[..., 2], scene.pose[..., 2])
        assert np.array_equal(again.heading_as_recorded, scene.heading_as_recorded)
        assert np.allclose(again.speed, scene.speed, atol=5e-4)
        assert np.array_equal(again.size, scene.size)
        assert np.array_equal(again.piece_kind, scene.piece_kind)
        assert np.array_equal(again.role & ~np.uint8(Role.STATIC), scene.role & ~np.uint8(Role.STATIC))
        order = lambda one: np.lexsort(one.light_state.T)  # noqa: E731
        reported = (scene.light_state != LightState.NOT_REPORTED).any(axis=1)
        first, second = scene.light_state[reported], again.light_state
        assert sorted(map(bytes, first)) == sorted(map(bytes, second))
        del order
        edges = lambda one: set(map(tuple, np.column_stack([one.edges, one.edge_kind]).tolist()))  # noqa: E731
        assert edges(again) == edges(scene)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "golden" / "wosac").glob("*.scene.npz")))
def test_realism_of_the_recording_is_the_same_after_a_trip_through_womd(file):
    """Edges, lights, headings and heights arrive where Waymo's metric looks for them."""
    scene = scene_v1.read_scene(file)
    again = scene_of(scenario_of(scene).SerializeToString(), "here")
    before, after = (log_features(realism_scenario(one)) for one in (scene, again))
    for name in before.__dataclass_fields__:
        found, expected = getattr(after, name), getattr(before, name)
        np.testing.assert_allclose(found, expected, atol=0 if found.dtype == bool else 3e-4, err_msg=name)


SCENARIO = scenario_of(whole_street()).SerializeToString()


def broken(change) -> bytes:
    message = scenario_of(whole_street())
    change(message)
    return message.SerializeToString()


def _set(path: str, value):
    def change(message):
        *steps, last = path.split(".")
        for step in steps:
            message = message[int(step)] if step.isdigit() else getattr(message, step)
        setattr(message, last, value)

    return change


def _repeat_track(message):
    message.tracks.add().CopyFrom(message.tracks[0])


BAD = {
    "no ego": (lambda m: m.ClearField("sdc_track_index"), "sdc_track_index is absent"),
    "ego out of range": (_set("sdc_track_index", 9), "sdc_track_index is 9; one of 4 tracks"),
    "ego not seen": (_set("tracks.0.states.10.valid", False), "the ego .* is not valid at the present step 10"),
    "present step": (_set("current_time_index", 31), "current_time_index is 31"),
    "no map": (lambda m: m.ClearField("map_features"), "no map feature with points"),
    "one step": (lambda m: m.ClearField("timestamps_seconds"), "0 time stamps"),
    "uneven time": (lambda m: m.timestamps_seconds.__setitem__(5, 0.7), "not evenly spaced"),
    "states missing": (lambda m: m.tracks[1].states.pop(), "track 3 has 30 states"),
    "unknown kind": (_set("tracks.1.object_type", 8), "track 3 has object_type 8"),
    "unknown light": (_set("dynamic_map_states.0.lane_states.0.state", 9), "the light of lane 100 at step 0 has state"),
    "unknown lane": (_set("map_features.0.lane.type", 5), "lane 100 has type 5"),
    "unknown line": (_set("map_features.5.road_line.type", 9), "road line 300 has type 9"),
    "unknown edge": (_set("map_features.3.road_edge.type", 3), "road edge 200 has type 3"),
    "NaN": (_set("tracks.0.states.4.center_x", float("nan")), "track 7 at step 4 is .nan"),
    "infinite map": (_set("map_features.0.lane.polyline.3.y", float("inf")), "points.* is inf"),
    "repeated id": (_repeat_track, "two road users have the id 7"),
    "repeated feature": (_set("map_features.1.id", 100), "two map pieces have the id 100"),
    "zero size": (_set("tracks.0.states.10.length", 0.0), "vehicle 7 has the size"),
    "prediction": (lambda m: m.tracks_to_predict.add(track_index=17), "tracks_to_predict names track 17 of 4"),
    "light steps": (lambda m: m.dynamic_map_states.pop(), "30 dynamic map states for 31"),
    "no id": (lambda m: m.ClearField("scenario_id"), "id '' must be a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_scenario_is_named_and_costs_only_itself(tmp_path, name):
    change, message = BAD[name]
    good = scenario_of(whole_street()).SerializeToString()
    tfrecord.write_records(tmp_path / "a.tfrecord", [broken(change), good])
    (where, error), (_, scene) = WomdRecords(str(tmp_path)).read("a.tfrecord")
    assert isinstance(scene, TrafficScene)
    assert where.endswith("record at byte 0")
    with pytest.raises(DataError, match=message):
        raise error


def test_what_is_odd_but_usable_is_counted():
    def odd(message):
        message.map_features[0].lane.exit_lanes.append(999)  # a lane without a successor in the map
        message.map_features.add(id=900)
        message.map_features.add(id=901).lane.type = 2
        message.objects_of_interest.append(77)
        track = message.tracks.add(id=50, object_type=1)
        for _ in range(31):
            track.states.add(valid=False)
        message.tracks[3].object_type = 0
        for state in message.tracks[1].states[:5]:
            state.length += 1.0

    data = broken(odd) + b"\xa2\x06\x01x"  # field 100, a text
    scene = scene_of(data, "here")
    assert scene.notes == {
        "lane edges that leave the map": 1, "lights of lanes outside the map": 1, "map features of no known kind": 1,
        "map features without points": 1, "objects of interest without a track": 1, "road users whose size varies": 1,
        "tracks never observed": 1, "tracks of no type": 1, "unknown field 100 of Scenario": 1,
    }  # fmt: skip
    assert scene.num_agents == 4


def test_a_lane_told_twice_in_a_step_keeps_the_last_state():
    def twice(message):
        message.dynamic_map_states[2].lane_states.add(lane=100, state=LightState.CAUTION)

    scene = scene_of(broken(twice), "here")
    assert scene.light_state[0, 1:4].tolist() == [LightState.STOP, LightState.CAUTION, LightState.STOP]
    assert scene.notes["lights told twice in a step"] == 1


def test_bytes_that_are_no_scenario_are_named():
    with pytest.raises(DataError, match="here: its 3 bytes are not a Scenario"):
        scene_of(b"\x0f\xff\xff", "here")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_of_a_scenario_makes_anything_but_a_scene_or_a_named_error(data):
    content = bytearray(SCENARIO)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(max_size=6))
        content[at : at + data.draw(st.integers(0, 6))] = new
    try:
        scene_of(bytes(content), "here").validate()
    except DataError as error:
        assert str(error)  # noqa: PT017


def test_no_signal_messages_differ_from_no_signals():
    without = scenario_of(whole_street())
    without.ClearField("dynamic_map_states")
    assert not scene_of(without.SerializeToString(), "here").has_lights
    for state in (silent := scenario_of(whole_street())).dynamic_map_states:
        state.ClearField("lane_states")
    scene = scene_of(silent.SerializeToString(), "here")
    assert scene.has_lights
    assert len(scene.light_piece) == 0


def test_a_sample_of_a_store_is_written_by_the_command(tmp_path, monkeypatch):
    from navsim_ext.traffic.womd_writer import main

    write_scenes(tmp_path / "store", (whole_street(id=name) for name in "abc"), fingerprint_of({}))
    output = tmp_path / "sample.tfrecord"
    monkeypatch.setattr("sys.argv", ["x", f"scenes={tmp_path / 'store'}", f"output={output}", "count=2"])
    monkeypatch.chdir(tmp_path)
    main()
    assert [scene.id for _, scene in WomdRecords(str(tmp_path)).read("sample.tfrecord")] == ["a", "b"]


def test_pieces_that_the_format_lacks_are_refused():
    scene = whole_street(piece_kind=np.array([0, 0, 0, 2, 2, 3, PieceKind.DRIVABLE_AREA, 9], np.uint8))
    with pytest.raises(DataError, match="no message for a map piece of kind drivable_area"):
        scenario_of(scene)
