"""r = sum_i w_i x_i over the configured terms, with validity; what cannot be scored has no reward.

Legend: S scenes, N trajectories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.pdm.reward import RewardWeights
from navsim_ext.pdm.version import require_traffic
from stage3_grpo.rewards.kinematics import PlannedMotion, motion, reverses, stands
from stage3_grpo.rewards.terms import MotionTerm, PdmTerm

if TYPE_CHECKING:
    from navsim_ext.pdm import PdmResult

Array = NDArray[np.float64]
TAIL_INTERVALS = 2  # of the "reverse tail": the last second of the plan
SCORERS_REWARD = "reward"  # the scorer's column of that name is the PDM term in its weighting, not what is trained on


class Scorer(Protocol):
    """What a reward needs of a scorer."""

    def submit(
        self, tokens: Sequence[str], trajectories: Array, reward: RewardWeights | None = None, **scoring: str
    ) -> Future[PdmResult]: ...


@dataclass(frozen=True)
class Scores:
    """Of N trajectories: ``reward``, ``valid``, the values of each term, and ``columns`` for the record (NaN: unknown).

    Among the columns: every sub-score, ``judge`` (the score that is not trained on), ``reverse_tail``, ``standing``.
    """

    reward: Array
    valid: NDArray[np.bool_]
    terms: Mapping[str, Array]
    columns: Mapping[str, Array]
    reasons: tuple[str, ...]  # why a row is invalid; empty text where it is not
    seconds: float


class Reward:
    """``score``: the PDM term (None: trajectory terms only); ``terms``: named trajectory terms; ``traffic``: what the
    other road users do while v2 is scored (log_replay, reactive, constant_velocity)."""

    def __init__(
        self, score: PdmTerm | None, terms: Mapping[str, MotionTerm] | None = None, traffic: str = "log_replay"
    ) -> None:
        self.traffic = require_traffic(traffic)
        if traffic != "log_replay" and (score is None or score.version != "v2"):
            raise DataError(
                f"reward.traffic={traffic} is NAVSIM 2's, and this reward has no v2 score: take reward=epdms, or "
                "reward.score.version=v2"
            )
        self.score = score
        self.terms = {name: term for name, term in (terms or {}).items() if term is not None}
        if self.score is None and not self.terms:
            raise DataError("a reward needs the PDM term or at least one trajectory term")
        idle = [name for name, term in self.terms.items() if term.weight == 0]
        if idle:
            raise DataError(f"reward terms {idle} have weight 0 and no effect: remove them (null) or weigh them")

    @property
    def scoring(self) -> dict[str, str]:
        """What the scorer is told besides the weights: nothing, where traffic is as recorded."""
        return {} if self.traffic == "log_replay" else {"traffic": self.traffic}

    @property
    def judge(self) -> str:
        return (self.score or PdmTerm()).judge

    def submit(
        self, scorer: Scorer, tokens: Sequence[str], trajectories: Array, history: Array, status: Array
    ) -> PendingScores:
        """Starts scoring [N,F,3]; ``history`` [N,H,3] and ``status`` [N,8] are those of each row's scene."""
        if not np.isfinite(trajectories).all():
            rows = np.flatnonzero(~np.isfinite(trajectories).reshape(len(trajectories), -1).all(1))
            raise DataError(f"the policy produced trajectories that are not finite, first for token {tokens[rows[0]]}")
        weights = self.score.weights if self.score else None
        future = scorer.submit(tokens, trajectories, weights, **self.scoring)
        return PendingScores(self, future, trajectories, history, status)

    def finish(self, pdm: PdmResult, moved: PlannedMotion, trajectories: Array) -> Scores:
        values = {name: term.value(moved) for name, term in self.terms.items()}
        valid = pdm.valid.copy()
        reward = np.zeros(len(trajectories))
        if self.score is not None:
            base = pdm[self.score.column]
            valid &= np.isfinite(base)
            values = {"score": base} | values
            reward += self.score.weight * np.where(valid, base, 0.0)
        for name, term in self.terms.items():
            reward += term.weight * values[name]
        columns = {name: value for name, value in pdm.columns.items() if name != SCORERS_REWARD}
        columns["judge"] = pdm[self.judge]
        columns["reverse_tail"] = reverses(trajectories, last=TAIL_INTERVALS).astype(float)
        columns["standing"] = stands(trajectories).astype(float)
        return Scores(np.where(valid, reward, np.nan), valid, values, columns, tuple(pdm.reason), pdm.seconds)


@dataclass(frozen=True)
class PendingScores:
    """Scores on their way."""

    reward: Reward
    future: Future[PdmResult]
    trajectories: Array
    history: Array
    status: Array

    def result(self) -> Scores:
        """Waits for the scorer; motion terms are computed here meanwhile."""
        moved = motion(self.trajectories, self.history, self.status)
        return self.reward.finish(self.future.result(), moved, self.trajectories)
