"""The world as a gymnasium environment, and its films."""

from __future__ import annotations

import dataclasses

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

from navsim_ext.closed_loop import ego_view, film
from navsim_ext.closed_loop.environment import ClosedLoopEnv, ClosedLoopVectorEnv, Stock
from navsim_ext.closed_loop.policies import Idm, Replay
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


@pytest.mark.parametrize("agents", [Replay, Idm])
def test_worlds_in_one_batch_do_what_gymnasium_does_with_single_ones(agents):
    """World for world the numbers of SyncVectorEnv: observations, rewards, ends, fresh episodes and infos."""
    stock, options = Stock(SCENES), {"agents": agents, "horizon_s": 3.0}
    vector = ClosedLoopVectorEnv(stock, 5, **options)
    single = gymnasium.vector.SyncVectorEnv([lambda: ClosedLoopEnv(stock, **options)] * 5)
    assert vector.metadata["autoreset_mode"] is single.metadata["autoreset_mode"]
    assert vector.single_observation_space == single.single_observation_space
    assert vector.observation_space == single.observation_space
    assert vector.action_space == single.action_space
    (seen, infos), (expected, other) = vector.reset(seed=4), single.reset(seed=4)
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    assert infos["scene"].tolist() == other["scene"].tolist()
    assert len(set(infos["scene"])) == 2
    random = np.random.default_rng(0)
    ends, ages = 0, 0
    for _ in range(20):
        actions = random.uniform(-1, 1, (5, 2)).astype(np.float32)
        found, reference = vector.step(actions), single.step(actions)
        np.testing.assert_allclose(found[0], reference[0], atol=1e-6)
        np.testing.assert_allclose(found[1], reference[1], atol=1e-6)
        assert np.array_equal(found[2], reference[2])
        assert np.array_equal(found[3], reference[3])
        assert {name: list(value) for name, value in found[4].items()} == {
            name: list(value) for name, value in reference[4].items()
        }
        assert found[0] in vector.observation_space
        ends += int((found[2] | found[3]).sum())
        ages = max(ages, len(vector._groups))
    assert ends > 5
    assert 1 < ages <= 6  # never more than ages


def test_gymnasium_s_wrappers_take_the_vector_environment():
    vector = gymnasium.wrappers.vector.RecordEpisodeStatistics(ClosedLoopVectorEnv(SCENES, 2, horizon_s=1.0))
    vector.reset(seed=0, options={"scene": [0, 0]})
    vector.step(np.zeros((2, 2), np.float32))
    *_, infos = vector.step(np.zeros((2, 2), np.float32))
    assert infos["episode"]["l"].tolist() == [2, 2]
    assert infos["episode"]["r"] == pytest.approx([0.8, 0.8], abs=0.05)
    with pytest.raises(DataError, match="finite numbers of shape"):
        vector.step(np.zeros((3, 2), np.float32))
    with pytest.raises(DataError, match="no scenes"):
        vector.reset(options={"scene": 2})
    with pytest.raises(DataError, match="seeds"):
        vector.env.reset(seed=[1])
    with pytest.raises(DataError, match="num_envs"):
        ClosedLoopVectorEnv(SCENES, 0)
    with pytest.raises(DataError, match="0 scenes"):
        ClosedLoopVectorEnv([], 1)


def test_an_ego_sees_edges_and_lanes_where_they_are():
    """On a road between y = -7 and y = 3.5 with lanes at -1.75, -5.25 and (the other way) 1.75."""
    seen, _ = ClosedLoopEnv(SCENES).reset(options={"scene": 0})
    edges, lanes = seen[105:129].reshape(12, 2), seen[129:].reshape(5, 4)
    place = ego_view.EDGE_PLACES + np.array([0.0, -1.75])
    expected = np.minimum(place[:, 1] + 7.0, 3.5 - place[:, 1]) / 20.0
    assert edges[:, 1].all()
    near = np.abs(expected) < 0.4  # distances are exact near the edge
    assert near.sum() >= 8
    assert np.allclose(edges[near, 0], expected[near], atol=0.01)
    assert np.allclose(lanes, [0.0, 1.0, 0.0, 1.0], atol=1e-3)
    turned = road([Car(0, -1.25, heading=0.3, speed=8), Car(30, -1.75)], half_length=120.0)
    lanes = ClosedLoopEnv([turned]).reset()[0][129:].reshape(5, 4)
    assert np.allclose(lanes[0], [0.5 / 20.0, np.cos(0.3), -np.sin(0.3), 1.0], atol=1e-3)
    nowhere = dataclasses.replace(
        SCENES[0], points=SCENES[0].points[:0], piece_start=np.zeros(1, np.int32), edges=np.empty((0, 2), np.int32),
        **{name: getattr(SCENES[0], name)[:0] for name in ("piece_kind", "piece_subtype", "piece_closed", "piece_id",
                                                          "speed_limit", "edge_kind")},
    )  # fmt: skip
    blind = ClosedLoopEnv([nowhere]).reset()[0]
    assert not blind[105:].any()
    assert blind[1] == 0.0


@pytest.mark.slow
def test_stable_baselines_drives_it_for_a_while():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", ClosedLoopEnv(SCENES), n_steps=64, batch_size=32, seed=0, device="cpu")
    model.learn(128)
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
