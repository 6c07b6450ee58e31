"""What a score is made of, and what a difference in score is made of.

Legend: n tokens, K sub-scores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
