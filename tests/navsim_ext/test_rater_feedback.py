"""The rater feedback score against its authors' function, and under its laws."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from navsim_ext.errors import DataError
from navsim_ext.evaluation.rater_feedback import FLOOR, rater_feedback

COMMITTED = Path(__file__).parents[1] / "golden" / "wod_e2e" / "rater_feedback.npz"


def frames(path):
    stored = np.load(path)
    place = 0
    for frame, count in enumerate(stored["rated_count"]):
        offsets = stored["rated_off"][place : place + count + 1]
        rated = [stored["rated_xy"][low:high] for low, high in itertools.pairwise(offsets)]
        ratings = stored["label"][place : place + count]
        place += count
        inputs = (stored["inference"][frame], stored["probability"][frame], rated, ratings, stored["init_speed"][frame])
        yield inputs, stored["score"][frame], stored["within"][frame]


@pytest.fixture(params=["committed", "golden"])
def golden(request, reference):
    return COMMITTED if request.param == "committed" else reference("golden/wod_e2e/rater_feedback.npz")


def test_every_score_is_the_authors(golden):
    for inputs, score, within in frames(golden):
        found = rater_feedback(*inputs)
        assert found.score == pytest.approx(score, abs=1e-9)
        np.testing.assert_array_equal(found.within, within)


def straight(speed: float, rating: float = 8.0):
    path = np.stack([speed * np.arange(1, 21) / 4, np.zeros(20)], axis=-1)
    return path, np.array([rating])


def test_a_rated_trajectory_gets_its_rating():
    path, rating = straight(8.0)
    assert rater_feedback(path[None], np.ones(1), [path], rating, 8.0).score == 8.0


@pytest.mark.parametrize(("speed", "lateral_m"), [(1.4, 0.5), (11.0, 1.0), (30.0, 1.0)])
def test_thresholds_grow_with_speed(speed, lateral_m):
    """Just inside the sideways threshold at 3 s the rating stands; twice as far it has fallen to a tenth there."""
    path, rating = straight(speed, 10.0)
    inside, outside = path.copy(), path.copy()
    inside[11, 1], outside[11, 1] = 0.999 * lateral_m, 2 * lateral_m
    assert rater_feedback(inside[None], np.ones(1), [path], rating, speed).score == 10.0
    assert rater_feedback(outside[None], np.ones(1), [path], rating, speed).score == pytest.approx((1.0 + 10.0) / 2)


def test_far_from_everything_scores_the_floor():
    path, rating = straight(8.0)
    assert rater_feedback(path[None] + 50.0, np.ones(1), [path], rating, 8.0).score == FLOOR


def test_turning_everything_changes_nothing():
    rng = np.random.default_rng(1)
    turn = np.array([[np.cos(1.1), -np.sin(1.1)], [np.sin(1.1), np.cos(1.1)]])
    for inputs, *_ in list(frames(COMMITTED))[:10]:
        predictions, probabilities, rated, ratings, speed = inputs
        rated = [path + rng.normal(0, 1e-3, path.shape) for path in rated]  # a step of no length has a fixed direction
        turned = rater_feedback(predictions @ turn.T, probabilities, [path @ turn.T for path in rated], ratings, speed)
        assert turned.score == pytest.approx(rater_feedback(predictions, probabilities, rated, ratings, speed).score)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"predictions": np.zeros((1, 19, 2))}, r"\[I, 20, 2\]"),
        ({"predictions": np.full((1, 20, 2), np.nan)}, "not finite"),
        ({"probabilities": np.array([0.5])}, "add up to 0.5"),
        ({"rated": []}, "0 rated trajectories"),
        ({"ratings": np.array([-1.0])}, "0 to 10 expected"),
        ({"rated": [np.zeros((0, 2))]}, "rated trajectory 0"),
        ({"speed": float("nan")}, "no speed"),
    ],
)
def test_bad_input_is_named(change, words):
    path, rating = straight(8.0)
    inputs = {"predictions": path[None], "probabilities": np.ones(1), "rated": [path], "ratings": rating, "speed": 8.0}
    with pytest.raises(DataError, match=words):
        rater_feedback(**(inputs | change))
