"""Numbers of a rollout of words: what is said, how, and whether it is right.

    readable       share of replies that say what the reward reads (a decision, or a trajectory)
    well_formed    share in the form <think>...</think><answer>...</answer>
    accuracy       share with exactly the driven decision: the judge of rewards of words
    agreement      share whose trajectory does what its decision says, where both are asked for
    distinct       different answers in a group, over its size; 1 / G: all alike
    length, truncated, entropy (nats per token)

Legend: N replies of this process, G of each prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from navsim_ext.questions.answers import normalised
from navsim_ext.runtime.collectives import gather_rows
from stage3_grpo.monitors.statistics import column_means
from stage3_grpo.rewards.replies import Array, Replies
from stage3_grpo.rewards.word_reward import WordReward, WordScores
from stage3_grpo.rewards.word_terms import agreement

BASELINE_ROLLOUTS = 20  # that later ones are compared with


def reply_columns(replies: Replies, lengths: Sequence[int], scores: WordScores, reward: WordReward) -> dict[str, Array]:
    """By name [N]; NaN: not known."""
    count = len(replies)
    planned = np.array([plan.valid for plan in replies.planned], dtype=np.float64)
    decided = np.array([stated.decision is not None for stated in replies.stated], dtype=np.float64)
    labels = [prompt.decision for prompt in replies.prompts]
    accuracy = [
        math.nan if label is None else float(stated.decision == label)
        for label, stated in zip(labels, replies.stated, strict=True)
    ]
    columns: dict[str, Array] = {
        "readable": planned if reward.needs_scorer else decided,
        "well_formed": np.array([float(reply.well_formed) for reply in replies.read]),
        "accuracy": np.array(accuracy),
        "length": np.asarray(lengths, dtype=np.float64),
        "truncated": replies.truncated.astype(np.float64),
        "distinct": distinct(replies),
    }
    if reward.needs_scorer and all(prompt.road is not None for prompt in replies.prompts):
        columns["agreement"] = agreement(replies, "the record")
    for part in scores.parts:
        columns[f"part_{part.name}"] = np.where(scores.valid, part.value, np.nan)
    columns |= {name: np.where(scores.valid, values, np.nan) for name, values in scores.columns.items()}
    assert all(len(values) == count for values in columns.values())
    return columns


def distinct(replies: Replies) -> Array:
    """[N] number of different answers in the row's group over its size."""
    said = [normalised(reply.answer or reply.text) for reply in replies.read]
    members: dict[int, list[str]] = {}
    for group, text in zip(replies.group.tolist(), said, strict=True):
        members.setdefault(group, []).append(text)
    shares = {group: len(set(texts)) / len(texts) for group, texts in members.items()}
    return np.array([shares[group] for group in replies.group.tolist()])


def means_over_processes(columns: Mapping[str, Array], device: torch.device) -> dict[str, float]:
    """Means of what is known over all processes, whose columns are the same. Collective."""
    names = sorted(columns)
    table = np.stack([columns[name] for name in names], axis=1)
    return column_means(names, gather_rows(torch.as_tensor(table, dtype=torch.float64, device=device)))


class Judge:
    """Gains of reward and accuracy over the run's first rollouts, and ``divergence``: by how much the reward rises
    while the accuracy falls (0 where they do not part)."""

    def __init__(self) -> None:
        self.sums = {"reward": 0.0, "accuracy": 0.0}
        self.count = 0

    def of(self, reward: float, accuracy: float) -> dict[str, float]:
        if not (math.isfinite(reward) and math.isfinite(accuracy)):
            return {}
        if self.count < BASELINE_ROLLOUTS:
            self.sums["reward"] += reward
            self.sums["accuracy"] += accuracy
            self.count += 1
        gain = reward - self.sums["reward"] / self.count
        judged = accuracy - self.sums["accuracy"] / self.count
        divergence = gain - judged if judged < 0.0 < gain else 0.0
        return {"reward_gain": gain, "accuracy_gain": judged, "divergence": divergence}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), int(state["count"])
