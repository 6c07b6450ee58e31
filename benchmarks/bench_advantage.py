"""Where the update of stage 3 points: the slope of mean PDMS along it, and how much of it is noise, by advantage.

    bash scripts/experiment.sh
    python benchmarks/bench_advantage.py --output benchmarks/results/advantage.json

With g_b the gradient of ``experiment=synthetic`` on batch b (16 scenes x 16 samples of the imitation planner) under
some advantages, and p_b that of its mean PDMS (leave-one-out, no other term; the clamp of log-probabilities stays),
both over the groups with spread:

    slope    mean over batches b of <p_b, u_b>, u_b the unit vector of the other batches' mean g
    signal   |E g|^2 / (E |g - E g|^2), of one batch: (|sum g|^2 - sum |g|^2) / (B (B - 1)) estimates |E g|^2

A negative slope is an update that lowers mean PDMS. One core needs about four minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row
from navsim_ext.runtime.config import compose
from stage2_dit import load_planner
from stage3_grpo.algorithm import Algorithm, GroupStandardised, LeaveOneOut
from stage3_grpo.credit import assign_credit
from stage3_grpo.policies.diffusion import DiffusionPolicy, ReferencePolicy
from stage3_grpo.policy import Key
from stage3_grpo.update import Updater

PDMS = "pdms"
ADVANTAGES = {"leave_one_out": "leave-one-out", "group": "group-standardised"}
CHOICES = {"leave_one_out": LeaveOneOut(), "group": GroupStandardised()}
POINTS = 100.0  # rewards are printed x 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("experiment"), help="EXPERIMENT_DIR of the script")
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    g = {name: value.double() for name, value in gradients(arguments.folder, arguments.batches).items()}
    true = g.pop(PDMS)
    rows = []
    for name, words in ADVANTAGES.items():
        slopes = POINTS * slope(true, g[name])
        error = float(slopes.std() / len(slopes) ** 0.5)
        rows.append(row(f"stage 3: slope of mean PDMS along the update, {words}", float(slopes.mean()),
                        f"points per unit of weight distance, standard error {error:.2g}",
                        "> 0" if name == "leave_one_out" else None))  # fmt: skip
        rows.append(row(f"stage 3: signal of one batch of 16 x 16, {words}", signal(g[name]), "of its noise"))
    means = [g[name].mean(dim=0) for name in ADVANTAGES]
    rows.append(row("stage 3: cosine of the two mean gradients", float(torch.cosine_similarity(*means, dim=0)), ""))
    report("direction of the update", rows, output=arguments.output,
           baseline="group-standardised advantages (GRPO) and leave-one-out ones (RLOO) on the same rollouts, "
           f"{arguments.batches} batches of the imitation planner of scripts/experiment.sh")  # fmt: skip


def gradients(folder: Path, batches: int) -> dict[str, Tensor]:
    """[B,P] ascent directions of the policy term, by advantage and of PDMS alone, on the same rollouts and weights."""
    init = folder / "stage2/diffusion_il/version_0/checkpoints/last.ckpt"
    cfg: Any = compose("stage3", [
        "experiment=synthetic", "sampler=flow", f"init='{init}'", f"output_dir='{folder}'",
        f"data.train='{folder}/stage3/index/train'", f"data.val='{folder}/stage3/index/val'",
        f"data.hidden_cache='{folder}/hidden/trainval'", f"data.metric_cache='{folder}/metric_cache/trainval'",
    ])  # fmt: skip
    algorithm: Algorithm = instantiate(cfg.module.algorithm)
    data = instantiate(cfg.datamodule)
    data.setup("fit")
    loaded = load_planner(init)
    planner = loaded.planner
    reference = ReferencePolicy.load(init, planner.config, loaded.hidden, allow_mismatch=False)
    policy: DiffusionPolicy = instantiate(cfg.policy)
    modules = policy.adopt(planner, reference, algorithm, hidden=loaded.hidden)
    updater = Updater(algorithm)
    variants = {name: dataclasses.replace(algorithm, advantage=choice) for name, choice in CHOICES.items()}
    parameters = list(planner.parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in (*variants, PDMS)}
    whole = tqdm(islice(data.train_dataloader(), batches), total=batches, desc="batches")
    for number, batch in enumerate(whole):
        rollout = policy.roll(batch, algorithm.group_size, Key(0, number), algorithm.needs(drift=False))
        plain = torch.as_tensor(rollout.own.scores.columns["pdms_v1"], dtype=rollout.reward.dtype)
        kinds = {name: (variant, rollout) for name, variant in variants.items()}
        kinds[PDMS] = (variants["leave_one_out"],
                       dataclasses.replace(rollout, reward=plain.masked_fill(~rollout.valid, 0.0)))  # fmt: skip
        for name, (variant, scored) in kinds.items():
            credit = assign_credit(variant, scored)
            loss = updater.losses(policy, modules, rollout, credit, None, beta=0.0, bc_weight=0.0).total
            parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            found[name].append(-scale(policy) * torch.cat([part.flatten() for part in parts]))
    return {name: torch.stack(each) for name, each in found.items()}


def scale(policy: DiffusionPolicy) -> float:
    """From the means over K steps and F x 3 elements that the loss takes to the sums of the policy gradient."""
    elements = policy.planner.config.horizon * 3 if policy.log_prob.reduction == "mean" else 1
    return policy.process.num_steps * elements


def slope(true: Tensor, update: Tensor) -> Tensor:
    """[B] slope of mean PDMS, by batch, along the unit vector of the other batches' mean update."""
    others = update.sum(dim=0) - update
    return (true * others).sum(dim=1) / torch.linalg.vector_norm(others, dim=1)


def signal(g: Tensor) -> float:
    """Squared length of the mean gradient over that of a batch's noise."""
    count, own = len(g), (g**2).sum()
    mean = ((g.sum(dim=0) ** 2).sum() - own) / (count * (count - 1))
    return float(mean / (own / count - mean))


if __name__ == "__main__":
    main()
