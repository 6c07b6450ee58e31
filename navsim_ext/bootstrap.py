"""Means with bootstrap intervals over whole logs (or scenarios).

Legend: n values, L logs, R bootstrap replicates. Tokens of one log are one drive and far from independent, so the
bootstrap draws whole logs with replacement (cluster bootstrap: Field & Welsh 2007).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
