"""Scores a table of trajectories, in this process, over processes or over Ray: the second half of scoring.

Rows are split by log, because two-frame comfort pairs scenes of one log; the result does not depend on the split.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from typing import Literal

import numpy as np
import pandas as pd

from navsim_ext.errors import DataError, MissingError
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import score, score_pairs
from navsim_ext.pdm.columns import RewardWeights
from navsim_ext.runtime.processes import process_pool
from navsim_ext.runtime.progress import track

Workers = Literal["sequential", "processes", "ray"]
ROWS_PER_PART = 2048


def score_part(
    table: pd.DataFrame, metric_cache: str | MetricCache, two_frame: bool, reward: RewardWeights | None, threads: int
) -> pd.DataFrame:
    """Score rows of one part, in its order: the columns of ``table`` but ``poses``, then validity and scores."""
    cache = MetricCache(metric_cache) if isinstance(metric_cache, str) else metric_cache
    tokens = table["token"].tolist()
    poses = np.stack([np.asarray(row, dtype=np.float64).reshape(-1, 3) for row in table["poses"]])
    if two_frame:
        names = table["name"].tolist()
        result = score_pairs(tokens, poses, cache, names=names, reward=reward, threads=threads or None)
    else:
        result = score(tokens, poses, cache, reward=reward, threads=threads or None)
    scores = result.to_frame().drop(columns="token")
    return pd.concat([table.drop(columns="poses").reset_index(drop=True), scores], axis=1)


def score_table(
    table: pd.DataFrame,
    metric_cache: str | os.PathLike[str],
    *,
    two_frame: bool = True,
    reward: RewardWeights | None = None,
    workers: Workers = "sequential",
    num_workers: int = 1,
    ray_address: str | None = None,
) -> pd.DataFrame:
    """Scores ``table`` (``token``, ``name``, ``log_name``, ``poses``) against the metric cache in that folder.

    ``workers="sequential"`` uses this process and all its cores as threads; ``processes`` and ``ray`` use
    ``num_workers`` single-threaded workers (``ray_address`` None starts a local Ray). Raises DataError for an empty
    table or an unknown kind of workers.
    """
    if table.empty:
        raise DataError("there are 0 trajectories to score: check the split and the planner")
    folder = os.fspath(metric_cache)
    parts = list(_parts(table))
    if workers == "sequential":
        cache = MetricCache(folder)
        scored = [
            (part.index[0], score_part(part, cache, two_frame, reward, 0)) for part in track(parts, "scoring (parts)")
        ]
    elif workers == "processes":
        scored = list(track(_in_processes(parts, folder, two_frame, reward, num_workers), "scoring", total=len(parts)))
    elif workers == "ray":
        arguments = (parts, folder, two_frame, reward, num_workers, ray_address)
        scored = list(track(_in_ray(*arguments), "scoring (parts)", total=len(parts)))
    else:
        raise DataError(f"workers={workers!r}: there are sequential, processes and ray")
    joined = pd.concat([rows.set_index(part.index) for part, rows in _matched(parts, scored)])
    return joined.loc[table.index].reset_index(drop=True)


def _parts(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Whole logs, gathered to parts of about ROWS_PER_PART rows."""
    waiting: list[pd.DataFrame] = []
    for _, rows in table.groupby("log_name", sort=True):
        waiting.append(rows)
        if sum(map(len, waiting)) >= ROWS_PER_PART:
            yield pd.concat(waiting)
            waiting = []
    if waiting:
        yield pd.concat(waiting)


def _matched(
    parts: Sequence[pd.DataFrame], scored: Sequence[tuple[int, pd.DataFrame]]
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    by_first = dict(scored)
    for part in parts:
        yield part, by_first[part.index[0]]


def _in_processes(
    parts: Sequence[pd.DataFrame], folder: str, two_frame: bool, reward: RewardWeights | None, num_workers: int
) -> Iterator[tuple[int, pd.DataFrame]]:
    with process_pool(num_workers) as pool:
        running = {pool.submit(score_part, part, folder, two_frame, reward, 1): part.index[0] for part in parts}
        for future in as_completed(running):
            yield running[future], future.result()


def _in_ray(
    parts: Sequence[pd.DataFrame],
    folder: str,
    two_frame: bool,
    reward: RewardWeights | None,
    num_workers: int,
    address: str | None,
) -> Iterator[tuple[int, pd.DataFrame]]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingError("workers=ray needs the package ray: pip install 'trivium[ray]'") from error
    started = not ray.is_initialized()
    if started:
        local = {"num_cpus": num_workers, "include_dashboard": False} if address is None else {"address": address}
        ray.init(log_to_driver=False, configure_logging=False, **local)
    try:
        task = ray.remote(num_cpus=1)(score_part)
        running = {task.remote(part, folder, two_frame, reward, 1): part.index[0] for part in parts}
        while running:
            (ready,), _ = ray.wait(list(running))
            yield running.pop(ready), ray.get(ready)
    finally:
        if started:
            ray.shutdown()
