"""python -m navsim_ext.hidden_cache.merge folder=CACHE [sources=[A,B]]: one canonical form of what writers left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from navsim_ext import shards
from navsim_ext.hidden_cache.prefix import FILE_NAME, read_prefix, write_prefix
from navsim_ext.hidden_cache.record import CacheSettings
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from navsim_ext.shards.identity import read_identity
from navsim_ext.shards.merge import Parts


def merge(
    folder: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]] = (),
    *,
    accept_missing: bool = False,
    progress: Parts = iter,
) -> shards.MergeReport:
    """:func:`navsim_ext.shards.merge`, and the shared prefix comes along into a new folder."""
    folder = Path(folder)
    report = shards.merge(folder, sources, accept_missing=accept_missing, track=progress)
    digest = CacheSettings.of(read_identity(folder)[0]).prefix
    if digest is not None and not (folder / FILE_NAME).is_file() and sources:
        write_prefix(folder, read_prefix(Path(sources[0]), digest))
    return report


@job("hidden_cache/merge")
def main(cfg: DictConfig) -> None:
    report = merge(
        cfg.folder,
        list(cfg.sources),
        accept_missing=cfg.accept_missing,
        progress=lambda parts: track(parts, "merge"),
    )
    Console().print(
        f"{cfg.folder}: {report.records:,} records in {report.parts} parts, {report.data_bytes / 1e9:.3f} GB; "
        f"{report.parts_written} parts written, {report.shards_removed} shards removed, "
        f"{report.identical_duplicates} identical duplicates dropped",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
