"""GPUDrive JSON, ScenarioNet pickles and NAVSIM logs as traffic scenes: same drives, same places, bad input named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from navsim_ext.errors import DataError, MissingError
from navsim_ext.runtime.config import compose
from navsim_ext.synthetic.build import recipe_of
from navsim_ext.synthetic.cast import EGO_AXLE_TO_CENTRE
from navsim_ext.synthetic.gpkg_writer import write_maps
from navsim_ext.synthetic.log_writer import encode, frames_of
from navsim_ext.traffic.codes import AgentKind, LightState, PieceKind, Role
from navsim_ext.traffic.gpudrive import GpuDriveJson
from navsim_ext.traffic.navsim import NavsimTraffic
from navsim_ext.traffic.scenarionet import ScenarioNetTraffic, light_state
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.source import TrafficSource
from tests.navsim_ext.test_readers_scenarionet import SPEED_MPS, track, waymo_scenario
from tests.navsim_ext.test_traffic_womd import whole_street
from tests.reference_data import reference_path


def only(source: TrafficSource) -> TrafficScene:
    """The one scene of a source; its error is raised."""
    assert isinstance(source, TrafficSource)
    ((_, scene),) = [reading for unit in source.units() for reading in source.read(unit)]
    if isinstance(scene, Exception):
        raise scene
    return scene


# GPUDrive


def gpudrive(scene: TrafficScene) -> dict:
    """What GPUDrive's converter writes of a WOMD scene."""

    def world(xy, z):
        places = zip(xy.astype(np.float64) + scene.origin[:2], z + scene.origin[2])
        return [{"x": float(x), "y": float(y), "z": float(h)} for (x, y), h in places]

    objects = []
    for n in range(scene.num_agents):
        seen = scene.valid[n]
        position = world(scene.pose[n, :, :2], scene.z[n])
        objects.append({
            "position": [p if ok else {"x": -1e4, "y": -1e4, "z": -1e4} for p, ok in zip(position, seen)],
            "heading": [float(h) if ok else -1e4 for h, ok in zip(scene.heading_as_recorded[n], seen)],
            "velocity": [{"x": -1e4, "y": -1e4}] * scene.num_steps,
            "valid": seen.tolist(), "length": float(scene.size[n, 0]), "width": float(scene.size[n, 1]),
            "height": float(scene.size[n, 2]), "type": AgentKind(scene.kind[n]).name.lower(),
            "id": int(scene.agent_id[n]), "goalPosition": position[int(np.flatnonzero(seen)[-1])],
            "mark_as_expert": False,
        })  # fmt: skip
    names = {PieceKind.LANE: "lane", PieceKind.ROAD_EDGE: "road_edge", PieceKind.LINE_BROKEN: "road_line",
             PieceKind.CROSSWALK: "crosswalk", PieceKind.STOP_SIGN: "stop_sign"}  # fmt: skip
    first = {"lane": 0, "road_edge": 14, "road_line": 5}
    roads = []
    for m in range(len(scene.piece_kind)):
        name = names[PieceKind(scene.piece_kind[m])]
        points = world(scene.piece(m), scene.point_z[scene.piece_start[m] : scene.piece_start[m + 1]])
        number = first[name] + int(scene.piece_subtype[m]) if name in first else 17
        roads.append({"geometry": points, "type": name, "map_element_id": number, "id": int(scene.piece_id[m])})
    lights = {}
    for k, row in enumerate(scene.light_piece):
        told = np.flatnonzero(scene.light_state[k] != LightState.NOT_REPORTED)
        x, y = (scene.light_stop[k] + scene.origin[:2]).tolist()
        lights[str(scene.piece_id[row] if row >= 0 else -2)] = {
            "state": [LightState(s).name.lower() for s in scene.light_state[k, told]],
            "x": [x] * len(told), "y": [y] * len(told), "z": [0.0] * len(told), "time_index": told.tolist(),
        }  # fmt: skip
    predict = [{"track_index": int(n), "difficulty": 1} for n in np.flatnonzero(scene.role & Role.PREDICT)]
    metadata = {"sdc_track_index": scene.ego, "tracks_to_predict": predict}
    metadata["objects_of_interest"] = [int(scene.agent_id[n]) for n in np.flatnonzero(scene.role & Role.INTEREST)]
    return {"name": "x.json", "scenario_id": scene.id, "objects": objects, "roads": roads, "tl_states": lights,
            "metadata": metadata}  # fmt: skip


