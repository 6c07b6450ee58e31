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
from stage3_grpo.collector import Experience
from stage3_grpo.rewards.reward import Scores
from stage3_grpo.update import Credit

PAIRED = ("reward", "judge", "reverse_tail", "standing", "v1_comfort", "v2_hc", "v1_ep", "v1_ttc")


def rollout_statistics(experience: Experience, credit: Credit) -> dict[str, float]:
    """Everything that is known before the update."""
    device = experience.chain.states.device
    names, values = table(experience.scores, device)
    reference_names, reference = table(experience.teacher_scores, device)
    statistics = column_means(names, values)
    statistics |= {f"reference_{name}": value for name, value in column_means(reference_names, reference).items()}
    first = values[:: experience.chain.group_size]
    statistics |= gains((names, first), (reference_names, reference))
    reward = values[:, names.index("reward")]
    known = reward[~reward.isnan()]
    if len(known):
        statistics |= {"reward_min": known.min().item(), "reward_max": known.max().item()}
        statistics["reward_std"] = known.std().item() if len(known) > 1 else 0.0
    statistics["invalid_rate"] = reward.isnan().double().mean().item()
    statistics["drift_m"] = gather_rows(experience.drift_m.float()).mean().item()
    statistics["zero_spread_groups"] = credit.zero_spread.item()
    statistics |= advantage_statistics(credit)
    total = sum(value for name, value in experience.seconds.items() if name != "score")
    statistics |= {f"seconds_{name}": value for name, value in experience.seconds.items()}
    statistics["seconds_rollout"] = total
    return statistics


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


def advantage_statistics(credit: Credit) -> dict[str, float]:
    advantage, mask = gather_rows(credit.advantage.contiguous()), gather_rows(credit.mask.contiguous())
    chosen = advantage[mask]
    share = mask.float().mean().item()
    if len(chosen) == 0:
        return {"advantage_used": share}
    return {
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
