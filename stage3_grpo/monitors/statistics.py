"""Numbers of a rollout, over the global batch. Keys are those of the CSV columns and the alarms.

``x`` of the policy's samples, ``reference_x`` of the reference's (same scenes, one sample each). ``x_gain``: the mean
difference between the group's sample 0 and the reference's sample, which had the same noise: exactly 0 while the two
policies are one. Means are over valid rows; NaN where there are none.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.runtime.collectives import gather_rows
from stage3_grpo.credit import Credit, Padded
from stage3_grpo.policy import PolicyRollout
from stage3_grpo.rewards.reward import Scores

PAIRED = ("reward", "judge", "reverse_tail", "standing", "v1_comfort", "v2_hc", "v1_ep", "v1_ttc")


def rewards_of(scores: Scores, reference: Scores, group_size: int, device: torch.device) -> dict[str, float]:
    """Means of the policy's and the reference's scores, and the gains of the groups' first samples."""
    names, values = table(scores, device)
    reference_names, reference_values = table(reference, device)
    statistics = column_means(names, values)
    told = column_means(reference_names, reference_values)
    statistics |= {f"reference_{name}": value for name, value in told.items()}
    first = values[::group_size]
    return statistics | gains((names, first), (reference_names, reference_values))


def compared(scores: Scores, reference: Scores) -> dict[str, float]:
    """The gains of one sample a scene over the reference's samples of the same scenes."""
    cpu = torch.device("cpu")
    return gains(table(scores, cpu), table(reference, cpu))


def gains(mine: tuple[list[str], Tensor], reference: tuple[list[str], Tensor]) -> dict[str, float]:
    """``x_gain`` of the paired columns of two tables with equal rows, and ``divergence``: by how much the reward rises
    and the judge falls, 0 where they do not part, NaN where one of them is unknown."""
    (names, values), (reference_names, reference_values) = mine, reference
    told = {}
    for name in PAIRED:
        if name in names and name in reference_names:
            difference = values[:, names.index(name)] - reference_values[:, reference_names.index(name)]
            told[f"{name}_gain"] = difference[~difference.isnan()].mean().item()  # NaN: no valid pair
    gain, judge = told["reward_gain"], told["judge_gain"]
    known = math.isfinite(gain) and math.isfinite(judge)
    told["divergence"] = math.nan if not known else gain - judge if judge < 0 < gain else 0.0
    return told


def credit_statistics(rollout: PolicyRollout, credit: Credit) -> dict[str, float]:
    """Rewards of whole rows and their advantages, whatever the policy."""
    padded = Padded(rollout.mask)
    decided = rollout.mask & rollout.valid[:, None]
    own = rollout.reward
    own = own if own.dim() == 1 else own.masked_fill(~decided, 0.0).sum(dim=1)
    real = padded.all(rollout.mask.any(dim=1))  # not padding
    valid = padded.all(rollout.valid)
    reward = padded.all(own)[valid & real]
    statistics = {"invalid_rate": 1.0 - (valid & real).sum().item() / max(real.sum().item(), 1)}
    if len(reward):
        statistics |= {"reward_min": reward.min().item(), "reward_max": reward.max().item()}
        statistics["reward_std"] = reward.std().item() if len(reward) > 1 else 0.0
    statistics["reward"] = reward.mean().item() if len(reward) else math.nan
    statistics["zero_spread_groups"] = credit.zero_spread.item()
    advantage, mask = padded.all(credit.advantage), padded.all(credit.mask)
    possible = padded.all(rollout.mask)
    chosen = advantage[mask]
    share = mask.sum().item() / max(possible.sum().item(), 1)
    if len(chosen) == 0:
        return statistics | {"advantage_used": share}
    return statistics | {
        "advantage_mean": chosen.mean().item(),
        "advantage_std": chosen.std().item() if len(chosen) > 1 else 0.0,
        "advantage_max": chosen.abs().max().item(),
        "advantage_used": share,
    }


def table(scores: Scores, device: torch.device) -> tuple[list[str], Tensor]:
    """Column names, and all rows of all processes [N,C] float64 with NaN for what is invalid or unknown."""
    own = {"reward": scores.reward} | {f"term_{name}": values for name, values in scores.terms.items()}
    if twice := sorted(own.keys() & scores.columns.keys()):
        raise DataError(f"the scorer's columns {twice} would hide the trained reward and its terms of the same name")
    columns = own | dict(scores.columns)
    names = sorted(columns)
    values = np.stack([np.where(scores.valid, columns[name], np.nan) for name in names], axis=1)
    dtype = torch.float64 if device.type != "mps" else torch.float32
    return names, gather_rows(torch.as_tensor(values, dtype=dtype, device=device))


def column_means(names: list[str], values: Tensor) -> dict[str, float]:
    """Means over the finite entries of each column; columns that are nowhere known are left out."""
    values = values.cpu().numpy()
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0)
    means = {name: float(s / c) if c else math.nan for name, s, c in zip(names, sums, counts)}
    return {name: mean for name, mean in means.items() if math.isfinite(mean) or name in ("reward", "judge")}
