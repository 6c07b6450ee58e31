"""Muon for the matrices of the transformer blocks: both optimizers as one, and exact to continue."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from planner_world import build_world, config
from test_stage2_training import equal_checkpoints, spawn

from navsim_ext.errors import DataError
from navsim_ext.runtime.run import run
from stage2_dit import DiffusionPlanner, PlannerConfig
from stage2_dit.optimizer import MuonWithAdamW, PlannerOptimizerSettings, block_matrices

MUON = "module.optimizer.matrices=muon"


def test_matrices_are_those_of_the_blocks():
    planner = DiffusionPlanner(PlannerConfig.small(16))
    found = {id(weight) for weight in block_matrices(planner)}
    names = {name for name, weight in planner.named_parameters() if id(weight) in found}
    assert len(names) == 7 * planner.config.num_layers
    assert all(name.startswith("model.transformer_blocks.") and name.endswith(".weight") for name in names)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def together(model: nn.Sequential, settings: PlannerOptimizerSettings) -> MuonWithAdamW:
    others = [weight for weight in model.parameters() if weight is not model[2].weight]
    return MuonWithAdamW([model[2].weight], [{"params": others}, {"params": [], "lr": 0.5}], settings)


def train(model: nn.Sequential, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(inputs) - inputs[:, :2].sin()).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_one_optimizer_does_what_the_two_do():
    settings = PlannerOptimizerSettings(lr=0.01, weight_decay=0.1, matrices="muon")
    joined, apart = network(), network()
    others = [weight for weight in apart.parameters() if weight is not apart[2].weight]
    alone = [
        torch.optim.Muon([apart[2].weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=settings.betas),
    ]
    train(joined, [together(joined, settings)], range(10))
    train(apart, alone, range(10))
    for one, other in zip(joined.parameters(), apart.parameters()):
        assert torch.equal(one, other)


def test_state_that_was_saved_goes_on_to_the_same_weights():
    settings = PlannerOptimizerSettings(lr=0.01, matrices="muon")
    whole, cut = network(), network()
    optimizer = together(whole, settings)
    train(whole, [optimizer], range(5))
    first = together(cut, settings)
    train(cut, [first], range(5))
    state = first.state_dict()
    assert len(state["state"]) == len(list(cut.parameters()))
    second = together(cut, PlannerOptimizerSettings(lr=0.3, matrices="muon"))
    second.load_state_dict(state)
    assert {group["lr"] for group in second.param_groups} == {0.01, 0.5}
    for one, group in ((optimizer, 0.02), (second, 0.02)):
        for each in one.param_groups:  # what a schedule does
            each["lr"] = group
    train(whole, [optimizer], range(5, 10))
    train(cut, [second], range(5, 10))
    for one, other in zip(whole.parameters(), cut.parameters()):
        assert torch.equal(one, other)


def test_a_run_with_muon_that_was_killed_ends_with_the_same_weights(tmp_path):
    world = build_world(tmp_path / "world")
    process = spawn(world, tmp_path / "cut", {"epoch": 1, "batch": 2, "signal": "SIGKILL"}, MUON)
    whole = run(config(world, tmp_path / "whole", MUON))
    process.communicate()
    assert process.returncode == -9
    result = run(config(world, tmp_path / "cut", MUON))
    assert result["resumed_from"] is not None
    equal_checkpoints(result["last"], whole["last"])


def test_another_word_is_refused():
    with pytest.raises(DataError, match="adamw or muon"):
        PlannerOptimizerSettings(matrices="sgd")
