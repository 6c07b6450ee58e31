"""score and score_pairs: parity with the real NAVSIM on committed scenes, the API's promises, bad input."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from pdm_golden import CONTINUOUS, GOLDEN_COLUMNS

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.metric_cache.schema import KIND, MetricCache, MetricCacheMismatch, cache_fields, map_folder
from navsim_ext.pdm import RewardWeights, TrajectoryShapeError, score, score_pairs
from navsim_ext.pdm.columns import COLUMNS, COLUMNS_ALONE
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.record import SceneMetricCache
from navsim_ext.pdm.reward import PUBLISHED_REWARD
from navsim_ext.runtime.checksums import write_checked_json
from navsim_ext.shards import ShardWriter

GOLDEN = Path(__file__).parents[1] / "golden" / "pdm" / "scenes.npz"


@pytest.fixture(scope="module")
def golden():
    return MemoryMetricCache.load_npz(GOLDEN)


@pytest.fixture(scope="module")
def batch(golden):
    """tokens, names, poses of all committed rows, and the cache."""
    cache, arrays = golden
    tokens = [token for token in cache.tokens for _ in arrays[f"names/{token}"]]
    names = np.concatenate([arrays[f"names/{token}"] for token in cache.tokens]).tolist()
    return tokens, names, np.concatenate([arrays[f"poses/{token}"] for token in cache.tokens]), cache


def expected(golden, column):
    cache, arrays = golden
    return np.concatenate([arrays[f"{column}/{token}"] for token in cache.tokens])


@pytest.fixture
def folder(tmp_path, golden):
    """The committed scenes as a metric cache on disk."""
    cache, _ = golden
    fingerprint = Fingerprint(KIND, cache_fields() | {"data": "golden"})
    with ShardWriter(tmp_path / "cache", fingerprint) as writer:
        for token in cache.tokens:
            record = cache.load(token)
            writer.put(token, record.to_arrays())
            cache.polygons(record.map_location).save(map_folder(tmp_path / "cache", record.map_location))
    return tmp_path / "cache"


@pytest.mark.parametrize("column", GOLDEN_COLUMNS)
def test_every_column_equals_navsim(golden, batch, column):
    tokens, names, poses, cache = batch
    result = score_pairs(tokens, poses, cache, names=names, reward=PUBLISHED_REWARD)
    assert result.valid.all()
    if column in CONTINUOUS:
        np.testing.assert_allclose(result[column], expected(golden, column), rtol=0, atol=1e-8)
    else:
        np.testing.assert_array_equal(result[column], expected(golden, column))


def test_score_is_score_pairs_without_the_two_frame_term(golden, batch):
    tokens, names, poses, cache = batch
    alone = score(tokens, poses, cache)
    pairs = score_pairs(tokens, poses, cache, names=names)
    assert np.isnan(alone.v2_ec).all()
    assert np.isfinite(pairs.v2_ec).sum() == len(tokens) // 2  # the later scene of each log
    without = np.isnan(pairs.v2_ec)
    for name, own in zip(COLUMNS, COLUMNS_ALONE):
        if name not in ("v2_ec", "epdms_v2", "epdms_v2_nofilter"):
            np.testing.assert_array_equal(alone[own], pairs[name])
        np.testing.assert_array_equal(alone[own][without], pairs[name][without])
    assert (alone.epdms_v2_no_ec[~without] != pairs.epdms_v2[~without]).any()
    with pytest.raises(KeyError, match="each scene was scored alone"):
        alone["epdms_v2"]
    with pytest.raises(AttributeError, match="with two-frame extended comfort"):
        _ = pairs.epdms_v2_no_ec
    named = {*alone.columns, *alone.to_frame(), *alone.summary()["mean"]}
    assert not {"epdms_v2", "epdms_v2_nofilter"} & named


def test_groups_order_and_threads_do_not_change_a_bit(batch):
    tokens, names, poses, cache = batch
    reference = score_pairs(tokens, poses, cache, names=names, threads=1)
    shuffled = np.random.default_rng(0).permutation(len(tokens))
    other = score_pairs(
        [tokens[i] for i in shuffled], poses[shuffled], cache, names=[names[i] for i in shuffled], threads=3
    )
    np.testing.assert_array_equal(other.values, reference.values[shuffled])
    one = score(tokens[7:8], poses[7:8], cache)
    np.testing.assert_array_equal(one.values, score(tokens, poses, cache).values[7:8])


def test_versions_and_rewards_from_one_pass(batch):
    tokens, _, poses, cache = batch
    both = score(tokens, poses, cache, reward=RewardWeights())
    np.testing.assert_allclose(both.reward, both.pdms_v1, rtol=0, atol=1e-15)  # 5/5/2 is PDMS
    only = score(tokens, poses, cache, versions=("v2",), reward=RewardWeights("v2", 5.0, 5.0, 2.0, lane_keeping=2.0))
    assert np.isnan(only.pdms_v1).all()
    np.testing.assert_array_equal(only.epdms_v2_no_ec, both.epdms_v2_no_ec)
    np.testing.assert_allclose(only.reward, only.epdms_v2_no_ec_nofilter, rtol=0, atol=1e-15)
    with pytest.raises(DataError, match="lane_keeping"):
        RewardWeights(lane_keeping=1.0)
    with pytest.raises(DataError, match="v3"):
        RewardWeights(version="v3")
    with pytest.raises(DataError, match="positive finite sum"):
        RewardWeights(progress=0.0, ttc=0.0, comfort=0.0)
    with pytest.raises(DataError, match="reward weighs v1"):
        score(tokens, poses, cache, versions=("v2",), reward=PUBLISHED_REWARD)
    with pytest.raises(DataError, match="v3"):
        score(tokens, poses, cache, versions=("v3",))


def test_wrong_shapes_are_named_errors(batch):
    tokens, _, poses, cache = batch
    for wrong in (poses[:, :7], poses[:-1], poses[..., :2], poses[0], [["a"]]):
        with pytest.raises(TrajectoryShapeError):
            score(tokens, wrong, cache)
    with pytest.raises(TrajectoryShapeError, match="single string"):
        score(tokens[0], poses[:1], cache)
    assert len(score([], np.zeros((0, 8, 3)), cache)) == 0


def test_rows_that_cannot_be_scored_are_invalid_with_a_reason(batch):
    tokens, _, poses, cache = batch
    tokens, poses = tokens[:6], poses[:6].copy()
    poses[1, 3, 0] = np.nan
    poses[2, 0, 2] = np.inf
    tokens[3] = "ffffffffffffffff"
    poses[4] = 1e308
    clean = score(tokens, np.nan_to_num(poses, posinf=0.0), cache)
    result = score(tokens, poses, cache, reward=PUBLISHED_REWARD)
    np.testing.assert_array_equal(result.valid, [True, False, False, False, False, True])
    assert "pose 3" in result.reason[1]
    assert "inf" in result.reason[2]
    assert "ffffffffffffffff" in result.reason[3]
    assert "beyond any scale" in result.reason[4]
    assert np.isnan(result.values[~result.valid]).all()
    np.testing.assert_array_equal(result.pdms_v1[[0, 5]], clean.pdms_v1[[0, 5]])
    summary = result.summary()
    assert (summary["rows"], summary["valid"], sum(summary["invalid"].values())) == (6, 2, 4)
    assert summary["mean"]["pdms_v1"] == pytest.approx(np.mean(result.pdms_v1[[0, 5]]))
    frame = result.to_frame()
    assert frame.loc[~frame["valid"], "pdms_v1"].isna().all()


def test_scenes_that_allow_no_score_are_invalid(golden):
    cache, arrays = golden
    token = cache.tokens[0]
    record, table = cache.load(token), cache.polygons(cache.load(token).map_location)
    flat = [[np.array([[0.0, 0.0], [5.0, 0.0], [9.0, 0.0]])], *[table.rings(row) for row in range(1, len(table))]]
    far = record.ego_state.copy()
    far[0] += 5000.0
    cases = {
        "empty map patch": (
            dataclasses.replace(record, map_polygons=record.map_polygons[:0], map_on_route=record.map_on_route[:0]),
            table,
        ),
        "m off the map": (dataclasses.replace(record, ego_state=far), table),
        "degenerate map polygon": (record, PolygonTable.from_rings(flat, table.types, table.ids)),
        "not in the table": (dataclasses.replace(record, map_polygons=record.map_polygons + 10_000), table),
    }
    for words, (scene, polygons) in cases.items():
        other = MemoryMetricCache({token: scene}, {scene.map_location: polygons})
        result = score([token], arrays[f"poses/{token}"][:1], other)
        assert not result.valid[0]
        assert words in result.reason[0]
        assert np.isnan(result.values).all()


def test_pairs_need_an_unambiguous_predecessor(golden, batch):
    tokens, _, poses, cache = batch
    with pytest.raises(DataError, match="stands twice"):
        score_pairs([tokens[0]] * 2, poses[:2], cache)
    with pytest.raises(DataError, match="3 names"):
        score_pairs(tokens[:1], poses[:1], cache, names=["a", "b", "c"])
    with pytest.raises(DataError, match="previous must hold"):
        score_pairs(tokens[:1], poses[:1], cache, previous=[1])
    with pytest.raises(DataError, match="versions must include"):
        score_pairs(tokens[:1], poses[:1], cache, versions=("v1",))
    first, second = cache.tokens[:2]
    rows = [tokens.index(first), tokens.index(second)]
    by_hand = score_pairs([first, second], poses[rows], cache, previous=[-1, 0])
    by_log = score_pairs([first, second], poses[rows], cache)
    np.testing.assert_array_equal(by_hand.values, by_log.values)
    assert np.isfinite(by_hand.v2_ec[1])
    with pytest.raises(DataError, match=r"previous\[0\] = 1"):  # the later scene is no predecessor
        score_pairs([first, second], poses[rows], cache, previous=[1, -1])
    broken = poses[rows].copy()
    broken[0] = np.nan  # an invalid row is nobody's predecessor
    assert np.isnan(score_pairs([first, second], broken, cache).v2_ec).all()
    other_planner = score_pairs([first, second], poses[rows], cache, names=["a", "b"])
    assert np.isnan(other_planner.v2_ec).all()


def test_unknown_human_leaves_the_filtered_score_undefined(golden):
    cache, arrays = golden
    token = cache.tokens[0]
    record = dataclasses.replace(cache.load(token), human_sub_scores=np.full(8, np.nan))
    other = MemoryMetricCache({token: record}, {record.map_location: cache.polygons(record.map_location)})
    result = score([token], arrays[f"poses/{token}"][:1], other)
    assert np.isnan(result.epdms_v2_no_ec[0])
    assert np.isfinite(result.epdms_v2_no_ec_nofilter[0])


def test_approximate_maps_are_labelled(golden):
    cache, arrays = golden
    token = cache.tokens[0]
    record = dataclasses.replace(cache.load(token), map_label="approx")
    other = MemoryMetricCache({token: record}, {record.map_location: cache.polygons(record.map_location)})
    result = score([token, "0" * 16], arrays[f"poses/{token}"][:2], other)
    assert result.map_label.tolist() == ["approx", ""]
    assert result.summary()["maps"] == {"approx": 1}


def test_columns_by_name(batch):
    tokens, _, poses, cache = batch
    result = score(tokens[:2], poses[:2], cache)
    np.testing.assert_array_equal(result["pdms_v1"], result.pdms_v1)
    with pytest.raises(KeyError, match="there are v1_nc"):
        result["pdms"]
    with pytest.raises(AttributeError):
        result.pdms  # noqa: B018


def test_cache_on_disk_round_trip_and_workers(folder, batch):
    tokens, names, poses, memory = batch
    cache = MetricCache(folder, resident=2)
    assert sorted(cache.tokens) == sorted(memory.tokens)
    for token in cache.tokens:
        ours, theirs = cache.load(token), memory.load(token)
        for name, value in theirs.to_arrays().items():
            np.testing.assert_array_equal(ours.to_arrays()[name], value)
        assert ours.track_tokens == theirs.track_tokens
        ours.validate()
    reference = score_pairs(tokens, poses, memory, names=names)
    np.testing.assert_array_equal(score_pairs(tokens, poses, cache, names=names).values, reference.values)
    assert len(cache.resident) == 2  # the least recently used went
    reopened = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(score(tokens, poses, reopened).pdms_v1, reference.pdms_v1)
    with pytest.raises(MissingError, match="abc"):
        cache.load("abc")


def test_a_cache_of_another_scorer_is_refused(tmp_path, golden):
    cache, _ = golden
    record = cache.load(cache.tokens[0])
    fields = cache_fields()
    fields["scorer"] = fields["scorer"] | {"version": 0}
    with ShardWriter(tmp_path / "old", Fingerprint(KIND, fields)) as writer:
        writer.put(record.token, record.to_arrays())
    with pytest.raises(MetricCacheMismatch, match="'version': 0"):
        MetricCache(tmp_path / "old")
    with ShardWriter(tmp_path / "other", Fingerprint("hidden_cache", cache_fields())) as writer:
        writer.put(record.token, record.to_arrays())
    with pytest.raises((MetricCacheMismatch, FingerprintMismatch), match="hidden_cache"):
        MetricCache(tmp_path / "other")


def test_the_builders_reason_is_the_rows_reason(folder, batch):
    _, _, poses, _ = batch
    entry = {"log": "x", "token": "deadbeefdeadbeef", "kind": "RouteError", "reason": "no route"}
    write_checked_json(folder / "report.json", {"entries": [entry]})
    result = score(["deadbeefdeadbeef"], poses[:1], MetricCache(folder))
    assert "RouteError: no route" in result.reason[0]


def test_records_that_break_their_promise_are_named(golden):
    cache, _ = golden
    record = cache.load(cache.tokens[0])
    sizes = record.track_sizes.copy()
    sizes[1, 0] = 0.0
    half = record.track_poses.copy()
    half[0, 0, 1] = np.nan
    wrong = {
        "degenerate size": {"track_sizes": sizes},
        "half-finite": {"track_poses": half},
        "ego_state has shape": {"ego_state": record.ego_state[:5]},
        "2 needed": {"centerline": record.centerline[:1]},
        "not finite": {"past_states": record.past_states * np.nan},
    }
    for words, change in wrong.items():
        with pytest.raises(DataError, match=words):
            dataclasses.replace(record, **change).validate()
    arrays = record.to_arrays()
    del arrays["centerline"]
    with pytest.raises(DataError, match="'centerline'"):
        SceneMetricCache.from_arrays("t", arrays)
