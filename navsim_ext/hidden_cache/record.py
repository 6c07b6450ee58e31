"""One sample in the cache: from states [L,D] to named arrays and back, under the settings of the cache.

| array | when | meaning |
|---|---|---|
| codec's parts (``bf16``; ``int8`` or ``fp8`` with ``scale``) | always, ``.zst``/``.shape`` with zstd | the states |
| ``error`` float32 | lossy codecs | relative error of this record against bf16 |
| ``image`` int64 [S,2] | the exporter told | spans of image tokens, before pooling |
| ``padding`` int64 | published layout | rows of left padding among the states |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import kernels
from navsim_ext.hidden_cache.codecs import bits_to_states, codec_named, relative_error, states_to_bits
from navsim_ext.hidden_cache.compression import check_compression, compress, decompress
from navsim_ext.hidden_cache.pooling import Spans, check_pooling, check_spans, pool_image_tokens
from navsim_ext.hidden_cache.source import states_fingerprint

KIND = "hidden_cache"


@dataclass(frozen=True)
class CacheSettings:
    """How a cache stores states; all of it is in the cache's fingerprint."""

    codec: str = "bf16"
    compression: str | None = None  # "zstd"
    pooling: str | None = None  # "image_2x2"
    pad_to: int | None = None  # published layout: rows as published weights saw them, left padding included
    prefix: str | None = None  # digest of the shared prefix

    def __post_init__(self) -> None:
        codec_named(self.codec)
        check_compression(self.compression)
        check_pooling(self.pooling)
        if self.pad_to is not None and (self.pooling or self.prefix):
            raise DataError(
                f"pad_to={self.pad_to} keeps rows as published weights saw them, left padding first: it goes neither "
                "with pooling nor with a shared prefix"
            )

    def fingerprint(self, vlm: Fingerprint) -> Fingerprint:
        """The cache's own fingerprint; its parent ``states`` is what planners compare."""
        states = states_fingerprint(vlm, codec=self.codec, pooling=self.pooling, pad_to=self.pad_to)
        return Fingerprint(KIND, asdict(self), parents={"states": states})

    @classmethod
    def of(cls, fingerprint: Fingerprint) -> CacheSettings:
        """Settings of a cache; raises DataError when the store holds something else."""
        if fingerprint.kind != KIND:
            raise DataError(f"a store of kind {fingerprint.kind!r} is not a hidden-state cache ({KIND!r})")
        return cls(**fingerprint.fields)


def encode_record(
    token: str, states: Tensor | np.ndarray, settings: CacheSettings, *, image_spans: Spans = (), padding: int = 0
) -> dict[str, np.ndarray]:
    """Arrays of one sample. Raises DataError for a wrong shape, NaN or infinite values, or misplaced spans."""
    if states.ndim != 2 or not len(states):
        raise DataError(f"token {token}: states must be [L,D] with L >= 1, are {tuple(states.shape)}")
    check_spans(image_spans, len(states))
    if settings.pad_to is None and padding:
        raise DataError(f"token {token}: {padding} rows of padding in an unpadded cache; cut them off, or set pad_to")
    if settings.pad_to is not None and not (len(states) >= settings.pad_to and 0 <= padding < len(states)):
        raise DataError(
            f"token {token}: {len(states)} rows, {padding} of them padding; the published layout has at least "
            f"pad_to={settings.pad_to} rows and one token"
        )
    if settings.pooling:
        if not len(image_spans):
            raise DataError(
                f"token {token}: pooling {settings.pooling} needs image_spans, the places of its image tokens"
            )
        states = pool_image_tokens(torch.as_tensor(states), image_spans)
    bits = states_to_bits(states)
    require_finite(token, bits)
    parts, error = encode_with_error(bits, settings.codec)
    arrays = compress(parts) if settings.compression else dict(parts)
    if error is not None:
        arrays["error"] = np.array(error, np.float32)
    if len(image_spans):
        arrays["image"] = np.array(image_spans, np.int64)
    if settings.pad_to is not None:
        arrays["padding"] = np.array(padding, np.int64)
    return arrays


def encode_with_error(bits: np.ndarray, codec_name: str) -> tuple[dict[str, np.ndarray], float | None]:
    """The codec's parts of bits [L,D] and their relative error against these bits; None for a lossless codec."""
    codec = codec_named(codec_name)
    parts = codec.encode(bits)
    if codec.lossless:
        return parts, None
    decoded = np.empty_like(bits)
    codec.decode_into(parts, decoded)
    return parts, relative_error(bits, decoded)


def stored_parts(arrays: Mapping[str, np.ndarray], settings: CacheSettings) -> Mapping[str, np.ndarray]:
    """The codec's parts of a record, decompressed where they are compressed."""
    return decompress(arrays, codec_named(settings.codec).parts) if settings.compression else arrays


def stored_shape(arrays: Mapping[str, np.ndarray], settings: CacheSettings) -> tuple[int, int]:
    """(L, D) of a record, without reading its states."""
    main = next(iter(codec_named(settings.codec).parts))
    shape = arrays[main + ".shape"].tolist() if settings.compression else arrays[main].shape
    return int(shape[0]), int(shape[1])


def decode_record(arrays: Mapping[str, np.ndarray], settings: CacheSettings) -> Tensor:
    """bfloat16 [L,D] of a record, without a shared prefix."""
    out = np.empty(stored_shape(arrays, settings), np.uint16)
    codec_named(settings.codec).decode_into(stored_parts(arrays, settings), out)
    return bits_to_states(out)


def require_finite(token: str, bits: np.ndarray) -> None:
    """Raises DataError naming the first row with NaN or infinite values, and how many rows have any."""
    if kernels.largest_magnitude(bits.reshape(-1)) >= kernels.EXPONENT:
        rows = np.flatnonzero(((bits & kernels.MAGNITUDE) >= kernels.EXPONENT).any(1))
        raise DataError(
            f"token {token}: states are NaN or infinite in {len(rows)} of {len(bits)} rows, first in row {rows[0]}: "
            "the VLM overflowed (run it in bfloat16 or float32, not float16) or its weights are damaged"
        )
