"""What stands between stage 3's formulas and a run, against references written out by hand: no training."""

from __future__ import annotations

import dataclasses
import math
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from grpo_toy import Scenes, Source, ToyScorer, make_planner, token

from navsim_ext.errors import DataError
from navsim_ext.metric_cache.scorer import CoverageError, PdmScorer
from navsim_ext.pdm import PdmResult
from navsim_ext.pdm.columns import COLUMNS_ALONE
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import make
from navsim_ext.scene import collate_scenes
from stage2_dit import load_planner, step_distributions
from stage3_grpo.algorithm import Schedule
from stage3_grpo.core import gae
from stage3_grpo.credit import assign_credit
from stage3_grpo.module import mean_losses
from stage3_grpo.monitors.alarms import AlarmRule, Alarms
from stage3_grpo.monitors.statistics import column_means, credit_statistics
from stage3_grpo.policies.diffusion import DiffusionPolicy, ReferencePolicy
from stage3_grpo.policies.diffusion.held_out import DiffusionHeldOut
from stage3_grpo.policies.diffusion.policy import drift_m
from stage3_grpo.policy import Key
from stage3_grpo.rewards import PdmTerm, Reward
from stage3_grpo.update import Losses, Updater, minibatches

INVALID = [token(2)]


def rolled(tmp_path, name: str, **changes):
    """A rollout of four scenes, one of which cannot be scored, with what it was made of."""
    overrides = [f"algorithm={name}", *(f"algorithm.{key}={value}" for key, value in changes.items())]
    cfg = compose("stage3", ["output_dir=x", "init=x", "data.train=x", "data.hidden_cache=x", "data.metric_cache=x",
                             "algorithm.group_size=3", *overrides])  # fmt: skip
    algorithm = make(cfg.algorithm)
    path = make_planner(tmp_path)
    planner = load_planner(path).planner.eval()
    with torch.no_grad():  # another policy than the reference, so that nothing is equal by chance
        for weight in planner.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    reference = ReferencePolicy.load(path, planner.config, Source.fingerprint, allow_mismatch=False)
    policy = DiffusionPolicy(path, Reward(PdmTerm()), ToyScorer(invalid=INVALID), sampler=make(cfg.sampler),
                             log_prob=make(cfg.policy.log_prob), discount=cfg.policy.discount)  # fmt: skip
    policy.adopt(planner, reference, algorithm)
    if policy.value_head is not None:
        torch.nn.init.normal_(policy.value_head.out.weight, std=0.5)
    dataset = Scenes(4, 1)
    scenes = collate_scenes([dataset[i] for i in range(4)])
    batch = scenes, Source().fetch(scenes.token)
    return algorithm, policy, policy.roll(batch, 3, Key(3, 0), algorithm.needs(drift=True))


def update(algorithm, policy, rollout, credit, *, bc_weight: float) -> Losses:
    updater = Updater(algorithm)
    return updater.losses(policy, {}, rollout, credit, None, beta=0.0, bc_weight=bc_weight)


def logp_of(policy, rollout, chain):
    """Log-probabilities of a chain, computed afresh."""
    own, planner = rollout.own, policy.planner
    conditioning = planner.condition(own.hidden, own.hidden_mask, own.scenes.history, own.scenes.status)
    return policy.log_prob.of(chain, step_distributions(planner, conditioning, chain, process=planner.process))


def test_cloning_is_the_mean_over_all_teachers_whoever_can_be_scored(tmp_path):
    algorithm, policy, rollout = rolled(tmp_path, "diffgrpo")
    losses = update(algorithm, policy, rollout, assign_credit(algorithm, rollout), bc_weight=0.3)
    expected = -logp_of(policy, rollout, rollout.own.teacher).mean()
    assert float(losses.cloning) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.total) == pytest.approx(float(losses.policy + 0.3 * losses.cloning), rel=1e-5)
    assert float(losses.counted) == 9 * rollout.mask.shape[1]  # three of four scenes, three samples each


