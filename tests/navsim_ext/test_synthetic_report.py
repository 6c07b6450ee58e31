"""The world rewards looking: the recorded drive scores high, drivers that know only their own speed do not."""

from __future__ import annotations

import pandas as pd
import pytest

from navsim_ext.metric_cache.build import build as build_metric_cache
from navsim_ext.metric_cache.build import settings_from
from navsim_ext.readers import open_source
from navsim_ext.runtime.config import compose
from navsim_ext.synthetic.build import build, recipe_of
from navsim_ext.synthetic.report import ALL, MARGIN, TARGET, LookingVerdict, blind_drivers, judge


def verdict(human: float, **blind: float) -> LookingVerdict:
    means = pd.DataFrame({"human": human} | blind, index=[ALL])
    return LookingVerdict({"pdms_v1": means}, pd.Series({ALL: 1}), 0)


def test_a_world_is_fit_only_with_a_good_drive_and_a_margin_over_every_blind_driver():
    assert verdict(0.95, constant_velocity=0.5, standing_still=0.74).fit
    assert not verdict(0.95, constant_velocity=0.5, standing_still=0.76).fit
    assert not verdict(0.91, constant_velocity=0.5, standing_still=0.6).fit
    assert verdict(0.95, constant_velocity=0.8, standing_still=0.6).best_blind == 0.8


def test_the_recorded_drive_is_no_blind_driver():
    names = [planner.name for planner in blind_drivers((1.0, 2.0))]
    assert names[0] == "human"
    assert names[1:] == ["constant_velocity", "standing_still", "constant_deceleration_1", "constant_deceleration_2"]


@pytest.mark.slow
def test_looking_is_rewarded(tmp_path):
    options = ["output_dir=unused", "scenes=400", "seed=3", "recipe.cameras=[]", "recipe.qa=false"]
    build(tmp_path / "world", recipe_of(compose("synthetic", options)))
    cache = tmp_path / "cache"
    cfg = compose("metric_cache", [f"data.root={tmp_path}/world", "data.split=trainval", f"output_dir={cache}"])
    build_metric_cache(settings_from(cfg), workers="sequential")
    found = judge(
        tmp_path / "world", open_source(tmp_path / "world", "trainval"), cache, (1.0, 2.0, 2.5, 3.0, 4.0), ("pdms_v1",)
    )
    assert found.invalid == 0
    assert found.human >= TARGET
    assert found.human - found.best_blind >= MARGIN - 0.03  # 320 scenes of 80 logs scatter by about this much
