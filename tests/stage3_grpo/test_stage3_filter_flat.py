"""The filter of flat groups: its rule by hand and by simulation, and a run that goes on where it stopped."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from words_world import build_model, write_questions

from navsim_ext.errors import DataError
from navsim_ext.runtime.config import compose
from stage3_grpo import filter_flat
from stage3_grpo.filter_flat import FlatRule, chosen, flat_share, sample_rewards


def test_the_rule_by_hand():
    rule = FlatRule(8)
    half, rare, graded = [0.0, 1.0] * 16, [1.0] + [0.0] * 31, list(np.linspace(0.3, 0.7, 32))
    assert rule.keeps(half, 1.0)
    assert not rule.keeps([0.5] * 32, 1.0)  # no spread
    assert not rule.keeps(rare, 1.0)  # (31 / 32)^8 = 0.78 of its groups would be flat
    assert not rule.keeps(graded, 1.0)  # far from binary
    assert FlatRule(8, tolerance=None).keeps(graded, 1.0)
    result = chosen({"a": half, "b": rare, "c": []}, rule)
    assert (result["tokens"], result["unscored"], result["reward_range"]) == (["a"], 1, 1.0)
    assert result["expected_yield"]["kept"] == pytest.approx(1 - 2 * 0.5**8)
    assert result["expected_yield"]["all"] < result["expected_yield"]["kept"]
    with pytest.raises(DataError, match="warm it up"):
        chosen({"a": [0.0, 0.0]}, rule)


def test_the_expected_yield_is_that_of_drawn_groups():
    generator = np.random.default_rng(0)
    groups = generator.random((20_000, 8)) < 0.2
    flat = (groups.all(1) | ~groups.any(1)).mean()
    assert flat_share(0.2, 8) == pytest.approx(flat, abs=0.01)


def test_a_filter_that_was_cut_goes_on_and_ends_alike(tmp_path, monkeypatch):
    questions, model = write_questions(tmp_path / "q", 4), build_model(tmp_path / "m")

    def config(output):
        return compose("stage3", [
            "experiment=language_demo", f"init={model}", f"data.train={questions}", f"output_dir={output}",
            "policy.sampling.max_new_tokens=4", "filter.samples=3",
        ])  # fmt: skip

    whole = sample_rewards(config(tmp_path / "whole"))
    sample_rewards(config(tmp_path / "cut"))
    journal = tmp_path / "cut" / filter_flat.JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]) + lines[2][:30])  # killed while the third was written
    as_it_was, bytes_before = tmp_path / "as it was", journal.read_bytes()
    os.link(journal, as_it_was)
    assert sample_rewards(config(tmp_path / "cut")) == whole
    assert as_it_was.read_bytes() == bytes_before  # replaced, never emptied: a kill meanwhile loses no answer
    assert len(journal.read_text().splitlines()) == 4
    other = config(tmp_path / "cut")
    other.filter.samples = 5
    with pytest.raises(Exception, match="samples"):
        sample_rewards(other)
    assert json.loads((tmp_path / "cut" / "fingerprint.json").read_text())
