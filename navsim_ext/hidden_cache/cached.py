"""CachedHiddenStates: the cache as a source of padded batches.

Legend: B samples, L tokens of the longest, D width, P tokens of the shared prefix (L includes them).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache.buffers import BufferPool
from navsim_ext.hidden_cache.codecs import bits_to_states, codec_named
from navsim_ext.hidden_cache.prefix import read_prefix
from navsim_ext.hidden_cache.record import CacheSettings, stored_parts, stored_shape
from navsim_ext.hidden_cache.schema import HiddenBatch, PackedHiddenBatch
from navsim_ext.hidden_cache.source import dtype_named
from navsim_ext.shards import ShardStore
from navsim_ext.shards.store import Check

Arrays = Mapping[str, np.ndarray]


class CachedHiddenStates:
    """Reads a cache; usable from DataLoader workers.

    ``decode``: ``"host"`` gives a HiddenBatch; ``"device"`` gives a PackedHiddenBatch, whose ``to(device)`` moves the
    encoded bytes and decodes there. ``dtype``: bfloat16 or float32, of what comes out. ``pin_memory``: batches lie in
    page-locked memory (without a GPU it changes nothing; leave it to the DataLoader when that has workers).
    ``mask_padding`` (published layout): hide the rows of left padding, which published weights did see.
    ``read_ahead``: ask the kernel for all records of a batch before the first is copied, so that a cold disk or network
    file system works on them at once; on a warm cache it costs a quarter of the copying.
    ``threads``: how many copy or decode the rows of a batch at once (the compiled loops hold no lock of Python's). In
    the main process, together with ``pin_memory``, they are faster than DataLoader workers, which copy each batch once
    more through fresh shared memory.
    ``check``: as for :class:`navsim_ext.shards.ShardStore`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        decode: Literal["host", "device"] = "host",
        dtype: str | torch.dtype = torch.bfloat16,
        pin_memory: bool = False,
        mask_padding: bool = False,
        read_ahead: bool = False,
        threads: int = 1,
        check: Check = "first",
    ) -> None:
        if decode not in ("host", "device"):
            raise DataError(f"decode={decode!r}: states are decoded on the 'host' or the 'device'")
        if threads < 1:
            raise DataError(f"threads={threads}: at least one has to read")
        self.store = ShardStore(folder, check=check)
        self.settings = CacheSettings.of(self.store.fingerprint)
        self.decode, self.dtype, self.mask_padding = decode, dtype_named(dtype), mask_padding
        self.read_ahead, self.threads = read_ahead, threads
        self._executor: tuple[int, ThreadPoolExecutor] | None = None  # and the process that it belongs to
        digest = self.settings.prefix
        self.prefix = None if digest is None else read_prefix(Path(folder), digest)  # uint16 bits [P,D]
        self._codec = codec_named(self.settings.codec)
        self._pool = BufferPool(pin_memory=pin_memory)

    @property
    def fingerprint(self) -> Fingerprint:
        """What a planner compares: see :func:`navsim_ext.hidden_cache.source.states_fingerprint`."""
        return self.store.fingerprint.parents["states"]

    @property
    def tokens(self) -> list[str]:
        return self.store.tokens

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, token: object) -> bool:
        return token in self.store

    def fetch(self, tokens: Sequence[str]) -> HiddenBatch | PackedHiddenBatch:
        """States of these samples, padded on the right with zeros.

        Raises MissingError for a token that is not in the cache, CorruptShard for damaged bytes, DataError when
        widths differ.
        """
        if self.read_ahead:
            self.store.prefetch(tokens)
        records = list(self._map(self.store.get, tokens))
        shapes = [stored_shape(record, self.settings) for record in records]
        widths = {width for _, width in shapes} | ({self.prefix.shape[1]} if self.prefix is not None else set())
        if len(widths) != 1:
            raise DataError(f"{self.store.folder}: hidden states of widths {sorted(widths)} in one batch; run verify")
        lengths = np.array([length for length, _ in shapes])
        build = self._on_device if self.decode == "device" else self._on_host
        return build(records, lengths, widths.pop())

    def shape(self, token: str) -> tuple[int, int]:
        """(L, D) of a sample with the shared prefix; reads the index alone."""
        shard, row = self.store.locate(token)
        length, width = stored_shape(shard.arrays(row), self.settings)
        return length + (0 if self.prefix is None else len(self.prefix)), width

    def _on_host(self, records: Sequence[Arrays], lengths: np.ndarray, width: int) -> HiddenBatch:
        shared = 0 if self.prefix is None else len(self.prefix)
        out = self._pool.take((len(records), shared + int(lengths.max()), width), np.uint16)

        def fill(row: np.ndarray, record: Arrays, length: int) -> None:
            if self.prefix is not None:
                row[:shared] = self.prefix
            self._codec.decode_into(stored_parts(record, self.settings), row[shared : shared + length])
            row[shared + length :] = 0

        list(self._map(fill, out, records, lengths.tolist()))
        hidden = torch.from_numpy(out).view(torch.bfloat16)
        mask = self._mask(records, shared + lengths, out.shape[1])
        return HiddenBatch(hidden if self.dtype == torch.bfloat16 else hidden.to(self.dtype), mask)

    def _on_device(self, records: Sequence[Arrays], lengths: np.ndarray, width: int) -> PackedHiddenBatch:
        longest, parts = int(lengths.max()), {}
        encoded = list(self._map(lambda record: stored_parts(record, self.settings), records))

        def fill(row: np.ndarray, part: np.ndarray) -> None:
            row[: len(part)] = part
            row[len(part) :] = 0

        for name in self._codec.parts:
            columns = encoded[0][name].shape[1]
            out = self._pool.take((len(records), longest, columns), encoded[0][name].dtype)
            list(self._map(fill, out, [one[name] for one in encoded]))
            parts[name] = torch.from_numpy(out)
        prefix = None if self.prefix is None else bits_to_states(self.prefix)
        return PackedHiddenBatch(self.settings.codec, parts, self._mask(records, lengths, longest), prefix, self.dtype)

    def _map(self, function: Callable[..., Any], *columns: Iterable[Any]) -> Iterable[Any]:
        """``map`` over the rows of a batch, in threads where there are several."""
        if self.threads == 1:
            return map(function, *columns)
        if self._executor is None or self._executor[0] != os.getpid():  # threads do not survive a fork
            self._executor = (os.getpid(), ThreadPoolExecutor(self.threads, "hidden-cache"))
        return self._executor[1].map(function, *columns)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_executor": None}

    def _mask(self, records: Sequence[Arrays], lengths: np.ndarray, longest: int) -> torch.Tensor:
        """[B,L] bool: right padding is never visible, left padding of the published layout unless mask_padding."""
        column = np.arange(longest)[None, :]
        mask = column < lengths[:, None]
        if self.mask_padding and self.settings.pad_to is not None:
            mask &= column >= np.array([record["padding"] for record in records])[:, None]
        return torch.from_numpy(mask)
