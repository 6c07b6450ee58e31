"""Filters as choices: which rows are learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stage3_grpo.algorithm.advantage import Credited
from stage3_grpo.algorithm.errors import AlgorithmError
from stage3_grpo.core import spread_mask


class RowFilter(Protocol):
    """``compares``: it looks at groups."""

    compares: bool

    def __call__(self, given: Credited) -> Tensor:
        """[N] bool: rows that are kept."""
        ...


@dataclass(frozen=True)
class ZeroSpread:
    """Leaves out groups whose rewards agree (std <= ``minimum``): they have advantage 0 and only dilute the mean."""

    minimum: float = 0.0
    compares = True

    def __post_init__(self) -> None:
        if self.minimum < 0:
            raise AlgorithmError(f"minimum is {self.minimum}: a standard deviation cannot be below 0")

    def __call__(self, given: Credited) -> Tensor:
        return spread_mask(given.whole, given.group, given.valid, self.minimum)
