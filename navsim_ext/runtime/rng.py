"""Randomness that is a pure function of where training stands, so that resuming needs nothing to be restored.

Deviation from the usual callback that stores generator states: a stored state is only right if everything between
saving and the next batch (iterator creation, sanity checks, a validation that is skipped or run again) draws exactly
as often as it did before. Here every batch of every rank starts from its own seed instead:

    seed = SHA-256(base, rank, kind, index)[:63 bits],   kind in {batch, epoch, validation}

so a run that was killed and continued draws the same numbers, with dropout, under DDP and whatever happened between.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from navsim_ext.errors import TriviumError


class ResumeMismatch(TriviumError):
    """A run was about to continue from a checkpoint that another configuration, data set or machine size made."""


def derive_seed(*parts: int | str) -> int:
    """63-bit seed from any integers and strings; different parts give independent streams."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_all(seed: int) -> None:
    """Seeds the global generators of python, numpy and torch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - libraries draw from this legacy global state
    torch.manual_seed(seed)
