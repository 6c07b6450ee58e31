"""Random numbers addressed by what they are for, so that samples do not depend on rank, batch, order or device.

A row's numbers come from the counter-based generator Philox 4x64, keyed by a hash of (seed, step, token, sample index).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from navsim_ext.errors import DataError

POSE_CHANNELS = 3


@dataclass(frozen=True)
class ChainNoise:
    """Standard normal draws of R chains: ``initial`` [R,F,3], ``steps`` [R,K,F,3]; float32, not clipped."""

    initial: Float[Tensor, "R F 3"]
    steps: Float[Tensor, "R K F 3"]

    def __post_init__(self) -> None:
        if self.initial.shape[0] != self.steps.shape[0] or self.initial.shape[1:] != self.steps.shape[2:]:
            raise DataError(f"noise of shapes {tuple(self.initial.shape)} and {tuple(self.steps.shape)} do not belong "
                            "together; [R,F,3] and [R,K,F,3] were expected")  # fmt: skip

    def to(self, device: torch.device | str) -> ChainNoise:
        return ChainNoise(self.initial.to(device), self.steps.to(device))


def row_generator(seed: int, step: int, token: str, sample: int) -> np.random.Generator:
    """The generator of one row; equal keys give equal numbers on every machine."""
    key = hashlib.blake2b(f"{seed}/{step}/{token}/{sample}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))


def keyed_noise(
    seed: int, step: int, tokens: Sequence[str], *, group_size: int, num_steps: int, horizon: int
) -> ChainNoise:
    """Noise of len(tokens) x group_size rows, scene-major; ``step`` is the training step (0 for evaluation)."""
    shape = (num_steps + 1, horizon, POSE_CHANNELS)
    rows = [
        row_generator(seed, step, token, sample).standard_normal(shape, dtype=np.float32)
        for token in tokens
        for sample in range(group_size)
    ]
    noise = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)
    return ChainNoise(noise[:, 0], noise[:, 1:])


def keyed_generator(seed: int, step: int, purpose: str, index: int = 0) -> torch.Generator:
    """A torch CPU generator for one purpose of one step (``index``: the rank), for draws whose shape is the batch's."""
    key = hashlib.blake2b(f"{seed}/{step}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
