"""Two-stage evaluation: equal to NAVSIM on the golden groups; what is bad costs its own group and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
from two_stage_golden import FOLDER, PLANNERS, golden_groups, predictions, split_of

from navsim_ext.errors import DataError
from navsim_ext.evaluation.two_stage import (
    NAMES,
    STAGE_ROWS,
    IncompleteEvaluation,
    Trajectories,
    evaluate,
    extended_score,
    navsim_table,
    stage_two_weights,
)
from navsim_ext.evaluation.two_stage_file import checked_poses
from navsim_ext.pdm.memory import MemoryMetricCache

SCORES, WEIGHTS = 1e-8, 1e-9


@pytest.mark.parametrize("human_filter", [False, True])
@pytest.mark.parametrize("traffic", ["reactive", "log_replay"])
@pytest.mark.parametrize("name", PLANNERS)
def test_rows_are_navsims(name, traffic, human_filter):
    cache, extra, split = golden_groups()
    result = evaluate(predictions(extra, name), split, cache, traffic=traffic, human_filter=human_filter)
    wanted = extra[f"scores/{name}/{traffic}/{human_filter}"]
    assert result.rows["valid"].all()
    assert result.rows["token"].tolist() == extra["tokens"].tolist()
    for k, column in enumerate((*NAMES, "weight", "score")):
        tolerance = WEIGHTS if column == "weight" else SCORES
        np.testing.assert_allclose(result.rows[column], wanted[:, k], rtol=0, atol=tolerance, err_msg=column)
    assert result.complete
    assert (result.stages["groups"] == 2).all()


@pytest.fixture(scope="module")
def shared(reference, tmp_path_factory):
    """The whole shared golden set, cached by the command's own function."""
    import shutil

    from navsim_ext.metric_cache.build import build
    from navsim_ext.metric_cache.settings import BuildSettings

    golden, folder = reference("golden/navsim_two_stage"), tmp_path_factory.mktemp("two_stage")
    shutil.copytree(golden / "dataset", folder / "data")  # the maps' folder must be writable for nobody but NAVSIM
    config = folder / "data/config/train_test_split/synth_two_stage.yaml"
    report = build(BuildSettings.two_stage(str(folder / "data"), str(config), str(folder / "cache")))
    assert (report["cached"], report["invalid"]) == (92, 0)
    return golden, folder, config


@pytest.mark.parametrize(
    ("human_filter", "traffic"),
    [
        (True, "log_replay"),
        pytest.param(True, "reactive", marks=pytest.mark.slow),  # the committed groups have it in every run
        pytest.param(False, "log_replay", marks=pytest.mark.slow),
        pytest.param(False, "reactive", marks=pytest.mark.slow),
    ],
)
def test_whole_golden_set_by_the_command(shared, traffic, human_filter, tmp_path):
    from navsim_ext.evaluation.score_file import main
    from navsim_ext.runtime.config import compose

    golden, folder, config = shared
    planners = np.load(golden / "planners.npz")
    rows = [
        {
            "token": str(token),
            "name": str(name),
            "poses": planners[f"{name}__poses"][i].reshape(-1),
            "interval": float(planners[f"{name}__interval"]),
        }
        for name in planners["planners"]
        for i, token in enumerate(planners["tokens"])
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "in.parquet")
    options = [
        "protocol=two_stage", f"trajectories={tmp_path}/in.parquet", f"metric_cache={folder}/cache",
        f"data.root={folder}/data", f"data.split_config={config}", f"traffic={traffic}",
        f"human_filter={human_filter}", f"output={tmp_path}/out.parquet", f"csv_dir={tmp_path}/csv",
    ]  # fmt: skip
    main.__wrapped__(compose("score_file", options)) if hasattr(main, "__wrapped__") else _run(options)
    policy = {"reactive": "idm", "log_replay": "log_replay"}[traffic]
    run = "policy == @policy and human_filter == @human_filter"
    found = pd.read_parquet(tmp_path / "out.parquet").set_index(["name", "token"])
    wanted = pd.read_parquet(golden / "scores.parquet").query(run).set_index(["planner", "token"]).loc[found.index]
    assert found["valid"].all()
    assert (found["stage"] == wanted["stage"]).all()
    for column in (*NAMES, "weight", "score"):
        tolerance = WEIGHTS if column == "weight" else SCORES
        np.testing.assert_allclose(found[column], wanted[column], rtol=0, atol=tolerance, err_msg=column)
    stages = pd.read_parquet(tmp_path / "out.aggregates.parquet").set_index(["name", "token"])
    wanted = pd.read_parquet(golden / "aggregates.parquet").query(run).set_index(["planner", "token"]).loc[stages.index]
    for column in wanted.columns.drop(["policy", "human_filter"]):
        np.testing.assert_allclose(stages[column].astype(float), wanted[column].astype(float), rtol=0, atol=SCORES)
    for name in ("const_velocity", "reference"):
        file = golden / f"csv/{name}__{policy}__filter.csv"
        if human_filter:
            theirs, ours = pd.read_csv(file), pd.read_csv(tmp_path / f"csv/{name}.csv")
            assert theirs.columns.tolist() == ours.columns.tolist()
            theirs, ours = theirs.set_index("token"), ours.set_index("token")
            assert set(theirs.index) == set(ours.index)
            assert ours.index[-3:].tolist() == list(STAGE_ROWS)
            pd.testing.assert_frame_equal(
                ours.loc[theirs.index].drop(columns="Unnamed: 0"),
                theirs.drop(columns="Unnamed: 0"),
                atol=SCORES,
                rtol=0,
            )


