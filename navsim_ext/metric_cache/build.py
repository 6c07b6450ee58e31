"""Builds a metric cache: ``python -m navsim_ext.metric_cache.build data.root=DATASET data.split=SPLIT output_dir=DIR``.

``data.split_config=DATASET/config/train_test_split/NAME.yaml`` instead of ``data.split`` caches both stages of a
two-stage split of NAVSIM 2.

Can be killed at any moment and run again; the finished folder is byte-identical whatever the number of workers and
the order of logs. It holds the merged shards, ``maps/<location>`` polygon tables, ``report.json`` (what could not be
cached and why) and ``logs.jsonl``.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import remove_temporaries
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.metric_cache import journal
from navsim_ext.metric_cache.journal import Invalid, LogResult
from navsim_ext.metric_cache.schema import KIND, MAPS_FOLDER, cache_fields
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.metric_cache.worker import LogWorker
from navsim_ext.readers import NothingSelected, configured_filter
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.workers import KINDS, spread
from navsim_ext.scene import SYNTHETIC_TOKEN_LENGTH
from navsim_ext.shards import ShardWriter, merge

logger = logging.getLogger(__name__)

SCENES_PER_SECOND = 10.0  # per core, of both versions; only for the estimate that is told beforehand
RECORD_BYTES = 60_000


class NothingCached(TriviumError):
    """Not one scene could be cached."""


def build(
    settings: BuildSettings,
    *,
    workers: str = "sequential",
    num_workers: int | None = None,
    ray_address: str | None = None,
) -> dict[str, Any]:
    """Builds (or goes on building) the cache in ``settings.output_dir``; returns the content of ``report.json``.

    Raises NothingCached, MissingError for absent data, FingerprintMismatch when the folder holds another cache,
    FolderBusy when another build is at work in it, WorkerDied when a worker was killed.
    """
    if workers not in KINDS:
        raise DataError(f"workers={workers}: one of {', '.join(KINDS)} was expected")
    count = num_workers if num_workers is not None else os.cpu_count() or 1
    if count < 1:
        raise DataError(f"num_workers={num_workers}: at least 1 is needed")
    cache = Path(settings.output_dir)
    with FolderLock(cache):
        fingerprint = cache_fingerprint(settings)
        log_names = list(settings.log_files())
        with ShardWriter(cache, fingerprint, writer="start") as writer:  # checks the folder, finishes open shards
            stored = set(writer.done)
        finished = journal.finished_logs(cache, stored)
        remaining = [name for name in log_names if name not in finished]
        tell_cost(settings, remaining, len(finished), len(stored), count if workers != "sequential" else 1)
        results = [finished[name] for name in log_names if name in finished]
        make = partial(LogWorker, settings, fingerprint)
        workers = workers if remaining else "sequential"
        made = spread(
            make, remaining, kind=workers, num_workers=min(count, len(remaining) or 1), ray_address=ray_address
        )
        results += _progress((result for _, result in made), len(finished), log_names)
        results += _unreadable(settings)
        results += _absent_tokens(settings, results)
        merge(cache)
        sweep(cache)
        report = journal.write_report(cache, results)
    if not report["cached"]:
        raise NothingCached(
            f"{cache}: 0 scenes were cached of {len(log_names)} logs; {report['invalid']} were invalid "
            f"{report['counts']}, listed in {cache / journal.REPORT_FILE}"
        )
    return report


def sweep(cache: Path) -> None:
    """Removes what killed writers of maps and reports left half written; only the holder of the folder's lock may."""
    for folder in (cache, *(cache / MAPS_FOLDER).glob("*/")):
        remove_temporaries(folder)


def cache_fingerprint(settings: BuildSettings) -> Fingerprint:
    """What the cache is made of; the doctor's verdict on this machine stands in ``info``."""
    from navsim_ext.pdm.arithmetic import verdict

    return Fingerprint(kind=KIND, fields=cache_fields() | {"data": settings.identity()}, info={"doctor": verdict()})


