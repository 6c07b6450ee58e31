"""Scoring a planner end to end: what it writes, that it resumes, that workers do not matter, and what it refuses."""

import json

import forked
import numpy as np
import pandas as pd
import pytest
from damage import damages
from rich.console import Console

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError
from navsim_ext.evaluation.attribution import PDMS_V1
from navsim_ext.evaluation.planning import plan_scenes
from navsim_ext.evaluation.score import NothingScored, score_planner
from navsim_ext.evaluation.scoring import score_table
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.planners import ConstantVelocityAgent, Human
from navsim_ext.runtime.config import compose


def config(world, output, *overrides):
    return compose(
        "score",
        [f"output_dir={output}", f"data.index={world.index}", "data.cameras=[]", f"metric_cache={world.metric_cache}",
         "data.split=trainval", *overrides],
    )  # fmt: skip


@pytest.fixture(scope="module")
def human(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("human")
    return output, score_planner(config(world, output, "planner=human"), Console(quiet=True))


def test_tables_agree_and_the_score_follows_from_its_columns(human):
    output, scores = human
    stored = pd.read_parquet(output / "scores.parquet")
    pd.testing.assert_frame_equal(stored, scores)
    assert pd.read_csv(output / "scores.csv")["pdms_v1"].to_numpy() == pytest.approx(scores["pdms_v1"].to_numpy())
    columns = {term: scores[term].to_numpy() for term in PDMS_V1.terms}
    np.testing.assert_allclose(PDMS_V1(columns), scores["pdms_v1"], atol=1e-12)
    aggregate = json.loads((output / "aggregate.json").read_text())
    assert aggregate["estimates"]["human"]["pdms_v1"]["mean"] == pytest.approx(scores["pdms_v1"].mean())
    assert aggregate["identity"]["tokens"] == len(scores) == 12


def test_two_frame_comfort_has_a_predecessor_in_all_but_the_first_scene_of_a_log(human):
    _, scores = human
    assert scores["v2_ec"].isna().sum() == scores["log_name"].nunique()


def test_the_human_scores_well_and_standing_still_does_not(world, human, tmp_path):
    _, scores = human
    still = score_planner(config(world, tmp_path, "planner=standing_still"), Console(quiet=True))
    assert scores["pdms_v1"].mean() > 0.8
    assert still["pdms_v1"].mean() < scores["pdms_v1"].mean() - 0.1


def test_workers_do_not_change_a_bit(world, human):
    _, expected = human
    table, _ = plan_scenes(Human(), SceneDataset(world.index, cameras=()), None, human[0])
    processes = score_table(table, world.metric_cache, workers="processes", num_workers=2)
    pd.testing.assert_frame_equal(processes, expected)


@pytest.mark.slow
def test_ray_does_not_change_a_bit(world, human):
    _, expected = human
    table, _ = plan_scenes(Human(), SceneDataset(world.index, cameras=()), None, human[0])
    pd.testing.assert_frame_equal(score_table(table, world.metric_cache, workers="ray"), expected)


def test_planning_goes_on_where_it_stopped(world, tmp_path):
    class Counting(ConstantVelocityAgent):
        calls, stop_at = 0, None

        def plan(self, batch, hidden=None):
            self.calls += 1
            if self.calls == self.stop_at:
                raise KeyboardInterrupt
            return super().plan(batch, hidden)

    tokens = SceneDataset(world.index, cameras=()).tokens
    dataset = SceneDataset(world.index, cameras=(), tokens=tokens * 3)  # 36 samples: parts of 16, 16 and 4
    whole, _ = plan_scenes(ConstantVelocityAgent(), dataset, None, tmp_path / "whole", batch_size=1)
    cut = Counting()
    cut.stop_at = 20
    with pytest.raises(KeyboardInterrupt):
        plan_scenes(cut, dataset, None, tmp_path / "cut", batch_size=1)
    rest = Counting()
    resumed, _ = plan_scenes(rest, dataset, None, tmp_path / "cut", batch_size=1)
    assert rest.calls == 36 - 16
    pd.testing.assert_frame_equal(resumed, whole)
    part = next(iter(sorted((tmp_path / "cut" / "planned").glob("part-*"))))
    for damaged in damages(part.read_bytes(), np.random.default_rng(0), 8):
        part.write_bytes(damaged)
        again = Counting()
        mended, _ = plan_scenes(again, dataset, None, tmp_path / "cut", batch_size=1)
        assert again.calls == 16
        pd.testing.assert_frame_equal(mended, whole)


def test_another_planner_may_not_go_on_in_the_folder(world, tmp_path):
    dataset = SceneDataset(world.index, cameras=())
    plan_scenes(ConstantVelocityAgent(), dataset, None, tmp_path)
    with pytest.raises(FingerprintMismatch, match="constant_velocity"):
        plan_scenes(Human(), dataset, None, tmp_path)


def test_a_poor_metric_cache_is_refused_before_planning(world, tmp_path):
    other = tmp_path / "test_index"
    data = [f"data.root={world.root}", "data.split=test", "data.cameras=[]"]
    done = forked.run("-m", "navsim_ext.dataset", *data, "check_pictures=false", f"output_dir={other}")
    assert done.returncode == 0, done.stderr
    with pytest.raises(DataError, match="holds 0 of the 4 tokens"):
        score_planner(config(world, tmp_path, "planner=human", f"data.index={other}"), Console(quiet=True))


def test_nothing_valid_is_a_failure_and_says_why(world, tmp_path):
    class Nowhere(Human):
        name = "nowhere"

        def plan(self, batch, hidden=None):
            return super().plan(batch, hidden) * float("nan")

    cfg = config(world, tmp_path, "planner=human")
    cfg.planner = {"_target_": f"{__name__}.make_nowhere"}
    globals()["make_nowhere"] = Nowhere
    with pytest.raises(NothingScored, match="all 12"):
        score_planner(cfg, Console(quiet=True))
    reasons = pd.read_parquet(tmp_path / "scores.parquet")["reason"]
    assert reasons.str.contains("not finite").all()
