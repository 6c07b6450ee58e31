"""Rewards of words: pure functions of what was said, what was driven, and what the others of the group said.

Legend: N replies, groups of G. For an axis x (speed, path): P_x the actions that a reply names, T_x the driven one.

    AlphaDrive (arXiv:2503.07608), paper:  r = Q_speed + Q_path + format,  Q_x = F1_x W_x D_x
    F1_x = 2 |P & T| / (|P| + |T|)     W_x = mean weight of P_x     D_x = 1 - 0.2 (c - 1) / (G - 1)

c counts the members of the group that name the same set. The paper gives no curve for D, only its bound of 20 %; this
one is ours. Everything is read inside ``<answer>``, never in the reasoning.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from navsim_ext.errors import DataError
from navsim_ext.questions.meta_actions import PATHS, SPEEDS, decide
from stage3_grpo.rewards.replies import Array, Replies

Axis = Literal["speed", "path"]
Credit = Literal["all", "decision", "trajectory"]
ACTIONS: dict[str, tuple[str, ...]] = {"speed": SPEEDS, "path": PATHS}
PUBLISHED_WEIGHTS = {
    "KEEP": 0.8, "ACCELERATE": 0.9, "DECELERATE": 1.0, "STOP": 1.0,
    "STRAIGHT": 0.8, "LEFT_TURN": 1.0, "RIGHT_TURN": 1.0, "LEFT_CHANGE": 1.0, "RIGHT_CHANGE": 1.0,
}  # fmt: skip
NAMED_WEIGHTS = {"published": PUBLISHED_WEIGHTS, "none": dict.fromkeys(PUBLISHED_WEIGHTS, 1.0)}


class WordTerm(Protocol):
    """A summand of a reward of words. ``credit``: which tokens of a reply it is credited to."""

    weight: float
    credit: Credit

    def value(self, replies: Replies) -> Array:
        """[N]; NaN where it is not known."""
        ...


def f1(predicted: frozenset[str], true: frozenset[str]) -> float:
    """2 |P & T| / (|P| + |T|); 0 where nothing is named."""
    return 2.0 * len(predicted & true) / (len(predicted) + len(true)) if predicted and true else 0.0


def mean_weight(actions: frozenset[str], weights: Mapping[str, float]) -> float:
    """Mean weight of the actions; 0 for none."""
    return sum(weights[action] for action in actions) / len(actions) if actions else 0.0


def diversity(said: Sequence[frozenset[str]], group: Sequence[int], most: float) -> Array:
    """[N] D = 1 - most (c - 1) / (G - 1); 1 in a group of one. The order of the rows does not matter."""
    together = Counter(zip(group, said, strict=True))
    sizes = Counter(group)
    shares = [(together[g, s] - 1) / (sizes[g] - 1) if sizes[g] > 1 else 0.0 for g, s in zip(group, said, strict=True)]
    return 1.0 - most * np.array(shares, dtype=np.float64)


def require_honest(weights: Mapping[str, float], axis: Axis, most: float) -> None:
    """Raises DataError for a table under which naming more actions than the right one could pay.

    For each driven action t, even when the whole group says it: (1 - most) w_t > F1 W of every larger set with t.
    """
    actions = ACTIONS[axis]
    missing = [action for action in actions if not 0.0 < weights.get(action, 0.0) <= 1.0]
    if missing:
        raise DataError(f"weights of {missing} must be numbers in (0, 1]: {dict(weights)}")
    for true in actions:
        others = [action for action in actions if action != true]
        for more in (set(c) for k in range(1, len(actions)) for c in itertools.combinations(others, k)):
            named = frozenset(more | {true})
            hedged = f1(named, frozenset({true})) * mean_weight(named, weights)
            if hedged >= (1.0 - most) * weights[true]:
                raise DataError(
                    f"under these weights naming {sorted(named)} pays {hedged:.3f} where {true} alone may pay "
                    f"{(1.0 - most) * weights[true]:.3f}: bring the weights nearer together or lower diversity"
                )


@dataclass(frozen=True)
class PlanningQuality:
    """Q_x = F1_x W_x D_x of one axis; ``diversity``: the most that agreement costs (0: no such term).

    ``weights``: by action, ``published``, ``none`` (all 1), or ``frequency``: those of the training data, which
    :meth:`with_frequencies` puts in.
    """

    axis: Axis
    weights: Mapping[str, float] | str = "published"
    diversity: float = 0.2
    weight: float = 1.0
    credit: Credit = "all"

    def __post_init__(self) -> None:
        if self.axis not in ACTIONS:
            raise DataError(f"axis {self.axis!r}: speed or path was expected")
        if not 0.0 <= self.diversity <= 0.2:
            raise DataError(f"diversity is {self.diversity}; at most 20 % can be taken: [0, 0.2]")
        if self.weights != "frequency":
            require_honest(self.table, self.axis, self.diversity)

    @property
    def table(self) -> Mapping[str, float]:
        """Weight of each action; raises DataError for a name that is no table."""
        if not isinstance(self.weights, str):
            return self.weights
        if self.weights not in NAMED_WEIGHTS:
            raise DataError(f"weights {self.weights!r}: {', '.join(NAMED_WEIGHTS)} or a table of all actions; weights "
                            "of the frequency are those of a training data set")  # fmt: skip
        return NAMED_WEIGHTS[self.weights]

    def with_frequencies(self, weights: Mapping[str, float]) -> PlanningQuality:
        return replace(self, weights=dict(weights)) if self.weights == "frequency" else self

    def value(self, replies: Replies) -> Array:
        said = [stated.speeds if self.axis == "speed" else stated.paths for stated in replies.stated]
        true = [frozenset({getattr(label, self.axis)}) for label in replies.labels(f"reward {self.axis} quality")]
        table = self.table
        quality = [f1(p, t) * mean_weight(p, table) for p, t in zip(said, true, strict=True)]
        return np.array(quality) * diversity(said, replies.group.tolist(), self.diversity)


@dataclass(frozen=True)
class PlanningAccuracy:
    """1 where exactly the two driven words are stated, else 0: the measure of evaluation as a reward."""

    weight: float = 1.0
    credit: Credit = "all"

    def value(self, replies: Replies) -> Array:
        labels = replies.labels("reward accuracy")
        said = [stated.decision for stated in replies.stated]
        return np.array([float(one == label) for one, label in zip(said, labels, strict=True)])


@dataclass(frozen=True)
class WellFormed:
    """1 where the whole reply is ``<think>...</think><answer>...</answer>``, with something in both; else 0."""

    weight: float = 1.0
    credit: Credit = "all"

    def value(self, replies: Replies) -> Array:
        return np.array([float(reply.well_formed) for reply in replies.read])


@dataclass(frozen=True)
class ReleasedQuality:
    """Of one axis in the form of AlphaDrive's released code, faults included: for comparison, not for use.

        r = F1 W + d,   d = +bonus if no named action was named by an *earlier* reply of the group, else -bonus

    Faults, kept: an answer without any valid word gets +bonus (nothing named was named before), more than a wrong
    answer that repeats; the order of the samples changes their rewards; words are looked up before their punctuation
    is stripped, so ``STRAIGHT.`` is no action. Declared difference: words are looked for inside ``<answer>`` alone.
    """

    axis: Axis
    bonus: float = 0.4
    weight: float = 1.0
    credit: Credit = "all"

    def value(self, replies: Replies) -> Array:
        labels = replies.labels("the released reward")
        seen: dict[int, set[str]] = {}
        values = []
        for reply, label, group in zip(replies.read, labels, replies.group.tolist(), strict=True):
            pieces = (piece.strip().upper() for piece in (reply.answer or "").split(","))
            said = frozenset(piece for piece in pieces if piece in ACTIONS[self.axis])
            earlier = seen.setdefault(group, set())
            new = all(action not in earlier for action in said)
            earlier |= said
            quality = f1(said, frozenset({getattr(label, self.axis)})) * mean_weight(said, PUBLISHED_WEIGHTS)
            values.append(quality + (self.bonus if new else -self.bonus))
        return np.array(values)


@dataclass(frozen=True)
class DecisionAgreement:
    """1 where the decision that is stated is that of the trajectory that follows it, else 0; 0 where either is missing.

    Best credited to the trajectory: it is to do what was decided, not the other way round.
    """

    weight: float = 1.0
    credit: Credit = "all"

    def value(self, replies: Replies) -> Array:
        return agreement(replies, "reward agreement")


def agreement(replies: Replies, asked_by: str) -> Array:
    """[N] 0 or 1."""
    values = np.zeros(len(replies))
    for row, (speed, road) in enumerate(replies.roads(asked_by)):
        said, plan = replies.stated[row].decision, replies.planned[row].poses
        if said is not None and plan is not None:
            values[row] = decide(plan, speed, road) == said
    return values
