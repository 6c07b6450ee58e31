"""PDM scores for rollouts: a metric cache behind a thread, so that scoring runs beside the device's work."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import TriviumError
from navsim_ext.fingerprint import Fingerprint
from stage3_grpo.rewards.terms import PdmTerm

log = logging.getLogger(__name__)

MAX_LISTED = 20


class CoverageError(TriviumError):
    """Too many training tokens have no metric cache."""


class ScorerMismatch(TriviumError):
    """The metric cache, or what it is, does not fit the configuration."""


@dataclass(frozen=True)
class PdmScores:
    """``columns``: float64 [N] by name; ``valid`` [N] bool; ``seconds`` that scoring took."""

    columns: Mapping[str, NDArray[np.float64]]
    valid: NDArray[np.bool_]
    reasons: tuple[str, ...]
    seconds: float


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
        from navsim_ext.metric_cache.schema import MetricCache  # compiles kernels: only runs that score pay for it

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

    def score(self, tokens: Sequence[str], trajectories: NDArray[np.float64], term: PdmTerm | None) -> PdmScores:
        """Scores [N,8,3] now; ``tokens`` may repeat. Tokens without a cache are invalid, not 0."""
        from navsim_ext.pdm import RewardWeights, score

        start = time.perf_counter()
        weights = None
        if term is not None and not term.standard:
            weights = RewardWeights(
                term.version, term.progress, term.ttc, term.comfort, term.driving_direction, term.lane_keeping
            )
        known = np.array([token in self.known for token in tokens], dtype=bool)
        chosen = np.flatnonzero(known)
        reasons = ["" if there else "no metric cache" for there in known]
        columns: dict[str, NDArray[np.float64]] = {}
        valid = np.zeros(len(tokens), dtype=bool)
        if len(chosen):
            rows = np.ascontiguousarray(trajectories[chosen], dtype=np.float64)
            frame = score(
                [tokens[i] for i in chosen], rows, self.cache, versions=("v1", "v2"), reward=weights
            ).to_frame()
            valid[chosen] = frame["valid"].to_numpy(dtype=bool)
            for i, reason in zip(chosen, frame["reason"]):
                reasons[i] = str(reason or "")
            for name in frame.columns:
                if name not in ("token", "valid", "reason") and frame[name].dtype.kind == "f":
                    columns[name] = np.full(len(tokens), np.nan)
                    columns[name][chosen] = frame[name].to_numpy()
        return PdmScores(columns, valid, tuple(reasons), time.perf_counter() - start)

    def submit(
        self, tokens: Sequence[str], trajectories: NDArray[np.float64], term: PdmTerm | None
    ) -> Future[PdmScores]:
        """As :meth:`score` in the background; the compiled kernels leave Python's lock to others."""
        return self._pool.submit(self.score, list(tokens), trajectories, term)


def require_fields(fingerprint: Fingerprint, expect: Mapping[str, Any], where: str) -> None:
    """Raises ScorerMismatch listing ``key: cache | expected`` for each field that differs."""
    from navsim_ext.fingerprint import flatten_json

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
