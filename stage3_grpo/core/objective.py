"""The loss of a step, put together from the terms that a configuration weighs.

    L = L_policy + beta KL + w_bc L_bc + w_v L_v

The seed's form E[log(pi / pi_ref) A] + beta KL has the gradient of ``surrogate="reinforce"`` with a KL term: log pi_ref
is constant in the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from stage3_grpo.core.kl import k1, k3
from stage3_grpo.core.reduce import masked_mean, sequence_mean
from stage3_grpo.core.surrogates import PolicyTerm, clipped_ratio, reinforce

Surrogate = Literal["reinforce", "clip"]
RatioLevel = Literal["step", "trajectory"]
Averaging = Literal["token", "sequence"]


@dataclass(frozen=True)
class Objective:
    """``surrogate``; ``ratio_level`` "step": one ratio per decision, "trajectory": one of the means over decisions.

    ``averaging`` "token": one mean over all decisions that count; "sequence": of the means over each row's decisions.
    """

    surrogate: Surrogate = "reinforce"
    ratio_level: RatioLevel = "step"
    clip_low: float = 0.2
    clip_high: float = 0.2
    averaging: Averaging = "token"

    @property
    def counts_rows(self) -> bool:
        """Whether the terms are means over rows, so that rows are what a ``count`` must count."""
        return self.ratio_level == "trajectory" or self.averaging == "sequence"

    def policy(
        self,
        logp: Float[Tensor, "N K"],
        logp_old: Float[Tensor, "N K"],
        advantage: Float[Tensor, "N K"],
        mask: Bool[Tensor, "N K"],
        count: Tensor | float | None = None,
    ) -> PolicyTerm:
        """The policy term for logp, logp_old and (already discounted) advantage [N,K].

        At trajectory level the means over a trajectory's decisions take the place of its decisions; ``count`` then
        counts trajectories, and so it does with sequence averaging.
        """
        if self.ratio_level == "trajectory":
            steps = mask.sum(dim=1, keepdim=True)
            average = lambda value: value.masked_fill(~mask, 0.0).sum(1, keepdim=True) / steps.clamp_min(1)  # noqa: E731
            logp, logp_old, advantage = average(logp), average(logp_old), average(advantage)
            mask = steps > 0
        mean = sequence_mean if self.averaging == "sequence" else masked_mean
        if self.surrogate == "reinforce":
            return reinforce(logp, advantage, mask, count, mean)
        return clipped_ratio(
            logp, logp_old, advantage, mask, clip_low=self.clip_low, clip_high=self.clip_high, count=count, mean=mean
        )


def sampled_kl(
    form: Literal["k1", "k3"],
    logp: Float[Tensor, "N K"],
    logp_ref: Float[Tensor, "N K"],
    mask: Bool[Tensor, "N K"],
    count: Tensor | float | None = None,
    averaging: Averaging = "token",
) -> Float[Tensor, ""]:
    """Mean KL to the reference over decisions, []."""
    estimate = {"k1": k1, "k3": k3}[form](logp, logp_ref.detach())
    return (sequence_mean if averaging == "sequence" else masked_mean)(estimate, mask, count)