def test_gpudrive_gives_the_scene_that_was_converted(tmp_path):
    scene = whole_street()
    (tmp_path / "a.json").write_text(json.dumps(gpudrive(scene)))
    again = only(GpuDriveJson(str(tmp_path)))
    assert set(again.equals(scene)) == {"source", "goal", "edges", "edge_kind", "speed_limit"}
    last = scene.num_steps - 1 - scene.valid[:, ::-1].argmax(axis=1)
    assert np.array_equal(again.goal, scene.pose[np.arange(4), last, :2])


def _change(content: dict, *path, value) -> None:
    *steps, last = path
    for step in steps:
        content = content[step]
    content[last] = value


BAD_JSON = {
    "no ego": (("metadata", "sdc_track_index"), None, "sdc_track_index is None"),
    "ego unseen": (("objects", 0, "valid"), [False] * 31, "the ego is not valid at step 10"),
    "no roads": (("roads",), [], "no roads with points"),
    "no objects": (("objects",), [], "no objects"),
    "degrees": (("objects", 0, "heading"), [179.0] * 31, "headings reach 179"),
    "unknown kind": (("objects", 1, "type"), "boat", "type 'boat'"),
    "unknown road": (("roads", 0, "type"), "river", "type 'river'"),
    "unknown light": (("tl_states", "100", "state", 0), "purple", "state 'purple' at step 0"),
    "NaN": (("objects", 0, "position", 3, "x"), float("nan"), "object 0 has a position or heading"),
    "short": (("objects", 0, "heading"), [0.0], "unequal length"),
    "zero size": (("objects", 3, "width"), 0.0, "vehicle 4 has the size"),
    "repeated id": (("objects", 3, "id"), 7, "two road users have the id 7"),
    "text": (("objects", 0, "position", 3, "x"), "x", "the content does not fit"),
    "huge id": (("objects", 3, "id"), 2**70, "the content does not fit"),
    "huge place": (("objects", 0, "position", 3, "x"), 1e300, "pose.* is inf"),
    "not an object": (("objects", 0), 3, "the content does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_gpudrive_files_are_named(tmp_path, name):
    path, value, message = BAD_JSON[name]
    content = gpudrive(whole_street())
    _change(content, *path, value=value)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        only(GpuDriveJson(str(tmp_path)))
    assert "a.json" in str(caught.value)


JUNK = [None, True, -1, 1e300, float("nan"), "x", "7", [], {}, [1], {"x": 1}, 2**70]


def test_no_junk_in_any_place_makes_anything_but_a_scene_or_a_named_error(tmp_path):
    rng = np.random.default_rng(0)

    def places(node, path=()):
        children = node.items() if isinstance(node, dict) else enumerate(node[:4]) if isinstance(node, list) else ()
        for key, child in children:
            yield (*path, key)
            yield from places(child, (*path, key))

    text = json.dumps(gpudrive(whole_street()))
    everywhere = list(places(json.loads(text)))
    for number in rng.choice(len(everywhere), 150, replace=False):
        content = json.loads(text)
        _change(content, *everywhere[number], value=JUNK[int(rng.integers(len(JUNK)))])
        (tmp_path / "a.json").write_text(json.dumps(content))
        ((_, found),) = GpuDriveJson(str(tmp_path)).read("a.json")
        assert isinstance(found, TrafficScene | DataError), everywhere[number]


def test_gpudrive_without_metadata_or_cut_short_is_refused(tmp_path):
    content = gpudrive(whole_street())
    (tmp_path / "a.json").write_text(json.dumps(content)[:-50])
    with pytest.raises(DataError, match="it is no JSON"):
        only(GpuDriveJson(str(tmp_path)))
    del content["metadata"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="metadata absent"):
        only(GpuDriveJson(str(tmp_path)))
    with pytest.raises(MissingError, match="is not a folder"):
        GpuDriveJson(str(tmp_path / "absent")).units()
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="holds no GPUDrive"):
        GpuDriveJson(str(tmp_path / "empty")).units()


# ScenarioNet


def write_scenario(folder: Path, scenario: dict) -> ScenarioNetTraffic:
    (folder / "sd.pkl").write_bytes(pickle.dumps(scenario))
    (folder / "dataset_summary.pkl").write_bytes(pickle.dumps({}))
    return ScenarioNetTraffic(str(folder))


def test_scenarionet_tracks_stay_as_they_are(tmp_path):
    scenario = waymo_scenario()
    scene = only(write_scenario(tmp_path, scenario))
    steps = len(scenario["metadata"]["ts"])
    assert (scene.num_steps, scene.dt, scene.now) == (steps, 0.1, 15)
    assert np.allclose(scene.speed[0, 1:-1], SPEED_MPS, atol=1e-2)
    for token, recorded in scenario["tracks"].items():
        row = scene.ego if token == "7" else scene.agent_tokens.index(token)
        state = recorded["state"]
        valid = np.asarray(state["valid"], bool)
        assert np.array_equal(scene.valid[row], valid)
        world = scene.pose[row, :, :2].astype(np.float64) + scene.origin[:2]
        assert np.allclose(world[valid], state["position"][valid, :2], atol=1e-3)
    late = scene.agent_tokens.index("20")
    assert not scene.valid[late, :30].any()
    assert scene.kind[scene.agent_tokens.index("21")] == AgentKind.PEDESTRIAN
    assert scene.role[scene.agent_tokens.index("22")] == Role.STATIC
    (row,) = scene.light_piece
    assert scene.light_state[0, [0, 29, 30, 59, 60]].tolist() == [
        LightState.STOP, LightState.STOP, LightState.GO, LightState.GO, LightState.UNKNOWN,
    ]  # fmt: skip
    assert scene.piece_tokens[row] == "connector 3"
    assert scene.route[row]


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ("LANE_STATE_ARROW_STOP", LightState.ARROW_STOP), ("LANE_STATE_FLASHING_STOP", LightState.FLASHING_STOP),
        ("TRAFFIC_LIGHT_RED", LightState.STOP), ("TRAFFIC_LIGHT_GREEN", LightState.GO), (None, LightState.NOT_REPORTED),
        ("LANE_STATE_ARROW_CAUTION", LightState.ARROW_CAUTION), ("YELLOW", LightState.CAUTION),
        ("LANE_STATE_UNKNOWN", LightState.UNKNOWN), ("", LightState.UNKNOWN),
    ],
)  # fmt: skip
def test_words_for_lights(told, state):
    assert light_state(told) == state