def test_the_policy_term_is_a_mean_over_rows_that_count(tmp_path):
    algorithm, policy, rollout = rolled(tmp_path, "rloo")
    credit = assign_credit(algorithm, rollout)
    losses = update(algorithm, policy, rollout, credit, bc_weight=0.0)
    logp = logp_of(policy, rollout, rollout.own.chain)
    terms = [credit.advantage[i] * logp[i] for i in range(12) if bool(credit.mask[i].all())]
    assert 0 < len(terms) <= 9
    assert float(losses.policy) == pytest.approx(-float(torch.stack(terms).mean()), rel=1e-5)
    assert float(losses.cloning) == 0.0


def test_gae_is_standardised_over_rows_that_count(tmp_path):
    algorithm, _, rollout = rolled(tmp_path, "ppo")
    credit = assign_credit(algorithm, rollout)
    valid, scores = rollout.valid, rollout.own.scores
    assert int(valid.sum()) == 9
    reward = torch.as_tensor(scores.reward[scores.valid], dtype=torch.float32)
    steps = rollout.mask.shape[1]
    raw, target = gae(reward, rollout.value_old[valid], torch.ones(9, steps, dtype=torch.bool), gamma=1.0, lam=0.95)
    discount = 0.6 ** torch.arange(steps - 1, -1, -1, dtype=torch.float32)
    expected = (raw - raw.mean()) / raw.std() * discount
    torch.testing.assert_close(credit.advantage[valid], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(credit.advantage[~valid], torch.zeros(3, steps))
    torch.testing.assert_close(credit.target[valid], target)
    assert not credit.mask[~valid].any()


def test_the_value_error_counts_valid_rows_alone(tmp_path):
    algorithm, policy, rollout = rolled(tmp_path, "ppo")
    credit = assign_credit(algorithm, rollout)
    losses = update(algorithm, policy, rollout, credit, bc_weight=0.0)
    error = 0.5 * ((rollout.value_old - credit.target)[rollout.valid] ** 2).mean()
    assert float(losses.value) == pytest.approx(float(error), rel=1e-4)
    assert float(losses.ratio_mean) == pytest.approx(1.0, abs=1e-5)


def test_zero_spread_is_a_share_of_valid_rows(tmp_path):
    algorithm, _, rollout = rolled(tmp_path, "diffgrpo")
    agreeing = rollout.start == 0  # the first scene's samples agree
    same = dataclasses.replace(rollout, reward=torch.where(agreeing, 0.5, rollout.reward))
    assert float(assign_credit(algorithm, same).zero_spread) == pytest.approx(3 / 9)


def test_statistics_compare_samples_of_equal_noise(tmp_path):
    algorithm, policy, rollout = rolled(tmp_path, "diffgrpo")
    credit = assign_credit(algorithm, rollout)
    told = credit_statistics(rollout, credit) | policy.statistics(rollout)
    own, planner = rollout.own, policy.planner
    ends = planner.trajectories(own.chain)[::3]
    teachers = planner.trajectories(own.teacher)  # weights play no part in it
    drift = torch.linalg.vector_norm(ends[..., :2] - teachers[..., :2], dim=-1).mean(dim=1)
    torch.testing.assert_close(own.drift_m, drift)
    torch.testing.assert_close(drift_m(planner.trajectories(own.chain), teachers, 3), drift)
    assert told["drift_m"] == pytest.approx(float(drift.mean()), rel=1e-5)
    mine, theirs = own.scores.reward[::3], own.teacher_scores.reward
    assert told["reward_gain"] == pytest.approx(float(np.nanmean(mine - theirs)), abs=1e-6)
    assert told["invalid_rate"] == pytest.approx(0.25)
    assert told["advantage_used"] == pytest.approx(0.75)


def test_means_leave_out_what_is_unknown():
    values = torch.tensor([[1.0, float("nan"), float("nan")], [3.0, 4.0, float("nan")]])
    assert column_means(["a", "b", "c"], values) == {"a": 2.0, "b": 4.0}


def test_updates_that_count_nothing_leave_no_trace_in_the_means():
    def losses(counted: float, value: float) -> Losses:
        return Losses(*(torch.tensor(value) for _ in Losses._fields[:-1]), counted=torch.tensor(counted))

    means = mean_losses([losses(0.0, 0.0), losses(4.0, 2.0)])
    assert {name: float(value) for name, value in means.items() if name not in ("total", "cloning")} == dict.fromkeys(
        ("policy", "kl", "kl_reference", "value", "clip_fraction", "ratio_mean", "approx_kl"), 2.0
    )
    assert float(means["total"]) == float(means["cloning"]) == 1.0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_minibatches_take_every_scene_once(count):
    tokens = [token(i) for i in range(8)]
    parts = minibatches(tokens, count, seed=1, rollout=2, epoch=0, device="cpu")
    assert sorted(i for part in parts for i in part) == list(range(8))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if count > 1:
        assert parts != minibatches(tokens, count, seed=1, rollout=2, epoch=1, device="cpu")


class Told:
    """A scorer that gives prepared columns, wrong numbers in invalid rows included."""

    def __init__(self, columns: dict, valid: list[bool]) -> None:
        self.columns, self.valid = columns, np.array(valid)

    def score(self, tokens, trajectories, reward=None) -> PdmResult:
        unknown, empty = np.full(len(tokens), np.nan), np.full(len(tokens), "", dtype=object)
        values = np.stack([self.columns.get(name, unknown) for name in COLUMNS_ALONE], axis=1)
        return PdmResult(tokens, values, self.valid, empty, empty)

    def submit(self, tokens, trajectories, reward=None) -> Future:
        future: Future = Future()
        future.set_result(self.score(tokens, trajectories, reward))
        return future


def test_held_out_means_are_over_valid_scenes():
    columns = {"pdms_v1": np.array([0.2, 0.9, 0.6]), "epdms_v2_no_ec": np.array([0.1, np.nan, np.nan])}
    scorer = Told(columns, [True, False, True])
    held_out = DiffusionHeldOut(None, Reward(PdmTerm()), scorer, 0)
    forward = np.stack([np.linspace(1, 8, 8), np.zeros(8), np.zeros(8)], axis=1)
    means = held_out.means({"a": forward, "b": forward, "c": -forward})
    assert means["pdms_v1"] == pytest.approx(0.4)
    assert means["epdms_v2_no_ec"] == pytest.approx(0.1)
    assert means["invalid_rate"] == pytest.approx(1 / 3)
    assert means["reverse_tail"] == pytest.approx(1 / 3)
    assert math.isnan(means["v1_nc"])


@pytest.mark.parametrize(("version", "selection"), [("v1", "pdms_v1"), ("v2", "epdms_v2_no_ec_nofilter")])
def test_the_best_checkpoint_goes_by_the_version_that_is_trained_on(version, selection):
    assert DiffusionHeldOut(None, Reward(PdmTerm(version=version)), None, 0).selection == selection


def test_the_gain_is_over_the_reference_of_the_same_version():
    held_out = DiffusionHeldOut(None, Reward(PdmTerm()), Told({"pdms_v1": np.array([0.75])}, [True]), 0)
    held_out.reference_means = {"pdms_v1": 0.5, "epdms_v2_no_ec_nofilter": 0.1}
    held_out._plans = {"a": np.zeros((8, 3))}
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False,
                              strategy=SimpleNamespace(broadcast=lambda value: value))  # fmt: skip
    told = held_out.finish(trainer)
    assert (told["pdm_score"], told["gain"]) == (pytest.approx(0.75), pytest.approx(0.25))
    assert told["reference_pdms_v1"] == 0.5