def _run(options: list[str]) -> None:
    done = forked.run("-m", "navsim_ext.evaluation.score_file", *options)
    assert done.returncode == 0, done.stderr


def changed(
    trajectories: Trajectories, row: int, poses: np.ndarray | None = None, *, drop: bool = False
) -> Trajectories:
    keep = [i for i in range(len(trajectories.tokens)) if not (drop and i == row)]
    moved = [poses if i == row and poses is not None else trajectories.poses[i] for i in keep]
    return Trajectories([trajectories.tokens[i] for i in keep], moved, [trajectories.intervals[i] for i in keep])


@pytest.mark.parametrize("case", ["nan", "missing", "no_cache", "short"])
def test_a_bad_scene_costs_its_group_and_no_other(case):
    cache, extra, split = golden_groups()
    whole = evaluate(predictions(extra, "slow"), split, cache)
    bad = split.groups[0].pairs[0][1]
    row = extra["tokens"].tolist().index(bad)
    trajectories, records = predictions(extra, "slow"), cache
    if case == "nan":
        trajectories = changed(trajectories, row, np.full((8, 3), np.nan))
    elif case == "missing":
        trajectories = changed(trajectories, row, drop=True)
    elif case == "short":
        trajectories = changed(trajectories, row, extra["poses/slow"][row][:5])
    else:
        tokens = [token for token in cache.tokens if token != bad]
        locations = {cache.load(token).map_location for token in tokens}
        records = MemoryMetricCache(
            {token: cache.load(token) for token in tokens}, {place: cache.polygons(place) for place in locations}
        )
    result = evaluate(trajectories, split, records)
    assert result.groups["valid"].tolist() == [False, True]
    assert bad in result.groups["reason"][0]
    assert not result.complete
    assert result.stages["groups"].tolist() == [1, 1, 1]
    assert result.combined == pytest.approx(whole.groups["combined"][1], abs=1e-12)
    assert result.rows.set_index("token")["valid"].sum() == 15  # no other scene is lost
    with pytest.raises(IncompleteEvaluation, match=bad):
        evaluate(trajectories, split, records, strict=True)


def mapping_of(split) -> list:
    return [[group.now, group.prev, [list(pair) for pair in group.pairs]] for group in split.groups]