def test_bad_scenarionet_files_are_named(tmp_path):
    for change, message in (
        (lambda s: s["metadata"].update(sdc_id="99"), "sdc_id is '99'"),
        (
            lambda s: s["tracks"].update({"9": track("VEHICLE", np.full((len(s["metadata"]["ts"]), 2), np.nan), 0.0)}),
            "finite",
        ),
        (lambda s: s["map_features"].clear(), "no lane within"),
        (lambda s: s.pop("tracks"), "tracks is absent"),
    ):
        scenario = waymo_scenario()
        change(scenario)
        with pytest.raises(DataError, match=message):
            only(write_scenario(tmp_path, scenario))
    (tmp_path / "sd.pkl").write_bytes(pickle.dumps(waymo_scenario())[:-100])
    with pytest.raises(DataError, match=r"sd\.pkl"):
        only(ScenarioNetTraffic(str(tmp_path)))


def test_real_scenarionet_scenes_move_plausibly():
    source = ScenarioNetTraffic(str(reference_path("real/nuscenes_mini")))
    for unit in source.units():
        ((_, scene),) = source.read(unit)
        assert isinstance(scene, TrafficScene), scene
        vehicles = (scene.kind == AgentKind.VEHICLE) & ((scene.role & Role.STATIC) == 0)
        velocity = scene.velocity()
        ahead = np.stack([np.cos(scene.pose[..., 2]), np.sin(scene.pose[..., 2])], axis=-1)
        moving = (scene.speed > 3.0) & vehicles[:, None] & scene.speed_known
        along = (velocity * ahead).sum(axis=-1)[moving] / scene.speed[moving]
        assert np.median(along) > 0.99  # heading and motion agree
        lanes = scene.pieces(PieceKind.LANE)
        on_route = np.concatenate([scene.piece(row) for row in lanes if scene.route[row]])
        near = np.hypot(*(on_route[:, None] - scene.pose[0, None, ::10, :2]).transpose(2, 0, 1)).min(axis=0)
        assert np.median(near) < 3.0


# NAVSIM logs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(data root, the synthetic drive that its one log records)"""
    root = tmp_path_factory.mktemp("navsim")
    recipe = recipe_of(compose("synthetic", ["output_dir=unused", "scenes=8", "recipe.cameras=[]", "recipe.qa=false"]))
    drive = recipe.drive(0)
    folder = root / "navsim_logs" / "trainval"
    folder.mkdir(parents=True)
    frames = frames_of(drive, recipe.name_of(0), (960, 540))
    (folder / f"{recipe.name_of(0)}.pkl").write_bytes(encode(frames))
    write_maps(root / "maps", recipe.seed)
    return root, drive, frames