def tell_cost(settings: BuildSettings, remaining: Sequence[str], finished: int, stored: int, num_workers: int) -> None:
    """Logs an estimate of time and disk before the work, from the windows of the first remaining log."""
    if not remaining:
        logger.info("%s: all %d logs are done", settings.output_dir, finished)
        return
    try:
        _, scenes = next(settings.open_logs(remaining[0]).logs())
        per_log = len(scenes)
    except NothingSelected:
        per_log = 0
    estimate = per_log * len(remaining)
    if settings.tokens is not None:
        estimate = min(estimate, len(settings.tokens) - stored) if per_log else len(settings.tokens) - stored
    needed, free = estimate * RECORD_BYTES, shutil.disk_usage(settings.output_dir).free
    logger.info(
        "%s: %d logs (%d done before), about %d scenes, %.0f s on %d workers, %.2f GB of %.1f GB free",
        settings.output_dir, len(remaining), finished, estimate, estimate / SCENES_PER_SECOND / num_workers,
        num_workers, needed / 1e9, free / 1e9,
    )  # fmt: skip
    if 2 * needed > free:  # merging writes a second copy before it removes the first
        logger.warning(
            "the disk of %s may be too small: about %.2f GB are needed", settings.output_dir, 2 * needed / 1e9
        )


def _progress(results: Iterator[LogResult], done: int, log_names: Sequence[str]) -> Iterator[LogResult]:
    from navsim_ext.runtime.progress import track

    return track(results, "metric cache, logs", total=len(log_names), done=done)


def _unreadable(settings: BuildSettings) -> list[LogResult]:
    """Second-stage files that could not be read, as invalid entries of no log."""
    bad = tuple(Invalid(None, type(error).__name__, str(error)) for _, error in settings.unreadable())
    return [LogResult("", (), bad)] if bad else []


def _absent_tokens(settings: BuildSettings, results: Sequence[LogResult]) -> list[LogResult]:
    """Tokens that were asked for and that no log of the split has, as invalid entries of no log."""
    if settings.tokens is None:
        return []
    known = {token for result in results for token in result.cached}
    known |= {entry.token for result in results for entry in result.invalid if entry.token is not None}
    absent = [token for token in settings.tokens if token not in known]
    if not absent:
        return []
    recorded = f"no window of {settings.split} has this token (wrong split, or too close to the ends of its log)"
    unreadable = settings.unreadable()
    simulated = f"no file of the second stage {settings.second_stage} has this token"
    if unreadable:
        simulated += f"; {len(unreadable)} of its files cannot be read, first: {unreadable[0][1]}"
    entries = (
        Invalid(token, "MissingError", simulated if len(token) == SYNTHETIC_TOKEN_LENGTH else recorded)
        for token in absent
    )
    return [LogResult("", (), tuple(entries))]


def settings_from(cfg: DictConfig) -> BuildSettings:
    """Settings of a composed configuration; raises MissingError when no data root or split is given."""
    data = cfg.data
    if data.root is None:
        raise MissingError("data.root is not set: give data.root=... or the variable OPENSCENE_DATA_ROOT")
    if data.split_config is not None:
        changed = [f"data.{key}={data[key]}" for key in ("split", "scene_filter") if data[key] is not None]
        if changed:
            raise DataError(f"data.split_config says which scenes there are; leave {', '.join(changed)} out")
        return BuildSettings.two_stage(
            data.root, data.split_config, cfg.output_dir, maps_root=data.maps_root, second_stage=data.second_stage
        )
    if data.split is None:
        raise MissingError("no split: set data.split=NAME, or data.split_config=FILE for both stages of NAVSIM 2's")
    return BuildSettings.from_filter(
        data.root, data.split, cfg.output_dir, maps_root=data.maps_root, scene_filter=configured_filter(data)
    )


@job("metric_cache")
def main(cfg: DictConfig) -> None:
    started = time.perf_counter()
    report = build(settings_from(cfg), workers=cfg.workers, num_workers=cfg.num_workers, ray_address=cfg.ray_address)
    logger.info(
        "%s: %d scenes cached, %d invalid %s, %.1f s", cfg.output_dir, report["cached"], report["invalid"],
        report["counts"], time.perf_counter() - started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
