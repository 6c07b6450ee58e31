"""``python -m navsim_ext.evaluation.compare a=SCORES b=SCORES``: what changed from A to B, and why.

Prints the paired difference of every score with its interval by log, the waterfall of sub-scores (Shapley shares that
add up to the difference), and the tokens that changed most; ``output_dir`` also writes them as ``comparison.json`` and
``pairs.parquet``. A and B may also be two folders of ``navsim_ext.closed_loop.drive``.
Scores made by different scorers are not compared unless ``force=true``, which is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.errors import DataError
from navsim_ext.evaluation import drives
from navsim_ext.evaluation.attribution import EPDMS_V2_NOFILTER, PDMS_V1, ScoreFormula, shapley_attribution
from navsim_ext.evaluation.table import HEADLINE, TITLES, read_scores, require_same_quantity
from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.pdm.columns import WITHOUT_COMFORT
from navsim_ext.runtime.config import job

FORMULAS = {formula.name: formula for formula in (PDMS_V1, EPDMS_V2_NOFILTER, drives.FORMULA)}
SCORES = (*HEADLINE, *WITHOUT_COMFORT.values(), *drives.HEADLINE)
NAMES = {**TITLES, **drives.TITLES}


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of B with A over the tokens that are valid in both."""

    pairs: pd.DataFrame  # token, log_name, and <column>_a, <column>_b, <column>_change for the scores
    differences: Mapping[str, Estimate]  # per score: mean of b - a
    waterfall: Mapping[str, Mapping[str, Estimate]]  # per score: share of each sub-score in the mean difference
    only_a: int
    only_b: int
    dropped_invalid: int


def compare(a: pd.DataFrame, b: pd.DataFrame) -> Comparison:
    """Pairs two score tables of one planner each by token. Raises DataError when no token is valid in both."""
    for label, table in (("A", a), ("B", b)):
        if table["name"].nunique() != 1:
            raise DataError(f"table {label} holds planners {sorted(table['name'].unique())}: choose one")
        repeated = table["token"][table["token"].duplicated()].unique()
        if len(repeated):
            raise DataError(f"table {label} lists {len(repeated)} tokens twice, e.g. {repeated[0]}")
    require_same_quantity({"A": list(a.columns), "B": list(b.columns)})
    merged = a.merge(b, on="token", suffixes=("_a", "_b"), validate="one_to_one")
    valid = merged[merged["valid_a"] & merged["valid_b"]].reset_index(drop=True)
    if valid.empty:
        raise DataError(f"no token is valid in both tables ({len(a)} rows in A, {len(b)} in B, {len(merged)} shared)")
    logs = valid["log_name_a"].tolist()
    pairs = pd.DataFrame({"token": valid["token"], "log_name": logs})
    differences: dict[str, Estimate] = {}
    waterfall: dict[str, dict[str, Estimate]] = {}
    for score in SCORES:
        if f"{score}_a" not in valid:
            continue
        change = (valid[f"{score}_b"] - valid[f"{score}_a"]).to_numpy(float)
        pairs[f"{score}_a"], pairs[f"{score}_b"], pairs[f"{score}_change"] = (
            valid[f"{score}_a"],
            valid[f"{score}_b"],
            change,
        )
        differences[score] = bootstrap_mean(change, logs)
        if score in FORMULAS:
            shares = _shares(FORMULAS[score], valid)
            waterfall[score] = {term: bootstrap_mean(share, logs) for term, share in shares.items()}
    return Comparison(
        pairs, differences, waterfall, len(a) - len(merged), len(b) - len(merged), len(merged) - len(valid)
    )


def _shares(formula: ScoreFormula, valid: pd.DataFrame) -> dict[str, np.ndarray]:
    before = {term: valid[f"{term}_a"].to_numpy(float) for term in formula.terms}
    after = {term: valid[f"{term}_b"].to_numpy(float) for term in formula.terms}
    return shapley_attribution(formula, formula.terms, before, after)


