"""The experiment's verdict on tables with known differences."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from navsim_ext.errors import DataError
from stage3_grpo.experiment import IMITATION, METRICS, judge, tell

RULES = {"required_points": 3.0, "minimum_scenes": 500, "reverse_tail_margin": 0.005}


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
    tell(console, result, 3.0)
    assert "+5.0 [+5.0, +5.0]" in console.file.getvalue()


@pytest.mark.parametrize(("change", "flag"), [
    ({"pdms": 0.72}, "pdms_rises"), ({"epdms": 0.69}, "epdms_holds"), ({"reverse": 0.12}, "reverse_tail_holds"),
    ({"scenes": 400}, "enough_scenes"),
])  # fmt: skip
def test_each_condition_can_fail_it(change, flag):
    result = verdict(**({"pdms": 0.76} | change))
    assert not getattr(result, flag)
    assert not result.passed


def test_only_scenes_that_all_could_be_scored_on_count():
    tables = {IMITATION: table(IMITATION, invalid=20), "seed0": table("seed0", pdms=0.8, invalid=50)}
    assert judge(tables, **RULES).scenes == 550
    with pytest.raises(DataError, match="no test scene is valid for all planners"):
        judge({IMITATION: table(IMITATION, invalid=600), "seed0": table("seed0")}, **RULES)
