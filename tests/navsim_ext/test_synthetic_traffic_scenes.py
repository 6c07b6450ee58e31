"""The synthetic world as traffic scenes: drives at 10 Hz, maps whose edges have the ground on the left, the law."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely

from navsim_ext.errors import DataError
from navsim_ext.maps.nuplan_gpkg import read_gpkg
from navsim_ext.synthetic.gpkg_writer import map_path
from navsim_ext.synthetic.traffic import STEP_S, Resumed, resume
from navsim_ext.synthetic.traffic_scenes import SyntheticTraffic
from navsim_ext.traffic.codes import LANES, AgentKind, EdgeKind, LightState, PieceKind, Role
from navsim_ext.traffic.findings import off_road, overlaps
from navsim_ext.traffic.source import TrafficSource

MIX = {"turn": 1.0, "start": 1.0, "cruise": 1.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> SyntheticTraffic:
    return SyntheticTraffic(scenes=3, maps_root=str(tmp_path_factory.mktemp("maps")), seed=5, mix=MIX)


@pytest.fixture(scope="module")
def scenes(source):
    return [scene for unit in source.units() for _, scene in source.read(unit)]


def test_scenes_are_whole_drives_at_ten_hertz(source, scenes):
    assert isinstance(source, TrafficSource)
    assert len({scene.id for scene in scenes}) == 3
    for scene in scenes:
        assert scene.num_steps == 166
        assert scene.now == 15
        assert scene.valid.all()
        assert scene.role[0] == Role.EGO
        assert scene.kind[0] == AgentKind.VEHICLE
        static = (scene.role & Role.STATIC) > 0
        assert not scene.speed[static].any()
        assert np.abs(scene.speed[0] - scene.ego_dynamics[:, 0]).max() < 0.35
        assert np.hypot(*(scene.goal[0] - scene.pose[0, -1, :2])) < 400.0
        assert scene.route.any()
        ego_lane = scene.pieces(*LANES)[scene.route[scene.pieces(*LANES)]]
        reach = np.concatenate([scene.piece(row) for row in ego_lane])
        assert np.hypot(*(reach - scene.pose[0, scene.now, :2]).T).min() < 6.0


def test_road_edges_have_the_drivable_ground_on_their_left(source, scenes):
    for scene in scenes:
        town = read_gpkg(map_path(Path(source.maps_root), scene.map_location), "x")
        layers = (town.roadblocks, town.intersections, town.carparks, town.generic_drivable_areas, town.lanes)
        ground = shapely.union_all([polygon for layer in layers for polygon in layer.polygons]).buffer(0.1)
        checked = 0
        for row in scene.pieces(PieceKind.ROAD_EDGE):
            line = scene.piece(row).astype(np.float64) + scene.origin[:2]
            step = np.diff(line, axis=0)
            length = np.hypot(*step.T)
            keep = length > 2.0
            middle = 0.5 * (line[1:] + line[:-1])[keep]
            normal = np.column_stack([-step[keep, 1], step[keep, 0]]) / length[keep, None]
            assert shapely.contains_xy(ground, middle + 0.5 * normal).all()
            assert not shapely.contains_xy(ground, middle - 0.5 * normal).any()
            checked += int(keep.sum())
        assert checked > 20


def test_moving_vehicles_stay_on_the_road_of_the_whole_town(scenes):
    for scene in scenes:
        moving = set(scene.agent_id[(scene.kind == AgentKind.VEHICLE) & (scene.speed.max(axis=1) > 1.0)].tolist())
        assert len(moving) > 1
        assert not moving & {found.agent for found in off_road(scene)}
        assert overlaps(scene) == []


def test_lanes_join_end_to_start_and_neighbours_lie_on_their_side(scenes):
    for scene in scenes:
        for (i, j), kind in zip(scene.edges, scene.edge_kind):
            if kind == EdgeKind.SUCCESSOR:
                assert np.hypot(*(scene.piece(i)[-1] - scene.piece(j)[0])) < 0.1
                assert [j, i, EdgeKind.PREDECESSOR] in np.column_stack([scene.edges, scene.edge_kind]).tolist()
            elif kind in (EdgeKind.LEFT, EdgeKind.RIGHT):
                a, b = scene.piece(i), scene.piece(j)
                ahead = a[1] - a[0]
                aside = b[0] - a[0]
                cross = ahead[0] * aside[1] - ahead[1] * aside[0]
                assert (cross > 0.0) == (kind == EdgeKind.LEFT)


def test_lights_stand_at_the_start_of_their_connector_and_hold_the_ego(scenes):
    crossed = 0
    for scene in scenes:
        for row, stop, state in zip(scene.light_piece, scene.light_stop, scene.light_state):
            assert set(np.unique(state)) <= {LightState.STOP, LightState.GO}
            way = scene.piece(row)
            assert np.hypot(*(way[0] - stop)) < 0.01
            if not scene.route[row]:
                continue
            unit = (way[1] - way[0]) / np.hypot(*(way[1] - way[0]))
            gone = (scene.pose[0, :, :2] - stop) @ unit
            near = np.abs((scene.pose[0, :, :2] - stop) @ np.array([-unit[1], unit[0]])) < 1.0
            for step in np.flatnonzero((gone[:-1] <= 0.0) & (gone[1:] > 0.0) & near[1:]):
                assert state[step] == LightState.GO
                crossed += 1
    assert crossed


@pytest.mark.parametrize("which", [0, 1])
def test_the_law_goes_on_from_the_states_in_a_scene_as_recorded(scenes, which):
    """From the first step and from the present one, with nothing but the arrays of the scene."""
    for scene in scenes:
        law, nobody = scene.law, np.zeros(scene.num_agents, np.bool_)
        begin = round(float(law["clock"][which]) / STEP_S)
        states = [law[f"state_{name}"][which] for name in ("s", "speed", "acceleration", "waiting")]
        first = scene.now * which
        motion = resume(
            law, Resumed(begin, *states, nobody, np.zeros((scene.num_agents, 3))), scene.num_steps - 1 - first
        )
        again = motion.pose.transpose(1, 0, 2)[..., :2].astype(np.float32)
        assert np.array_equal(again, scene.pose[:, first:, :2])


def test_a_scene_depends_on_seed_and_index_alone(source, scenes):
    other = SyntheticTraffic(scenes=1, maps_root=source.maps_root, seed=5, mix=MIX)
    (again,) = [scene for _, scene in other.read(source.units()[0])]
    assert again.equals(scenes[0]) == []
    shifted = SyntheticTraffic(scenes=1, maps_root=source.maps_root, seed=6, mix=MIX)
    assert shifted.identity() != other.identity()


def test_the_test_part_lies_in_the_unseen_town(source):
    test = SyntheticTraffic(scenes=4, maps_root=source.maps_root, seed=5, mix=MIX, part="test")
    train = SyntheticTraffic(scenes=6, maps_root=source.maps_root, seed=5, mix=MIX, part="train")
    recipe = test.recipe()
    assert {recipe.location_of(int(unit)) for unit in test.units()} == {test.test_location}
    assert test.test_location not in {recipe.location_of(int(unit)) for unit in train.units()}
    assert not set(test.units()) & set(train.units())


@pytest.mark.parametrize("wrong", [{"part": "dev"}, {"horizon_s": 0.0}, {"mix": {"flying": 1.0}}, {"mix": {}}])
def test_settings_that_make_no_sense_are_named(source, wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        SyntheticTraffic(**{"scenes": 1, "maps_root": source.maps_root, "mix": MIX} | wrong)
