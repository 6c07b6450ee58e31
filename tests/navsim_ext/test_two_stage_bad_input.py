"""Bad input of the two-stage protocol: named, counted, and no other scene is lost. On the committed golden groups.

What is broken in files is in test_synthetic_second_stage.py (a whole world with broken pickles),
test_readers_second_stage.py and test_devkit_submission.py.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from road_worlds import make_town
from two_stage_golden import golden_groups, predictions

from navsim_ext.errors import DataError
from navsim_ext.evaluation.two_stage import Trajectories, TwoStageResult, evaluate
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.reactive.agents import traffic_agents
from navsim_ext.pdm.traffic_agents import IS_ACTIVE, STAYS
from navsim_ext.readers import read_split


def changed_cache(**changes) -> MemoryMetricCache:
    """The golden records; ``token=record`` replaces one."""
    cache, _, _ = golden_groups()
    records = {token: changes.get(token, cache.load(token)) for token in cache.tokens}
    return MemoryMetricCache(records, {r.map_location: cache.polygons(r.map_location) for r in records.values()})


def only_the_first_group_is_lost(result: TwoStageResult, reason: str, *, invalid_rows: int) -> None:
    cache, extra, split = golden_groups()
    whole = evaluate(predictions(extra, "slow"), split, cache)
    assert result.groups["valid"].tolist() == [False, True]
    assert reason in result.groups["reason"][0]
    assert not result.complete
    assert result.stages["groups"].tolist() == [1, 1, 1]
    assert result.stages["groups_expected"].tolist() == [2, 2, 2]
    assert result.combined == whole.groups["combined"][1]
    assert (~result.rows["valid"]).sum() == invalid_rows
    ours, theirs = result.rows.set_index("token"), whole.rows.set_index("token")
    other = list(split.groups[1].tokens)
    np.testing.assert_array_equal(ours.loc[other, "score"], theirs.loc[other, "score"])


@pytest.mark.parametrize("gap_us", [0, 40_000, 560_000, -500_000])
@pytest.mark.parametrize("stage", ["first", "second"])
def test_neighbours_at_a_wrong_distance_in_time(stage, gap_us):
    cache, extra, split = golden_groups()
    group = split.groups[0]
    now, prev = (group.now, group.prev) if stage == "first" else group.pairs[0]
    moved = dataclasses.replace(cache.load(prev), time_us=cache.load(now).time_us - gap_us)
    result = evaluate(predictions(extra, "slow"), split, changed_cache(**{prev: moved}), traffic="log_replay")
    assert result.groups["valid"].tolist() == [False, True]
    assert f"{gap_us * 1e-6:.3f} s after {prev}" in result.groups["reason"][0]
    reasons = result.rows.set_index("token")["reason"]
    assert "no extended comfort" in reasons[now]
    assert "no extended comfort" in reasons[prev]
    assert result.rows["valid"].all()  # each scene has its own sub-scores; what the two share is missing
    assert result.rows.set_index("token").loc[[now, prev], "score"].isna().all()


def test_a_lane_of_two_vertices_costs_its_group():
    """NAVSIM's reactive traffic fails on such a path, and with it the whole evaluation."""
    cache, extra, split = golden_groups()
    token = split.groups[0].pairs[0][0]
    record = cache.load(token)
    agents = record.traffic_agents
    active = int(np.flatnonzero(agents.kinds & IS_ACTIVE)[0])
    first = int(agents.path_offsets[agents.path[active]])
    kept = np.r_[0 : first + 1, int(agents.path_offsets[agents.path[active] + 1]) : len(agents.path_vertices)]
    gone = len(agents.path_vertices) - len(kept)
    offsets = agents.path_offsets - gone * (np.arange(len(agents.path_offsets)) > agents.path[active])
    short = dataclasses.replace(record, path_offsets=offsets, path_vertices=agents.path_vertices[kept])
    result = evaluate(predictions(extra, "slow"), split, changed_cache(**{token: short}))
    only_the_first_group_is_lost(result, "a lane of 2 vertices, on which NAVSIM's", invalid_rows=1)
    assert token in result.groups["reason"][0]


