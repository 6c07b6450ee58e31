"""The sim-agents metrics against the challenge's own code, against naive twins, and under their laws."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely

from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.features import Features, log_features, rollout_features
from navsim_ext.realism.interaction import nearest_distances, times_to_collision
from navsim_ext.realism.kinematics import acceleration_validity, speed_validity
from navsim_ext.realism.likelihood import buckets, log_likelihood, log_likelihoods, scenario_metrics
from navsim_ext.realism.metric import realism
from navsim_ext.realism.road_edge import EdgeSegments, road_edge_distances
from navsim_ext.realism.rollouts import RolloutFolder, Rollouts, world_states
from navsim_ext.realism.rules import HISTORY_STEPS, RULES, STEPS, Histogram, rules_of
from navsim_ext.realism.scenario import listed, scenario_of
from navsim_ext.traffic.codes import PieceKind
from navsim_ext.traffic.scene_v1 import read_scene

COMMITTED = Path(__file__).parents[1] / "golden" / "wosac"
COMMITTED_NAMES = ("08_alone", "10_far", "12_islands")
OTHER_NAMES = (
    "00_straight", "01_cross", "02_cross_split", "03_curve", "04_roundabout", "05_bridge", "06_lot", "07_highway",
    "09_crowd", "11_cross2",
)  # fmt: skip
STORED = {
    "collision": "collision_per_step",
    "offroad": "offroad_per_step",
    "traffic_light_violation": "traffic_light_violation_per_step",
}


@pytest.fixture(params=[*COMMITTED_NAMES, *OTHER_NAMES])
def golden(request, reference):
    """Folder and name of a golden scene."""
    name = request.param
    return (COMMITTED if name in COMMITTED_NAMES else reference("golden/wosac")), name


def load(folder: Path, name: str):
    scene = read_scene(folder / f"{name}.scene.npz")
    return scene, RolloutFolder(folder).get(name)


def test_every_value_equals_the_challenges_code(golden):
    folder, name = golden
    scene, rollouts = load(folder, name)
    scenario = scenario_of(scene)
    log, simulated = log_features(scenario), rollout_features(scenario, world_states(scenario, scene, rollouts, 32))
    reference = np.load(folder / f"{name}.golden.npz")
    far = np.abs(scenario.log[..., :2]).max() > 1000
    tolerance = {
        "time_to_collision": 2.5e-5,
        "distance_to_nearest_object": 1e-3 if far else 1e-5,
        "distance_to_road_edge": 1e-3 if far else 4e-5,
        "average_displacement_error": 2e-5,
    }
    assert np.array_equal(reference["log/object_id"], scenario.ids[: scenario.scored])
    for which, features in (("log", log), ("sim", simulated)):
        for feature in Features.__dataclass_fields__:
            ours, theirs = getattr(features, feature), reference[f"{which}/{STORED.get(feature, feature)}"]
            assert ours.dtype == theirs.dtype, feature
            assert ours.shape == theirs.shape, feature
            if feature in tolerance:
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=tolerance[feature], err_msg=feature)
            else:  # kinematics to the last bit, flags exactly
                np.testing.assert_array_equal(ours, theirs, err_msg=feature)
    np.testing.assert_array_equal(speed_validity(scenario.present), reference["valid/speed"])
    np.testing.assert_array_equal(acceleration_validity(scenario.present), reference["valid/acceleration"])
    for year in (2023, 2025):
        for feature, value in log_likelihoods(scenario, log, simulated, RULES[year]).items():
            theirs = reference[f"ll{year}/{feature}"].reshape(value.shape)
            np.testing.assert_allclose(value, theirs, atol=1e-6, err_msg=f"{year} {feature}")


@pytest.mark.parametrize("year", [2023, 2024, 2025])
def test_every_score_equals_the_challenges_code(golden, year):
    folder, name = golden
    scene, rollouts = load(folder, name)
    result = realism(scene, rollouts, year=year)
    expected = json.loads((folder / "metrics.json").read_text())["per_scenario"][name][str(year)]
    assert result.metrics.keys() == expected["scenario"].keys()
    for entry, value in expected["scenario"].items():
        assert result.metrics[entry] == pytest.approx(value, rel=1e-6, abs=3e-7), entry
    for entry, value in buckets(result.metrics, RULES[year]).items():
        assert value == pytest.approx(expected["buckets"][entry], abs=3e-7), entry


def committed(name: str = "10_far"):
    return load(COMMITTED, name)


def test_order_of_objects_and_of_rollouts_does_not_matter():
    scene, rollouts = committed("12_islands")
    whole = realism(scene, rollouts).metrics
    rng = np.random.default_rng(3)
    objects, order = rng.permutation(len(rollouts.ids)), rng.permutation(len(rollouts.pose))
    shuffled = Rollouts(rollouts.ids[objects], rollouts.pose[order][:, objects], rollouts.z[order][:, objects])
    assert realism(scene, shuffled).metrics == pytest.approx(whole, abs=1e-12)


def test_the_log_itself_has_no_displacement_and_agrees_in_every_event():
    scene, rollouts = committed("12_islands")
    rows = [int(np.flatnonzero(scene.agent_id == one)[0]) for one in rollouts.ids]
    future = slice(HISTORY_STEPS, STEPS)
    pose = np.concatenate([scene.pose[rows, future, :2], scene.heading_as_recorded[rows, future, None]], axis=-1)
    log = Rollouts(rollouts.ids, np.repeat(pose[None], 32, axis=0), np.repeat(scene.z[rows, future][None], 32, axis=0))
    metrics = realism(scene, log).metrics
    assert metrics["average_displacement_error"] == 0
    for event in ("collision_indication", "offroad_indication", "traffic_light_violation"):
        assert metrics[f"{event}_likelihood"] == pytest.approx(32.001 / 32.002, abs=1e-12)
    assert metrics["metametric"] > realism(scene, rollouts).metrics["metametric"]


@pytest.mark.parametrize("origin", [(330_800.0, 4_689_700.0, 0.0), (-586_900.0, 0.0, 12.0)])
def test_a_map_projection_does_not_round_the_world_away(origin):
    """Far origins (UTM) in float32 would quantise places to half a metre: figures must be those of a near origin."""
    scene, rollouts = committed("12_islands")
    here = replace(scene, origin=np.array([4096.0, 4096.0, 0.0]))
    there = replace(scene, origin=np.array(origin))
    assert realism(there, rollouts).metrics == pytest.approx(realism(here, rollouts).metrics, abs=1e-12)
    assert scenario_of(scene).log[scenario_of(scene).log_valid][:, :2].min() == pytest.approx(
        (scene.pose[scene.valid][:, :2] + scene.origin[:2]).min(), abs=1e-2
    )  # WOMD's own frame is kept


def test_a_histogram_by_hand():
    histogram = Histogram(0.0, 4.0, 4)
    simulated = np.array([[[0.5, 1.0, 3.9]], [[np.nan, 7.0, -2.0]]], np.float32)  # bins 0, 1, 3 and 3, 3, 0
    logged = np.array([[0.0, 1.5, 4.0]], np.float32)  # bins 0, 1, 3
    probability = (np.array([2, 1, 3]) + 0.1) / (6 + 0.4)
    np.testing.assert_allclose(log_likelihood(logged, simulated, histogram), np.log(probability)[None])


def boxes(rng: np.random.Generator, objects: int, spread: float):
    """states [1, S, T, 4], valid, size of boxes that do not move, in coordinates small enough for float32."""
    states = np.zeros((1, objects, STEPS, 4), np.float32)
    states[..., :2] = rng.uniform(-spread, spread, (1, objects, 1, 2))
    states[..., 3] = rng.uniform(-4, 4, (1, objects, 1))
    size = rng.uniform([0.5, 0.5, 1], [6, 2.5, 2], (objects, 3)).astype(np.float32)
    return states, np.ones((1, objects, STEPS), bool), size


@pytest.mark.parametrize("spread", [6.0, 40.0])
def test_nearest_distance_is_that_of_the_rounded_boxes(spread):
    rng = np.random.default_rng(int(spread))
    states, valid, size = boxes(rng, 12, spread)
    found = nearest_distances(states, valid, size, 5)[0, :, 0]
    cores, radius = [], np.minimum(size[:, 0], size[:, 1]) * 0.35
    for row in range(12):
        x, y, _, heading = states[0, row, 0].astype(float)
        half = (size[row, :2] - 2 * radius[row]) / 2
        corner = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * half
        turn = np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]])
        cores.append(shapely.Polygon(corner @ turn.T + [x, y]))
    checked = 0
    for i in range(5):
        apart = [j for j in range(12) if j != i]
        distances = np.array([cores[i].distance(cores[j]) - radius[i] - radius[j] for j in apart])
        if all(cores[i].distance(cores[j]) > 0 for j in apart):
            assert found[i] == pytest.approx(distances.min(), abs=2e-5)
            checked += 1
        else:
            assert found[i] < 0
    assert checked


def test_depth_of_overlapping_boxes_is_the_least_push_that_parts_them():
    states = np.zeros((1, 2, STEPS, 4), np.float32)
    states[0, 1, :, 0] = 3.0  # two cars of 4 x 2 m one behind the other, overlapping by 1 m, side by side by 2 m
    size = np.array([[4, 2, 1.5], [4, 2, 1.5]], np.float32)
    found = nearest_distances(states, np.ones((1, 2, STEPS), bool), size, 2)
    np.testing.assert_allclose(found, -1.0, atol=1e-6)


def test_time_to_collision_of_a_follower():
    """A car at 10 m/s, 20 m (bumper to bumper) behind one at 6 m/s: 5 s, then less by 1 s each second."""
    time = np.arange(STEPS) * 0.1
    states = np.zeros((1, 2, STEPS, 4), np.float32)
    states[0, 0, :, 0], states[0, 1, :, 0] = 10 * time, 24.0 + 6 * time
    size = np.array([[4, 2, 1.5], [4, 2, 1.5]], np.float32)
    found = times_to_collision(states, np.ones((1, 2, STEPS), bool), size, 2)
    expected = np.clip((20.0 - 4 * time[HISTORY_STEPS:]) / 4, None, 5.0)
    still = expected > 0.1
    still[-1] = False  # at the last step there is no speed
    np.testing.assert_allclose(found[0, 0][still], expected[still], atol=1e-3)
    assert (found[0, 1] == 5).all()
    assert found[0, 0, -1] == 5


@pytest.mark.parametrize("seed", range(5))
def test_pruned_road_edge_search_equals_the_search_over_all_segments(seed):
    rng = np.random.default_rng(seed)
    lengths = (90, 40, 3, 2, 55)
    lines = [np.cumsum(rng.normal(0, 4, (length, 2)), axis=0) + rng.uniform(-60, 60, 2) for length in lengths]
    points = np.concatenate([np.concatenate(lines), rng.normal(0, 1, (190, 1))], axis=1).astype(np.float32)
    offsets = np.cumsum([0, *lengths])
    states, valid, size = boxes(rng, 6, 60.0)
    states[..., :2] += np.cumsum(rng.normal(0, 0.5, states[..., :2].shape), axis=2).astype(np.float32)
    edges = EdgeSegments.from_polylines(points, offsets)
    everything = np.array([[-np.inf, -np.inf, np.inf, np.inf]], np.float32).repeat(len(edges.boxes), axis=0)
    unpruned = EdgeSegments(edges.start, edges.edge, edges.before, edges.after, everything)
    np.testing.assert_array_equal(
        road_edge_distances(states, valid, size, edges), road_edge_distances(states, valid, size, unpruned)
    )


def test_road_edge_distance_of_a_car_in_a_street():
    street = np.array([[-100, -4, 0], [100, -4, 0], [100, 4, 0], [-100, 4, 0]], np.float32)  # drivable on the left
    edges = EdgeSegments.from_polylines(street, np.array([0, 2, 4]))
    states, valid = np.zeros((1, 2, STEPS, 4), np.float32), np.ones((1, 2, STEPS), bool)
    states[0, 1, :, 1] = 3.5
    found = road_edge_distances(states, valid, np.array([[4, 2, 1.5], [4, 2, 1.5]], np.float32), edges, False)
    np.testing.assert_allclose(found[0, 0], -3.0, atol=1e-6)
    np.testing.assert_allclose(found[0, 1], 0.5, atol=1e-6)


def test_listed_objects_are_left_out_of_the_additional_figure_only(reference):
    scene, rollouts = load(reference("golden/wosac"), "03_curve")  # one overlap in its log, one car half off the road
    scenario = scenario_of(scene)
    found = listed(scenario)
    assert found.contacts
    assert found.offroad
    assert 0 < found.clean.sum() < scenario.scored
    result = realism(scene, rollouts)
    log = log_features(scenario)
    simulated = rollout_features(scenario, world_states(scenario, scene, rollouts, 32))
    alone = scenario_metrics(scenario, log, simulated, RULES[2025], found.clean)
    assert result.clean == alone["metametric"] != result.metrics["metametric"]


def altered(rollouts: Rollouts, **fields) -> Rollouts:
    return Rollouts(**({"ids": rollouts.ids, "pose": rollouts.pose, "z": rollouts.z} | fields))


def test_rollouts_that_break_a_rule_are_refused_by_name():
    scene, rollouts = committed()
    ids, pose, z = rollouts.ids, rollouts.pose, rollouts.z
    broken = pose.copy()
    broken[3, 2, 5, 1] = np.nan
    foreign = np.append(ids[1:], 987654)
    for change, words in (
        ({"ids": ids[1:], "pose": pose[:, 1:], "z": z[:, 1:]}, f"objects \\[{ids[0]}\\] are missing"),
        ({"ids": foreign}, "are missing"),
        ({"ids": np.append(ids, 987654), "pose": pose[:, [*range(len(ids)), 0]], "z": None}, r"\[987654\] are foreign"),
        ({"ids": np.append(ids[1:], ids[1])}, f"object {ids[1]} appears twice"),
        ({"pose": broken}, f"object {ids[2]} has a value that is not finite in rollout 3, step 5"),
        ({"pose": pose[:, :, :79], "z": None}, "79 steps"),
        ({"pose": pose[:31], "z": None}, "there are 31, the rules ask 32"),
    ):
        with pytest.raises(RealismError, match=words):
            realism(scene, altered(rollouts, **change))
    assert np.isfinite(realism(scene, altered(rollouts, pose=pose[:4], z=z[:4]), expected=None).metrics["metametric"])


def test_scenes_and_years_that_the_rules_do_not_admit():
    scene, rollouts = committed()
    with pytest.raises(RealismError, match="no sim-agents rules of 2022; there are 2023, 2024, 2025"):
        rules_of(2022)
    with pytest.raises(RealismError, match=r"need 91 steps of 0\.1 s with the present at step 10"):
        realism(replace(scene, now=9), rollouts)
    lines = np.where(scene.piece_kind == PieceKind.ROAD_EDGE, PieceKind.LINE_SOLID, scene.piece_kind).astype(np.uint8)
    with pytest.raises(RealismError, match="no road edge"):
        realism(replace(scene, piece_kind=lines), rollouts)
