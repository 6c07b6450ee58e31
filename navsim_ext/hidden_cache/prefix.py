"""The constant prompt prefix of a causal model, stored once for a whole cache.

Only for an exporter that ran the prefix once and reused its keys and values: then all samples share these states by
construction. Prefix states recomputed inside batches of other lengths differ by rounding and are stored with each
sample instead. The cache's fingerprint holds the prefix's digest, so two different ones cannot meet in one folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from navsim_ext.errors import MissingError
from navsim_ext.files import write_atomic
from navsim_ext.shards import CorruptShard

FILE_NAME = "prefix.safetensors"
TENSOR = "prefix_bf16"  # uint16 bits [P,D]


def prefix_digest(bits: np.ndarray) -> str:
    """SHA-256 hex of shape and values of the bits [P,D]."""
    return hashlib.sha256(repr(bits.shape).encode() + np.ascontiguousarray(bits, "<u2").tobytes()).hexdigest()


def write_prefix(folder: Path, bits: np.ndarray) -> None:
    """Writes the prefix atomically; all writers of a folder write the same bytes."""
    write_atomic(folder / FILE_NAME, safetensors_numpy.save({TENSOR: bits}))


def read_prefix(folder: Path, digest: str) -> np.ndarray:
    """The prefix bits [P,D]; raises MissingError, or CorruptShard when any byte of the file is not as written."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise MissingError(f"{path} is missing: this cache shares a prompt prefix; restore it or export again")
    content = path.read_bytes()
    try:
        bits = safetensors_numpy.load(content)[TENSOR]
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptShard(f"{path}: is damaged ({error}); restore it or export again") from error
    if prefix_digest(bits) != digest or safetensors_numpy.save({TENSOR: bits}) != content:
        found = prefix_digest(bits)[:12]
        raise CorruptShard(
            f"{path}: has digest {found}, the cache was made with {digest[:12]}; restore or export again"
        )
    return bits
