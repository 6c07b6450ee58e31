"""python -m navsim_ext.hidden_cache.reencode source=CACHE output_dir=DIR codec=int8_g128: the same states, smaller."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.errors import DataError
from navsim_ext.hidden_cache.cached import CachedHiddenStates
from navsim_ext.hidden_cache.codecs import bits_to_states, codec_named
from navsim_ext.hidden_cache.compression import compress
from navsim_ext.hidden_cache.record import CacheSettings, decode_record, encode_record, stored_parts
from navsim_ext.hidden_cache.writer import HiddenCacheWriter
from navsim_ext.runtime.config import job
from navsim_ext.runtime.preflight import measure_slice, preflight
from navsim_ext.runtime.progress import track
from navsim_ext.shards.writer import SHARD_BYTES


def reencode(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    codec: str = "bf16",
    compression: str | None = None,
    pooling: str | None = None,
    writer: str = "0",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> int:
    """Writes a cache of the same states under other settings; goes on where an earlier run ended. Returns the number
    of records written by this run.

    From bf16 to anything; a lossy or pooled cache can only change its compression, since a second loss would stand
    on the first without any fingerprint saying so. Raises DataError for that, and for pooling without image spans.
    """
    cache = CachedHiddenStates(source)
    target = replace(cache.settings, codec=codec, compression=compression, pooling=pooling)
    require_possible(cache, target)
    tokens = cache.tokens
    if not tokens:
        raise DataError(f"{source}: nothing to encode, the cache holds no finished record (after a kill run merge)")

    def convert(token: str) -> dict[str, np.ndarray]:
        return converted(token, cache.store.get(token), cache.settings, target)

    prefix = None if cache.prefix is None else bits_to_states(cache.prefix)
    with HiddenCacheWriter(
        output_dir,
        cache.fingerprint.parents["vlm"],
        codec=codec,
        compression=compression,
        pooling=pooling,
        pad_to=target.pad_to,
        prefix=prefix,
        writer=writer,
        shard_bytes=shard_bytes,
    ) as out:
        missing = [token for token in tokens if token not in out.done]
        if missing:
            preflight(
                output_dir=output_dir,
                items=len(missing),
                bytes_per_item=sum(array.nbytes for array in convert(missing[0]).values()),
                seconds_per_item=measure_slice(convert, missing[:8], budget_s=1.0),
                title=f"reencode to {codec}",
            )
        for token in progress(missing):
            out.put_encoded(token, convert(token))
    return len(missing)


def require_possible(cache: CachedHiddenStates, target: CacheSettings) -> None:
    """Raises DataError unless the target's values can be made from the source's without a second loss."""
    source = cache.settings
    if (source.codec, source.pooling) == (target.codec, target.pooling):
        return
    if not codec_named(source.codec).lossless or source.pooling:
        raise DataError(
            f"{cache.store.folder}: holds codec={source.codec} pooling={source.pooling}, asked for is "
            f"codec={target.codec} pooling={target.pooling}: only its compression can change; start from the bf16 cache"
        )


def converted(
    token: str, arrays: Mapping[str, np.ndarray], source: CacheSettings, target: CacheSettings
) -> dict[str, np.ndarray]:
    """A record under the target's settings; values are untouched where only the compression changes."""
    if (source.codec, source.pooling) == (target.codec, target.pooling):
        parts = {name: stored_parts(arrays, source)[name] for name in codec_named(source.codec).parts}
        others = {name: arrays[name] for name in ("error", "image", "padding") if name in arrays}
        return (compress(parts) if target.compression else parts) | others
    spans = [tuple(span) for span in arrays["image"].tolist()] if "image" in arrays else ()
    padding = int(arrays["padding"]) if "padding" in arrays else 0
    return encode_record(token, decode_record(arrays, source), target, image_spans=spans, padding=padding)


@job("hidden_cache/reencode")
def main(cfg: DictConfig) -> None:
    written = reencode(
        cfg.source,
        cfg.output_dir,
        codec=cfg.codec,
        compression=cfg.compression,
        pooling=cfg.pooling,
        writer=str(cfg.writer),
        progress=lambda tokens: track(tokens, "reencode"),
    )
    Console().print(
        f"{cfg.output_dir}: {written:,} records written, codec={cfg.codec}", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
