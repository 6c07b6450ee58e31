"""What stands between stage 2's formulas and a run, against references written out by hand: no training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from navsim_ext.pdm import PdmResult
from navsim_ext.pdm.columns import COLUMNS_ALONE
from navsim_ext.runtime.learning_rate import total_steps, warmup_cosine_factor
from stage2_dit.inference import medoid
from stage2_dit.metrics import displacement, pdm_means
from stage2_dit.normaliser import PUBLISHED, TrajectoryNormaliser, fit_bounds


def test_validation_scores_are_means_over_valid_scenes():
    """Invalid rows may hold any number: it counts nowhere. A version that a scene cannot give is left out alone."""
    columns = {"pdms_v1": [0.2, 0.9, 0.6, 0.7], "epdms_v2_no_ec": [0.1, 0.0, np.nan, 0.5]}
    values = np.stack([columns.get(name, [np.nan] * 4) for name in COLUMNS_ALONE], axis=1)
    empty = np.full(4, "", dtype=object)
    result = PdmResult(list("abcd"), values, np.array([True, False, True, True]), empty, empty)
    assert pdm_means(result) == {"scored": 3.0, "unscored": 1.0, "pdms_v1": pytest.approx(0.5),
                                 "epdms_v2_no_ec": pytest.approx(0.3)}  # fmt: skip


def test_displacement_by_hand():
    plan, target = torch.zeros(1, 2, 3), torch.tensor([[[3.0, 4.0, 0.5], [0.0, 1.0, 2 * math.pi - 0.1]]])
    told = {name: float(value) for name, value in displacement(plan, target).items()}
    assert told == pytest.approx({"ade": 3.0, "fde": 1.0, "heading_error": 0.3}, abs=1e-5)


@pytest.mark.parametrize("component", range(3))
@pytest.mark.parametrize("side", ["low", "high"])
def test_outside_is_beyond_the_box_by_any_component(side, component):
    normaliser = TrajectoryNormaliser(PUBLISHED["waypoint"])
    low, high = torch.tensor(PUBLISHED["waypoint"].low), torch.tensor(PUBLISHED["waypoint"].high)
    inside = ((low + high) / 2).repeat(3, 8, 1)
    edge = (low if side == "low" else high)[component]
    width = (high - low)[component] * (-1 if side == "low" else 1)
    inside[1, 4, component] = edge - 0.001 * width
    inside[2, 4, component] = edge + 0.001 * width
    assert normaliser.outside(inside).tolist() == [False, False, True]


def test_fitted_bounds_are_the_extremes_widened_by_the_margin():
    targets = [torch.tensor([[[0.0, -1.0, 0.1]] * 8]), torch.tensor([[[10.0, 1.0, 0.3]] * 8])]
    bounds = fit_bounds(targets, "waypoint", margin=0.1)
    assert bounds.low == pytest.approx((-1.0, -1.2, 0.08), abs=1e-5)
    assert bounds.high == pytest.approx((11.0, 1.2, 0.32), abs=1e-5)


def test_the_medoid_by_hand():
    """The sum of distances to the others is least for the second; by the headings it would be the last."""
    points = torch.zeros(1, 4, 8, 3)
    points[0, :, :, 0] = torch.tensor([0.0, 1.0, 1.5, 9.0])[:, None]
    points[0, :, :, 2] = torch.tensor([40.0, 90.0, 50.0, 45.0])[:, None]
    sums = [sum(abs(a - b) for b in (0.0, 1.0, 1.5, 9.0)) for a in (0.0, 1.0, 1.5, 9.0)]
    assert sorted(sums)[:2] == [9.5, 9.5]  # the second and the third alike: the first of them is taken
    assert medoid(points)[0, 0].tolist() == [1.0, 0.0, 90.0]


@pytest.mark.parametrize(("limit", "accumulate", "epochs", "steps", "expected"), [
    (1.0, 1, 3, -1, 30), (0.5, 1, 3, -1, 15), (4, 1, 3, -1, 12), (1.0, 4, 3, -1, 9), (1.0, 1, 3, 7, 7),
    (1.0, 1, -1, 50, 50),
])  # fmt: skip
def test_steps_of_a_whole_run(limit, accumulate, epochs, steps, expected):
    loader = SimpleNamespace(train_dataloader=lambda: range(10))
    trainer = SimpleNamespace(datamodule=loader, limit_train_batches=limit, accumulate_grad_batches=accumulate,
                              max_epochs=epochs, max_steps=steps)  # fmt: skip
    assert total_steps(trainer) == expected


def test_the_rate_warms_up_falls_and_stays():
    factors = [warmup_cosine_factor(step, warmup=4, total=12, floor=0.1) for step in (0, 3, 4, 8, 12, 20)]
    assert factors == pytest.approx([0.25, 1.0, 1.0, 0.55, 0.1, 0.1])
