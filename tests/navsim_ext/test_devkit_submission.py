"""Submission files: what is written reads back, under the original class names, and faults are named."""

import pickle
import pickletools
import sys

import numpy as np
import pandas as pd
import pytest
from two_stage_golden import golden_groups, predictions

from navsim_ext.devkit import submission
from navsim_ext.devkit.submission import (
    InvalidSubmission,
    check_submission,
    dry_run,
    merge_submissions,
    read_submission,
    write_submission,
)
from navsim_ext.evaluation import submission_file
from navsim_ext.evaluation.score_file import score_file
from navsim_ext.evaluation.two_stage import evaluate
from navsim_ext.evaluation.two_stage_file import read_planners
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm.columns import SCORE_COLUMNS
from navsim_ext.pickles import RefusedObject
from navsim_ext.pickles.writing import dumps_as

TEAM = {"name": "t", "authors": "a", "email": "e@x.org", "institution": "i", "country": "c"}
POSES = {f"{i:016x}": np.arange(24, dtype=np.float64).reshape(8, 3) + i for i in range(3)}


@pytest.mark.parametrize("version", ["v1.1", "v2.2"])
def test_round_trip(tmp_path, version):
    path = tmp_path / "s.pkl"
    write_submission(path, POSES, TEAM, version=version, expected_tokens=list(POSES))
    back = check_submission(path, list(POSES))
    assert back.keys() == POSES.keys()
    for token, poses in POSES.items():
        np.testing.assert_array_equal(back[token], poses.astype(np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["s.pkl"]


def test_pickle_names_the_original_classes_and_leaves_no_module_behind(tmp_path):
    before = set(sys.modules)
    write_submission(tmp_path / "s.pkl", POSES, TEAM)
    assert not {name for name in set(sys.modules) - before if name.startswith(("navsim.", "nuplan"))}
    assert submission_file.Trajectory.__module__ == "navsim_ext.evaluation.submission_file"
    strings = [argument for _, argument, _ in pickletools.genops((tmp_path / "s.pkl").read_bytes())]
    for name in ("navsim.common.dataclasses", "Trajectory", "TrajectorySampling"):
        assert name in strings
    assert "navsim_ext.evaluation.submission_file" not in strings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda poses, team: team.update(email=""), "email"),
        (lambda poses, team: poses.clear(), "0 tokens"),
        (lambda poses, team: poses.update(bad=np.zeros((7, 3))), "bad has poses"),
        (lambda poses, team: poses.update(bad=np.full((8, 3), np.nan)), "not finite"),
    ],
)
def test_faults_are_named_and_nothing_is_written(tmp_path, change, message):
    poses, team = dict(POSES), dict(TEAM)
    change(poses, team)
    with pytest.raises(InvalidSubmission, match=message):
        write_submission(tmp_path / "s.pkl", poses, team)
    assert not list(tmp_path.iterdir())


def test_missing_and_unknown_tokens_are_counted(tmp_path):
    with pytest.raises(InvalidSubmission, match=r"1 expected tokens are missing .*1 are unknown"):
        write_submission(tmp_path / "s.pkl", POSES, TEAM, expected_tokens=[*list(POSES)[:2], "f" * 16])


def test_a_foreign_object_is_refused_without_being_built(tmp_path):
    path = tmp_path / "s.pkl"
    path.write_bytes(pickle.dumps({"predictions": [{"t": pytest.approx(1.0)}]}))
    with pytest.raises(RefusedObject, match=r"pytest|approx"):
        check_submission(path)


def test_the_dry_run_scores_as_a_score_file_does(small_cache, tmp_path):
    """Neighbouring scenes are paired for two-frame comfort, as on the server."""
    tokens = sorted(MetricCache(small_cache).tokens)
    rng = np.random.default_rng(0)
    poses = {token: np.cumsum(rng.normal([2.0, 0.0, 0.0], [1.5, 0.3, 0.1], (8, 3)), axis=0) for token in tokens}
    rows = [{"token": token, "name": "a", "poses": poses[token].ravel()} for token in tokens]
    pd.DataFrame(rows).to_parquet(tmp_path / "in.parquet")
    _, expected = score_file(tmp_path / "in.parquet", MetricCache(small_cache))
    frame = dry_run(poses, str(small_cache))
    assert frame["v2_ec"].notna().any()
    for column in SCORE_COLUMNS:
        np.testing.assert_array_equal(frame[column], expected[column], err_msg=column)


SECOND = {f"{i:017x}": np.arange(24, dtype=np.float64).reshape(8, 3) - i for i in range(2)}