def test_a_reward_is_the_weighted_sum_of_its_terms():
    class Half:
        weight = -0.5

        def value(self, motion):
            return np.array([1.0, 0.5, 0.25])

    scorer = Told({"reward": np.array([0.2, 0.4, np.nan]), "pdms_v1": np.array([0.9, 0.9, 0.9]),
                   "epdms_v2_no_ec_nofilter": np.array([0.6, 0.7, 0.8])}, [True, False, True])  # fmt: skip
    reward = Reward(PdmTerm(weight=2.0, progress=10.0), {"half": Half()})
    moved = np.zeros((3, 8, 3))
    scores = reward.submit(scorer, ["a", "b", "c"], moved, np.zeros((3, 4, 3)), np.zeros((3, 8))).result()
    assert scores.reward[0] == pytest.approx(2.0 * 0.2 - 0.5 * 1.0)
    assert np.isnan(scores.reward[1:]).all()
    assert scores.valid.tolist() == [True, False, False]  # a score that is not known is not a low one
    assert "reward" not in scores.columns
    assert scores.columns["judge"].tolist() == [0.6, 0.7, 0.8]


def test_coverage_is_the_share_of_known_tokens():
    scorer = object.__new__(PdmScorer)
    scorer.known, scorer.folder, scorer.min_coverage = frozenset("abc"), "cache", 0.75
    assert scorer.require_coverage(["a", "b", "c", "x"]) == ["x"]
    with pytest.raises(CoverageError, match=r"2 of 5.*coverage 0\.6000"):
        scorer.require_coverage(["a", "b", "c", "x", "y"])


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.55), ("exponential", 0.1**0.5), ("cosine", 0.55)])
def test_schedules_start_end_and_pass_through_their_middle(shape, middle):
    schedule = Schedule(1.0, 0.1, 10, shape)
    assert [schedule(0), schedule(10), schedule(99)] == pytest.approx([1.0, 0.1, 0.1])
    assert schedule(5) == pytest.approx(middle)


