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

from navsim_ext.pdm.columns import COLUMNS, COLUMNS_ALONE

_POSITIONS = tuple({name: i for i, name in enumerate(names)} for names in (COLUMNS_ALONE, COLUMNS))
METRICS = frozenset({"pdms_v1", "epdms_v2", "epdms_v2_nofilter", "epdms_v2_no_ec", "epdms_v2_no_ec_nofilter", "reward"})


@dataclass(frozen=True, eq=False)
class PdmResult:
    """One row per trajectory, in the order they were given. ``result["pdms_v1"]`` or ``result.pdms_v1`` is a column.

    EPDMS has the name of what it is: ``epdms_v2`` where neighbouring scenes were compared (``two_frame``), and
    ``epdms_v2_no_ec`` where each was scored alone; either is absent where the other is there.

    A row is valid when one of the versions that were asked for could be scored. The columns of a version that its scene
    has no reference for (a metric cache imported from the other NAVSIM version) are NaN, and ``reason`` says so:
    ``valid_for`` tells the validity of one column. Columns of versions that were not asked for, and v2_ec without a
    predecessor, are NaN in valid rows too.
    """

    tokens: Sequence[str]  # [N]
    values: Float64[np.ndarray, "N columns"]  # in the order of ``columns.COLUMNS``, or of COLUMNS_ALONE
    valid: Bool[np.ndarray, " N"]
    reason: NDArray[np.object_]  # [N] str, empty where every version that was asked for is there
    map_label: NDArray[np.object_]  # [N] "nuplan", "approx" (scores from a reconstructed map), empty where unknown
    states: Float64[np.ndarray, "N 41 11"] | None = field(default=None, repr=False)  # simulated, if kept
    seconds: float = 0.0  # that scoring took
    two_frame: bool = False  # scored with extended comfort: EPDMS as NAVSIM defines it

    def __len__(self) -> int:
        return len(self.valid)

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        """A column [N] by name; raises KeyError naming those that exist."""
        positions = _POSITIONS[self.two_frame]
        if column not in positions:
            other = _POSITIONS[not self.two_frame].get(column)
            why = "" if other is None else (
                " (scored with two-frame extended comfort)" if self.two_frame
                else " (each scene was scored alone, without two-frame extended comfort)"
            )  # fmt: skip
            raise KeyError(f"PdmResult has no column {column!r}{why}; there are {', '.join(positions)}")
        return self.values[:, positions[column]]

    def __getattr__(self, name: str) -> NDArray[np.float64]:
        if name.startswith("__"):  # copying asks before there are fields
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    @property
    def columns(self) -> dict[str, NDArray[np.float64]]:
        """All columns [N] by name, as views."""
        return {name: self.values[:, i] for name, i in _POSITIONS[self.two_frame].items()}

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
        for name in (name for name in _POSITIONS[self.two_frame] if name in METRICS):
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
