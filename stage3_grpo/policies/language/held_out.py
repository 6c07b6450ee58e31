"""Greedy answers to held-out questions, beside those of the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np

from navsim_ext.runtime.collectives import gather_by_token
from stage3_grpo.policies.language.data import AskedPrompt
from stage3_grpo.policies.language.statistics import reply_columns

if TYPE_CHECKING:
    from stage3_grpo.policies.language.policy import LanguagePolicy

STANDARD = {"v1": "pdms_v1", "v2": "epdms_v2_no_ec_nofilter"}
LEFT_OUT = ("distinct",)  # of groups, which single answers are not


class LanguageHeldOut:
    """``score``, which chooses the best checkpoint: the planning accuracy, or the standard PDM score where the reward
    is made of it, or the mean reward where no decision is known. The reference answers once, in the first epoch."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self.policy = policy
        self.reference_means: dict[str, float] = {}
        self._mine: dict[str, dict[str, float]] = {}
        self._reference: dict[str, dict[str, float]] = {}

    def start(self) -> None:
        self._mine, self._reference = {}, {}

    def add(self, batch: Sequence[AskedPrompt]) -> None:
        prompts = list(batch)
        self._mine |= self._answer(prompts, reference=False)
        if not self.reference_means:
            self._reference |= self._answer(prompts, reference=True)

    def _answer(self, prompts: list[AskedPrompt], *, reference: bool) -> dict[str, dict[str, float]]:
        policy = self.policy
        greedy = replace(policy.sampling, temperature=0.0, top_k=0, top_p=1.0)
        drawn = policy.answers(prompts, [[0]] * len(prompts), greedy, reference=reference)
        replies = policy.replies(prompts, drawn)
        scores = policy.reward.submit(policy.scorer, replies).result()
        columns = reply_columns(replies, [len(row[0].tokens) for row in drawn], scores, policy.reward)
        columns["reward"] = scores.reward
        kept = {name: values for name, values in columns.items() if name not in LEFT_OUT}
        return {
            prompt.name: {name: float(values[row]) for name, values in kept.items()}
            for row, prompt in enumerate(prompts)
        }

    def finish(self, trainer: pl.Trainer) -> dict[str, float]:
        means, reference = _means(gather_by_token(self._mine)), _means(gather_by_token(self._reference))
        if not trainer.sanity_checking:  # which sees a few batches only
            self.reference_means = self.reference_means or reference
        theirs = self.reference_means or reference
        told = means | {f"reference_{name}": value for name, value in theirs.items()}
        told["score"] = self._score(means)
        told["gain"] = told["score"] - self._score(theirs)
        return told

    def _score(self, means: Mapping[str, float]) -> float:
        reward = self.policy.reward
        name = STANDARD[reward.pdm.score.version] if reward.pdm is not None else "accuracy"
        value = means.get(name, math.nan)
        return value if math.isfinite(value) else means.get("reward", math.nan)

    def state_dict(self) -> dict[str, Any]:
        return {"reference_means": dict(self.reference_means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference_means = dict(state.get("reference_means", {}))


def _means(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means of what is known, over all questions."""
    means = {}
    for name in sorted({name for row in rows.values() for name in row}):
        values = np.array([row.get(name, math.nan) for row in rows.values()])
        known = values[np.isfinite(values)]
        if len(known):
            means[name] = float(known.mean())
    return means