def test_bad_mappings_are_named(tmp_path):
    from navsim_ext.readers import read_split

    cache, extra, split = golden_groups()
    mapping = mapping_of(split)

    def read(entries, **extra_keys):
        (tmp_path / "scene_filter").mkdir(exist_ok=True)
        (tmp_path / "scene_filter/s.yaml").write_text(
            json.dumps(
                {
                    "num_future_frames": 8,
                    "tokens": list(split.first_stage_tokens),
                    "include_synthetic_scenes": True,
                    "reactive_synthetic_initial_tokens": list(split.second_stage_tokens),
                }
            )
        )
        content = {"defaults": [{"scene_filter": "s"}], "data_split": "test", "reactive_all_mapping": entries}
        (tmp_path / "s.yaml").write_text(json.dumps(content | extra_keys))
        return read_split(tmp_path / "s.yaml")

    assert read(mapping).groups == split.groups
    twice = read([mapping[0], [mapping[1][0], mapping[1][1], [*mapping[1][2], mapping[0][2][0]]]])
    assert all("stands in 2 groups" in group.problem for group in twice.groups)
    lonely = read([[mapping[0][0], mapping[0][1], []], mapping[1]])
    result = evaluate(predictions(extra, "slow"), lonely, cache)
    assert result.groups["valid"].tolist() == [False, True]
    assert "no second-stage pair" in result.groups["reason"][0]
    hidden = read(None)
    with pytest.raises(DataError, match="only the evaluation server"):
        evaluate(predictions(extra, "slow"), hidden, cache)
    for wrong in ("text", [["a", "b"]], [["a", "b", [["c"]]]], [[1, "b", [["c", "d"]]]]):
        with pytest.raises(DataError, match="reactive_all_mapping"):
            read(wrong)


def test_swapped_neighbours_are_named():
    cache, extra, split = golden_groups()
    mapping = mapping_of(split)
    mapping[0][2][0] = mapping[0][2][0][::-1]
    result = evaluate(predictions(extra, "slow"), split_of(mapping), cache)
    assert result.groups["valid"].tolist() == [False, True]
    assert "-0.502 s after" in result.groups["reason"][0]
    mapping = mapping_of(split)  # far apart: neighbours of another group's pair
    mapping[0][1], mapping[1][1] = mapping[1][1], mapping[0][1]
    assert not evaluate(predictions(extra, "slow"), split_of(mapping), cache).groups["valid"].any()


def test_token_in_no_group_and_predicted_twice():
    cache, extra, split = golden_groups()
    one = dataclasses.replace(split, groups=split.groups[:1])
    result = evaluate(predictions(extra, "slow"), one, cache)
    assert result.complete
    assert (result.rows["reason"] == "in no group of the split").sum() == 8
    trajectories = predictions(extra, "slow")
    doubled = Trajectories(
        [*trajectories.tokens, trajectories.tokens[0]], [*trajectories.poses, trajectories.poses[0]], [0.5] * 17
    )
    with pytest.raises(DataError, match="predicted twice"):
        evaluate(doubled, split, cache)


def test_a_whole_group_without_trajectories_leaves_the_score_incomplete():
    cache, extra, split = golden_groups()
    tokens = set(split.groups[0].tokens)
    rows = [i for i, token in enumerate(extra["tokens"].tolist()) if token in tokens]
    part = predictions(extra, "slow")
    part = Trajectories([part.tokens[i] for i in rows], [part.poses[i] for i in rows], [0.5] * len(rows))
    result = evaluate(part, split, cache)
    assert not result.complete
    assert result.stages["groups"].tolist() == [1, 1, 1]
    assert evaluate(part, split, cache, strict=True).combined == result.combined  # NAVSIM skips such a group


def test_weights_are_a_narrow_kernel_and_uniform_beyond_it():
    starts = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.4]])
    weights = stage_two_weights(np.zeros(2), starts)
    np.testing.assert_allclose(weights / weights[0], np.exp(-np.array([0.0, 0.01, 0.16]) / 0.2), rtol=1e-12)
    assert weights.sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(stage_two_weights(np.array([1.93, 0.0]), np.zeros((4, 2))), np.full(4, 0.25))
    assert stage_two_weights(np.array([1.91, 0.0]), np.array([[0.0, 0.0], [0.1, 0.0]]))[0] < 0.5
    np.testing.assert_array_equal(stage_two_weights(np.array([np.nan, 0.0]), np.zeros((2, 2))), [0.5, 0.5])


def test_extended_score_is_the_formula():
    values = dict(zip(NAMES, (1.0, 1.0, 0.5, 1.0, 0.8, 1.0, 0.0, 1.0, 1.0)))
    assert extended_score(values) == pytest.approx(0.5 * (4.0 + 5.0 + 0.0 + 2.0 + 2.0) / 16.0)


