"""python -m navsim_ext.hidden_cache.stats folder=CACHE: bytes, tokens, and the codec's error against bf16."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.errors import DataError
from navsim_ext.files import read_json
from navsim_ext.hidden_cache.cached import CachedHiddenStates
from navsim_ext.hidden_cache.codecs import CODECS, states_to_bits
from navsim_ext.hidden_cache.record import CacheSettings, decode_record, encode_with_error
from navsim_ext.runtime.config import job
from navsim_ext.shards.records import RECORD_ALIGNMENT


@dataclass(frozen=True)
class CodecFigures:
    """Size and error of a codec on the sampled records."""

    bytes_per_sample: float
    error_mean: float  # relative, Frobenius, against bf16
    error_max: float


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds. ``codecs``: its own figures; for a bf16 cache also what every other codec would give."""

    samples: int
    width: int
    prefix_tokens: int
    tokens_min: int
    tokens_mean: float
    tokens_max: int
    file_bytes: int
    shards: int
    identical_duplicates: int
    rejected: int
    settings: CacheSettings
    sampled: int
    codecs: dict[str, CodecFigures]


def stats(folder: str | os.PathLike[str], *, sample: int = 32) -> CacheStats:
    """Counts all records and looks at the states of ``sample`` of them, evenly spaced.

    Raises DataError for an empty cache.
    """
    cache = CachedHiddenStates(folder)
    if not len(cache):
        raise DataError(f"{folder}: the cache holds no finished record; export into it, or run merge after a kill")
    tokens = cache.tokens
    lengths = [cache.shape(token)[0] for token in tokens]
    chosen = [tokens[i] for i in np.unique(np.linspace(0, len(tokens) - 1, max(1, sample)).astype(int))]
    held = cache.store.stats()
    return CacheStats(
        samples=len(cache),
        width=cache.shape(tokens[0])[1],
        prefix_tokens=0 if cache.prefix is None else len(cache.prefix),
        tokens_min=min(lengths),
        tokens_mean=float(np.mean(lengths)),
        tokens_max=max(lengths),
        file_bytes=held.file_bytes,
        shards=held.shards,
        identical_duplicates=held.identical_duplicates,
        rejected=sum(len(read_json(path)) for path in Path(folder).glob("rejected-*.json")),
        settings=cache.settings,
        sampled=len(chosen),
        codecs=codec_figures(cache, chosen),
    )


def codec_figures(cache: CachedHiddenStates, tokens: list[str]) -> dict[str, CodecFigures]:
    """Figures of the cache's own codec as it stores, then, where the states are at hand, of the others uncompressed."""
    own = [cache.store.get(token) for token in tokens]
    errors = [float(record["error"]) if "error" in record else 0.0 for record in own]
    sizes = [cache.store.record_bytes(token) for token in tokens]
    name = cache.settings.codec + (f" + {cache.settings.compression}" if cache.settings.compression else "")
    figures = {name: CodecFigures(float(np.mean(sizes)), float(np.mean(errors)), max(errors))}
    if cache.settings.codec != "bf16":
        return figures
    width = decode_record(own[0], cache.settings).shape[1]
    for other in CODECS.values():
        if other.name == "bf16" or width % (getattr(other, "group", None) or 1):
            continue
        errors, sizes = [], []
        for record in own:
            parts, error = encode_with_error(states_to_bits(decode_record(record, cache.settings)), other.name)
            errors.append(error)
            sizes.append(sum(part.nbytes + -part.nbytes % RECORD_ALIGNMENT for part in parts.values()))
        figures[other.name] = CodecFigures(float(np.mean(sizes)), float(np.mean(errors)), max(errors))
    return figures


def table(found: CacheStats) -> list[Table]:
    """The figures as two tables for a terminal."""
    facts = Table("cache", "", show_header=False)
    mean_bytes, settings = found.file_bytes / found.samples, asdict(found.settings)
    for name, value in (
        ("samples", f"{found.samples:,} in {found.shards} shards"),
        ("settings", ", ".join(f"{key}={str(value)[:12]}" for key, value in settings.items() if value is not None)),
        ("tokens", f"{found.tokens_min:,} to {found.tokens_max:,}, mean {found.tokens_mean:,.1f}"),
        ("shared prefix", f"{found.prefix_tokens:,} tokens"),
        ("width", f"{found.width:,}"),
        ("bytes", f"{found.file_bytes / 1e9:,.3f} GB, {mean_bytes / 1e6:,.3f} MB a sample"),
        ("twice", f"{found.identical_duplicates:,} (identical)"),
        ("rejected", f"{found.rejected:,}"),
    ):
        facts.add_row(name, value)
    codecs = Table(f"codec ({found.sampled} samples)")
    for name in ("MB a sample", "error mean", "error max"):
        codecs.add_column(name, justify="right")
    for name, figures in found.codecs.items():
        codecs.add_row(
            name, f"{figures.bytes_per_sample / 1e6:.3f}", f"{figures.error_mean:.5f}", f"{figures.error_max:.5f}"
        )
    return [facts, codecs]


@job("hidden_cache/stats")
def main(cfg: DictConfig) -> None:
    found = stats(cfg.folder, sample=cfg.sample)
    console = Console()
    for one in table(found):
        console.print(one)


if __name__ == "__main__":
    main()
