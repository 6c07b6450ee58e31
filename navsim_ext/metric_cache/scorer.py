"""The scorer of a training: a metric cache that is the expected one, and a thread, so that scoring runs beside the
device's work.

Importing this loads the kernels of the scorer: import it where scores are wanted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from numpy.typing import ArrayLike

from navsim_ext.errors import TriviumError
from navsim_ext.fingerprint import Fingerprint, flatten_json
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import PdmResult, RewardWeights, score
from navsim_ext.pdm.columns import COLUMNS

log = logging.getLogger(__name__)

MAX_LISTED = 20
V1_ONLY = tuple(name for name in COLUMNS if name.startswith("v1_") or name == "pdms_v1")


class CoverageError(TriviumError):
    """Too many training tokens have no metric cache."""


class ScorerMismatch(TriviumError):
    """The metric cache, or what it is, does not fit the configuration."""


class PdmScorer:
    """Scores trajectories against one metric cache; both versions, since one of them is the judge.

    ``metric_cache`` folder; ``expect``: fields that the cache's fingerprint must have (dotted keys), so that a run
    says what it believes to train on; ``min_coverage``: least share of training tokens that have a cache.
    """

    def __init__(
        self,
        metric_cache: str | os.PathLike[str],
        *,
        expect: Mapping[str, Any] | None = None,
        min_coverage: float = 0.99,
    ) -> None:
        self.cache = MetricCache(metric_cache)
        self.folder = str(metric_cache)
        self.known = frozenset(self.cache.tokens)
        self.min_coverage = min_coverage
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pdm")
        require_fields(self.cache.fingerprint, dict(expect or {}), self.folder)

    @property
    def fingerprint(self) -> Fingerprint:
        return self.cache.fingerprint

    def require_coverage(self, tokens: Sequence[str]) -> list[str]:
        """Tokens without a cache (their rewards will be invalid); raises CoverageError below ``min_coverage``."""
        missing = [token for token in tokens if token not in self.known]
        share = 1.0 - len(missing) / max(len(tokens), 1)
        if missing:
            listed = ", ".join(missing[:MAX_LISTED]) + (" ..." if len(missing) > MAX_LISTED else "")
            message = (
                f"{len(missing)} of {len(tokens)} training tokens have no metric cache in {self.folder} "
                f"(coverage {share:.4f}): {listed}"
            )
            if share < self.min_coverage:
                raise CoverageError(
                    f"{message}; at least {self.min_coverage} is required: build the cache of the training split "
                    "(python -m navsim_ext.metric_cache.build), or lower scorer.min_coverage"
                )
            log.warning(message)
        return missing

    def score(
        self,
        tokens: Sequence[str],
        trajectories: ArrayLike,
        reward: RewardWeights | None = None,
        traffic: str = "log_replay",
    ) -> PdmResult:
        """Scores [N,8,3] now; ``tokens`` may repeat. Tokens without a record are invalid, not 0.

        Under another ``traffic`` than log replay v2 is scored in it, and v1, which knows no other, on log replay.
        """
        if traffic == "log_replay":
            return score(list(tokens), trajectories, self.cache, reward=reward)
        result = score(list(tokens), trajectories, self.cache, reward=reward, traffic=traffic)
        replayed = score(list(tokens), trajectories, self.cache, versions=("v1",))
        known = result.valid & replayed.valid
        for name in V1_ONLY:
            result[name][known] = replayed[name][known]  # a view of the result's values
        return dataclasses.replace(result, seconds=result.seconds + replayed.seconds)

    def submit(
        self,
        tokens: Sequence[str],
        trajectories: ArrayLike,
        reward: RewardWeights | None = None,
        traffic: str = "log_replay",
    ) -> Future[PdmResult]:
        """As :meth:`score` in the background; the compiled kernels leave Python's lock to others."""
        return self._pool.submit(self.score, list(tokens), trajectories, reward, traffic)


def require_fields(fingerprint: Fingerprint, expect: Mapping[str, Any], where: str) -> None:
    """Raises ScorerMismatch listing ``key: cache | expected`` for each field that differs."""
    found = flatten_json(fingerprint.compared())
    wrong = [
        f"{key}: {found.get(key, '(absent)')!r} | {value!r}"
        for key, value in flatten_json(dict(expect)).items()
        if found.get(key, "(absent)") != value
    ]
    if wrong:
        listed = "\n  ".join(wrong)
        raise ScorerMismatch(
            f"the metric cache {where} is not the one that the configuration expects (cache | expected):\n  {listed}\n"
            "give the right folder, or set scorer.expect to what it is"
        )
