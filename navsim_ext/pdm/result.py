"""PdmResult: scores as columns, each row valid or invalid with its reason. What is invalid is NaN, never a score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64
from numpy.typing import NDArray

from navsim_ext.pdm.columns import COLUMNS

_POSITION = {name: i for i, name in enumerate(COLUMNS)}
METRICS = ("pdms_v1", "epdms_v2", "epdms_v2_nofilter", "reward")


@dataclass(frozen=True, eq=False)
class PdmResult:
    """One row per trajectory, in the order they were given. ``result["pdms_v1"]`` or ``result.pdms_v1`` is a column.

    A row is valid when one of the versions that were asked for could be scored. The columns of a version that its scene
    has no reference for (a metric cache imported from the other NAVSIM version) are NaN, and ``reason`` says so:
    ``valid_for`` tells the validity of one column. Columns of versions that were not asked for, and v2_ec without a
    predecessor, are NaN in valid rows too.
    """

    tokens: Sequence[str]  # [N]
    values: Float64[np.ndarray, "N columns"]  # in the order of ``columns.COLUMNS``
    valid: Bool[np.ndarray, " N"]
    reason: NDArray[np.object_]  # [N] str, empty where every version that was asked for is there
    map_label: NDArray[np.object_]  # [N] "nuplan", "approx" (scores from a reconstructed map), empty where unknown
    states: Float64[np.ndarray, "N 41 11"] | None = field(default=None, repr=False)  # simulated, if kept
    seconds: float = 0.0  # that scoring took

    def __len__(self) -> int:
        return len(self.valid)

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        """A column [N] by name; raises KeyError naming those that exist."""
        if column not in _POSITION:
            raise KeyError(f"PdmResult has no column {column!r}; there are {', '.join(COLUMNS)}")
        return self.values[:, _POSITION[column]]

    def __getattr__(self, name: str) -> NDArray[np.float64]:
        if name in _POSITION:
            return self.values[:, _POSITION[name]]
        raise AttributeError(name)

    @property
    def columns(self) -> dict[str, NDArray[np.float64]]:
        """All columns [N] by name, as views."""
        return {name: self.values[:, i] for name, i in _POSITION.items()}

    def valid_for(self, column: str) -> NDArray[np.bool_]:
        """Rows [N] that have a value in a column; raises KeyError as ``result[column]`` does."""
        return self.valid & ~np.isnan(self[column])

    @property
    def num_invalid(self) -> int:
        return int((~self.valid).sum())

    def invalid_reasons(self) -> dict[str, int]:
        """How many rows are invalid, by reason, most frequent first."""
        return dict(Counter(self.reason[~self.valid]).most_common())

    def incomplete_reasons(self) -> dict[str, int]:
        """How many valid rows lack a version that was asked for, by reason, most frequent first."""
        return dict(Counter(self.reason[self.valid & (self.reason != "")]).most_common())

    def to_frame(self) -> pd.DataFrame:
        """token, valid, reason, map_label and all columns."""
        head = {"token": list(self.tokens), "valid": self.valid, "reason": self.reason, "map_label": self.map_label}
        return pd.DataFrame(head | self.columns)

    def summary(self) -> dict[str, Any]:
        """Counts, means of the metrics over the rows that have them, reasons of invalid and incomplete rows, and whose
        maps the scores are from."""
        means = {}
        for name in METRICS:
            scores = self[name][self.valid]
            known = scores[~np.isnan(scores)]
            if len(known):
                means[name] = float(known.mean())
        labels = Counter(label for label in self.map_label if label)
        return {
            "rows": len(self),
            "valid": int(self.valid.sum()),
            "invalid": self.invalid_reasons(),
            "incomplete": self.incomplete_reasons(),
            "mean": means,
            "maps": dict(labels),
        }
