"""The world as a gymnasium environment, and its films."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

from navsim_ext.closed_loop import film
from navsim_ext.closed_loop.environment import ClosedLoopEnv, ClosedLoopVectorEnv
from navsim_ext.errors import DataError
from tests.navsim_ext.closed_loop_worlds import Car, road

SCENES = [
    road([Car(0, -1.75, speed=8), Car(30, -1.75, speed=8)], id="free", half_length=120.0),
    road([Car(0, -1.75, speed=8), Car(25, -1.75)], id="blocked", half_length=120.0),
]


def test_gymnasium_accepts_the_environment():
    check_env(ClosedLoopEnv(SCENES), skip_render_check=True)


def test_driving_straight_earns_the_progress_and_a_contact_ends_it():
    env = ClosedLoopEnv(SCENES)
    first, info = env.reset(seed=0, options={"scene": 0})
    assert info["scene"] == "free"
    assert np.allclose(first[3:19:2] * 20.0, np.arange(5, 45, 5), atol=1e-3)  # the way ahead
    assert np.allclose(first[21:23] * 20.0, [30.0, 0.0], atol=1e-3)  # the road user ahead
    total, steps = 0.0, 0
    while True:
        _, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
        total, steps = total + reward, steps + 1
        if terminated or truncated:
            break
    assert truncated
    assert steps == 16
    assert total == pytest.approx(6.4, abs=0.05)
    env.reset(options={"scene": 1})
    while not terminated:
        _, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
    assert info == {"contact": True, "off_road": False, "red_light": False}
    assert reward < -0.5
    with pytest.raises(DataError, match="finite"):
        env.step(np.array([np.nan, 0.0]))


def test_vector_environment_equals_single_ones_and_restarts_those_that_ended():
    vector, single = ClosedLoopVectorEnv(SCENES, 3), [ClosedLoopEnv(SCENES) for _ in range(3)]
    observation, _ = vector.reset(seed=4)
    assert observation.shape == vector.observation_space.shape
    assert observation in vector.observation_space
    alone = np.stack([env.reset(seed=4 + k)[0] for k, env in enumerate(single)])
    assert np.array_equal(observation, alone)
    random = np.random.default_rng(0)
    ended = np.zeros(3, bool)
    for _ in range(20):
        actions = random.uniform(-0.3, 0.3, (3, 2)).astype(np.float32)
        observation, reward, terminated, truncated, _ = vector.step(actions)
        for k, env in enumerate(single):
            if ended[k]:
                expected = (env.reset()[0], 0.0, False, False)
            else:
                expected = env.step(actions[k])[:4]
            assert np.array_equal(observation[k], expected[0])
            assert (reward[k], terminated[k], truncated[k]) == tuple(expected[1:])
        ended = terminated | truncated
    assert observation in vector.observation_space


@pytest.mark.slow
def test_stable_baselines_drives_it_for_a_while():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", ClosedLoopEnv(SCENES), n_steps=64, batch_size=32, seed=0, device="cpu")
    model.learn(256)
    action, _ = model.predict(ClosedLoopEnv(SCENES).reset(seed=0)[0], deterministic=True)
    assert action.shape == (2,)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".mp4"])
def test_film_has_a_picture_for_every_step(tmp_path, suffix):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    pictures = film.frames(SCENES[0], every=10, height=120)
    path = tmp_path / f"drive{suffix}"
    assert film.write_film(path, pictures, 1.0) == 9
    if suffix == ".mp4":
        import imageio_ffmpeg

        count, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
        assert count == 9
    else:
        with Image.open(path) as image:
            assert image.n_frames == 9
            assert image.size == (120, 120)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="ends in"):
        film.write_film(tmp_path / "drive.avi", iter([]), 1.0)
    with pytest.raises(DataError, match="0 pictures"):
        film.write_film(path, iter([]), 1.0)
