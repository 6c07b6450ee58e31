"""Scoring of many scenarios as a command, and submissions: what they write, refuse and survive."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.realism import score as job
from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.rollouts import KIND, RolloutFolder
from navsim_ext.realism.scene_folder import SceneFolder
from navsim_ext.realism.score import METRICS, ScoreSettings, score_rollouts
from navsim_ext.realism.submission import (
    Method,
    Submission,
    check_submission,
    read_submission,
    rollouts_of,
    write_submission,
)
from navsim_ext.shards import ShardWriter, merge
from navsim_ext.traffic.store import fingerprint_of, write_scenes

GOLDEN = Path(__file__).parents[1] / "golden" / "wosac"
NAMES = ["08_alone", "10_far", "12_islands"]
METHOD = Method("me", "mine", num_model_parameters="1k", acknowledge_complies_with_closed_loop_requirement=True)


def settings(folder: Path = GOLDEN, year: int = 2025) -> ScoreSettings:
    return ScoreSettings(str(folder), str(folder), year, 32)


def test_the_table_holds_the_challenges_figures(tmp_path):
    summary = score_rollouts(settings(), str(tmp_path))
    table = pd.read_parquet(tmp_path / "scenarios.parquet").set_index("scenario")
    golden = json.loads((GOLDEN / "metrics.json").read_text())["per_scenario"]
    assert table.index.tolist() == NAMES
    for name in NAMES:
        for column in METRICS:
            expected = golden[name]["2025"]["scenario"][column]
            assert table.loc[name, column] == pytest.approx(expected, rel=1e-6, abs=3e-7)
    mean = np.mean([golden[name]["2025"]["scenario"]["metametric"] for name in NAMES])
    assert summary["mean"]["metametric"] == pytest.approx(mean, abs=3e-7)
    assert summary["intervals"]["metametric"]["low"] <= mean <= summary["intervals"]["metametric"]["high"]
    assert not summary["invalid"]


def test_stores_give_the_same_figures_as_files(tmp_path):
    scenes, rollouts = SceneFolder(str(GOLDEN)), RolloutFolder(GOLDEN)
    loaded = {scenes.get(name).id: (scenes.get(name), rollouts.get(name)) for name in NAMES}
    write_scenes(tmp_path / "scenes", iter(scene for scene, _ in loaded.values()), fingerprint_of({"golden": 1}))
    with ShardWriter(tmp_path / "rollouts", Fingerprint(KIND, {"golden": 1})) as writer:
        for name, (_, one) in loaded.items():
            writer.put(name, one.arrays())
    merge(tmp_path / "rollouts")
    stored = ScoreSettings(str(tmp_path / "scenes"), str(tmp_path / "rollouts"), 2025, 32)
    summary = score_rollouts(stored, str(tmp_path / "out"))
    assert summary["mean"] == pytest.approx(score_rollouts(settings(), str(tmp_path / "files"))["mean"], abs=1e-12)


def test_finished_scenarios_are_kept_and_other_data_refused(tmp_path, monkeypatch):
    score_rollouts(settings(), str(tmp_path))
    before = (tmp_path / "scenarios.parquet").read_bytes()

    def fail(self, name):
        raise AssertionError(f"{name} was scored again")

    monkeypatch.setattr(job.ScenarioWorker, "process", fail)
    score_rollouts(settings(), str(tmp_path))
    assert (tmp_path / "scenarios.parquet").read_bytes() == before
    with pytest.raises(FingerprintMismatch, match=r"year: 2025 \| 2024"):
        score_rollouts(settings(year=2024), str(tmp_path))


def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in GOLDEN.glob("*.npz"):
        shutil.copy(path, folder)
    return folder


def test_an_invalid_scenario_is_a_row_with_its_reason_and_in_no_mean(tmp_path):
    folder = copied(tmp_path)
    stored = dict(np.load(folder / "10_far.rollouts.npz"))
    stored["xyzh"][2, 1, 4, 0] = np.nan
    np.savez(folder / "10_far.rollouts.npz", **stored)
    summary = score_rollouts(settings(folder), str(tmp_path / "out"))
    table = pd.read_parquet(tmp_path / "out" / "scenarios.parquet").set_index("scenario")
    assert table["valid"].tolist() == [True, False, True]
    assert "not finite in rollout 2, step 4" in table.loc["10_far", "reason"]
    assert np.isnan(table.loc["10_far", list(METRICS)].to_numpy(float)).all()
    assert summary["scenarios"] == 2
    assert list(summary["invalid"]) == ["10_far"]
    assert np.isfinite(summary["mean"]["metametric"])


def test_scenes_without_rollouts_are_refused_unless_asked_for(tmp_path):
    folder = copied(tmp_path)
    (folder / "10_far.rollouts.npz").unlink()
    with pytest.raises(RealismError, match=r"1 scenarios have no rollouts \(10_far\)"):
        score_rollouts(settings(folder), str(tmp_path / "out"))
    assert score_rollouts(settings(folder), str(tmp_path / "out"), allow_missing=True)["scenarios"] == 2
    with pytest.raises(MissingError, match="neither a store"):
        score_rollouts(settings(tmp_path / "nowhere"), str(tmp_path / "out"))


def test_a_damaged_rollout_file_is_named(tmp_path):
    folder = copied(tmp_path)
    path = folder / "08_alone.rollouts.npz"
    path.write_bytes(path.read_bytes()[:2000])
    summary = score_rollouts(settings(folder), str(tmp_path / "out"))
    assert str(path) in summary["invalid"]["08_alone"]


def test_a_submission_is_whole_and_read_back_as_it_was(tmp_path):
    scenes, rollouts, path = SceneFolder(str(GOLDEN)), RolloutFolder(GOLDEN), tmp_path / "out.tar.gz"
    assert write_submission(path, scenes, rollouts, METHOD, shards=2) == 3
    assert check_submission(path, scenes) == []
    shards = list(read_submission(path))
    assert [name for name, _ in shards] == ["submission.binproto-00000-of-00002", "submission.binproto-00001-of-00002"]
    by_id = {scenes.get(name).id: name for name in NAMES}
    for _, message in shards:
        for scenario in message.scenario_rollouts:
            name = by_id[scenario.scenario_id]
            scene = scenes.get(name)
            back = rollouts_of(scenario, scene)
            there = rollouts.get(name).of(back.ids)
            np.testing.assert_allclose(back.pose, there.pose, atol=2e-3)


def repacked(source: Path, target: Path, change) -> Path:
    with tarfile.open(target, "w:gz") as archive:
        for name, message in read_submission(source):
            change(message)
            content = message.SerializeToString()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target


def first(message):
    return message.scenario_rollouts[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "submission_type", 3), "submission_type is 3"),
        (lambda m: setattr(m, "account_name", ""), "account_name is empty"),
        (lambda m: m.scenario_rollouts.pop(), "is missing"),
        (lambda m: setattr(first(m), "scenario_id", "elsewhere"), "none of the split's"),
        (lambda m: m.scenario_rollouts.append(first(m)), "is there already"),
        (lambda m: first(m).joint_scenes.pop(), "31 rollouts, 32 are needed"),
        (lambda m: first(m).joint_scenes[4].simulated_trajectories.pop(), "rollout 4: missing"),
        (lambda m: first(m).joint_scenes[0].simulated_trajectories[0].center_x.pop(), "center_x has 79 values"),
        (
            lambda m: first(m).joint_scenes[0].simulated_trajectories[0].heading.__setitem__(5, float("nan")),
            "heading has a value that is not finite",
        ),
    ],
)
def test_every_fault_of_a_submission_is_named(tmp_path, change, words):
    scenes = SceneFolder(str(GOLDEN))
    write_submission(tmp_path / "good.tar.gz", scenes, RolloutFolder(GOLDEN), METHOD, shards=1)
    faults = check_submission(repacked(tmp_path / "good.tar.gz", tmp_path / "bad.tar.gz", change), scenes)
    assert any(words in fault for fault in faults), faults


def test_what_is_no_submission_is_named(tmp_path):
    scenes = SceneFolder(str(GOLDEN))
    with pytest.raises(MissingError, match="does not exist"):
        check_submission(tmp_path / "none.tar.gz", scenes)
    (tmp_path / "text.tar.gz").write_text("no archive")
    with pytest.raises(DataError, match=r"no \.tar\.gz archive"):
        check_submission(tmp_path / "text.tar.gz", scenes)
    with pytest.raises(RealismError, match="acknowledge_complies"):
        write_submission(tmp_path / "out.tar.gz", scenes, RolloutFolder(GOLDEN), Method("me", "mine", (), "", "", "",
                         num_model_parameters="1k"))  # fmt: skip
    assert not (tmp_path / "out.tar.gz").exists()
    assert Submission(submission_type=1).IsInitialized()
