"""Stated shapes are checked in tests, cost nothing elsewhere, and use the letters of docs/architecture.md."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shape_checks
import torch
from jaxtyping import TypeCheckError

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    "navsim_ext.closed_loop.contact", "navsim_ext.closed_loop.kinematics", "navsim_ext.closed_loop.state",
    "navsim_ext.pdm.references", "navsim_ext.pdm.scorer", "navsim_ext.planners", "sim_agents.model.attention",
    "sim_agents.model.network", "sim_agents.model.rolling", "sim_agents.training.losses", "stage2_dit.attention",
    "stage2_dit.diffusion.ddim", "stage2_dit.diffusion.flow", "stage2_dit.diffusion.sampling", "stage2_dit.dit",
    "stage2_dit.layers", "stage2_dit.metrics", "stage2_dit.noise", "stage2_dit.normaliser", "stage2_dit.planner",
    "stage3_grpo.core.advantages", "stage3_grpo.core.filters", "stage3_grpo.core.objective", "stage3_grpo.core.reduce",
    "stage3_grpo.core.returns", "stage3_grpo.core.surrogates",
]  # fmt: skip


def small_planner():
    from stage2_dit.planner import DiffusionPlanner, PlannerConfig

    sizes = {"num_heads": 2, "head_width": 4, "num_layers": 2, "output_width": 8, "encoder_width": 8}
    return DiffusionPlanner(PlannerConfig(hidden_width=6, **sizes))


def wrong_calls():
    """Calls that torch itself would answer, by broadcasting, with something wrong."""
    from navsim_ext.closed_loop import kinematics
    from navsim_ext.planners import straight
    from sim_agents.model.sampling import Sampling
    from stage2_dit.conditioning import Conditioning
    from stage2_dit.diffusion.ddim import Ddim
    from stage2_dit.metrics import displacement

    planner = small_planner()
    scenes = planner.condition(torch.zeros(2, 5, 6), None, torch.zeros(2, 4, 3), torch.zeros(2, 8))
    ddim = Ddim()
    return {
        "time of one row": lambda: planner(torch.zeros(4, 8, 3), torch.zeros(1), scenes),
        "noise of one row": lambda: ddim.corrupt(torch.zeros(4, 8, 3), torch.zeros(1, 8, 3), torch.zeros(4).long()),
        "target without rows": lambda: displacement(torch.zeros(4, 8, 3), torch.zeros(8, 3)),
        "status of another batch": lambda: planner.condition(
            torch.zeros(2, 5, 6), None, torch.zeros(2, 4, 3), torch.zeros(1, 8)
        ),
        "a mask of numbers": lambda: planner.condition(
            torch.zeros(2, 5, 6), torch.ones(2, 5), torch.zeros(2, 4, 3), torch.zeros(2, 8)
        ),
        "scenes that differ": lambda: Conditioning(
            scenes.tokens, None, scenes.history[:1], scenes.mean, scenes.ego, scenes.layers
        ),
        "one pose for all": lambda: kinematics.compose(torch.zeros(3), torch.zeros(7, 5, 3)),
        "one number for all": lambda: Sampling().sample(torch.zeros(4, 9), torch.zeros(1)),
        "seven distances": lambda: straight(torch.zeros(2, 7)),
    }


@pytest.mark.parametrize("name", list(wrong_calls()))
def test_a_wrong_shape_is_refused(name):
    with pytest.raises(TypeCheckError):
        wrong_calls()[name]()


def test_every_room_that_should_state_shapes_does():
    for module in MODULES:
        importlib.import_module(module)
        assert any(name.startswith(f"{module}.") for name in shape_checks.HINTS), module
    assert len(shape_checks.HINTS) > 100


def imported_rooms():
    for name in shape_checks.CHECKED:
        room = importlib.import_module(name)
        for found in pkgutil.walk_packages(getattr(room, "__path__", ()), f"{name}."):
            importlib.import_module(found.name)


def test_letters_stand_in_the_legend():
    imported_rooms()
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## The letters of shapes")[2]
    rows = re.findall(r"^\| ([\w, ]+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", page, flags=re.MULTILINE)
    columns = [{letter for row in rows if row[column].strip() for letter in row[0].split(", ")} for column in (1, 2, 3)]
    foreign = []
    for where, hints in shape_checks.HINTS.items():
        room = where.split(".")
        column = 2 if room[1] == "pdm" else 1 if room[0] == "sim_agents" or room[1] == "closed_loop" else 0
        axes = re.sub(
            r"[*_]", " ", " ".join(axis for hint in hints.values() for axis in re.findall(r'"([^"]*)"', hint))
        )
        letters = {axis for axis in axes.split() if re.fullmatch(r"[A-Za-z]1?", axis)}
        foreign += [(where, letter) for letter in sorted(letters - columns[column])]
    assert foreign == []


def test_outside_of_tests_nothing_is_wrapped_or_evaluated():
    program = """
import sys
from stage2_dit.planner import DiffusionPlanner
assert not hasattr(DiffusionPlanner.forward, "__wrapped__")
assert isinstance(DiffusionPlanner.forward.__annotations__["x"], str)
assert "beartype" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
