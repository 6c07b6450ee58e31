"""Parity with the reference implementation of the published algorithms: losses, gradients, log-probabilities.

Tolerance: max(20 x the reference's own |fp32 - fp64|, 2e-6 x its largest value). In float64, where no rounding of a
machine's kernels can hide or make a difference, it holds for everything; so it does in float32, but for the norms of
gradients, which the kernels of other CPUs put at 2.1e-6 and 3.6e-6 (SSE 4.1) and which get 6e-6.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stage2_dit import Chain, ChainNoise, Exploration, log_prob, sample_chain, step_distributions
from stage2_dit.published import from_published
from stage3_grpo.core import (
    Objective,
    batch_standardised,
    behaviour_cloning,
    denoising_discount,
    group_standardised,
    sampled_kl,
)
from stage3_grpo.policies.diffusion import LogProb

IN_TREE = Path(__file__).parents[1] / "golden" / "planner"
CASES = ("attention_ego", "large_scaled", "small_4layer")
DDIM_BUFFERS = (".ddim_", ".ddpm_", "eta.eta_logit")
GAMMA, BC_WEIGHT, KL_WEIGHT = 0.6, 0.1, 0.05


class Case:
    def __init__(self, folder: Path, sampler: str = "ddim", process: str | None = None,
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        self.sampler, self.dtype = sampler, dtype
        self.meta = json.loads((folder / "meta.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.golden = load_file(folder / f"golden_{sampler}.safetensors")
        weights = load_file(folder / "checkpoint.safetensors")
        if process is not None:  # a planner of another process does not carry the buffers of this one
            weights = {key: weight for key, weight in weights.items() if not any(x in key for x in DDIM_BUFFERS)}
        self.planner, _ = from_published(weights, process=process)
        self.planner.eval().to(dtype)
        for tensors in (self.inputs, self.golden):
            tensors.update({key: value.to(dtype) for key, value in tensors.items() if value.is_floating_point()})
        self.group_size = self.meta["group"]
        scenes, rows = self.meta["B"], self.meta["B"] * self.group_size
        self.group = torch.arange(scenes).repeat_interleave(self.group_size)
        self.reward = self.inputs["grpo.rewards"]
        self.valid = torch.ones(rows, dtype=torch.bool)
        self.process = self.planner.process
        self.log_prob = LogProb()

    def condition(self):
        return self.planner.condition(
            self.inputs["vl_features"], None, self.inputs["his_traj"].reshape(self.meta["B"], 4, 3),
            self.inputs["status_feature"],
        )  # fmt: skip

    def chain(self, name: str, group_size: int) -> Chain:
        exploration = Exploration.preset("published")
        return Chain(self.golden[name], self.process.times, exploration, self.process.identity(), group_size)

    def rollout(self) -> Chain:
        noise = ChainNoise(self.inputs["grpo.init_noise"], self.inputs["grpo.step_noise"])
        with torch.no_grad():
            return sample_chain(self.planner, self.condition(), noise=noise, group_size=self.group_size,
                                exploration=Exploration.preset("published"))  # fmt: skip

    def logp(self, chain: Chain, scenes=slice(None)):
        conditioning = self.condition().select(scenes)
        return self.log_prob.of(chain, step_distributions(self.planner, conditioning, chain, process=self.process))

    def perturb(self) -> None:
        """The actor after a step, as the reference cases define it."""
        with torch.no_grad():
            self.planner.action_decoder.fc2.bias += 0.05
            self.planner.action_decoder.fc2.weight *= 1.1

    def check(self, key: str, value: torch.Tensor) -> None:
        golden = self.golden[key]
        noise, largest = self.meta["fp64_error"][self.sampler][key]
        rounded = self.dtype == torch.float32 and ".gradnorm." in key
        tolerance = max(20 * noise, (6e-6 if rounded else 2e-6) * largest)
        error = (value.detach().reshape(golden.shape).double() - golden.double()).abs().max().item()
        assert error <= tolerance, f"{key}: {error:.3e} > {tolerance:.3e}"

    def check_gradients(self, name: str, loss: torch.Tensor) -> None:
        """Every gradient and gradient norm that the reference holds under a name."""
        self.planner.zero_grad()
        loss.backward()
        gradients = {key: p.grad for key, p in self.planner.named_parameters() if p.grad is not None}
        checked = 0
        for key in self.golden:
            if key.startswith(f"{name}.grad."):
                self.check(key, gradients[key.removeprefix(f"{name}.grad.")])
                checked += 1
            elif key.startswith(f"{name}.gradnorm."):
                part = key.removeprefix(f"{name}.gradnorm.")
                chosen = [g for k, g in gradients.items() if part == "TOTAL" or k == part or k.startswith(part + ".")]
                self.check(key, torch.stack([g.double().pow(2).sum() for g in chosen]).sum().sqrt())
                checked += 1
        assert checked > 10


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request) -> torch.dtype:
    return request.param


def folder_of(name: str, reference) -> Path:
    return IN_TREE / name if (IN_TREE / name).is_dir() else reference(f"golden/planner/{name}")


@pytest.fixture(params=CASES)
def case(request, reference, dtype) -> Case:
    return Case(folder_of(request.param, reference), dtype=dtype)


def test_log_probabilities(case):
    chain = case.rollout()
    case.check("grpo.chains", chain.states)
    case.check("grpo.trajs", case.planner.trajectories(chain))
    steps = step_distributions(case.planner, case.condition(), chain, process=case.process)
    density = torch.distributions.Normal(steps.mean, steps.std).log_prob(chain.states[:, 1:])
    case.check("grpo.logprobs", density)
    torch.testing.assert_close(density, log_prob(case.planner, case.condition(), chain))  # one truth in both stages
    case.check("newest.old_logprobs", case.log_prob.of(chain, steps))


@pytest.mark.parametrize("name", ["grpo.reinforce", "grpo.reinforce_nobc", "grpo.rpp"])
def test_reinforce(case, name):
    chain = case.rollout()
    logp = case.logp(chain)
    advantage = (batch_standardised if name.endswith("rpp") else group_standardised)(
        case.reward, case.group, case.valid
    )
    discounted = advantage[:, None] * denoising_discount(logp.shape[1], GAMMA)
    mask = torch.ones_like(logp, dtype=torch.bool)
    policy = Objective().policy(logp, logp.detach(), discounted, mask).loss
    teacher = case.logp(case.chain("grpo.teacher_chains", 1))
    cloning = behaviour_cloning(teacher, torch.ones_like(teacher, dtype=torch.bool))
    case.check(f"{name}.policy_loss", policy)
    case.check(f"{name}.reward", case.reward.mean())
    if name.endswith("nobc"):
        loss = policy
    else:
        case.check(f"{name}.bc_loss", cloning)
        loss = policy + BC_WEIGHT * cloning
    case.check(f"{name}.loss", loss)
    case.check_gradients(name, loss)


def test_clipped_ratio_of_trajectory_means(case):
    chain = case.rollout()
    with torch.no_grad():
        old = case.logp(chain)
    advantage = group_standardised(case.reward, case.group, case.valid)
    case.check("clip.old_log_probs", old.mean(dim=1))
    discounted = advantage[:, None] * denoising_discount(old.shape[1], GAMMA)
    case.check("clip.advantages", discounted.mean(dim=1))
    case.perturb()
    logp = case.logp(chain)
    minibatch = torch.zeros_like(logp, dtype=torch.bool)
    minibatch[::2] = True
    term = Objective("clip", "trajectory").policy(logp, old, discounted, minibatch)
    teacher = case.logp(case.chain("grpo.teacher_chains", 1))
    cloning = behaviour_cloning(teacher, torch.ones_like(teacher, dtype=torch.bool))
    case.check("clip.policy_loss", term.loss)
    case.check("clip.clip_frac", term.clip_fraction)
    case.check("clip.approx_kl", term.approx_kl)
    case.check("clip.bc_loss", cloning)
    loss = term.loss + BC_WEIGHT * cloning
    case.check("clip.loss", loss)
    case.check_gradients("clip", loss)


@pytest.mark.parametrize("perturbed", [False, True])
def test_newest_form(case, perturbed):
    name = "newest.grpo_perturbed" if perturbed else "newest.grpo_mu1"
    chain = case.rollout()
    with torch.no_grad():
        old = case.logp(chain)
    advantage = group_standardised(case.reward, case.group, case.valid)
    discounted = advantage[:, None] * denoising_discount(old.shape[1], GAMMA)
    case.check("newest.adv_weighted", discounted)
    reference = case.golden["newest.ref_logprobs"]
    if torch.equal(
        reference, case.golden["newest.old_logprobs"]
    ):  # the actor itself: its KL is 0, not a rounding squared
        reference = old
    if perturbed:
        case.perturb()
    logp = case.logp(chain)
    mask = torch.ones_like(logp, dtype=torch.bool)
    term = Objective("clip").policy(logp, old, discounted, mask)
    kl = sampled_kl("k3", logp, reference.reshape(logp.shape), mask)
    teacher = case.logp(case.chain("grpo.teacher_chains", 1))
    cloning = behaviour_cloning(teacher, torch.ones_like(teacher, dtype=torch.bool))
    case.check(f"{name}.policy_loss", term.loss)
    case.check(f"{name}.kl_loss", kl)
    case.check(f"{name}.bc_loss", cloning)
    case.check(f"{name}.clip_frac", term.clip_fraction)
    case.check(f"{name}.ratio_mean", term.ratio_mean)
    loss = term.loss + KL_WEIGHT * kl + BC_WEIGHT * cloning
    case.check(f"{name}.loss", loss)
    case.check_gradients(name, loss)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("name", ["large_scaled", "small_4layer"])
def test_flow_log_probabilities(reference, dtype, name, kind):
    case = Case(folder_of(name, reference), "flow", f"flow_published_{kind}", dtype)
    case.log_prob = LogProb(clamp_at="step")
    exploration = Exploration.preset("published_flow")
    states = case.golden[f"newest.flow_{kind}.chain"]
    logp = case.logp(Chain(states, case.process.times, exploration, case.process.identity(), 1))
    case.golden[f"newest.flow_{kind}.logprobs"].clamp_(-5.0, 2.0)  # the last step has standard deviation 1e-6
    case.check(f"newest.flow_{kind}.logprobs", logp)
    case.check_gradients(f"newest.flow_{kind}", logp.mean())
