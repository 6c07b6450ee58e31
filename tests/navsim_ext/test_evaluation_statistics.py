"""Bootstrap by log and Shapley attribution against known answers."""

import numpy as np
import pytest

from navsim_ext.bootstrap import bootstrap_mean
from navsim_ext.errors import DataError
from navsim_ext.evaluation.attribution import EPDMS_V2_NOFILTER, PDMS_V1, shapley_attribution


def test_interval_is_that_of_the_log_means_when_logs_are_the_unit():
    rng = np.random.default_rng(1)
    log_effect = rng.normal(0.5, 0.1, 200)
    values = np.repeat(log_effect, 10)  # ten identical tokens a log: 200 independent numbers, not 2,000
    logs = np.repeat([f"log{i}" for i in range(200)], 10)
    estimate = bootstrap_mean(values, logs)
    standard_error = log_effect.std() / np.sqrt(200)
    assert estimate.mean == pytest.approx(log_effect.mean())
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * standard_error, rel=0.1)
    assert (estimate.count, estimate.logs) == (2000, 200)


def test_coverage_is_about_the_level():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        values = np.repeat(rng.normal(0.0, 1.0, 40), 3) + rng.normal(0, 0.1, 120)
        estimate = bootstrap_mean(values, np.repeat(np.arange(40), 3).astype(str), replicates=400, seed=trial)
        hits += estimate.low <= 0.0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


def test_nan_is_left_out_and_not_counted_and_one_log_has_no_interval():
    estimate = bootstrap_mean(np.array([1.0, np.nan, 0.0]), ["a", "b", "a"])
    assert (estimate.mean, estimate.count, estimate.logs) == (0.5, 2, 1)
    assert np.isnan(estimate.low)
    assert "[one log]" in estimate.format()
    assert bootstrap_mean(np.array([np.nan]), ["a"]).format() == "-"


def test_lengths_must_agree():
    with pytest.raises(DataError, match="2 values but 1 log"):
        bootstrap_mean(np.zeros(2), ["a"])


@pytest.mark.parametrize("formula", [PDMS_V1, EPDMS_V2_NOFILTER])
def test_attribution_adds_up_and_unchanged_terms_get_nothing(formula):
    rng = np.random.default_rng(3)
    before = {term: rng.choice([0.0, 0.5, 1.0], 50) for term in formula.terms}
    after = {term: rng.choice([0.0, 0.5, 1.0], 50) for term in formula.terms}
    still = formula.terms[1]
    after[still] = before[still]
    shares = shapley_attribution(formula, formula.terms, before, after)
    np.testing.assert_allclose(sum(shares.values()), formula(after) - formula(before), atol=1e-12)
    assert np.all(shares[still] == 0.0)


def test_attribution_of_a_product_of_two_is_the_symmetric_split():
    before, after = {"a": np.array([0.2]), "b": np.array([0.5])}, {"a": np.array([1.0]), "b": np.array([0.7])}
    shares = shapley_attribution(lambda c: c["a"] * c["b"], ("a", "b"), before, after)
    assert shares["a"][0] == pytest.approx(0.8 * (0.5 + 0.7) / 2)
    assert shares["b"][0] == pytest.approx(0.2 * (0.2 + 1.0) / 2)


def test_missing_extended_comfort_leaves_the_weights():
    columns = {term: np.array([1.0, 1.0]) for term in EPDMS_V2_NOFILTER.terms}
    columns["v2_ep"] = np.array([0.0, 0.0])
    columns["v2_ec"] = np.array([np.nan, 0.0])
    np.testing.assert_allclose(EPDMS_V2_NOFILTER(columns), [9 / 14, 9 / 16])


def test_formulas_give_the_reference_scores(reference):
    import pandas as pd

    table = pd.read_parquet(reference("golden/navsim/scores_v11.parquet"))
    names = {
        "v1_nc": "no_at_fault_collisions",
        "v1_dac": "drivable_area_compliance",
        "v1_ep": "ego_progress",
        "v1_ttc": "time_to_collision_within_bound",
        "v1_comfort": "comfort",
    }
    columns = {ours: table[theirs].to_numpy(float) for ours, theirs in names.items()}
    np.testing.assert_allclose(PDMS_V1(columns), table["score"], atol=1e-12)
