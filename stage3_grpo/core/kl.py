"""KL(pi || pi_ref) of each decision, [N,K], estimated from samples of pi or exact.

Legend: d = logp_ref - logp of a sampled decision. Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def k1(logp: Float[Tensor, "*any"], logp_ref: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """-d: unbiased as a value; its gradient is that of logp alone, so the pull vanishes in expectation.

    To weigh it in a loss use :func:`k3` or :func:`gaussian_kl`; to weigh it in the reward use this.
    """
    return logp - logp_ref


def k3(logp: Float[Tensor, "*any"], logp_ref: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """e^d - d - 1 >= 0: unbiased, low variance; 0 exactly where the policies agree."""
    d = logp_ref - logp
    return torch.expm1(d) - d


def gaussian_kl(mean: Tensor, std: Tensor, mean_ref: Tensor, std_ref: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(mean_ref, std_ref^2)) elementwise:

    log(std_ref / std) + (std^2 + (mean - mean_ref)^2) / (2 std_ref^2) - 1/2
    """
    return torch.log(std_ref / std) + (std**2 + (mean - mean_ref) ** 2) / (2.0 * std_ref**2) - 0.5
