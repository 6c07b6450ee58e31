"""The pull to the frozen reference, as a choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stage3_grpo.algorithm.errors import AlgorithmError
from stage3_grpo.algorithm.schedule import AdaptiveWeight, Schedule

FORMS = ("k1", "k3", "exact")


@dataclass(frozen=True)
class KlPenalty:
    """beta KL(pi || pi_ref), estimated from the sampled decisions (k1, k3) or exact (policies that can compute it).

    ``weight``: beta, by the clock or adaptive to a target.
    """

    form: Literal["k1", "k3", "exact"] = "k3"
    weight: Schedule | AdaptiveWeight = field(default_factory=lambda: Schedule(0.1))

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise AlgorithmError(f"kl form {self.form!r} does not exist; one of {', '.join(FORMS)}")