def alarm(rule: AlarmRule, values: list[float], window: int = 2) -> list[str]:
    """Actions of one rule on a series of records."""
    alarms = Alarms("unused", {"it": rule}, window=window, escalation=("warn", "raise_bc", "raise_bc", "stop"))
    module = SimpleNamespace(bc_boost=0.0, stopped_by_alarm=False, drawn_at=0, rollout_number=0, record={})
    trainer = SimpleNamespace(is_global_zero=False, should_stop=False)
    for value in values:
        module.record = {"x": value, "y": 1.0}
        alarms.on_train_batch_end(trainer, module, None, None, 0)
    assert trainer.should_stop == module.stopped_by_alarm == ("stop" in [e["action"] for e in alarms.actions])
    return [f"{entry['action']} {entry['value']:g} {entry['bc_boost']:g}" for entry in alarms.actions]


def test_an_alarm_looks_at_the_mean_of_its_window_and_climbs():
    rule = AlarmRule("x", minus="y", above=1.0)
    assert alarm(rule, [2.0, 2.0, 0.0, 3.9]) == []
    climbed = ["warn 2 0", "raise_bc 2 0.1", "raise_bc 2 0.2", "stop 8 0.2"]
    assert alarm(rule, [5.0, 1.0, 3.0, 3.0, 3.0, 3.0, 9.0, 9.0]) == climbed
    assert alarm(rule, [3.0, 3.0, 0.0, 0.0, 3.0, 3.0]) == ["warn 2 0", "warn 2 0"]  # quiet in between: from the start
    assert alarm(AlarmRule("x", below=0.5), [0.4, 0.5]) == ["warn 0.45 0"]
    assert alarm(rule, [float("nan"), 3.0]) == ["warn 2 0"]  # what is unknown is left out


def test_a_run_that_is_shorter_than_a_window_says_that_no_alarm_could_ring(caplog):
    alarms = Alarms("unused", {"it": AlarmRule("x", above=1.0)}, window=3)
    trainer = SimpleNamespace(is_global_zero=True)
    alarms.on_train_end(trainer, SimpleNamespace(rollout_number=2))
    assert caplog.text == ""
    alarms.on_train_end(trainer, SimpleNamespace(rollout_number=1))
    assert "the run made 2 rollouts, alarms look at windows of 3" in caplog.text


def test_a_scorer_without_a_judge_is_no_agreement():
    with pytest.raises(DataError, match="weight 0"):
        Reward(PdmTerm(), {"idle": SimpleNamespace(weight=0.0)})