def rewritten(written, tmp_path, change) -> NavsimTraffic:
    root, _, frames = written
    frames = pickle.loads(pickle.dumps(frames))
    change(frames)
    (tmp_path / "navsim_logs" / "x").mkdir(parents=True)
    (tmp_path / "navsim_logs" / "x" / "log.pkl").write_bytes(pickle.dumps(frames))
    return NavsimTraffic(str(tmp_path), "x", maps_root=str(root / "maps"))


def test_a_whole_log_at_two_hertz_is_the_drive_that_was_recorded(written):
    root, drive, frames = written
    scene = only(NavsimTraffic(str(root), "trainval"))
    assert (scene.dt, scene.num_steps, scene.now) == (0.5, len(drive.ego), 3)
    town = drive.plan.town.origin
    world = scene.pose[..., :2].astype(np.float64) + scene.origin[:2]
    ahead = EGO_AXLE_TO_CENTRE * np.column_stack([np.cos(drive.ego[:, 2]), np.sin(drive.ego[:, 2])])
    assert np.allclose(world[0], drive.ego[:, :2] + ahead + town, atol=1e-3)
    assert np.allclose(world[1:].transpose(1, 0, 2), drive.objects[..., :2] + town, atol=1e-3)
    turn = (scene.pose[1:, :, 2].T - drive.objects[..., 2] + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(turn).max() < 1e-4
    assert scene.agent_tokens[1:] == tuple(frames[0]["anns"]["track_tokens"])
    assert scene.frame_tokens == tuple(frame["token"] for frame in frames)
    assert np.allclose(scene.size[1:], [drive.cast.rows[m]["size"] for m in drive.members])
    assert np.allclose(scene.ego_dynamics, drive.ego_dynamics, atol=1e-5)
    told = {str(c): red for c, red in frames[3]["traffic_lights"]}
    for row, state in zip(scene.light_piece, scene.light_state[:, 3]):
        red = told.get(scene.piece_tokens[row].removeprefix("connector "))
        expected = {None: LightState.NOT_REPORTED, True: LightState.STOP, False: LightState.GO}
        assert state == expected[red]
    assert scene.cameras["CAM_F0"].path == frames[3]["cams"]["CAM_F0"]["data_path"]
    assert scene.images["CAM_F0"][5] == frames[5]["cams"]["CAM_F0"]["data_path"]


def test_a_log_is_cut_where_time_jumps_and_nothing_is_filled_in(written, tmp_path):
    def change(frames):
        for frame in frames[6:]:
            frame["timestamp"] += 500_000
        for frame in frames[-1:]:
            frame["timestamp"] += 500_000

    source = rewritten(written, tmp_path, change)
    first, second, third = [scene for _, scene in source.read("log.pkl")]
    assert (first.id, first.num_steps, first.now) == ("log-0", 6, 3)
    assert (second.id, second.num_steps) == ("log-1", len(written[2]) - 7)
    assert isinstance(third, DataError)
    assert "1 time step" in str(third)


def test_gaps_in_a_track_stay_gaps(written, tmp_path):
    gone = written[2][0]["anns"]["track_tokens"][0]

    def change(frames):
        anns = frames[5]["anns"]
        keep = np.array([token != gone for token in anns["track_tokens"]])
        for key, value in anns.items():
            anns[key] = value[keep] if isinstance(value, np.ndarray) else [v for v, k in zip(value, keep) if k]

    scene = only(rewritten(written, tmp_path, change))
    row = scene.agent_tokens.index(gone)
    assert np.flatnonzero(~scene.valid[row]).tolist() == [5]
    assert not scene.pose[row, 5].any()


def test_bad_logs_are_named(written, tmp_path):
    def twice(frames):
        frames[2]["anns"]["track_tokens"][1] = frames[2]["anns"]["track_tokens"][0]

    source = rewritten(written, tmp_path, twice)
    with pytest.raises(DataError, match="annotated twice"):
        only(source)
    with pytest.raises(MissingError, match="maps"):
        NavsimTraffic(str(tmp_path), "x").prepare(tmp_path)
    (tmp_path / "navsim_logs" / "x" / "log.pkl").write_bytes(pickle.dumps([3]))
    with pytest.raises(DataError, match=r"log\.pkl"):
        list(source.read("log.pkl"))
    (tmp_path / "navsim_logs" / "x" / "log.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="holds a dict"):
        list(source.read("log.pkl"))


@pytest.mark.parametrize("name", ["navsim", "navsim_real"])
def test_golden_logs_become_scenes(name):
    source = NavsimTraffic(str(reference_path(f"golden/{name}/dataset")), "trainval")
    source.prepare(Path())
    for unit in source.units():
        for _, scene in source.read(unit):
            assert isinstance(scene, TrafficScene), scene
            assert scene.dt == 0.5
            assert scene.route.any()
