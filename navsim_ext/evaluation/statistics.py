"""Means with bootstrap intervals by log, paired differences, and what a difference in score is made of.

Legend: n tokens, L logs, R bootstrap replicates, K sub-scores.
Tokens of one log are one drive and far from independent, so the bootstrap draws whole logs with replacement
(cluster bootstrap: Field & Welsh 2007) and keeps the paired structure when two planners are compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError

REPLICATES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens with its interval: ``count`` tokens in ``logs`` logs."""

    mean: float
    low: float
    high: float
    count: int
    logs: int

    def to_json(self) -> dict[str, float | int | None]:
        """Plain JSON: NaN (nothing measured, or no interval) becomes null."""
        return {key: None if math.isnan(value) else value for key, value in asdict(self).items()}

    def format(self, scale: float = 100.0, digits: int = 1) -> str:
        """``83.2 [80.1, 86.0]``; a dash where nothing was measured, no interval where one log was."""
        if self.count == 0:
            return "-"
        mean = f"{self.mean * scale:.{digits}f}"
        if self.logs < 2:
            return f"{mean} [one log]"
        return f"{mean} [{self.low * scale:.{digits}f}, {self.high * scale:.{digits}f}]"


def bootstrap_mean(
    values: NDArray[np.float64],
    logs: Sequence[str],
    *,
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Mean of ``values`` [n] with a percentile interval over draws of whole logs.

    Replicate r draws L logs with replacement: mean_r = sum_l c_rl S_l / sum_l c_rl n_l, with c_r ~ Multinomial(L, 1/L),
    S_l the sum and n_l the number of values in log l. NaN values are left out (and not counted in ``count``).
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(logs):
        raise DataError(f"{len(values)} values but {len(logs)} log names")
    keep = ~np.isnan(values)
    values = values[keep]
    names, index = np.unique(np.asarray(logs, dtype=object)[keep].astype(str), return_inverse=True)
    if len(values) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    mean = float(values.mean())
    if len(names) < 2:
        return Estimate(mean, math.nan, math.nan, len(values), len(names))
    S = np.bincount(index, weights=values, minlength=len(names))
    n = np.bincount(index, minlength=len(names))
    c = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1.0 / len(names)), size=replicates)
    means = (c @ S) / (c @ n)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Estimate(mean, float(low), float(high), len(values), len(names))


@dataclass(frozen=True)
class ScoreFormula:
    """A score as a function of its sub-scores: the same lines that the scorer uses for aggregation.

    score = prod(multipliers) * sum(w_k x_k) / sum(w_k); a weighted term that is NaN leaves the sum and its weight.
    """

    name: str
    multipliers: tuple[str, ...]
    weights: Mapping[str, float]

    @property
    def terms(self) -> tuple[str, ...]:
        return (*self.multipliers, *self.weights)

    def __call__(self, columns: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        product = math.prod((columns[name] for name in self.multipliers), start=1.0)
        x = np.stack([columns[name] for name in self.weights])
        w = np.array(list(self.weights.values()))[:, None] * ~np.isnan(x)
        return product * (w * np.nan_to_num(x)).sum(axis=0) / w.sum(axis=0)


PDMS_V1 = ScoreFormula("pdms_v1", ("v1_nc", "v1_dac"), {"v1_ep": 5.0, "v1_ttc": 5.0, "v1_comfort": 2.0})
EPDMS_V2_NOFILTER = ScoreFormula(
    "epdms_v2_nofilter",
    ("v2_nc", "v2_dac", "v2_ddc", "v2_tlc"),
    {"v2_ep": 5.0, "v2_ttc": 5.0, "v2_lk": 2.0, "v2_hc": 2.0, "v2_ec": 2.0},
)


def shapley_attribution(
    function: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.float64]],
    terms: Sequence[str],
    before: Mapping[str, NDArray[np.float64]],
    after: Mapping[str, NDArray[np.float64]],
) -> dict[str, NDArray[np.float64]]:
    """Splits f(after) - f(before) into one share per term, per token; the shares add up to it exactly.

    phi_k = sum over subsets T of the other terms of |T|! (K-|T|-1)! / K! * (f(T and k) - f(T)), where f(T) takes the
    terms of T from ``after`` and the rest from ``before`` (Shapley 1953). Unlike changing one sub-score at a time in a
    fixed order, no term is favoured by its place, although the score is a product.
    """
    K = len(terms)
    value: dict[frozenset[str], NDArray[np.float64]] = {}
    for size in range(K + 1):
        for subset in itertools.combinations(terms, size):
            chosen = frozenset(subset)
            value[chosen] = function({term: (after if term in chosen else before)[term] for term in terms})
    shares: dict[str, NDArray[np.float64]] = {}
    for term in terms:
        others = [other for other in terms if other != term]
        share = 0.0
        for size in range(K):
            weight = math.factorial(size) * math.factorial(K - size - 1) / math.factorial(K)
            for subset in itertools.combinations(others, size):
                chosen = frozenset(subset)
                share = share + weight * (value[chosen | {term}] - value[chosen])
        shares[term] = np.asarray(share)
    return shares
