"""Every array of every golden metric cache, rebuilt from the data sets: both versions, planner internals included."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from golden_scenes import POSITION_M, REST, SETS, GoldenSet, golden_folder

from navsim_ext.frames import wrap_angle
from navsim_ext.metric_cache.map_table import map_table
from navsim_ext.metric_cache.scene_record import MapContext, build_scene, closed_plan, read_road
from navsim_ext.pdm.closed.plan import ClosedPlan
from navsim_ext.pdm.log_replay import replayed_boxes
from navsim_ext.pdm.record import SceneMetricCache
from navsim_ext.pdm.version import VERSIONS

NAVSIM_NAMES = {"v1": "v11", "v2": "v22"}
Case = tuple[GoldenSet, MapContext, SceneMetricCache, ClosedPlan]


@pytest.fixture(scope="module", params=SETS)
def cases(request, reference, tmp_path_factory) -> list[Case]:
    folder = tmp_path_factory.mktemp("golden")
    golden = GoldenSet(golden_folder(request.param, reference, folder), folder)
    contexts = {location: MapContext(location, m, map_table(m)) for location, m in golden.maps.items()}
    built = []
    for scene in golden.scenes():
        context = contexts[scene.map_location]
        record = build_scene(scene, context)
        road = read_road(context.vector_map, record.ego_state, scene.roadblock_ids)
        built.append((golden, context, record, closed_plan(scene, context, road, record.ego_state)))
    assert len(built) == len(golden.tokens) > 0
    return built


def each(cases: list[Case]) -> Iterator[tuple[SceneMetricCache, ClosedPlan, MapContext, int, str, dict]]:
    for golden, context, record, plan in cases:
        for v, version in enumerate(VERSIONS):
            yield record, plan, context, v, version, golden.expected(record.token, NAVSIM_NAMES[version])


def close(found, wanted, tolerance: float, what: str) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance, err_msg=what)


def close_poses(found, wanted, what: str) -> None:
    close(found[..., :2], wanted[..., :2], POSITION_M, what)
    close(wrap_angle(found[..., 2] - wanted[..., 2]), 0.0, REST, what)


def test_ego_and_past(cases):
    for record, _, _, _, version, expected in each(cases):
        close_poses(record.ego_state, expected["ego_state11"], "ego pose")
        close(record.ego_state[3:], expected["ego_state11"][3:], REST, "ego dynamics")
        assert record.time_us == int(expected["ego_time_us"])
        if version == "v2":
            close_poses(record.past_states, expected["past_human_state11"], "past")
            close(record.past_states[:, 3:], expected["past_human_state11"][:, 3:], REST, "past dynamics")
            np.testing.assert_array_equal(record.past_time_us, expected["past_human_time_us"])
            close(record.human_poses, expected["human_poses"], 2e-9, "human (NAVSIM inverts a UTM matrix: 1e-9 m)")
        close(record.human_poses, expected["gt_future_poses"], REST, "human (Scene API)")


def test_route_centreline_and_map(cases):
    for record, _, context, _, _, expected in each(cases):
        assert record.route_lane_ids == expected["route_lane_ids"].tolist()
        assert record.route_roadblock_ids == expected["route_block_ids_corrected"].tolist()
        close_poses(record.centerline, expected["centerline_se2"], "centreline")
        close(record.centerline_progress, expected["centerline_progress"], REST, "centreline progress")
        table, rows = context.table, record.map_polygons
        assert table.ids[rows].tolist() == expected["map_tokens"].tolist()
        np.testing.assert_array_equal(table.types[rows], expected["map_types"])
        np.testing.assert_array_equal(record.map_on_route, expected["map_on_route"])
        vertices = np.concatenate([table.rings(row)[0] for row in rows])
        close(vertices, expected["map_xy"], POSITION_M, "map vertices")


def test_observation(cases):
    single = 0
    for record, _, _, _, version, expected in each(cases):
        rows = [record.track_tokens.index(token) for token in expected["obj_tokens"]]
        np.testing.assert_array_equal(record.track_types[rows], expected["obj_types"])
        close(record.track_velocities[rows], expected["obj_first_velocity"], REST, "first velocity")
        close(record.track_sizes[rows], expected["obj_lwh"], REST, "size")
        boxes = replayed_boxes(record, version)
        np.testing.assert_array_equal(np.isnan(boxes[:, rows]), np.isnan(expected["obs_corners"]))
        close(boxes[:, rows], expected["obs_corners"], POSITION_M, "boxes")
        assert np.isnan(np.delete(boxes, rows, axis=1)).all()
        for order in expected["obs_order"]:
            present = np.flatnonzero(order >= 0)
            by_row = sorted(present, key=lambda i: rows[i])
            assert by_row == sorted(present, key=lambda i: order[i])
        single += int((np.isfinite(record.track_poses[..., 0]).sum(axis=1) == 1).sum())
    if "real" in str(cases[0][0].folder):
        assert single > 100  # the rule for tracks that are seen once is exercised


def test_red_lights(cases):
    seen = 0
    for record, _, context, _, version, expected in each(cases):
        if version == "v2":
            wanted = {token.removeprefix("red_light_"): i for i, token in enumerate(expected["red_tokens"].tolist())}
            found = context.table.ids[record.red_polygons].tolist()
            assert sorted(found) == sorted(wanted)
            for row, fid in enumerate(found):
                active = expected["red_active"][:, wanted[fid]]
                np.testing.assert_array_equal(np.repeat(record.red_frames[row], 5)[:41], active)
            seen += len(found)
    if "real" not in str(cases[0][0].folder):
        assert seen > 0


def test_proposals_of_the_rule_based_planner(cases):
    for _, plan, _, _, _, expected in each(cases):
        unrolled = np.s_[:, :41]
        close(plan.rollout.target_speeds, expected["pc_target_velocities"], REST, "target speeds")
        close(plan.rollout.idm[unrolled], expected["pc_idm"][unrolled], POSITION_M, "IDM states")
        close(plan.rollout.leaders[unrolled], expected["pc_lead"][unrolled], POSITION_M, "leaders")
        close_poses(plan.rollout.poses[unrolled], expected["pc_state_se2"][unrolled], "proposal poses")
        assert list(plan.rollout.world.tokens) == expected["pc_obs_tokens_t0"].tolist()
        close(plan.states[..., :2], expected["pc_sim_state11"][..., :2], POSITION_M, "simulated positions")
        close(plan.states[..., 2:], expected["pc_sim_state11"][..., 2:], REST, "simulated states")


def test_choice_and_trajectory_per_version(cases):
    for record, plan, _, v, _, expected in each(cases):
        np.testing.assert_array_equal(plan.scores[v].multiplicative.T, expected["pc_multi"])
        weighted = plan.scores[v].weighted.T
        close(weighted, expected["pc_weighted"][: len(weighted)], POSITION_M, "weighted sub-scores")
        close(plan.scores[v].progress, expected["pc_progress_raw"], POSITION_M, "raw progress")
        close(plan.scores[v].scores, expected["pc_scores"], POSITION_M, "proposal scores")
        best = int(expected["pc_best"])
        assert record.pdm_closed_index[v] == best
        close(plan.rollout.idm[best], expected["pc_idm"][best], POSITION_M, "IDM states to 5 s")
        close(plan.rollout.leaders[best], expected["pc_lead"][best], POSITION_M, "leaders to 5 s")
        close_poses(record.pdm_closed[v], expected["pdm_traj_state11"], "trajectory")


def test_reference_scores_equal_those_of_the_scored_pairs(cases):
    for golden, _, record, _ in cases:
        trajectories = np.load(golden.folder / "scores" / f"{record.token}_trajs.npz")
        human = trajectories["names"].tolist().index("human")
        for v, version in enumerate(VERSIONS):
            scored = np.load(golden.folder / "scores" / f"{record.token}_{NAVSIM_NAMES[version]}.npz")
            close(record.pdm_progress[v], scored["progress_raw"][0, 0], POSITION_M, "progress of PDM-Closed")
            assert record.pdm_multiplier[v] == scored["multi_prod"][0, 0]
        nc, dac, tlc, ddc = scored["multi"][human, :, 1]
        np.testing.assert_array_equal(record.human_sub_scores[:4], [nc, dac, ddc, tlc])
        np.testing.assert_array_equal(record.human_sub_scores[5:7], scored["weighted"][human, 1:3, 1])


def test_records_do_not_depend_on_what_was_built_before(cases):
    """NAVSIM's list of collided tracks grows from scene to scene; here every scene starts anew."""
    golden, context, record, _ = cases[-1]
    scene = next(scene for scene in golden.scenes() if scene.token == record.token)
    again = build_scene(scene, context)
    for name, array in record.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[name], array, err_msg=name)
