"""Scores a table of trajectories, in this process, over processes or over Ray: the second half of scoring.

Rows are split by log, because two-frame comfort pairs scenes of one log; the result does not depend on the split.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import RewardWeights, score, score_pairs
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import spread

ROWS_PER_PART = 2048


class NothingScored(TriviumError):
    """Not one trajectory could be scored."""


class PartWorker:
    """Scores one part after another; the metric cache is opened once. ``threads`` 0: as many as there are cores."""

    def __init__(
        self, metric_cache: str, two_frame: bool, reward: RewardWeights | None, threads: int, traffic: str, name: str
    ) -> None:
        self.cache = MetricCache(metric_cache)
        self.two_frame, self.options = two_frame, {"reward": reward, "threads": threads or None, "traffic": traffic}

    def process(self, table: pd.DataFrame) -> pd.DataFrame:
        """Score rows of one part, in its order: the columns of ``table`` but ``poses``, then validity and scores."""
        tokens = table["token"].tolist()
        poses = np.stack([np.asarray(row, dtype=np.float64).reshape(-1, 3) for row in table["poses"]])
        if self.two_frame:
            names = table["name"].tolist()
            result = score_pairs(tokens, poses, self.cache, names=names, **self.options)
        else:
            result = score(tokens, poses, self.cache, **self.options)
        scores = result.to_frame().drop(columns="token")
        return pd.concat([table.drop(columns="poses").reset_index(drop=True), scores], axis=1)

    def close(self) -> None:
        """Nothing is left open."""


def score_table(
    table: pd.DataFrame,
    metric_cache: str | os.PathLike[str],
    *,
    two_frame: bool = True,
    reward: RewardWeights | None = None,
    traffic: str = "log_replay",
    workers: str = "sequential",
    num_workers: int = 1,
    ray_address: str | None = None,
) -> pd.DataFrame:
    """Scores ``table`` (``token``, ``name``, ``log_name``, ``poses``) against the metric cache in that folder.

    Without ``two_frame`` EPDMS stands under other names (``pdm.columns.WITHOUT_COMFORT``): it is another quantity.
    ``workers="sequential"`` uses this process and all its cores as threads; ``processes`` and ``ray`` use
    ``num_workers`` single-threaded workers (``ray_address`` None starts a local Ray). Raises DataError for an empty
    table or an unknown kind of workers.
    """
    if table.empty:
        raise DataError("there are 0 trajectories to score: check the split and the planner")
    parts = list(_parts(table))
    threads = 0 if workers == "sequential" else 1
    make = partial(PartWorker, os.fspath(metric_cache), two_frame, reward, threads, traffic)
    scored = spread(make, parts, kind=workers, num_workers=num_workers, ray_address=ray_address)
    rows = [part.set_index(parts[number].index) for number, part in track(scored, "scoring (parts)", total=len(parts))]
    joined = pd.concat(rows)
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
