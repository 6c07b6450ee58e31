"""Other RL libraries in the same world, seeing what the planners see."""

import warnings

import numpy as np
import pytest
from closed_loop_worlds import Car, road
from ego_worlds import street
from gymnasium.utils.env_checker import check_env

from navsim_ext.closed_loop.environment import ClosedLoopEnv, ClosedLoopVectorEnv
from sim_agents.ego.observation import FlatView, Sight, flat_size

SIGHT = Sight(others=3, pieces=6, way=4)


def test_the_environment_shows_what_the_planners_see():
    env = ClosedLoopEnv([street(0), street(1)], horizon_s=2.0, observer=lambda: FlatView(SIGHT))
    assert env.observation_space.shape == (flat_size(SIGHT),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env, skip_render_check=True)
    first, _ = env.reset(options={"scene": 0})
    again, _ = env.reset(options={"scene": 0})
    np.testing.assert_array_equal(first, again)
    after = env.step(np.zeros(2))[0]
    assert np.abs(after - first).max() > 0.01


def test_worlds_side_by_side_have_views_of_their_own():
    envs = ClosedLoopVectorEnv([street(0), street(1)], 2, horizon_s=1.0, observer=lambda: FlatView(SIGHT))
    seen, _ = envs.reset(seed=0, options={"scene": [0, 1]})
    assert seen.shape == (2, flat_size(SIGHT))
    alone = ClosedLoopEnv([street(0), street(1)], horizon_s=1.0, observer=lambda: FlatView(SIGHT))
    for k in range(2):
        np.testing.assert_allclose(seen[k], alone.reset(options={"scene": k})[0], atol=1e-6)
    assert all(isinstance(one, float) for one in envs.step(np.zeros((2, 2)))[1].tolist())


@pytest.mark.slow
def test_an_outside_ppo_learns_in_it():
    """stable-baselines3 (optional) drives on after training, where at first it stands about."""
    sb3 = pytest.importorskip("stable_baselines3")
    scenes = [road([Car(0, -1.75, 0.0, speed)], id=f"free-{speed}") for speed in (0.0, 3.0, 6.0)]
    make = lambda: ClosedLoopEnv(scenes, horizon_s=5.0, observer=lambda: FlatView(SIGHT))  # noqa: E731
    model = sb3.PPO("MlpPolicy", make(), n_steps=256, batch_size=64, seed=0, device="cpu", learning_rate=1e-3)

    def earned():
        env, total = make(), 0.0
        for k in range(3):
            seen, _ = env.reset(options={"scene": k})
            ended = False
            while not ended:
                seen, reward, terminated, truncated, _ = env.step(model.predict(seen, deterministic=True)[0])
                total, ended = total + reward, terminated or truncated
        return total / 3

    before = earned()
    model.learn(6_000)
    assert earned() > before + 1.0