def test_both_stages_are_written_read_and_checked(tmp_path):
    path = tmp_path / "s.pkl"
    write_submission(
        path, POSES, TEAM, second_stage=SECOND, expected_tokens=list(POSES), expected_second_stage=list(SECOND)
    )
    found = read_submission(path)
    assert [set(stage) for stage in found.stages] == [set(POSES), set(SECOND)]
    assert set(found.intervals.values()) == {0.5}
    with pytest.raises(InvalidSubmission, match=r"stage 2: 0 expected tokens are missing .* and 1 are unknown"):
        check_submission(path, list(POSES), list(SECOND)[:1])
    with pytest.raises(InvalidSubmission, match="knows no second stage"):
        write_submission(path, POSES, TEAM, version="v1.1", second_stage=SECOND)
    dense = {token: np.zeros((40, 3)) for token in POSES}
    write_submission(path, dense, TEAM, interval=0.1)
    assert set(read_submission(path).intervals.values()) == {0.1}


def test_every_token_of_every_stage_is_looked_at(tmp_path):
    """Lists instead of trajectories, short samplings, NaN: named and counted, and the good tokens stay."""
    path = tmp_path / "s.pkl"
    bad_second = dict(SECOND)
    stages = [{t: submission_file.Trajectory(np.float32(p)) for t, p in part.items()} for part in (POSES, bad_second)]
    tokens = [*stages[0], *stages[1]]
    stages[0][tokens[0]] = np.zeros((8, 3)).tolist()
    stages[0][tokens[1]] = submission_file.Trajectory(np.zeros((8, 3), np.float32), 0.1)
    stages[1][tokens[3]] = submission_file.Trajectory(np.full((8, 3), np.nan, np.float32))
    fields = dict.fromkeys(submission_file.TEAM_FIELDS, "x")
    keys = submission_file.PREDICTIONS["v2.2"]
    content = fields | {key: [stage] for key, stage in zip(keys, stages)}
    path.write_bytes(dumps_as(content, submission_file.STAND_INS))
    found = read_submission(path)
    assert set(found.malformed) == {tokens[0], tokens[1], tokens[3]}
    assert "a Trajectory was expected" in found.malformed[tokens[0]]
    assert "cover" in found.malformed[tokens[1]]
    assert "not finite" in found.malformed[tokens[3]]
    assert set(found.poses) == {tokens[2], tokens[4]}
    with pytest.raises(InvalidSubmission, match="3 tokens are malformed"):
        check_submission(path)


def test_blind_planners_beside_the_planner_are_not_submitted(tmp_path, monkeypatch, capsys):
    """As ``score probes=true`` writes its trajectories."""
    rows = [
        {"token": token, "name": name, "poses": poses.ravel()}
        for name in ("mine", "probe_standing_still")
        for token, poses in POSES.items()
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    team = [f"team.{key}={value}" for key, value in TEAM.items()]
    options = [f"trajectories={tmp_path}/t.parquet", f"output={tmp_path}/s.pkl", *team]
    monkeypatch.setattr(sys, "argv", ["submission", *options])
    submission.main()
    assert read_submission(tmp_path / "s.pkl").poses.keys() == POSES.keys()
    pd.DataFrame(rows + [row | {"name": "other"} for row in rows]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(SystemExit):
        submission.main()
    assert "['mine', 'other']" in capsys.readouterr().err


def test_parts_are_merged_and_contradictions_refused(tmp_path):
    first, second = list(POSES)[:2], list(POSES)[1:]
    write_submission(tmp_path / "a.pkl", {token: POSES[token] for token in first}, TEAM)
    write_submission(tmp_path / "b.pkl", {token: POSES[token] for token in second}, TEAM, second_stage=SECOND)
    merged = merge_submissions([tmp_path / "a.pkl", tmp_path / "b.pkl"])
    assert [len(stage) for stage in merged.stages] == [3, 2]
    write_submission(tmp_path / "c.pkl", {first[0]: POSES[first[0]] + 1.0}, TEAM)
    with pytest.raises(InvalidSubmission, match=r"c.pkl: token .* predicted differently"):
        merge_submissions([tmp_path / "a.pkl", tmp_path / "c.pkl"])
    write_submission(tmp_path / "old.pkl", POSES, TEAM, version="v1.1")
    with pytest.raises(InvalidSubmission, match="of versions"):
        merge_submissions([tmp_path / "a.pkl", tmp_path / "old.pkl"])


@pytest.mark.slow
def test_a_submission_scores_as_its_trajectories(tmp_path):
    cache, extra, split = golden_groups()
    poses = dict(zip(extra["tokens"].tolist(), extra["poses/slow"]))
    stages = [{t: poses[t] for t in tokens} for tokens in (split.first_stage_tokens, split.second_stage_tokens)]
    write_submission(tmp_path / "s.pkl", stages[0], TEAM, second_stage=stages[1])
    ((name, trajectories),) = read_planners(tmp_path / "s.pkl").items()
    assert name == TEAM["name"]
    found = evaluate(trajectories, split, cache).rows.set_index("token")
    wanted = evaluate(predictions(extra, "slow"), split, cache).rows.set_index("token").loc[found.index]
    pd.testing.assert_frame_equal(found, wanted)
