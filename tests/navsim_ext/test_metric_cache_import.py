"""NAVSIM's pickled caches taken over: the same scores as a cache of our own, and no code of a pickle is run."""

from __future__ import annotations

import dataclasses
import lzma
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from navsim_pickles import LookAlikes, write_cache

from navsim_ext.devkit.cache_content import box_pose
from navsim_ext.devkit.cache_pickle import read_cache
from navsim_ext.devkit.cache_tracks import sightings
from navsim_ext.devkit.metric_cache_import import NothingImported, import_caches
from navsim_ext.errors import DataError, MissingError
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import RewardWeights, score, score_pairs
from navsim_ext.pdm.columns import COLUMNS_ALONE, SCORE_COLUMNS
from navsim_ext.pdm.log_replay import replayed_boxes
from navsim_ext.pickles import DamagedPickle, RefusedObject

ALONE = COLUMNS_ALONE[: len(SCORE_COLUMNS)]  # of scenes scored one by one


@pytest.fixture(scope="module")
def own(small_cache) -> MetricCache:
    return MetricCache(small_cache)


@pytest.fixture(scope="module")
def pickled(own, tmp_path_factory) -> Path:
    """v1/ and v2/ folders as NAVSIM leaves them."""
    root = tmp_path_factory.mktemp("pickled")
    with pytest.MonkeyPatch.context() as patch:
        make = LookAlikes().install(patch)
        for token in own.tokens:
            record = own.load(token)
            for version in ("v1", "v2"):
                path = root / version / record.log_name / "unknown" / token / "metric_cache.pkl"
                write_cache(path, make, record, own.polygons(record.map_location), version)
    return root


def test_imported_caches_give_the_same_scores(own, pickled, tmp_path):
    report = import_caches(pickled / "v1", pickled / "v2", tmp_path)
    assert (report["cached"], report["invalid"]) == (4, 0)
    imported = MetricCache(tmp_path)
    rng = np.random.default_rng(0)
    tokens = [token for token in own.tokens for _ in range(12)]
    steps = rng.normal([2.0, 0.0, 0.0], [1.5, 0.3, 0.1], (len(tokens), 8, 3))
    poses = np.cumsum(steps, axis=1)
    ours, theirs = score(tokens, poses, own), score(tokens, poses, imported)
    assert theirs.valid.all()
    for column in ALONE:
        np.testing.assert_allclose(theirs[column], ours[column], rtol=0, atol=1e-8, err_msg=column)
    for token in own.tokens:
        mine, other = own.load(token), imported.load(token)
        np.testing.assert_allclose(other.pdm_closed, mine.pdm_closed, rtol=0, atol=2e-9)
        np.testing.assert_allclose(other.human_poses, mine.human_poses)
        np.testing.assert_array_equal(other.red_frames, mine.red_frames)
        assert other.route_lane_ids == mine.route_lane_ids


