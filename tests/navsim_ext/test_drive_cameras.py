"""What the cameras of a drive show is what the pictures of a log of the same drive show."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_readers_scenarionet import waymo_scenario

from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, MissingError
from navsim_ext.frames import POSE_INTERVAL_S, to_local
from navsim_ext.maps.nuplan_gpkg import load_map
from navsim_ext.rendering.camera import camera_rig
from navsim_ext.rendering.drive_cameras import DriveCameras, lights_shown, objects_seen
from navsim_ext.rendering.objects import braking_tracks
from navsim_ext.rendering.renderer import render
from navsim_ext.synthetic.drive import recorded
from navsim_ext.synthetic.fids import Fids
from navsim_ext.synthetic.log_writer import annotations
from navsim_ext.synthetic.traffic_scenes import SyntheticTraffic, scene_of
from navsim_ext.traffic.codes import LightState
from navsim_ext.traffic.scenarionet import ScenarioNetTraffic

SIZE = (320, 180)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> SyntheticTraffic:
    mix = {"queue": 1.0, "red": 1.0, "double_parked": 1.0}
    return SyntheticTraffic(
        scenes=3, maps_root=str(tmp_path_factory.mktemp("maps")), seed=3, mix=mix, horizon_s=4.0, image_size=SIZE
    )


@pytest.mark.parametrize("step", [0, 20])
def test_a_drive_looks_like_the_log_of_it(source, step):
    """At now and 2 s later, pixel by pixel; only who is seen at all may differ (logs leave out the far ones)."""
    cameras = DriveCameras(source.maps_root, None, image_size=SIZE)
    lit = 0
    for unit in source.units():
        run = source.run(int(unit))
        scene = scene_of(source, int(unit), run)
        drive = recorded(run)
        state, policy = World().reset([scene]), Replay()
        policy.start(state, [scene])
        while state.step < step:
            World().step(state, policy.act(state))
        frame = 3 + step // 5
        ego = drive.ego[frame]
        local = to_local(ego, state.scenes.frame[0])
        tracks = [str(int(member)) for member in drive.members]
        window = [annotations(drive, k, tracks) for k in range(frame - 3, frame + 1)]
        braking = braking_tracks(window, 3, POSE_INTERVAL_S)
        seen, shown = objects_seen(state, 0, local)
        far = {
            token for token, box in zip(seen.track_tokens, seen.boxes) if np.hypot(*box[:2]) > 70.0
        }  # logs know those only who come nearer
        assert set(tracks) - far <= set(seen.track_tokens)
        assert shown - far == braking - far
        lit += len(braking - far)
        names = dict(zip(seen.track_tokens, seen.names))
        assert all(names[token] == name for token, name in zip(tracks, window[-1].names) if token in names)
        mine = cameras.picture(state, 0, local, "CAM_F0").astype(float)
        town = load_map(Path(source.maps_root), scene.map_location)
        pose = ego + np.append(drive.plan.town.origin, 0.0)
        theirs = render(
            town, window[-1], pose, _lights(drive, frame), camera_rig(SIZE)["CAM_F0"], SIZE, braking=braking
        ).astype(float)
        changed = (np.abs(mine - theirs) > 8.0).any(axis=-1)
        assert changed.mean() < 0.002
    assert lit > 0


def _lights(drive, frame):
    fids = Fids(drive.plan.town)
    return [
        (str(fids.connector(c.index)), not bool(drive.green[frame, c.index]))
        for c in drive.plan.town.connectors
        if c.phase >= 0
    ]


def test_a_light_of_an_unknown_lane_is_named_and_one_without_a_state_is_dark(source):
    scene = source.scene(int(source.units()[0]))
    dark = np.full_like(scene.light_state, LightState.NOT_REPORTED)
    assert lights_shown(World().reset([replace(scene, light_state=dark)]), 0) == []
    assert lights_shown(World().reset([scene]), 0)
    nameless = replace(scene, piece_tokens=tuple(f"lane {k}" for k in range(len(scene.piece_kind))))
    with pytest.raises(DataError, match="no lane connector"):
        lights_shown(World().reset([nameless]), 0)


def test_cameras_of_a_recorded_scenario_see_its_rebuilt_map(tmp_path):
    """A scenario of ScenarioNet: what lies ahead is drawn, and other things behind."""
    (tmp_path / "scenario.pkl").write_bytes(pickle.dumps(waymo_scenario()))
    source = ScenarioNetTraffic(str(tmp_path))
    (_, scene), = source.read("scenario.pkl")  # fmt: skip
    cameras = DriveCameras(str(tmp_path), None, image_size=SIZE)
    state = World().reset([scene])
    ego = state.pose[0, scene.ego].double().cpu().numpy()
    picture = cameras.picture(state, 0, ego, "CAM_F0")
    assert picture.shape == (*SIZE[::-1], 3)
    turned = cameras.picture(state, 0, ego + np.array([0.0, 0.0, np.pi]), "CAM_F0")
    assert (picture != turned).any()
    assert cameras.map_of(scene) is cameras.map_of(scene)
    with pytest.raises(MissingError, match="of none of the 1 scenarios"):
        source.map_of(replace(scene, id="another"))