def test_reactive_traffic_changes_scores_and_needs_no_second_look():
    """The same call twice is the same; traffic that reacts is another world than the replayed one."""
    cache, extra, split = golden_groups()
    first = evaluate(predictions(extra, "slow"), split, cache, threads=1)
    again = evaluate(predictions(extra, "slow"), split, cache, threads=2)
    pd.testing.assert_frame_equal(first.rows, again.rows)
    assert first.combined != evaluate(predictions(extra, "slow"), split, cache, traffic="log_replay").combined
    constant = evaluate(predictions(extra, "slow"), split, cache, traffic="constant_velocity")
    assert constant.complete
    assert 0.0 <= constant.combined <= 1.0


def test_navsims_layout():
    cache, extra, split = golden_groups()
    table = navsim_table(evaluate(predictions(extra, "slow"), split, cache))
    assert table.columns.tolist()[:3] == ["token", "valid", f"{NAMES[0]}_stage_one"]
    assert len(table) == 19
    assert table["token"].tolist()[-3:] == list(STAGE_ROWS)
    stage_one = table["token"].isin(split.first_stage_tokens)
    assert table.loc[stage_one, f"{NAMES[0]}_stage_two"].isna().all()


@pytest.mark.parametrize(
    ("values", "interval", "problem"),
    [
        (np.zeros(24), 0.5, ""),
        ([[0.0, 0.0, 0.0]] * 40, 0.1, ""),
        (np.zeros(23), 0.5, "23 values"),
        (None, 0.5, "null"),
        (["a"] * 24, 0.5, "not numbers"),
        (np.zeros(24), None, "interval"),
        (np.zeros(24), -0.5, "interval"),
        (np.zeros(24), 0.1, "4 s needed"),
        ([math.inf, *[0.0] * 23], 0.5, "pose 0"),
        ([[0.0] * 4] * 6, 0.5, "n x 3"),
    ],
)
def test_poses_of_a_table_are_checked(values, interval, problem):
    poses, found = checked_poses(values, interval)
    assert (found == "") == (problem == "")
    assert problem in found
    assert problem or poses.shape[1] == 3


def test_golden_folder_is_small():
    assert sum(path.stat().st_size for path in Path(FOLDER).rglob("*") if path.is_file()) < 800_000


def test_traffic_is_named_everywhere():
    from navsim_ext.evaluation.table import identity_line
    from navsim_ext.pdm import RewardWeights, score, scorer_fingerprint

    cache, extra, _ = golden_groups()
    tokens, poses = extra["tokens"].tolist()[:2], extra["poses/slow"][:2]
    digests = {scorer_fingerprint(traffic).digest for traffic in ("log_replay", "reactive", "constant_velocity")}
    assert len(digests) == 3
    assert scorer_fingerprint().digest == scorer_fingerprint("log_replay").digest
    with pytest.raises(DataError, match="one of log_replay, reactive"):
        score(tokens, poses, cache, traffic="parked")
    with pytest.raises(DataError, match="NAVSIM 2's"):
        score(tokens, poses, cache, versions=("v1", "v2"), traffic="reactive")
    with pytest.raises(DataError, match="only log replay has v1"):
        score(tokens, poses, cache, reward=RewardWeights(), traffic="reactive")
    what = {"split": "s", "tokens": 1, "logs": 1, "token_digest": "d", "part": "", "map_labels": []}
    assert "traffic reactive" in identity_line(what | {"traffic": "reactive"})
    assert "traffic" not in identity_line(what)


def test_a_group_of_predictions_scores_as_each_alone():
    """As in reinforcement: many trajectories of one scene, each in the world that answers to it."""
    from navsim_ext.pdm import RewardWeights, score

    cache, extra, _ = golden_groups()
    token = extra["tokens"].tolist()[8]
    plans = np.stack([extra[f"poses/{name}"][8] for name in ("slow", "swerve", "to_pair")])
    weights = RewardWeights("v2", 5.0, 5.0, 2.0)
    together = score([token] * 3, plans, cache, traffic="reactive", reward=weights)
    assert np.isfinite(together["reward"]).all()
    for i in range(3):
        alone = score([token], plans[i : i + 1], cache, traffic="reactive", reward=weights)
        np.testing.assert_array_equal(alone.values[0], together.values[i])
