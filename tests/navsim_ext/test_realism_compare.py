"""Models compared by realism: paired differences with intervals, seeds, and a rollout shown as a scene."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from navsim_ext.errors import MissingError
from navsim_ext.files import read_json, write_json_atomic
from navsim_ext.realism.compare import compare, print_comparison, shown
from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.rollouts import RolloutFolder, as_scene
from navsim_ext.realism.rules import HISTORY_STEPS
from navsim_ext.realism.scene_folder import SceneFolder
from navsim_ext.realism.score import SCENARIOS_FILE, SUMMARY_FILE, ScoreSettings, score_rollouts
from navsim_ext.runtime.config import configured
from navsim_ext.runtime.options import OptionError
from navsim_ext.runtime.parquet import write_table

GOLDEN = Path(__file__).parents[1] / "golden" / "wosac"


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    score_rollouts(ScoreSettings(str(GOLDEN), str(GOLDEN), 2025, 32), str(folder))
    return folder


def variant(scored: Path, folder: Path, change, count: int = 40) -> str:
    """Scores of ``count`` scenarios, the golden ones over and over, their meta-metrics changed."""
    table = pd.read_parquet(scored / SCENARIOS_FILE)
    many = table.iloc[np.arange(count) % len(table)].reset_index(drop=True)
    many["scenario"] = [f"s{number:02d}" for number in range(count)]
    many["metametric"] = change(np.arange(count), many["metametric"].to_numpy())
    folder.mkdir(parents=True)
    write_table(folder / SCENARIOS_FILE, many)
    write_json_atomic(folder / SUMMARY_FILE, read_json(scored / SUMMARY_FILE))
    return str(folder)


def test_neighbours_are_paired_and_what_is_not_shown_is_said(scored, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    good = [variant(scored, tmp_path / f"good{k}", lambda i, m, k=k: m + 0.05 + k * 0.01) for k in range(2)]
    same = variant(scored, tmp_path / "same", lambda i, m: m + noise)
    base = variant(scored, tmp_path / "base", lambda i, m: m)
    found = compare({"good": good, "same": [same], "base": [base]})
    first, second = (one for _, _, one in found.steps)
    assert first.mean == pytest.approx(0.055 - noise.mean(), abs=1e-9)
    assert shown(first)
    assert not shown(second)
    assert second.low < 0 < second.high
    assert found.seeds["good"][1] - found.seeds["good"][0] == pytest.approx(0.01)
    assert found.scenarios == 40
    console = Console(width=80, record=True)
    print_comparison(found, console)
    text = console.export_text()
    assert "no: 0 is in it" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    told = found.to_json()
    assert [one["shown"] for one in told["neighbours"]] == [True, False]
    assert set(told["models"]) == {"good", "same", "base"}


def test_models_are_given_on_the_command_line():
    given = ["scores={cat_k: [runs/a, runs/b], idm: [runs/c]}", "output_dir=out"]
    assert configured("realism_compare", given).scores == {"cat_k": ["runs/a", "runs/b"], "idm": ["runs/c"]}
    with pytest.raises(OptionError, match=r"scores"):
        configured("realism_compare", ["scores=runs/a", "output_dir=out"])


def test_scores_that_cannot_be_compared_are_named(scored, tmp_path):
    one = variant(scored, tmp_path / "one", lambda i, m: m)
    with pytest.raises(RealismError, match="at least 2"):
        compare({"a": [one]})
    with pytest.raises(MissingError, match="score the rollouts"):
        compare({"a": [one], "b": [str(tmp_path / "nowhere")]})
    score_rollouts(ScoreSettings(str(GOLDEN), str(GOLDEN), 2024, 32), str(tmp_path / "older"))
    with pytest.raises(RealismError, match="year 2025 and 2024"):
        compare({"a": [str(scored)], "b": [str(tmp_path / "older")]})
    table = pd.read_parquet(Path(one) / SCENARIOS_FILE)
    table.loc[3, "valid"] = False
    other = variant(scored, tmp_path / "hole", lambda i, m: m)
    write_table(Path(other) / SCENARIOS_FILE, table)
    assert compare({"a": [one], "b": [other]}).left_out == 1


def test_a_rollout_as_a_scene_is_the_history_and_then_the_drive():
    name = "12_islands"
    scene, rollouts = SceneFolder(str(GOLDEN)).get(name), RolloutFolder(GOLDEN).get(name)
    driven = as_scene(scene, rollouts, 7)
    rows = [int(np.flatnonzero(scene.agent_id == one)[0]) for one in rollouts.ids]
    np.testing.assert_array_equal(driven.pose[:, :HISTORY_STEPS, :2], scene.pose[:, :HISTORY_STEPS, :2])
    np.testing.assert_array_equal(driven.pose[rows, HISTORY_STEPS:, :2], rollouts.pose[7][..., :2])
    assert driven.valid[rows, HISTORY_STEPS:].all()
    assert not np.delete(driven.valid, rows, axis=0)[:, HISTORY_STEPS:].any()
    assert driven.id == scene.id
    with pytest.raises(RealismError, match="rollout 32 was asked for, there are 32"):
        as_scene(scene, rollouts, 32)
    with pytest.raises(RealismError, match="79 steps"):
        as_scene(scene, replace(rollouts, pose=rollouts.pose[:, :, :79]), 0)
    with pytest.raises(RealismError, match="not in it"):
        as_scene(scene, replace(rollouts, ids=rollouts.ids + 10_000), 0)