def print_comparison(console: Console, comparison: Comparison, names: tuple[str, str], most_changed: int) -> None:
    """Three tables of at most 80 columns."""
    table = Table(title=f"{names[1]} minus {names[0]}, x 100, paired by token [95 % by log]", title_justify="left")
    for title, side in (("score", "left"), ("difference", "right"), ("tokens", "right")):
        table.add_column(title, justify=side)
    for score, estimate in comparison.differences.items():
        table.add_row(NAMES[score], f"{estimate.mean * 100:+.1f} {_interval(estimate)}", str(estimate.count))
    console.print(table)
    for score, shares in comparison.waterfall.items():
        table = Table(title=f"What the difference in {NAMES[score]} is made of (x 100)", title_justify="left")
        for title, side in (("sub-score", "left"), ("share", "right"), ("", "left")):
            table.add_column(title, justify=side)
        largest = max((abs(share.mean) for share in shares.values()), default=0.0) or 1.0
        for term, share in sorted(shares.items(), key=lambda item: -abs(item[1].mean)):
            bar = ("+" if share.mean > 0 else "-") * round(24 * abs(share.mean) / largest)
            table.add_row(NAMES[term], f"{share.mean * 100:+.2f}", bar)
        console.print(table)
    score = next(iter(comparison.differences))
    order = comparison.pairs[f"{score}_change"].abs().sort_values(ascending=False, kind="stable").index[:most_changed]
    table = Table(title=f"Tokens that changed most in {NAMES[score]} (x 100)", title_justify="left")
    for title, side in (("token", "left"), (names[0], "right"), (names[1], "right"), ("change", "right")):
        table.add_column(title, justify=side)
    for _, row in comparison.pairs.loc[order].iterrows():
        before, after = row[f"{score}_a"] * 100, row[f"{score}_b"] * 100
        table.add_row(row["token"], f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
    console.print(table)
    if comparison.only_a or comparison.only_b or comparison.dropped_invalid:
        console.print(
            f"Left out: {comparison.only_a} tokens only in A, {comparison.only_b} only in B, "
            f"{comparison.dropped_invalid} invalid in one of them."
        )


def _interval(estimate: Estimate) -> str:
    if estimate.logs < 2:
        return "[one log]"
    return f"[{estimate.low * 100:+.1f}, {estimate.high * 100:+.1f}]"


def select(folder: str, planner: str | None) -> tuple[pd.DataFrame, str, Fingerprint]:
    """One planner's rows of a score folder, or of a folder of drives."""
    scores, fingerprint = drives.read_drives(folder) if drives.are_drives(folder) else read_scores(folder)
    names = scores["name"].unique().tolist()
    if planner is None and len(names) > 1:
        raise DataError(f"{folder} holds planners {names}: choose one with a_planner= or b_planner=")
    chosen = planner or names[0]
    if chosen not in names:
        raise DataError(f"{folder} has no planner {chosen!r}; it holds {names}")
    return scores[scores["name"] == chosen].reset_index(drop=True), chosen, fingerprint


@job("compare")
def main(cfg: DictConfig) -> None:
    a, name_a, made_a = select(cfg.a, cfg.a_planner)
    b, name_b, made_b = select(cfg.b, cfg.b_planner)
    scorer_a, scorer_b = made_a.parents["scorer"], made_b.parents["scorer"]
    if not cfg.force:
        scorer_a.require_equal(
            scorer_b,
            mine=f"scores in {cfg.a}",
            theirs=f"scores in {cfg.b}",
            remedy="Score both with one scorer, or add force=true to compare all the same (it is recorded).",
        )
    comparison = compare(a, b)
    console = Console()
    print_comparison(console, comparison, (name_a, name_b), cfg.most_changed)
    if scorer_a.digest != scorer_b.digest:
        console.print("FORCED: the two tables were made by different scorers.", style="bold red")
    if cfg.output_dir:
        output = Path(cfg.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        comparison.pairs.to_parquet(output / "pairs.parquet")
        content = {
            "a": {"folder": str(cfg.a), "planner": name_a, "fingerprint": made_a.digest},
            "b": {"folder": str(cfg.b), "planner": name_b, "fingerprint": made_b.digest},
            "forced": scorer_a.digest != scorer_b.digest,
            "differences": {score: estimate.to_json() for score, estimate in comparison.differences.items()},
            "waterfall": {
                score: {term: share.to_json() for term, share in shares.items()}
                for score, shares in comparison.waterfall.items()
            },
        }
        write_json_atomic(output / "comparison.json", content)


if __name__ == "__main__":
    main()
