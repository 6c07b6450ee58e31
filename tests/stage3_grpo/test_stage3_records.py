"""What a run of stage 3 records is what it trained on, its alarms are all told, and what they stop stays stopped."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from grpo_toy import config, make_planner, token

import stage3_grpo.module as module_of_stage_3
import stage3_grpo.train as command
from navsim_ext.errors import DataError
from navsim_ext.runtime.checkpoint_file import load_checkpoint
from navsim_ext.runtime.checkpoint_folder import newest_complete
from navsim_ext.runtime.run import run
from stage2_dit import NotFiniteLoss
from stage3_grpo.core import ZeroMask, masked_mean
from stage3_grpo.module import StoppedByAlarm
from stage3_grpo.monitors import FlightRecorder
from stage3_grpo.monitors.statistics import table
from stage3_grpo.rewards.reward import Scores
from stage3_grpo.update import Updater

ALGORITHMS = ("diffgrpo", "diffgrpo_clip", "rloo", "reinforce_pp", "ppo", "flow_grpo")
REWARDS = ("pdms", "published", "epdms", "guarded")
PLAIN = ["trainer.limit_val_batches=0", "callbacks.best=null"]
ROLLOUTS = 12
HACKABLE = [*PLAIN, "policy.scorer.mode=hackable", "module.optimizer.lr=0.01", "alarms.window=5",
            "algorithm.bc_weight.start=0"]  # fmt: skip


@pytest.fixture(scope="module")
def planners(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("planners")
    return {"ddim": make_planner(folder), "flow": make_planner(folder, "flow", process="flow_ode")}


def rows(output: Path, name: str) -> list[dict[str, str]]:
    with open(output / "version_0" / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("algorithm", "reward"),
    [*(("diffgrpo", name) for name in REWARDS), *((name, "guarded") for name in ALGORITHMS[1:])],
)
def test_the_record_is_of_the_reward_that_was_trained_on(planners, tmp_path, monkeypatch, algorithm, reward):
    trained = []

    def seen(settings, rollout):
        trained.append((rollout.own.scores, rollout.own.teacher_scores))
        return assign(settings, rollout)

    assign = module_of_stage_3.assign_credit
    monkeypatch.setattr(module_of_stage_3, "assign_credit", seen)
    init = planners["flow" if algorithm == "flow_grpo" else "ddim"]
    invalid = f"policy.scorer.invalid=[{token(3)}]"
    dotted = [*PLAIN, "trainer.max_epochs=6", invalid]
    run(config(init, tmp_path, [f"algorithm={algorithm}", f"reward={reward}"], dotted))
    told = rows(tmp_path, "rewards")
    assert len(told) == len(trained) == ROLLOUTS
    for row, (scores, reference) in zip(told, trained):
        value, group = scores.reward, len(scores.reward) // len(reference.reward)
        assert float(row["reward"]) == pytest.approx(np.nanmean(value), rel=1e-6)
        assert float(row["reward_min"]) == pytest.approx(np.nanmin(value), rel=1e-6)
        assert float(row["reward_max"]) == pytest.approx(np.nanmax(value), rel=1e-6)
        assert float(row["reward_std"]) == pytest.approx(np.nanstd(value, ddof=1), rel=1e-5, abs=1e-7)
        assert float(row["reference_reward"]) == pytest.approx(np.nanmean(reference.reward), rel=1e-6)
        gain = np.nanmean(value[::group] - reference.reward)
        assert float(row["reward_gain"]) == pytest.approx(gain, rel=1e-5, abs=1e-7)
        judged = np.nanmean(np.where(scores.valid, scores.columns["judge"], np.nan)[::group]
                            - np.where(reference.valid, reference.columns["judge"], np.nan))  # fmt: skip
        assert float(row["judge_gain"]) == pytest.approx(judged, rel=1e-5, abs=1e-7)
        assert float(row["divergence"]) == pytest.approx(gain - judged if judged < 0 < gain else 0.0, abs=1e-6)
        assert float(row["invalid_rate"]) == pytest.approx(np.isnan(value).mean())
        for name, term in scores.terms.items():
            assert float(row[f"term_{name}"]) == pytest.approx(np.mean(term[scores.valid]), rel=1e-5, abs=1e-7)
    assert {float(row["invalid_rate"]) for row in told} == {0.0, 0.25}


def test_a_column_that_would_hide_the_reward_is_refused():
    values = np.ones(2)
    scores = Scores(values, np.ones(2, dtype=bool), {}, {"reward": values, "judge": values}, ("", ""), 0.0)
    with pytest.raises(DataError, match=r"\['reward'\] would hide"):
        table(scores, torch.device("cpu"))


def test_every_alarm_of_a_step_is_told_with_its_own_boost(planners, tmp_path):
    rules = [f"alarms.rules.{name}={{_target_: stage3_grpo.monitors.AlarmRule, metric: drift_m, above: -1.0}}"
             for name in ("one", "two", "three")]  # fmt: skip
    off = [f"alarms.rules.{name}=null" for name in
           ("divergence", "judge", "reverse_tail", "standing", "comfort", "drift", "invalid")]  # fmt: skip
    escalation = ["alarms.window=2", "alarms.escalation=[raise_bc,warn]", "trainer.max_epochs=3"]
    run(config(planners["ddim"], tmp_path, [], [*PLAIN, *rules, *off, *escalation]))
    told = rows(tmp_path, "alarms")
    assert len({row["step"] for row in told}) == 3
    assert len(told) == 9  # three windows of two rollouts, three rules that always ring
    assert [row["action"] for row in told] == ["raise_bc"] * 3 + ["warn"] * 6
    assert [float(row["bc_boost"]) for row in told] == pytest.approx([0.1, 0.2, 0.4] + [0.4] * 6)
    weight = [float(row["bc_weight"]) for row in rows(tmp_path, "kl_divergence")]
    assert weight[-1] == pytest.approx(0.1 + 0.4)  # what was told is what was applied


def test_the_table_of_alarms_is_there_when_none_rang(planners, tmp_path):
    run(config(planners["ddim"], tmp_path, [], [*PLAIN, "trainer.max_epochs=1"]))
    text = (tmp_path / "version_0/alarms.csv").read_text()
    assert text.strip() == "step,rollout,alarm,action,cause,value,bc_boost"
    run(config(planners["ddim"], tmp_path, [], [*PLAIN, "trainer.max_epochs=2", "resume_ignore=[trainer.max_epochs]"]))
    assert (tmp_path / "version_0/alarms.csv").read_text() == text


def test_a_run_that_an_alarm_stopped_stays_stopped(planners, tmp_path):
    first = run(config(planners["ddim"], tmp_path, [], [*HACKABLE, "trainer.max_epochs=40"]))
    assert first["module"].stopped_by_alarm
    newest = newest_complete(tmp_path / "version_0/checkpoints")
    before, told = newest.read_bytes(), rows(tmp_path, "alarms")
    with pytest.raises(StoppedByAlarm, match=r"alarms\.csv.*resume=never.*alarms=warn") as caught:
        run(config(planners["ddim"], tmp_path, [], [*HACKABLE, "trainer.max_epochs=40"]))
    assert caught.value.checkpoint == newest
    assert newest.read_bytes() == before
    assert rows(tmp_path, "alarms") == told
    again = [*HACKABLE, "trainer.max_epochs=40", "resume_ignore=[callbacks.alarms]"]
    result = run(config(planners["ddim"], tmp_path, ["alarms=warn"], again))
    assert result["global_step"] == 80  # in spite of it, by name


def test_the_command_of_a_stopped_run_does_not_end_well(monkeypatch, tmp_path, capsys):
    error = StoppedByAlarm("an alarm stopped the run: see alarms.csv", None)
    stub = SimpleNamespace(stopped_by_alarm=True, stopped=lambda what: error)
    result = {"module": stub, "metrics": {}, "run_dir": "r", "global_step": 5, "last": None, "best": None}
    monkeypatch.setattr("navsim_ext.runtime.run.run", lambda cfg: result)
    given = ["init=x", "data.train=x", "data.hidden_cache=x", "data.metric_cache=x", f"output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["stage3_grpo.train", *given])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 3
    assert "StoppedByAlarm: an alarm stopped the run" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run(planners, tmp_path, monkeypatch, algorithm, what):
    losses = Updater._losses
    calls = []

    def spoilt(self, policy, *arguments, **options):
        made = losses(self, policy, *arguments, **options)
        planner = policy.planner
        calls.append({name: value.clone() for name, value in planner.state_dict().items()})
        if len(calls) < 3:
            return made
        if what == "loss":
            return made._replace(total=made.total * float("nan"))
        weight = next(iter(planner.parameters()))
        return made._replace(total=made.total + torch.sqrt((weight * 0.0).sum()))  # a finite loss, a NaN gradient

    monkeypatch.setattr(Updater, "_losses", spoilt)
    dotted = ["surrogate.target_kl=null"] if algorithm == "ppo" else []
    with pytest.raises(NotFiniteLoss, match=rf"the (norm of the )?{what} is nan at step 2; .*tokens are in") as caught:
        run(config(planners["ddim"], tmp_path, [f"algorithm={algorithm}"], dotted))
    assert Path(str(caught.value).rsplit(" ", 1)[1]).is_file()
    assert all(value.isfinite().all() for value in calls[-1].values())
    assert len(calls) == 3  # nothing was done after it


def test_a_mean_over_nothing_anywhere_is_zero_with_zero_gradient():
    value = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    mean = masked_mean(value, torch.zeros(1, 2, dtype=torch.bool), torch.tensor(0.0))
    mean.backward()
    assert float(mean) == 0.0
    assert torch.equal(value.grad, torch.zeros(1, 2))
    with pytest.raises(ZeroMask):
        masked_mean(value, torch.zeros(1, 2, dtype=torch.bool))


def test_ppo_with_scenes_that_cannot_be_scored_stays_a_number(planners, tmp_path):
    """Most minibatches count nothing here: they leave no trace in the means, and the alarm sees the rest."""
    bad = "[" + ",".join(token(i) for i in range(1, 9) if i != 3) + "]"
    dotted = [*PLAIN, "trainer.max_epochs=6", f"policy.scorer.invalid={bad}", "surrogate.target_kl=null",
              "module.optimizer.lr=1e-9", "alarms.window=4", "alarms.escalation=[warn]"]  # fmt: skip
    run(config(planners["ddim"], tmp_path, ["algorithm=ppo"], dotted))
    told, counted = rows(tmp_path, "kl_divergence"), 0
    for row, rate in zip(told, (float(row["invalid_rate"]) for row in rows(tmp_path, "rewards"))):
        assert "nan" not in row.values(), row
        if rate < 1.0:
            counted += 1
            assert float(row["ratio_mean"]) == pytest.approx(1.0, abs=1e-4)  # of the minibatches that count
            assert float(row["bc_loss"]) != 0.0
    assert counted == 6
    state = load_checkpoint(newest_complete(tmp_path / "version_0/checkpoints"))["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    assert {row["alarm"] for row in rows(tmp_path, "alarms")} >= {"invalid"}


def test_nothing_is_stepped_on_where_nothing_counts_and_nothing_is_cloned(planners, tmp_path):
    bad = "[" + ",".join(token(i) for i in range(1, 9) if i != 3) + "]"
    dotted = [*PLAIN, "trainer.max_epochs=1", f"policy.scorer.invalid={bad}", "algorithm.bc_weight.start=0",
              "surrogate.target_kl=null"]  # fmt: skip
    run(config(planners["ddim"], tmp_path, ["algorithm=ppo"], dotted))
    updates = {float(row["invalid_rate"]): float(told["updates"])
               for row, told in zip(rows(tmp_path, "rewards"), rows(tmp_path, "advantages"))}  # fmt: skip
    assert updates == {1.0: 0.0, 0.75: 4.0}  # one of two minibatches in each of four passes


def test_what_is_unknown_is_no_sign_of_agreement(planners, tmp_path, monkeypatch):
    """Without a judge the divergence is unknown, not 0."""
    from stage3_grpo.rewards import Reward

    finish = Reward.finish

    def unjudged(self, *arguments):
        scores = finish(self, *arguments)
        unknown = np.full(len(scores.reward), np.nan)
        return dataclasses.replace(scores, columns={**scores.columns, "judge": unknown})

    monkeypatch.setattr(Reward, "finish", unjudged)
    run(config(planners["ddim"], tmp_path, [], [*PLAIN, "trainer.max_epochs=1"]))
    assert all(row["divergence"] == "nan" for row in rows(tmp_path, "rewards"))


def test_why_there_are_no_figures_of_held_out_scenes():
    assert "give data.val=INDEX" in command.without_held_out(None, 1)
    for every, named in ((2, "trainer.check_val_every_n_epoch"), (None, "trainer.val_check_interval")):
        said = command.without_held_out("index/val", every)
        assert "data.val=index/val" in said, "it was set"
        assert "give data.val" not in said
        assert named in said


def test_rollouts_that_moved_no_weight_have_rows_of_their_own(tmp_path):
    """They share the optimizer step with the next one: every group was flat, or no scene could be scored."""

    def recorded(recorder: FlightRecorder, rollouts: range) -> list[str]:
        for number in rollouts:
            module = SimpleNamespace(record={"reward": 0.5 + number}, drawn_at=3, rollout_number=number,
                                     log_dict=lambda *_, **__: None)  # fmt: skip
            loop = SimpleNamespace(total_batch_idx=number)
            trainer = SimpleNamespace(fit_loop=loop, log_every_n_steps=100, is_global_zero=True, current_epoch=0)
            recorder.on_train_batch_end(trainer, module, None, None, number)
        return [row["rollout"] for row in rows(tmp_path, "rewards")]

    (tmp_path / "version_0").mkdir()
    assert recorded(FlightRecorder(tmp_path / "version_0"), range(5, 8)) == ["5", "6", "7"]
    again = FlightRecorder(tmp_path / "version_0")  # a run that was continued makes the last one once more
    assert recorded(again, range(7, 9)) == ["5", "6", "7", "8"]
