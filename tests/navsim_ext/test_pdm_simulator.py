"""Reference interpolation, profile fits, tracker and bicycle: against the dense formulation, physics and NAVSIM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import interp1d

from navsim_ext.errors import DataError
from navsim_ext.pdm.ego import AX, HEADING, NUM_STEPS, STEERING, STEP_S, VX, WHEEL_BASE, YAW_RATE, state_from_pose
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.profiles import NUM_DISPLACEMENTS, fit_curvature, fit_velocity
from navsim_ext.pdm.references import references_from_predictions, references_from_trajectory
from navsim_ext.pdm.simulator import MAX_STEERING, simulate

UTM = np.array([664_627.0, 4_998_104.0])
GOLDEN = Path(__file__).parents[1] / "golden" / "pdm" / "scenes.npz"


def random_references(rng, speed=8.0, noise=0.3):
    headings = np.cumsum(rng.normal(0, 0.03, NUM_STEPS)) + rng.uniform(-np.pi, np.pi)
    steps = speed * STEP_S + rng.normal(0, noise, NUM_STEPS)
    xy = np.cumsum(np.c_[steps * np.cos(headings), steps * np.sin(headings)], axis=0) + UTM
    return np.c_[xy, (headings + np.pi) % (2 * np.pi) - np.pi]


def dense_profiles(references):
    """The two fits as NAVSIM states them: normal equations in (v0, a) and (k0, k'), with its difference matrix."""
    m, dt = NUM_DISPLACEMENTS, STEP_S
    headings = references[:-1, 2]
    column = np.stack([np.cos(headings), np.sin(headings)], axis=1).ravel()
    system = np.tril(np.ones((m, m)))[np.repeat(np.arange(m), 2)] * (column * dt * dt)[:, None]
    system[:, 0] = column * dt
    penalty = np.zeros((m - 2, m))  # over v0, a_0 ... a_38
    for row in range(m - 2):
        penalty[row, row + 1] = -1.0
    penalty[-1, -1] = 1.0
    y = np.diff(references[:, :2], axis=0).ravel()
    x = np.linalg.solve(system.T @ system + 1e-4 * penalty.T @ penalty, system.T @ y)
    velocities = x[0] + dt * np.concatenate([[0.0], np.cumsum(x[1:])])
    turns = np.diff(references[:, 2])
    turns = np.arctan2(np.sin(turns), np.cos(turns))
    system = np.tril(np.ones((m, m))) * (velocities * dt * dt)[:, None]
    system[:, 0] = velocities * dt
    ridge = np.diag([1e-10] + [1e-2] * (m - 1))
    x = np.linalg.solve(system.T @ system + ridge, system.T @ turns)
    return velocities, x[0] + dt * np.concatenate([[0.0], np.cumsum(x[1:])])


@pytest.mark.parametrize("seed", range(5))
def test_banded_fits_solve_the_dense_normal_equations(seed):
    references = random_references(np.random.default_rng(seed))
    velocities, curvatures = np.empty(NUM_DISPLACEMENTS), np.empty(NUM_DISPLACEMENTS)
    fit_velocity(references, velocities)
    fit_curvature(references, velocities, curvatures)
    expected_velocities, expected_curvatures = dense_profiles(references)
    np.testing.assert_allclose(velocities, expected_velocities, atol=1e-9)
    np.testing.assert_allclose(curvatures, expected_curvatures, atol=1e-9)


def test_curvature_fit_keeps_its_precision_at_standstill():
    """Without motion only the penalty on k_0 remains (condition 1e12): the exact solution is known, k = 0."""
    references = np.zeros((NUM_STEPS, 3))
    velocities, curvatures = np.zeros(NUM_DISPLACEMENTS), np.empty(NUM_DISPLACEMENTS)
    fit_curvature(references, velocities, curvatures)
    np.testing.assert_array_equal(curvatures, 0.0)
    # constant v, constant turn w per step: minimiser of sum (w - v dt k)^2 + 1e-10 k^2 over constant k
    v, w = 1e-4, 1e-5
    velocities[:] = v
    references[:, 2] = w * np.arange(NUM_STEPS)
    fit_curvature(references, velocities, curvatures)
    s = (v * STEP_S) ** 2
    exact = NUM_DISPLACEMENTS * v * STEP_S * w / (NUM_DISPLACEMENTS * s + 1e-10)
    np.testing.assert_allclose(curvatures, exact, rtol=1e-4)  # not exactly constant: the penalty sits at k_0 only


def test_straight_constant_speed_is_followed_exactly():
    state = state_from_pose([10.0, 20.0, 0.0], [8.0, 0.0, 0.0, 0.0])
    times = np.arange(NUM_STEPS) * STEP_S
    references = np.c_[10.0 + 8.0 * times, np.full(NUM_STEPS, 20.0), np.zeros(NUM_STEPS)]
    states = simulate(references[None], state)[0]
    np.testing.assert_allclose(states[:, 0], references[:, 0], atol=1e-9)
    np.testing.assert_allclose(
        states[:, [1, HEADING, STEERING, AX, YAW_RATE]], [[20.0, 0, 0, 0, 0]] * NUM_STEPS, atol=1e-9
    )
    np.testing.assert_allclose(states[:, VX], 8.0, atol=1e-9)


def test_bicycle_obeys_its_own_equations_and_steering_limit():
    rng = np.random.default_rng(0)
    references = np.stack([random_references(rng, speed, 1.5) for speed in (0.0, 3.0, 12.0)])
    references[:, :, 2] += rng.normal(0, 0.5, references.shape[:2])
    state = state_from_pose(references[0, 0], [3.0, 0.1, 1.0, -0.5])
    states = simulate(references, state)
    old, new = states[:, :-1], states[:, 1:]
    np.testing.assert_allclose(new[..., 0], old[..., 0] + STEP_S * old[..., VX] * np.cos(old[..., HEADING]), atol=1e-8)
    np.testing.assert_allclose(new[..., VX], old[..., VX] + STEP_S * new[..., AX], atol=1e-12)
    np.testing.assert_allclose(new[..., YAW_RATE], new[..., VX] * np.tan(new[..., STEERING]) / WHEEL_BASE, atol=1e-12)
    assert np.abs(states[..., STEERING]).max() <= MAX_STEERING
    np.testing.assert_array_equal(states[:, 1:, [4, 6]], 0.0)  # neither lateral speed nor lateral acceleration


def test_proposals_do_not_influence_each_other():
    rng = np.random.default_rng(1)
    references = np.stack([random_references(rng) for _ in range(4)])
    state = state_from_pose(references[0, 0], [5.0, 0.0, 0.0, 0.0])
    together = simulate(references, state)
    for reference, states in zip(references, together):
        np.testing.assert_array_equal(simulate(reference[None], state)[0], states)


def test_references_follow_the_truncated_clock():
    """Query times are cut to whole microseconds at epoch magnitude, as int((t + t0) * 1e6) does in Python."""
    time_us = 1_623_032_413_000_033
    state = state_from_pose([664_627.0, 4_998_104.0, 3.0], [10.0, 0.0, 0.0, 0.0])
    poses = np.c_[5.0 * np.arange(1, 9), 0.3 * np.arange(1, 9), 0.1 * np.arange(1, 9)]
    references = references_from_predictions(poses[None], state, time_us)[0]
    t0 = time_us * 1e-6
    nodes = [time_us, *[int((t0 + (i * 0.5 + 0.5)) * 1e6) for i in range(8)]]
    queries = np.clip([int((i * 0.1 + t0) * 1e6) for i in range(NUM_STEPS)], nodes[0], nodes[-1])
    assert len({query - time_us - 100_000 * i for i, query in enumerate(queries)}) > 1  # the cut does move samples
    c, s = np.cos(state[2]), np.sin(state[2])
    xy = np.concatenate([state[None, :2], poses[:, :2] @ np.array([[c, s], [-s, c]]) + state[:2]])
    expected = interp1d(np.array(nodes, float), xy, axis=0)(queries)
    np.testing.assert_allclose(references[:, :2], expected, atol=2e-9)
    headings = np.unwrap(np.concatenate([[state[2]], state[2] + poses[:, 2]]))
    expected = interp1d(np.array(nodes, float), headings)(queries)
    np.testing.assert_allclose(np.cos(references[:, 2] - expected), 1.0, atol=1e-12)
    assert (np.abs(references[:, 2]) <= np.pi).all()


def test_trajectory_references_hit_their_nodes():
    rng = np.random.default_rng(2)
    trajectory = np.concatenate([random_references(rng), random_references(rng)])[:51]
    references = references_from_trajectory(trajectory, 1_000_000_000_000_000)
    np.testing.assert_allclose(references[:, :2], trajectory[:NUM_STEPS, :2], atol=2e-4)  # the cut: up to 1 us


def test_wrong_shapes_are_named():
    with pytest.raises(DataError, match=r"\(40, 3\)"):
        simulate(np.zeros((40, 3)), np.zeros(11))
    with pytest.raises(DataError, match=r"\(10,\)"):
        simulate(np.zeros((1, NUM_STEPS, 3)), np.zeros(10))


def test_states_equal_those_of_navsim():
    """Committed states of the real NAVSIM: x, y within 1e-8 m, the rest within 1e-9."""
    cache, golden = MemoryMetricCache.load_npz(GOLDEN)
    for token in cache.tokens:
        scene = cache.load(token)
        poses = golden[f"poses/{token}"][golden["state_rows"]]
        states = simulate(references_from_predictions(poses, scene.ego_state, scene.time_us), scene.ego_state)
        difference = np.abs(states - golden[f"states/{token}"])
        difference[..., HEADING] = np.minimum(difference[..., HEADING], 2 * np.pi - difference[..., HEADING])
        assert difference[..., :2].max() <= 1e-8
        assert difference[..., 2:].max() <= 1e-9
