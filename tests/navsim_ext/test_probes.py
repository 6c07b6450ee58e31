"""Blind probes: what they drive, that they see nothing, and when a planner counts as better."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from test_planners import batch_of
from two_stage_golden import golden_groups

from navsim_ext.errors import DataError
from navsim_ext.evaluation.probes import ZEROED, Probe, ZeroedHidden, probes_of, table_verdicts, verdicts
from navsim_ext.evaluation.scoring import PartWorker
from navsim_ext.evaluation.table import headline_of, join_scores, summarise
from navsim_ext.hidden_cache.schema import HiddenBatch
from navsim_ext.planners import StandingStill, StraightOn, baseline


class Sees:
    """Drives as far as its hidden states say."""

    name = "sees"

    def plan(self, batch, hidden=None):
        return torch.zeros(len(batch), 8, 3) + hidden.hidden.sum()


@pytest.mark.parametrize("v", [0.0, 4.0, 15.0])
def test_straight_on_gains_speed_up_to_its_target(v):
    planner = StraightOn(target_speed=10.0, acceleration=1.5)
    x = planner.plan(batch_of((v, 0.0)))[0, :, 0].double().numpy()
    t = np.linspace(0.0, 4.0, 4001)
    speed = np.maximum(np.minimum(v + 1.5 * t, 10.0), v)
    driven = np.concatenate([[0.0], np.cumsum(0.5 * (speed[1:] + speed[:-1]) * np.diff(t))])
    np.testing.assert_allclose(x, driven[500::500], atol=1e-4)
    with pytest.raises(DataError, match="straight_on"):
        baseline("straight_on", target_speed=0.0)


def test_probes_see_no_hidden_states():
    hidden = HiddenBatch(torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
    batch = batch_of((3.0, 0.0))
    assert Sees().plan(batch, hidden).sum() > 0
    assert ZeroedHidden(Sees()).plan(batch, hidden).abs().sum() == 0
    assert Probe(StandingStill()).plan(batch, hidden).abs().sum() == 0
    names = [probe.name for probe in probes_of(Sees(), "mine", sees=True, cache={}, version="v2")]
    assert len(set(names)) == len(names) == 6
    assert names[-1] == f"{ZEROED}mine"
    assert len(probes_of(StandingStill(), None, sees=False, cache={}, version="v1")) == 5


def test_a_planner_is_better_when_the_paired_interval_is():
    logs = [f"log{i // 4}" for i in range(40)]
    probe = np.random.default_rng(0).uniform(0.0, 0.8, 40)
    values = pd.DataFrame({"mine": probe + 0.1, "theirs": probe - 0.01, "probe_a": probe, "probe_b": probe - 0.2})
    mine, theirs = verdicts(values, logs, "epdms")
    assert (mine.probe, mine.beaten) == ("probe_a", True)
    assert (theirs.probe, theirs.beaten) == ("probe_a", False)
    assert "DOES NOT BEAT" in theirs.line("EPDMS")
    assert "+10.0 [+10.0, +10.0]" in mine.line("EPDMS")
    values.loc[:5, "mine"] = np.nan  # unscored scenes are left out of the pairs
    assert verdicts(values, logs, "epdms")[0].difference.count == 34
    assert not verdicts(values[["mine"]], logs, "epdms")


def test_verdicts_of_a_table_leave_invalid_rows_out():
    rows = [
        {"token": f"t{i}", "log_name": f"l{i % 3}", "name": name, "valid": not (i == 0 and name == "mine"), "s": value}
        for i in range(9)
        for name, value in (("mine", 0.6), ("probe_standing_still", 0.5))
    ]
    (found,) = table_verdicts(pd.DataFrame(rows), "s")
    assert found.difference.count == 8
    assert found.beaten
    assert table_verdicts(pd.DataFrame(rows), "absent") == []


def test_epdms_with_and_without_extended_comfort_are_two_quantities(tmp_path):
    cache, extra, _ = golden_groups()
    tokens = extra["tokens"].tolist()[:4]
    poses = list(extra["poses/slow"][:4].reshape(4, -1))
    table = pd.DataFrame({"token": tokens, "name": "mine", "log_name": "l", "poses": poses})
    worker = PartWorker.__new__(PartWorker)
    worker.cache, worker.options = cache, {"traffic": "reactive"}
    found = {}
    for worker.two_frame in (True, False):
        found[str(worker.two_frame)] = worker.process(table)
    assert "epdms_v2_no_ec" not in found["True"]
    assert "epdms_v2" not in found["False"]
    assert headline_of(found["False"].columns) == ("pdms_v1", "epdms_v2_no_ec", "epdms_v2_no_ec_nofilter")
    estimates = summarise(found["False"])["mine"]
    assert estimates["epdms_v2_no_ec_nofilter"].count == 4
    with pytest.raises(DataError, match="two quantities"):
        join_scores(found)
    again = found["False"].assign(name="other")
    assert len(join_scores({"a": found["False"], "b": again})) == 8
    with pytest.raises(DataError, match="give one of them another name"):
        join_scores({"a": again, "b": again})
    twice = found["False"].assign(name="probe_a")
    assert len(join_scores({"a": twice, "b": twice})) == 4
