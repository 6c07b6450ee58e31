"""python -m navsim_ext.hidden_cache.verify folder=CACHE: every byte, every record, one width."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from navsim_ext import shards
from navsim_ext.errors import TriviumError
from navsim_ext.hidden_cache.cached import CachedHiddenStates
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from navsim_ext.shards.verify import Track


def verify(folder: str | os.PathLike[str], *, progress: Track = iter) -> shards.VerifyReport:
    """Checks the store (see :func:`navsim_ext.shards.verify`), the shared prefix, and that there is one width."""
    report = shards.verify(folder, track=progress)
    if not report.ok:
        return report
    problems: list[str] = []
    try:
        cache = CachedHiddenStates(folder)
        widths: dict[int, str] = {}
        for token in cache.tokens:
            widths.setdefault(cache.shape(token)[1], token)
        if cache.prefix is not None:
            widths.setdefault(cache.prefix.shape[1], "(prefix)")
        if len(widths) > 1:
            found = ", ".join(f"{width} (token {token})" for width, token in sorted(widths.items()))
            problems.append(f"{folder}: records of different widths: {found}; they come from different VLMs")
    except TriviumError as error:
        problems.append(str(error))
    return dataclasses.replace(report, problems=tuple(problems))


@job("hidden_cache/verify")
def main(cfg: DictConfig) -> None:
    report = verify(Path(cfg.folder), progress=lambda paths: track(paths, "verify")).require_ok()
    Console().print(
        f"{cfg.folder}: {report.records:,} records in {report.shards} shards, {report.data_bytes / 1e9:.3f} GB: every "
        f"byte is as written ({report.identical_duplicates} records twice with the same bytes)",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
