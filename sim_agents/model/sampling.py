"""Choosing tokens: top-k, top-p and temperature, with random numbers that belong to who chooses, not to the batch.

Legend: [...] any shape, V tokens. A choice needs one uniform number, a hash of (seed, scene, rollout, road user,
step): the same scene gives the same rollouts alone or in a batch, on one process or on many.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from navsim_ext.errors import DataError
from sim_agents.model import kernels
from sim_agents.model.relations import compiled

_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685
"""The multipliers of SplitMix64's finaliser as signed numbers."""
_GOLDEN = -7046029254386353131


@dataclass(frozen=True)
class Sampling:
    """``top_k`` most probable tokens (0: all) that make up ``top_p`` of the probability, at ``temperature``; 0 takes
    the most probable one."""

    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0.0 < self.top_p <= 1.0 or not 0.0 <= self.temperature < float("inf"):
            raise DataError(f"{self}: top_k >= 0, 0 < top_p <= 1 and temperature >= 0 were expected")

    def log_probabilities(self, logits: Float[Tensor, "*any V"]) -> Float[Tensor, "*any V"]:
        """ln p [..., V] of the distribution that is sampled from; -inf for tokens that are left out."""
        return self._shaped(logits).log_softmax(dim=-1)

    def _shaped(self, logits: Tensor) -> Tensor:
        """Logits [..., V] whose softmax is the distribution."""
        if self.temperature == 0.0:
            best = logits.argmax(dim=-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1.0:
            probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
            before = probability.cumsum(dim=-1) - probability
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            logits = logits.masked_fill(dropped, -torch.inf)
        return logits

    def sample(
        self, logits: Float[Tensor, "*any V"], uniform: Float[Tensor, "*any"]
    ) -> tuple[Int64[Tensor, "*any"], Float[Tensor, "*any"]]:
        """Tokens [...] by the inverse of the distribution at ``uniform`` [...] in [0, 1), and their ln p [...]."""
        if compiled(logits) and not logits.requires_grad:
            return _choose(self._shaped(logits), uniform)
        logp = self.log_probabilities(logits)
        cumulative = logp.double().exp().cumsum(dim=-1)
        # The last token with a probability ends where the sum ends, however it was rounded.
        reached = cumulative > (uniform.double() * cumulative[..., -1])[..., None]
        tokens = reached.int().argmax(dim=-1)
        return tokens, logp.gather(-1, tokens[..., None])[..., 0]


def _choose(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.empty(uniform.shape, dtype=torch.int64)
    logp = torch.empty(uniform.shape)
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    kernels.choose(flat.numpy(), uniform.double().flatten().numpy(), tokens.view(-1).numpy(), logp.view(-1).numpy())
    if (tokens < 0).any():
        raise DataError("a road user's logits are not finite: the model that made them is broken (NaN weights?)")
    return tokens, logp


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64: every bit of the result depends on every bit of ``x``."""
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def text_key(text: str) -> int:
    """A signed 64-bit number of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def keyed_uniform(*parts: Tensor | int) -> Tensor:
    """Uniform float64 numbers in [0, 1) of int64 parts that broadcast; equal parts give equal numbers."""
    state: Tensor = torch.zeros((), dtype=torch.int64)
    for part in parts:
        state = _mixed((state ^ torch.as_tensor(part, dtype=torch.int64)) + _GOLDEN)
    return _shifted(state, 11).double() * 2.0**-53