def test_a_second_import_has_nothing_to_do(pickled, tmp_path, monkeypatch):
    import_caches(pickled / "v1", pickled / "v2", tmp_path)
    from navsim_ext.devkit import metric_cache_import

    monkeypatch.setattr(metric_cache_import, "import_log", lambda *_: pytest.fail("a finished log was done again"))
    assert import_caches(pickled / "v1", pickled / "v2", tmp_path)["cached"] == 4


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_caches_of_one_version_give_the_scores_of_that_version_alone(own, pickled, tmp_path, version):
    other = {"v1": "v2", "v2": "v1"}[version]
    folders = {"v1": None, "v2": None} | {version: pickled / version}
    assert import_caches(folders["v1"], folders["v2"], tmp_path)["cached"] == 4
    imported = MetricCache(tmp_path)
    steps = np.random.default_rng(0).normal([2.0, 0.0, 0.0], [1.5, 0.3, 0.1], (48, 8, 3))
    tokens, poses = [token for token in own.tokens for _ in range(12)], np.cumsum(steps, axis=1)
    ours, theirs = score(tokens, poses, own), score(tokens, poses, imported)
    assert theirs.valid.all()
    for column in ALONE:
        if version in column:
            np.testing.assert_allclose(theirs[column], ours[column], rtol=0, atol=1e-8, err_msg=column)
            known = column != "v2_ec"
        else:
            assert np.isnan(theirs[column]).all(), column
            known = False
        np.testing.assert_array_equal(theirs.valid_for(column), np.full(48, known), err_msg=column)
    ((reason, count),) = theirs.incomplete_reasons().items()
    assert count == 48
    assert reason.startswith(f"no scores of {other}: ")
    alone = score(tokens, poses, imported, versions=(other,))
    assert not alone.valid.any()
    assert alone.invalid_reasons() == {reason: 48}
    rewards = score(tokens, poses, imported, reward=RewardWeights(version=other))
    assert not rewards.valid_for("reward").any()
    assert score(tokens, poses, imported, reward=RewardWeights(version=version)).valid_for("reward").all()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_two_frame_comfort_is_of_v2_alone(own, pickled, tmp_path, version):
    folders = {"v1": None, "v2": None} | {version: pickled / version}
    import_caches(folders["v1"], folders["v2"], tmp_path)
    tokens = list(own.tokens)
    poses = np.cumsum(np.tile([2.0, 0.0, 0.0], (len(tokens), 8, 1)), axis=1)
    ours, theirs = score_pairs(tokens, poses, own), score_pairs(tokens, poses, MetricCache(tmp_path))
    assert np.isfinite(ours.v2_ec).any()
    if version == "v2":
        np.testing.assert_allclose(theirs.epdms_v2, ours.epdms_v2, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(theirs.v2_ec, ours.v2_ec)
    else:
        np.testing.assert_allclose(theirs.pdms_v1, ours.pdms_v1, rtol=0, atol=1e-8)
        assert np.isnan(theirs.v2_ec).all()


def test_no_folder_at_all_is_an_error(tmp_path):
    with pytest.raises(MissingError, match="both null"):
        import_caches(None, None, tmp_path)


def test_a_token_of_one_version_only_has_no_scores_of_the_other(pickled, tmp_path):
    v2 = tmp_path / "v2"
    first, *others = sorted((pickled / "v2").glob("*/*/*/metric_cache.pkl"))
    for path in others:
        target = v2 / path.relative_to(pickled / "v2")
        target.parent.mkdir(parents=True)
        target.write_bytes(path.read_bytes())
    report = import_caches(pickled / "v1", v2, tmp_path / "out")
    assert (report["cached"], report["invalid"]) == (4, 0)
    cache = MetricCache(tmp_path / "out")
    result = score(list(cache.tokens), np.zeros((4, 8, 3)), cache)
    assert result.valid_for("pdms_v1").all()
    assert [t for t, there in zip(cache.tokens, result.valid_for("epdms_v2_no_ec")) if not there] == [first.parent.name]


def test_half_a_reference_is_no_record(own):
    record = own.load(own.tokens[0])
    closed = np.array(record.pdm_closed)
    closed[0, 7] = np.nan
    for broken in (closed, np.full_like(closed, np.nan)):
        with pytest.raises(DataError, match="pdm_closed must be finite for one of"):
            dataclasses.replace(record, pdm_closed=broken).validate()


def test_swapped_folders_import_nothing(pickled, tmp_path):
    with pytest.raises(NothingImported, match=r"0 of 4 .*DataError"):
        import_caches(pickled / "v2", pickled / "v1", tmp_path)
    with pytest.raises(MissingError, match=r"metric_cache\.pkl"):
        import_caches(tmp_path, pickled / "v2", tmp_path / "out")


def test_a_pickle_that_names_anything_else_is_refused_and_nothing_runs(pickled, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "metric_cache.pkl"
    with lzma.open(path, "wb") as stream:
        pickle.dump(Attack(), stream)
    with pytest.raises(RefusedObject, match=r"mkdir"):
        read_cache(path)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_named(pickled, tmp_path):
    whole = next((pickled / "v1").glob("*/*/*/metric_cache.pkl")).read_bytes()
    path = tmp_path / "metric_cache.pkl"
    for content in (whole[: len(whole) // 2], b"not lzma", b""):
        path.write_bytes(content)
        with pytest.raises(DamagedPickle, match=str(path)):
            read_cache(path)
    with lzma.open(path, "wb") as stream:
        pickle.dump({"not": "a cache"}, stream)
    with pytest.raises(DataError, match=r"holds a dict"):
        read_cache(path)


def boxes_of(track: np.ndarray, version: str) -> np.ndarray:
    """[T,4,2] replayed boxes of one track of sightings [11,3]."""
    scene = SimpleNamespace(
        track_poses=track[None],
        track_sizes=np.array([[4.0, 2.0, 1.5]]),
        track_velocities=np.zeros((1, 2)),
        track_types=np.zeros(1, dtype=np.int8),
        red_polygons=np.zeros(0, dtype=np.int32),
        red_frames=np.zeros((0, 9), dtype=bool),
        ego_state=np.array([1e4, 1e4, 0.0, *[0.0] * 8]),
    )
    return replayed_boxes(scene, version)[:, 0]


def poses_of(boxes: np.ndarray) -> np.ndarray:
    return np.array([box_pose(shapely.Polygon(box)) if np.isfinite(box).all() else [np.nan] * 3 for box in boxes])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.booleans(), min_size=11, max_size=11).filter(any), st.booleans(), st.integers(0, 99))
def test_sightings_are_found_for_every_pattern_of_presence(seen, standing, seed):
    """Boxes of arbitrary sightings -> sightings -> the same boxes, in both versions."""
    rng = np.random.default_rng(seed)
    poses = np.cumsum(rng.uniform(0.0, 3.0, (11, 3)) * [1, 1, 0.2], axis=0)
    original = np.where(np.array(seen)[:, None], poses[:1] if standing else poses, np.nan)
    v1, v2 = boxes_of(original, "v1"), boxes_of(original, "v2")
    found = sightings(poses_of(v1), poses_of(v2))
    np.testing.assert_allclose(boxes_of(found, "v1"), v1, rtol=0, atol=1e-9)
    np.testing.assert_allclose(boxes_of(found, "v2"), v2, rtol=0, atol=1e-9)
    np.testing.assert_allclose(boxes_of(sightings(poses_of(v1), None), "v1"), v1, rtol=0, atol=1e-9)
    if np.isfinite(v2).any():
        np.testing.assert_allclose(boxes_of(sightings(None, poses_of(v2)), "v2"), v2, rtol=0, atol=1e-9)
