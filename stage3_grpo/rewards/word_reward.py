"""r = sum_i w_i x_i over the configured terms of words, with validity; what cannot be scored has no reward.

A reply that cannot be read is not one that cannot be scored: the model wrote it, so it gets the configured penalty
(never more than the worst readable reply), and is counted.

Legend: N replies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from stage3_grpo.rewards.replies import Array, Prompted, Replies
from stage3_grpo.rewards.reward import Scorer
from stage3_grpo.rewards.terms import PdmTerm
from stage3_grpo.rewards.word_terms import Credit, PlanningQuality, WordTerm

if TYPE_CHECKING:
    from navsim_ext.pdm import PdmResult

CREDITS = ("all", "decision", "trajectory")


@dataclass(frozen=True)
class WordsPdm:
    """The PDM score of the trajectory that a reply writes. ``penalty`` (<= 0): of a reply without a readable one."""

    score: PdmTerm
    penalty: float = -0.1
    weight: float = 1.0
    credit: Credit = "all"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.penalty) and self.penalty <= 0.0):
            raise DataError(f"penalty is {self.penalty}: a reply that cannot be read must not earn more than one that "
                            "crashes (0), so a number <= 0 was expected")  # fmt: skip


class WordPart(NamedTuple):
    """Values of one term [N] (0 where invalid), its weight, and the tokens that it is credited to."""

    name: str
    value: Array
    weight: float
    credit: Credit


@dataclass(frozen=True)
class WordScores:
    """Of N replies: the weighted sum ``reward`` (NaN where not ``valid``), its ``parts``, ``columns`` to record."""

    reward: Array
    valid: NDArray[np.bool_]
    parts: tuple[WordPart, ...]
    columns: Mapping[str, Array]
    reasons: tuple[str, ...]


class WordReward:
    """``terms``: named terms of words; ``pdm``: the scorer's term, which needs a metric cache."""

    def __init__(self, terms: Mapping[str, WordTerm] | None = None, pdm: WordsPdm | None = None) -> None:
        self.terms = {name: term for name, term in (terms or {}).items() if term is not None}
        self.pdm = pdm
        if not self.terms and pdm is None:
            raise DataError("a reward of words needs the PDM term or at least one term of words")
        everything = [*self.terms.items(), *([("pdm", pdm)] if pdm else [])]
        if "pdm" in self.terms:
            raise DataError("a term of words cannot be called pdm: that is the scorer's")
        for name, term in everything:
            if term.credit not in CREDITS:
                raise DataError(f"reward term {name}: credit {term.credit!r} does not exist; one of {CREDITS}")
            if not (math.isfinite(term.weight) and term.weight > 0.0):
                raise DataError(f"reward term {name} has weight {term.weight}: a positive number, or null without it")

    def with_frequencies(self, weights: Mapping[str, float]) -> WordReward:
        """The reward whose terms that weigh by frequency have these weights."""
        filled = {name: term.with_frequencies(weights) if isinstance(term, PlanningQuality) else term
                  for name, term in self.terms.items()}  # fmt: skip
        return WordReward(filled, self.pdm)

    @property
    def everything(self) -> list[WordTerm | WordsPdm]:
        return [*self.terms.values(), *([self.pdm] if self.pdm else [])]

    @property
    def weighs_by_frequency(self) -> bool:
        return any(getattr(term, "weights", None) == "frequency" for term in self.terms.values())

    def require_labels(self, prompts: Sequence[Prompted]) -> None:
        """Raises DataError naming the first question that lacks what a term compares with."""
        nothing = Replies([""] * len(prompts), prompts, np.arange(len(prompts)), np.zeros(len(prompts), dtype=bool))
        for term in self.terms.values():
            term.value(nothing)

    @property
    def needs_scorer(self) -> bool:
        return self.pdm is not None

    def submit(self, scorer: Scorer | None, replies: Replies) -> PendingWordScores:
        """Starts scoring; raises DataError for a reward without a label, and where a scorer is needed and missing."""
        if self.pdm is None:
            return PendingWordScores(self, replies, None, np.zeros(0, dtype=np.int64))
        if scorer is None:
            raise DataError("the reward scores trajectories, which needs a metric cache: set policy.metric_cache")
        rows = np.array([row for row, plan in enumerate(replies.planned) if plan.valid], dtype=np.int64)
        future = None
        if len(rows):
            tokens = [replies.prompts[row].token for row in rows]
            poses = np.stack([replies.planned[row].poses for row in rows])
            future = scorer.submit(tokens, poses, self.pdm.score.weights)
        return PendingWordScores(self, replies, future, rows)

    def finish(self, replies: Replies, result: PdmResult | None, rows: NDArray[np.int64]) -> WordScores:
        valid, reasons = np.ones(len(replies), dtype=bool), [""] * len(replies)
        parts: list[WordPart] = []
        columns: dict[str, Array] = {}
        for name, term in self.terms.items():
            value = term.value(replies)
            for row in np.flatnonzero(~np.isfinite(value)):
                valid[row], reasons[row] = False, f"term {name} is {value[row]}"
            parts.append(WordPart(name, np.where(np.isfinite(value), value, 0.0), term.weight, term.credit))
        if self.pdm is not None:
            value = np.full(len(replies), self.pdm.penalty)
            if result is not None:
                known = result.valid & np.isfinite(result[self.pdm.score.column])
                for row, good, reason in zip(rows, known, result.reason, strict=True):
                    if not good:
                        valid[row], reasons[row] = False, str(reason) or "no score of this version"
                value[rows] = np.where(known, result[self.pdm.score.column], 0.0)
            columns = self._columns(len(replies), result, rows)
            parts.append(WordPart("pdm", value, self.pdm.weight, self.pdm.credit))
        reward = sum(part.weight * part.value for part in parts)
        return WordScores(np.where(valid, reward, np.nan), valid, tuple(parts), columns, tuple(reasons))

    def _columns(self, count: int, result: PdmResult | None, rows: NDArray[np.int64]) -> dict[str, Array]:
        """Every sub-score [N]; NaN where there was nothing to score."""
        from navsim_ext.pdm.columns import COLUMNS_ALONE  # loads the kernels

        columns = {name: np.full(count, np.nan) for name in COLUMNS_ALONE if name != "reward"}
        if result is not None:
            for name in columns.keys() & result.columns.keys():
                columns[name][rows] = np.where(result.valid, result[name], np.nan)
        columns["judge"] = columns[self.pdm.score.judge]
        return columns


@dataclass(frozen=True)
class PendingWordScores:
    """Scores on their way."""

    reward: WordReward
    replies: Replies
    future: Future[PdmResult] | None
    rows: NDArray[np.int64]

    def result(self) -> WordScores:
        """Waits for the scorer; the terms of words are computed then."""
        result = None if self.future is None else self.future.result()
        return self.reward.finish(self.replies, result, self.rows)
