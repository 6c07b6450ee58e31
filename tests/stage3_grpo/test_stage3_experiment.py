"""The experiment's verdict on tables with known differences."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from navsim_ext.errors import DataError
from stage3_grpo.experiment import IMITATION, METRICS, judge, tell

RULES = {"required_points": 3.0, "minimum_scenes": 500, "epdms_tolerance": 0.5, "reverse_tail_margin": 0.005}


def table(
    name: str, *, pdms: float = 0.7, epdms: float = 0.7, reverse: float = 0.1, scenes: int = 600, invalid: int = 0
):
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({
        "token": [f"{i:016x}" for i in range(scenes)], "name": name,
        "log_name": [f"log{i // 10}" for i in range(scenes)],
        "valid": [i >= invalid for i in range(scenes)], "reason": "",
    })  # fmt: skip
    noise = generator.normal(0.0, 0.1, scenes)
    for metric in METRICS:
        frame[metric] = {"pdms_v1": pdms, "epdms_v2": epdms}.get(metric, 0.5) + noise
    frame["reverse_tail"] = (np.arange(scenes) < reverse * scenes).astype(float)
    return frame.sample(frac=1.0, random_state=len(name)).reset_index(drop=True)  # order must not matter


def verdict(**reinforced):
    tables = {IMITATION: table(IMITATION)}
    tables |= {f"seed{i}": table(f"seed{i}", **reinforced) for i in range(3)}
    return judge(tables, **RULES)


def test_a_gain_in_every_respect_passes():
    result = verdict(pdms=0.75, epdms=0.71, reverse=0.1)
    assert result.passed
    assert result.differences["pdms_v1"].mean == pytest.approx(0.05)
    assert (result.scenes, result.logs, len(result.by_seed)) == (600, 60, 3)
    console = Console(file=io.StringIO(), width=80)
    tell(console, result, RULES)
    told = console.file.getvalue()
    assert "PDMS up by 3 points, interval above 0: +5.0 [+5.0, +5.0]: yes" in told
    assert "EPDMS down by at most 0.5, interval not below 0: +1.0 [+1.0, +1.0]: yes" in told
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize(("change", "flag"), [
    ({"pdms": 0.72}, "pdms_rises"), ({"epdms": 0.69}, "epdms_holds"), ({"reverse": 0.12}, "reverse_tail_holds"),
    ({"scenes": 400}, "enough_scenes"),
])  # fmt: skip
def test_each_condition_can_fail_it(change, flag):
    result = verdict(**({"pdms": 0.76} | change))
    assert not getattr(result, flag)
    assert not result.passed


@pytest.mark.parametrize(("fall", "spread", "holds"), [
    (0.003, 0.2, True), (0.02, 0.2, False), (0.003, 0.0, False), (0.0, 0.0, True), (-0.02, 0.2, True),
], ids=["within tolerance and noise", "too far, if unsure", "a small certain fall", "equal", "a rise"])  # fmt: skip
def test_when_epdms_falls(fall, spread, holds):
    """``spread`` m: the difference of a log is -fall +- m in turn, so that its interval holds 0."""
    reinforced = table("seed0", pdms=0.76, epdms=0.7 - fall)
    log = reinforced["log_name"].str.removeprefix("log").astype(int)
    reinforced["epdms_v2"] += np.where(log % 2, spread, -spread)
    result = judge({IMITATION: table(IMITATION), "seed0": reinforced}, **RULES)
    assert result.differences["epdms_v2"].mean == pytest.approx(-fall)
    assert (result.differences["epdms_v2"].high > 0) == (spread > 0 or fall < 0)
    assert result.epdms_holds == holds
    assert result.passed == holds


def test_only_scenes_that_all_could_be_scored_on_count():
    tables = {IMITATION: table(IMITATION, invalid=20), "seed0": table("seed0", pdms=0.8, invalid=50)}
    found = judge(tables, **RULES)
    assert (found.scenes, found.left_out) == (550, 30)
    with pytest.raises(DataError, match="no test scene is valid for all planners"):
        judge({IMITATION: table(IMITATION, invalid=600), "seed0": table("seed0")}, **RULES)
