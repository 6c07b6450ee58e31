"""Do two judges rank planners alike? Rank correlations with ties, and their intervals over scenes.

Legend: P planners, n scenes, R bootstrap replicates. Scores are [P,n]; each scene is a draw of its own.

  Spearman   Pearson's correlation of the ranks, equal scores sharing the mean of their ranks
  Kendall    tau-b = (concordant - discordant) / sqrt((pairs - ties in a) (pairs - ties in b))
  error      mean over planners of |mean score of one judge - mean score of the other|

All three look at mean scores over scenes; replicate r draws n scenes with replacement, the same for all judges, so that
differences between judges are paired. A replicate in which a judge gives all planners the same score has no
correlation and is left out of the interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from navsim_ext.bootstrap import LEVEL, REPLICATES, Estimate
from navsim_ext.errors import DataError

MEASURES = ("spearman", "kendall", "error")
FEWEST_PLANNERS = 3
SAME = 1e-9  # scores nearer than this are equal: means of the same numbers in another order


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...] of scores [...,P]; NaN where either is the same for all planners."""
    x, y = (rankdata(np.round(values / SAME), axis=-1) for values in (a, b))
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    spread = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where(spread > 0.0, (x * y).sum(-1) / np.where(spread > 0.0, spread, 1.0), np.nan)


def kendall(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...] tau-b of scores [...,P]; NaN where either is the same for all planners."""
    x, y = (_signs(values) for values in (a, b))
    spread = np.sqrt((x * x).sum((-1, -2)) * (y * y).sum((-1, -2)))
    return np.where(spread > 0.0, (x * y).sum((-1, -2)) / np.where(spread > 0.0, spread, 1.0), np.nan)


def _signs(values: NDArray[np.float64]) -> NDArray[np.float64]:
    d = values[..., :, None] - values[..., None, :]
    return np.where(np.abs(d) < SAME, 0.0, np.sign(d))


def mean_error(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...] mean absolute difference of scores [...,P]."""
    return np.abs(a - b).mean(-1)


FUNCTIONS = {"spearman": spearman, "kendall": kendall, "error": mean_error}


@dataclass(frozen=True)
class Agreement:
    """How well each judge agrees with the truth: ``values[judge][measure]``, and ``differences[(a, b)][measure]``:
    judge a minus judge b."""

    values: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[tuple[str, str], Mapping[str, Estimate]]
    planners: int
    scenes: int


def agreement(
    judges: Mapping[str, NDArray[np.float64]],
    truth: NDArray[np.float64],
    *,
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = 0,
) -> Agreement:
    """Agreement of every judge's scores [P,n] with the truth [P,n], with percentile intervals over scenes.

    Raises DataError for fewer than FEWEST_PLANNERS planners, for no scene, other shapes, or a score that is not finite.
    """
    P, n = truth.shape
    if P < FEWEST_PLANNERS or n < 1:
        raise DataError(f"{P} planners on {n} scenes: a ranking needs at least {FEWEST_PLANNERS} planners and a scene")
    for name, scores in {**judges, "the truth": truth}.items():
        if scores.shape != (P, n) or not np.isfinite(scores).all():
            raise DataError(f"scores of {name}: {scores.shape} finite numbers were expected to be {(P, n)}")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=replicates)
    drawn = {name: counts @ scores.T / n for name, scores in judges.items()}
    true, true_drawn = truth.mean(-1), counts @ truth.T / n
    values, replicated = {}, {}
    for name, scores in judges.items():
        values[name] = {}
        for measure, function in FUNCTIONS.items():
            replicated[name, measure] = function(drawn[name], true_drawn)
            values[name][measure] = _estimate(
                float(function(scores.mean(-1), true)), replicated[name, measure], n, level
            )
    names = list(judges)
    differences = {
        (a, b): {
            measure: _estimate(
                values[a][measure].mean - values[b][measure].mean,
                replicated[a, measure] - replicated[b, measure],
                n,
                level,
            )
            for measure in MEASURES
        }
        for i, a in enumerate(names)
        for b in names[:i]
    }
    return Agreement(values, differences, P, n)


def _estimate(value: float, replicates: NDArray[np.float64], scenes: int, level: float) -> Estimate:
    known = replicates[np.isfinite(replicates)]
    if not len(known) or scenes < 2:
        return Estimate(value, float("nan"), float("nan"), scenes, scenes)
    tail = 0.5 * (1.0 - level)
    low, high = np.quantile(known, [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high), scenes, scenes)


def discordant(a: NDArray[np.float64], b: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs (i, j) of planners that a [P] puts in one order, i before j, and b [P] in the other."""
    x, y = _signs(a), _signs(b)
    return [(int(i), int(j)) for i, j in np.argwhere((x > 0) & (y < 0))]