def test_vehicles_without_a_lane_do_not_react():
    """Standing ones stay where they are, moving ones vanish; neither costs the scene."""
    poses = np.array([[500.0, 500.0, 0.0], [510.0, 500.0, 0.0]])
    velocities = np.array([[0.0, 0.0], [5.0, 0.0]])
    sizes = np.full((2, 3), [4.5, 2.0, 1.5])
    agents = traffic_agents(make_town(), np.zeros(3), np.arange(2), poses, sizes, velocities)
    assert agents.kinds.tolist() == [STAYS, 0]
    assert agents.path.tolist() == [-1, -1]
    assert agents.path_offsets.tolist() == [0]
    cache, extra, split = golden_groups()
    kinds = [cache.load(token).traffic_agents.kinds & IS_ACTIVE for token in split.first_stage_tokens]
    assert any((active == 0).any() for active in kinds)  # one of the golden scenes has such a vehicle
    assert evaluate(predictions(extra, "slow"), split, cache).complete


def test_a_malformed_prediction_costs_its_group():
    """A list in place of a trajectory, as ``read_submission`` reports it."""
    _, extra, split = golden_groups()
    good = predictions(extra, "slow")
    row = good.tokens.index(split.groups[0].pairs[1][1])
    poses = [np.zeros((0, 3)) if i == row else one for i, one in enumerate(good.poses)]
    bad = Trajectories(good.tokens, poses, good.intervals, {row: "a list; a Trajectory was expected"})
    cache, _, _ = golden_groups()
    result = evaluate(bad, split, cache)
    only_the_first_group_is_lost(result, "a Trajectory was expected", invalid_rows=1)


def test_2_hz_and_10_hz_may_be_mixed():
    """Every scene is scored in its own sampling; NAVSIM accepts either."""
    cache, extra, split = golden_groups()
    slow, dense = predictions(extra, "slow"), predictions(extra, "dense_10hz")
    first = set(split.groups[0].tokens)
    pick = [token in first for token in slow.tokens]
    poses = [a if here else b for here, a, b in zip(pick, slow.poses, dense.poses)]
    intervals = [a if here else b for here, a, b in zip(pick, slow.intervals, dense.intervals)]
    mixed = evaluate(Trajectories(slow.tokens, poses, intervals), split, cache)
    alone = [evaluate(one, split, cache) for one in (slow, dense)]
    assert mixed.complete
    assert mixed.groups["combined"].tolist() == [alone[0].groups["combined"][0], alone[1].groups["combined"][1]]


def test_a_missing_second_stage_leaves_the_first_ones_sub_scores():
    cache, extra, split = golden_groups()
    whole = evaluate(predictions(extra, "slow"), split, cache)
    good = predictions(extra, "slow")
    keep = [i for i, token in enumerate(good.tokens) if token in split.first_stage_tokens]
    part = Trajectories([good.tokens[i] for i in keep], [good.poses[i] for i in keep], [0.5] * len(keep))
    result = evaluate(part, split, cache)
    assert not result.groups["valid"].any()
    assert np.isnan(result.combined)
    assert all("no trajectory for this token" in reason for reason in result.groups["reason"])
    rows = result.rows.set_index("token")
    assert rows["valid"].sum() == len(keep)
    assert (rows.loc[list(split.second_stage_tokens), "reason"] == "no trajectory for this token").all()
    first = list(split.first_stage_tokens)
    np.testing.assert_array_equal(rows.loc[first, "score"], whole.rows.set_index("token").loc[first, "score"])


def test_an_absent_mapping_is_that_of_a_test_server(tmp_path):
    cache, extra, split = golden_groups()
    (tmp_path / "scene_filter").mkdir()
    (tmp_path / "scene_filter/s.yaml").write_text(json.dumps({"tokens": list(split.first_stage_tokens)}))
    (tmp_path / "s.yaml").write_text(json.dumps({"data_split": "test"}))
    with pytest.raises(DataError, match="split s has no reactive_all_mapping"):
        evaluate(predictions(extra, "slow"), read_split(tmp_path / "s.yaml"), cache)
    (tmp_path / "s.yaml").write_text(json.dumps({"reactive_all_mapping": []}))
    with pytest.raises(DataError, match="data_split is None"):
        read_split(tmp_path / "s.yaml")
