"""What stage 3 asks of a policy, and all that it is told of what a policy did.

Three kinds of policy are reinforced by the same code: a diffusion planner (its decisions are denoising steps), a
vision-language model (words) and a traffic model (motion tokens). Credit, update, module, monitors and checkpoints know
only what stands here.

Legend: S starts (scenes, prompts), N rows (one chain, one answer, one road user's drive), K decisions of a row, padded
to the longest; n rows of an update, M rows of a teacher with L decisions each.

    roll(batch, G, key, needs) -> PolicyRollout      G samples of every start, with their rewards
    decide(rollout, rows, teach) -> DecisionScores  log-probabilities of the same decisions under the present weights

Rows of one ``group`` are compared with each other. All rows of a start belong to one minibatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from navsim_ext.errors import TriviumError

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from stage3_grpo.algorithm import Algorithm


class WrongPolicy(TriviumError):
    """An algorithm asks what this kind of policy cannot give."""


class NoValidReward(TriviumError):
    """Nothing of a batch could be scored."""


class Key(NamedTuple):
    """Keys all noise of a rollout, together with a start's name and a sample's index: results depend on neither the
    process nor the batch that a start is in."""

    seed: int
    rollout: int


@dataclass(frozen=True)
class Needs:
    """What an algorithm, and the record of this rollout, want beside samples and rewards.

    ``old``: log-probabilities of the sampling policy (several updates follow). ``reference``: those of the frozen
    reference, or what an exact KL takes. ``value``: values of the value head. ``once``: one update of all rows
    follows, so what was computed with gradients may serve it. ``teach``: a teacher is cloned.
    """

    old: bool
    reference: bool
    value: bool
    once: bool
    teach: bool = True


class RewardPart(NamedTuple):
    """One of several rewards that are added: ``reward`` [N], its ``weight``, and the decisions it is credited to
    (``scope`` [N,K] bool; None: all)."""

    name: str
    reward: Tensor
    weight: float = 1.0
    scope: Tensor | None = None


@dataclass(frozen=True)
class PolicyRollout:
    """G samples of S starts on this process: the trace that credit and losses are made of.

    ``reward`` [N] (of the whole row) or [N,K] (of each decision), 0 where not ``valid``: what cannot be scored is no
    low reward. ``mask`` [N,K]: decisions that were made (not padding). ``parts`` are the summands of a reward [N],
    where it has several. ``weight`` [K] or [N,K]: how much a decision counts in the policy's term (None: alike).
    ``taught`` [M,L]: decisions of the teacher's rows, ``teaches`` [M] the start of each; None: there is no teacher.
    ``own``: whatever the policy wants to find again in :meth:`Policy.decide`.
    """

    names: Sequence[str]  # [S] of the starts
    start: Tensor  # [N] int64 place in ``names``
    group: Tensor  # [N] int64 in 0 ... N - 1
    mask: Tensor  # [N,K] bool
    reward: Tensor  # [N] or [N,K] float32
    valid: Tensor  # [N] bool
    own: Any
    logp_old: Tensor | None = None  # [N,K]
    logp_ref: Tensor | None = None  # [N,K]
    value_old: Tensor | None = None  # [N,K]
    weight: Tensor | None = None
    parts: tuple[RewardPart, ...] = ()
    taught: Tensor | None = None
    teaches: Tensor | None = None
    reasons: Sequence[str] = ()  # why rows are invalid, for messages

    @property
    def num_rows(self) -> int:
        return len(self.mask)


class DecisionScores(NamedTuple):
    """Under the present weights, with gradients; under a False ``PolicyRollout.mask`` anything may stand."""

    logp: Tensor  # [n,K]
    value: Tensor | None = None  # [n,K], of the value head
    teacher_logp: Tensor | None = None  # [m,L] of the teacher's rows of the same starts, in their order
    kl_exact: Tensor | None = None  # [n,K] KL to the reference of each decision, where it can be computed


class HeldOut(Protocol):
    """Figures of held-out starts over a validation epoch, beside the reference's."""

    def start(self) -> None: ...

    def add(self, batch: Any) -> None:
        """Plans, answers or drives one batch."""
        ...

    def finish(self, trainer: pl.Trainer) -> dict[str, float]:
        """Means over all held-out starts, each counted once; NaN: unknown. Collective."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Policy(Protocol):
    """A policy in training with its frozen reference, its rewards and its records."""

    name: str
    rows_at_once: int | None
    """Rows that one :meth:`decide` takes (None: all): memory, not the result."""

    def build(self, datamodule: Any, algorithm: Algorithm, seed: int) -> Mapping[str, nn.Module]:
        """Loads everything and returns the modules by the names that their weights have in checkpoints; raises for
        what does not fit together, before any step. The first call alone loads."""
        ...

    def parameters(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """What learns: "policy" and, where there is one, "value"."""
        ...

    def begin(self, datamodule: Any, device: Any) -> None:
        """Checks data and scorers and moves the reference, before the first step."""
        ...

    def roll(self, batch: Any, group_size: int, key: Key, needs: Needs) -> PolicyRollout:
        """Samples and scores; without gradients into the samples."""
        ...

    def decide(self, rollout: PolicyRollout, rows: Tensor, *, teach: bool) -> DecisionScores:
        """Scores the decisions of ``rows`` [n] again (all rows of their starts, or a part of them with
        ``rows_at_once``); with ``teach`` the teacher's rows of the starts whose first row is among them."""
        ...

    def statistics(self, rollout: PolicyRollout) -> dict[str, float]:
        """Numbers of a rollout for the record, over all processes, asked when it was learned from. Collective."""
        ...

    def after_update(self, updates: int) -> None:
        """Called when ``updates`` rollouts have been learned from: a reference may drift."""
        ...

    def held_out(self) -> HeldOut: ...

    def not_finite(self, what: str, value: float, trainer: pl.Trainer, rollout: PolicyRollout) -> TriviumError:
        """The error of a loss that is NaN or infinite; leaves a file that names the starts."""
        ...

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(records at the top of a checkpoint by which other commands know the policy; what a resume compares)."""
        ...

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Raises unless the reference, scorer and the like are those of a checkpoint's ``state``."""
        ...
