"""Baseline planners: analytic solutions, shapes, and errors that name what is missing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from navsim_ext.errors import DataError
from navsim_ext.frames import to_global
from navsim_ext.pdm.closed.planner import PdmClosed
from navsim_ext.planners import BASELINES, Planner, baseline
from navsim_ext.scene import SceneBatch


def batch_of(*velocities: tuple[float, float], target: torch.Tensor | None = None) -> SceneBatch:
    status = torch.zeros(len(velocities), 8)
    status[:, 4:6] = torch.tensor(velocities)
    tokens = [f"{i:016x}" for i in range(len(velocities))]
    return SceneBatch(tokens, ["log"] * len(tokens), torch.zeros(len(tokens), 4, 3), status, target)


def test_constant_velocity_uses_the_norm_of_the_velocity():
    poses = baseline("constant_velocity").plan(batch_of((3.0, 4.0), (-2.0, 0.0)))
    assert poses.shape == (2, 8, 3)
    assert poses.dtype == torch.float32
    torch.testing.assert_close(poses[0, :, 0], 5.0 * 0.5 * torch.arange(1, 9))
    torch.testing.assert_close(poses[1, -1], torch.tensor([8.0, 0.0, 0.0]))


@pytest.mark.parametrize("deceleration", [0.5, 2.0, 6.0])
def test_constant_deceleration_stops_after_v_squared_over_two_a(deceleration):
    v = 5.0
    poses = baseline("constant_deceleration", deceleration=deceleration).plan(batch_of((v, 0.0)))[0]
    for k in range(8):
        t = min(0.5 * (k + 1), v / deceleration)
        assert math.isclose(poses[k, 0], v * t - deceleration * t * t / 2, rel_tol=1e-6)
    if v / deceleration < 4.0:
        assert math.isclose(poses[-1, 0], v * v / (2 * deceleration), rel_tol=1e-6)
    assert (poses[1:, 0] >= poses[:-1, 0]).all()
    assert (poses[:, 1:] == 0).all()


def test_standing_still_is_eight_zero_poses():
    assert (baseline("standing_still").plan(batch_of((9.0, 0.0))) == 0).all()


def test_human_returns_the_target_and_refuses_to_invent_one():
    target = torch.randn(1, 10, 3)
    assert torch.equal(baseline("human").plan(batch_of((1.0, 0.0), target=target)), target[:, :8])
    with pytest.raises(DataError, match="8 future poses"):
        baseline("human").plan(batch_of((1.0, 0.0)))
    with pytest.raises(DataError, match="have 6"):
        baseline("human").plan(batch_of((1.0, 0.0), target=target[:, :6]))


class FakeCache:
    """Two versions that drive straight at 2 and 3 m/s from a turned, far away ego pose."""

    ego = np.array([664_000.0, 3_998_000.0, 2.1])

    def load(self, token: str) -> SimpleNamespace:
        local = np.zeros((2, 51, 3))
        local[0, :, 0] = 0.2 * np.arange(51)
        local[1, :, 0] = 0.3 * np.arange(51)
        return SimpleNamespace(pdm_closed=to_global(local, self.ego), ego_state=np.append(self.ego, np.zeros(8)))


@pytest.mark.parametrize(("version", "metres"), [("v1", 2.0), ("v2", 3.0)])
def test_pdm_closed_reads_its_own_version_at_half_seconds(version, metres):
    planner = PdmClosed(FakeCache(), version)
    poses = planner.plan(batch_of((0.0, 0.0)))
    torch.testing.assert_close(poses[0, :, 0], metres * 0.5 * torch.arange(1, 9), rtol=0, atol=1e-6)
    assert planner.name == f"pdm_closed_{version}"


def test_bad_choices_are_named():
    with pytest.raises(DataError, match="constant_velocity"):
        baseline("fastest")
    with pytest.raises(DataError, match="-1"):
        baseline("constant_deceleration", deceleration=-1.0)
    with pytest.raises(DataError, match="v3"):
        PdmClosed(FakeCache(), "v3")


def test_every_baseline_fulfils_the_protocol():
    assert isinstance(PdmClosed(FakeCache()), Planner)
    for name in BASELINES:
        assert isinstance(baseline(name), Planner)
