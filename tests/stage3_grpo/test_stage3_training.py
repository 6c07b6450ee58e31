"""Whole runs on a tiny planner: every algorithm, exact resume after kill -9, two processes, alarms, bad inputs."""

from __future__ import annotations

import csv
import json
import math
import signal
import sys
from pathlib import Path

import forked
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import grpo_toy
from grpo_toy import config, make_planner

from navsim_ext.errors import TriviumError
from navsim_ext.metric_cache.scorer import CoverageError
from navsim_ext.runtime.checkpoint_file import load_checkpoint
from navsim_ext.runtime.checkpoint_folder import newest_complete
from navsim_ext.runtime.run import run
from stage2_dit import WrongProcess, load_planner
from stage3_grpo.algorithm import AlgorithmError
from stage3_grpo.module import NoValidReward
from stage3_grpo.monitors.alarms import AlarmError
from stage3_grpo.policies.diffusion import ReferenceMismatch

ALGORITHMS = ("diffgrpo", "diffgrpo_clip", "rloo", "reinforce_pp", "ppo", "flow_grpo")
CHECKPOINTS = "version_0/checkpoints"
SHARDED = "navsim_ext.runtime.sharding.ShardedStrategy"


@pytest.fixture(scope="module")
def planners(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("planners")
    return {
        "ddim": make_planner(folder),
        "flow": make_planner(folder, "flow", process="flow_ode"),
        "wide": make_planner(folder, "wide", num_layers=4),
    }


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(newest_complete(output / CHECKPOINTS))["state_dict"]


def rows(output: Path, name: str) -> list[dict[str, str]]:
    with open(output / "version_0" / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def without_times(table: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in table]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_and_leaves_a_planner(planners, tmp_path, algorithm):
    init = planners["flow" if algorithm == "flow_grpo" else "ddim"]
    result = run(config(init, tmp_path, [f"algorithm={algorithm}"], ["module.drift_every=3"]))
    before, after = load_planner(init).planner.state_dict(), load_planner(result["best"])
    changed = [name for name, value in after.planner.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == len(before)
    assert after.hidden == grpo_toy.HIDDEN
    assert Path(result["best"]).name == "best_pdm_score.ckpt"
    assert result["best_score"] == pytest.approx(result["metrics"]["val/pdm_score"], abs=0.1)
    record = load_checkpoint(newest_complete(tmp_path / CHECKPOINTS))["stage3"]
    assert record["reference"]["digest"] == load_planner(init).fingerprint.digest
    for name in ("rewards", "kl_divergence", "advantages"):
        assert [int(row["rollout"]) for row in rows(tmp_path, name)] == [0, 1, 2, 3]
    first = rows(tmp_path, "rewards")[0]
    assert float(first["reward_gain"]) == pytest.approx(0.0, abs=1e-6)  # the policies are still one
    assert float(rows(tmp_path, "kl_divergence")[0]["drift_m"]) == pytest.approx(0.0, abs=1e-4)
    assert len(rows(tmp_path, "epochs")) == 2
    logged = rows(tmp_path, "metrics")
    for table in (rows(tmp_path, name) for name in ("rewards", "kl_divergence", "advantages")):
        for column in table[0].keys() - {"step", "rollout", "epoch"}:
            measured = [row["rollout"] for row in table if row[column] and math.isfinite(float(row[column]))]
            # what is not measured in every step does not stand there as if it were
            assert [row["step"] for row in logged if row.get(f"train/{column}")] == measured, column


def test_training_raises_the_reward(planners, tmp_path):
    """The toy pays for driving 55 m; the untrained planner drives 15 on average."""
    dotted = ["trainer.max_epochs=25", "module.optimizer.lr=0.01", "algorithm.group_size=8", "callbacks.alarms=null",
              "trainer.check_val_every_n_epoch=25", "algorithm.bc_weight.start=0.01"]  # fmt: skip
    result = run(config(planners["ddim"], tmp_path, [], dotted))
    assert result["metrics"]["val/gain"] > 0.1
    rewards = [float(row["reward"]) for row in rows(tmp_path, "rewards")]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.1


RESUMED = ["callbacks.checkpoint.every_n_steps=1", "datamodule.count=16"]  # 4 rollouts an epoch


@pytest.fixture(scope="module")
def whole(planners, tmp_path_factory) -> dict[str, Path]:
    """Uninterrupted runs by algorithm."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("diffgrpo", "ppo")}
    for name, folder in folders.items():
        run(config(planners["ddim"], folder, [f"algorithm={name}"], RESUMED))
    return folders


@pytest.mark.parametrize(
    ("algorithm", "rollout"),
    [("diffgrpo", 1), ("diffgrpo", 4), ("ppo", 6)],
    ids=["in the first epoch", "between epochs", "in the second epoch, several updates per rollout"],
)
def test_killed_run_ends_with_the_same_weights(planners, whole, tmp_path, algorithm, rollout):
    environment = {"TOY_KILL": json.dumps({"rollout": rollout}), "CUDA_VISIBLE_DEVICES": ""}
    command = [grpo_toy.__file__, planners["ddim"], tmp_path, algorithm, *RESUMED]
    killed = forked.run(*command, environment=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = load_checkpoint(newest_complete(tmp_path / CHECKPOINTS))
    assert saved["stage3"]["rollouts"] == rollout
    result = run(config(planners["ddim"], tmp_path, [f"algorithm={algorithm}"], RESUMED))
    assert result["resumed_from"] is not None
    for name in ("rewards", "kl_divergence", "advantages"):
        assert without_times(rows(tmp_path, name)) == without_times(rows(whole[algorithm], name))
    one, two = weights(whole[algorithm]), weights(tmp_path)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize(
    ("algorithm", "strategy"),
    [("ppo", "ddp"), ("reinforce_pp", "ddp"), ("ppo", "fsdp2")],  # minibatches of PPO leave a process without rows
)
@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(planners, tmp_path, algorithm, strategy):
    common = ["trainer.max_epochs=1", "trainer.limit_val_batches=0", "callbacks.best=null",
              "policy.scorer.invalid=[c000000000000003]"]  # fmt: skip
    run(config(planners["ddim"], tmp_path / "one", [f"algorithm={algorithm}"], common))
    port = forked.free_port()
    kind = "lightning.pytorch.strategies.DDPStrategy" if strategy == "ddp" else SHARDED
    strategy = f"{{_target_: {kind}, process_group_backend: gloo}}"
    dotted = [*common, "trainer.devices=2", f"trainer.strategy={strategy}", "datamodule.batch_size=2"]
    processes = []
    for rank in (0, 1):
        environment = forked.rank_variables(rank, 2, port) | {"CUDA_VISIBLE_DEVICES": ""}
        command = [grpo_toy.__file__, planners["ddim"], tmp_path / "two", algorithm, *dotted]
        processes.append(forked.start(*command, environment=environment))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for name in ("rewards", "kl_divergence", "advantages"):
        for one, two in zip(rows(tmp_path / "one", name), rows(tmp_path / "two", name), strict=True):
            for key in one:
                if not key.startswith("seconds") and one[key] != "":
                    expected = float(one[key])
                    assert float(two[key]) == pytest.approx(expected, abs=2e-5, rel=1e-4, nan_ok=True), (name, key)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-3, msg=name)


HACKABLE = ["policy.scorer.mode=hackable", "trainer.max_epochs=40", "module.optimizer.lr=0.01", "alarms.window=5",
            "trainer.limit_val_batches=0", "callbacks.best=null"]  # fmt: skip


def test_a_hackable_reward_is_caught(planners, tmp_path):
    """The reward pays for what the judge dislikes, and nothing anchors: warned, anchored, stopped."""
    dotted = [*HACKABLE, "algorithm.bc_weight.start=0", "alarms.bc_max=0.2"]
    result = run(config(planners["ddim"], tmp_path, [], dotted))
    assert result["module"].stopped_by_alarm
    assert result["global_step"] < 80
    told = rows(tmp_path, "alarms")
    divergence = [row["action"] for row in told if row["alarm"] == "divergence"]
    assert divergence[:4] == ["warn", "raise_bc", "raise_bc", "stop"]
    assert all(float(row["value"]) > 0.05 for row in told if row["alarm"] == "divergence")
    boosts = [float(row["bc_boost"]) for row in told if row["action"] == "raise_bc"]
    assert max(boosts) == pytest.approx(0.2)  # raised within its bounds
    weight = [float(row["bc_weight"]) for row in rows(tmp_path, "kl_divergence")]
    assert weight[0] == 0.0
    assert weight[-1] == pytest.approx(0.2)  # and used


def test_an_honest_reward_rings_nothing(planners, tmp_path):
    dotted = [part for part in HACKABLE if "hackable" not in part and "max_epochs" not in part]
    rules = ["alarms.rules.drift.above=100.0", "alarms.rules.reverse_tail.above=1.1", "trainer.max_epochs=10"]
    result = run(config(planners["ddim"], tmp_path, [], [*dotted, *rules]))
    assert not result["module"].stopped_by_alarm
    assert rows(tmp_path, "alarms") == []


@pytest.mark.parametrize(("error", "message", "overrides", "dotted"), [
    (AlgorithmError, "group_size is 1: use 2 or more", [], ["algorithm.group_size=1"]),
    (AlgorithmError, "discount is 1.5", [], ["policy.discount=1.5"]),
    (AlgorithmError, "9 minibatches cannot be made of 4", ["algorithm=ppo"], ["surrogate.minibatches=9"]),
    (AlgorithmError, "ConstantBaseline does not", ["advantage=constant", "keep=zero_spread"], []),
    (AlgorithmError, "kl form 'k4' does not exist", ["kl=k3"], ["kl.form=k4"]),
    (AlgorithmError, "constant schedule reads neither", [], ["algorithm.bc_weight.end=0.0"]),
    (WrongProcess, "predicts noise: train stage 2 with planner.process=flow_sde", ["algorithm=flow_grpo"], []),
    (CoverageError, "1 of 8 training tokens have no metric cache in toy .coverage 0.8750.: c000000000000002", [],
     ["policy.scorer.missing=[c000000000000002]"]),
    (NoValidReward, "none of the recorded drives", [],
     ["policy.scorer.invalid=[" + ",".join(grpo_toy.token(i) for i in range(1, 9)) + "]"]),
    (AlarmError, "watches 'nothing'", [], ["alarms.rules.drift.metric=nothing", "alarms.window=2"]),
    (AlarmError, "must be made of warn", [], ["alarms.escalation=[shout]"]),
])  # fmt: skip
def test_bad_configurations_are_named(planners, tmp_path, error, message, overrides, dotted):
    with pytest.raises(error, match=message):
        run(config(planners["ddim"], tmp_path, overrides, dotted))
    if error is not AlarmError:
        assert not (tmp_path / CHECKPOINTS).exists()  # before the first step


def test_another_reference_is_refused(planners, tmp_path):
    with pytest.raises(ReferenceMismatch, match=r"num_layers: 4 \| 2"):
        run(config(planners["ddim"], tmp_path / "a", [], [f"reference={planners['wide']}"]))
    with pytest.raises(TriviumError, match="does not exist"):
        run(config(planners["ddim"], tmp_path / "b", [], ["reference=/nowhere/planner.safetensors"]))
    run(config(planners["ddim"], tmp_path / "c", [], ["trainer.max_epochs=1"]))
    other = make_planner(tmp_path, "other")
    planner = load_planner(other)
    with torch.no_grad():
        planner.planner.fusion_projector.bias += 1.0
    from stage2_dit import save_planner

    save_planner(other, planner.planner, grpo_toy.HIDDEN)
    again = [f"reference={other}", "resume_ignore=[module.policy.reference]", "trainer.max_epochs=1"]
    with pytest.raises(ReferenceMismatch, match="trained against another reference"):
        run(config(planners["ddim"], tmp_path / "c", [], again))


def test_invalid_rewards_do_not_teach(planners, tmp_path):
    """Scenes that cannot be scored leave the weights alone, and are counted."""
    bad = "[" + ",".join(grpo_toy.token(i) for i in range(1, 9) if i != 3) + "]"
    dotted = [
        "trainer.max_epochs=1",
        "algorithm.bc_weight.start=0",
        "trainer.limit_val_batches=0",
        "callbacks.best=null",
    ]
    run(config(planners["ddim"], tmp_path, [], [*dotted, f"policy.scorer.invalid={bad}"]))
    told = rows(tmp_path, "rewards")
    rates = [float(row["invalid_rate"]) for row in told]
    assert sorted(rates) == [0.75, 1.0]
    used = [float(row["updates"]) for row in rows(tmp_path, "advantages")]
    assert used[rates.index(1.0)] == 0.0
    assert told[rates.index(1.0)]["reward"] == "nan"


def test_batches_without_rewards_end_the_run(planners, tmp_path):
    bad = "[" + ",".join(grpo_toy.token(i) for i in range(1, 9) if i != 3) + "]"
    dotted = [f"policy.scorer.invalid={bad}", "datamodule.batch_size=1", "module.max_invalid_batches=3",
              "trainer.max_epochs=5", "trainer.limit_val_batches=0", "callbacks.best=null"]  # fmt: skip
    with pytest.raises(NoValidReward, match=r"3 batches in a row had no valid reward.*toy: cannot be scored"):
        run(config(planners["ddim"], tmp_path, [], dotted))
