"""HiddenCacheWriter: stores the states of samples, one writer id per process, resumable after a kill at any moment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache.codecs import states_to_bits
from navsim_ext.hidden_cache.pooling import Spans
from navsim_ext.hidden_cache.prefix import prefix_digest, write_prefix
from navsim_ext.hidden_cache.record import CacheSettings, encode_record, require_finite, stored_shape
from navsim_ext.shards import ShardWriter
from navsim_ext.shards.container import read_index
from navsim_ext.shards.names import finished_shards
from navsim_ext.shards.shard import Shard
from navsim_ext.shards.writer import SHARD_BYTES


class HiddenCacheWriter:
    """Writes a cache of hidden states.

    ``fingerprint`` says what computes the states (VLM weights, prompt template, image settings). ``prefix`` [P,D] are
    the states of a prompt prefix that was run once and whose keys and values every sample reused; then ``put`` takes
    the states after it. With ``skip_bad`` samples with bad states are counted and listed in ``rejected`` and in
    ``rejected-<writer>.json`` instead of raised.

    Raises what :class:`navsim_ext.shards.ShardWriter` raises.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: Fingerprint,
        *,
        codec: str = "bf16",
        compression: str | None = None,
        pooling: str | None = None,
        pad_to: int | None = None,
        prefix: Tensor | np.ndarray | None = None,
        writer: str = "0",
        skip_bad: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        bits = None if prefix is None else states_to_bits(prefix)
        if bits is not None:
            require_finite("(prefix)", bits)
        self.settings = CacheSettings(
            codec, compression, pooling, pad_to, None if bits is None else prefix_digest(bits)
        )
        self.folder = Path(folder)
        self.skip_bad = skip_bad
        self.rejected: dict[str, str] = {}
        self._shards = ShardWriter(
            folder, self.settings.fingerprint(fingerprint), writer=writer, shard_bytes=shard_bytes
        )
        if bits is not None:
            write_prefix(self.folder, bits)
        self.width: int | None = bits.shape[1] if bits is not None else self._stored_width()

    @property
    def done(self) -> set[str]:
        """Tokens that the folder holds already."""
        return self._shards.done

    def put(self, token: str, states: Tensor | np.ndarray, *, image_spans: Spans = (), padding: int = 0) -> bool:
        """Stores the states [L,D] of one sample; when this returns True, a kill -9 does not lose it.

        ``image_spans``: where its image tokens are, [start, stop) of whole tiles (needed to pool, now or later).
        ``padding``: rows of left padding, in the published layout only.

        Raises DataError for NaN, infinity, a width that differs (with ``skip_bad``: returns False and lists it),
        DuplicateToken, StorageFull.
        """
        try:
            arrays = encode_record(token, states, self.settings, image_spans=image_spans, padding=padding)
            width = stored_shape(arrays, self.settings)[1]
            if self.width not in (None, width):
                raise DataError(f"token {token}: width {width}, this cache has {self.width}; one VLM gives one width")
        except DataError as error:
            if not self.skip_bad:
                raise
            self.rejected[token] = str(error)
            write_json_atomic(self.folder / f"rejected-{self._shards.writer}.json", self.rejected)
            return False
        self.put_encoded(token, arrays)
        return True

    def put_encoded(self, token: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Stores a record that is encoded under the settings of this cache already."""
        self.width = stored_shape(arrays, self.settings)[1]
        self._shards.put(token, arrays)

    def close(self) -> None:
        """Finishes the open shard: all records become visible to readers."""
        self._shards.close()

    def abandon(self) -> None:
        """Frees the writer id without finishing the open shard; the next writer or merge does that."""
        self._shards.abandon()

    def __enter__(self) -> HiddenCacheWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._shards.__exit__(*exception)

    def _stored_width(self) -> int | None:
        """Width of the records that the folder holds already, from one of them."""
        for path in finished_shards(self.folder):
            if read_index(path)[0].tokens:
                shard = Shard(path, self._shards.fingerprint)
                return stored_shape(shard.arrays(0), self.settings)[1]
        return None
