"""Chains and their log-probabilities, for any process, over a conditioning that is computed once.

Legend: S scenes, G = group_size rows of a scene, R = S G, K steps, F poses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from navsim_ext.errors import DataError
from stage2_dit.conditioning import Conditioning
from stage2_dit.diffusion.ddim import Ddim
from stage2_dit.diffusion.ddpm import Ddpm
from stage2_dit.diffusion.dpm_solver import DpmSolver
from stage2_dit.diffusion.flow import FLOW_STEPS, Flow
from stage2_dit.diffusion.process import Chain, Exploration, NoDensity, Process, WrongProcess
from stage2_dit.noise import ChainNoise, keyed_noise

PROCESSES = ("ddim", "ddpm", "ddpm_published", "dpm_solver", *(f"flow_{kind}" for kind in FLOW_STEPS))


class Steps(NamedTuple):
    """Distribution of every step of a chain: ``mean`` [R,K,F,3]; ``std`` [R,K,1,1], floored as for scoring."""

    mean: Tensor
    std: Tensor


class Denoiser(Protocol):
    """What sampling needs of a planner."""

    process: Process

    def __call__(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor: ...


def build_process(name: str, num_steps: int | None = None) -> Process:
    """A process by name; ``num_steps`` None: 5, or 10 for the DPM solver. Raises DataError for an unknown name."""
    if name == "ddim":
        return Ddim(num_steps or 5)
    if name in ("ddpm", "ddpm_published"):
        return Ddpm(num_steps or 5, published=name == "ddpm_published")
    if name == "dpm_solver":
        return DpmSolver(num_steps or 10)
    if name in PROCESSES:
        return Flow(num_steps or 5, kind=name.removeprefix("flow_"))  # type: ignore[arg-type]
    raise DataError(f"diffusion process {name!r} does not exist; choose one of {', '.join(PROCESSES)}")


def sample_chain(
    planner: Denoiser,
    conditioning: Conditioning,
    *,
    noise: ChainNoise | None = None,
    tokens: Sequence[str] | None = None,
    seed: int = 0,
    step: int = 0,
    group_size: int = 1,
    exploration: Exploration | None = None,
    process: Process | None = None,
) -> Chain:
    """Draws ``group_size`` chains of every scene. Autograd follows the caller's mode (use ``torch.no_grad``).

    Either ``noise`` is given, or ``tokens`` (one of each scene) and the noise is keyed by (seed, step, token, sample
    index). ``process`` overrides the planner's sampler; it must predict the same quantity (noise or velocity).
    """
    exploration = exploration or Exploration()
    process = check_process(planner, process)
    device = conditioning.tokens.device
    if noise is None:
        if tokens is None:
            raise DataError("sample_chain needs noise or the scenes' tokens to key it by")
        if len(tokens) != len(conditioning):
            raise DataError(f"{len(tokens)} tokens were given for {len(conditioning)} conditioned scenes")
        horizon = planner.config.horizon  # type: ignore[attr-defined]
        noise = keyed_noise(seed, step, tokens, group_size=group_size, num_steps=process.num_steps, horizon=horizon).to(
            device
        )
    if len(noise.initial) != len(conditioning) * group_size:
        raise DataError(
            f"noise has {len(noise.initial)} rows; {len(conditioning)} scenes x group size {group_size} need "
            f"{len(conditioning) * group_size}"
        )
    states = process.sample(lambda x, time: planner(x, time, conditioning), noise, exploration)
    return Chain(states, process.times, exploration, process.identity(), group_size)


def step_distributions(
    planner: Denoiser, conditioning: Conditioning, chain: Chain, *, process: Process | None = None
) -> Steps:
    """Mean and deviation of every step of every row, in one network call.

    The deviation is the process's own with the chain's ``log_prob_std_floor``; the final clip is ignored. Gradients
    flow to the planner through the mean, not to the chain. Raises NoDensity for samplers without step noise and
    WrongProcess when the chain was drawn by another process.
    """
    process = check_process(planner, process)
    if not process.has_density or chain.exploration.deterministic:
        raise NoDensity(
            f"chains of {process.name} (deterministic={chain.exploration.deterministic}) have no density: sample "
            "stochastically with ddim, ddpm or a flow sde or cps step"
        )
    if chain.process != process.identity():
        raise WrongProcess(f"the chain was drawn by {chain.process}, it was to be scored with {process.identity()}")
    if len(chain) != len(conditioning) * chain.group_size:
        raise DataError(
            f"the chain has {len(chain)} rows in groups of {chain.group_size}; the conditioning has "
            f"{len(conditioning)} scenes"
        )
    states = chain.states.detach()
    rows, count = len(states), process.num_steps
    index = torch.arange(count, device=states.device).repeat(rows)
    times = torch.tensor(process.times, device=states.device).repeat(rows)
    x = states[:, :-1].flatten(0, 1)
    prediction = planner(x, times, conditioning).float()
    mean, std = process.step(index, x, prediction, chain.exploration)
    std = chain.exploration.log_prob_std(std)
    return Steps(mean.unflatten(0, (rows, count)), std.expand(rows * count, 1, 1).unflatten(0, (rows, count)))


def log_prob(
    planner: Denoiser, conditioning: Conditioning, chain: Chain, *, process: Process | None = None
) -> Float[Tensor, "R K F 3"]:
    """[R,K,F,3] elementwise log N(x_{k+1}; mean_k, std_k) of every step of every row; see step_distributions."""
    mean, std = step_distributions(planner, conditioning, chain, process=process)
    z = (chain.states[:, 1:].detach() - mean) / std
    return -0.5 * z**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)


def check_process(planner: Denoiser, process: Process | None) -> Process:
    """The process to use; raises WrongProcess when it predicts something the planner was not trained to."""
    if process is None:
        return planner.process
    if process.prediction != planner.process.prediction:
        raise WrongProcess(
            f"the planner was trained with {planner.process.name} and predicts {planner.process.prediction}; "
            f"{process.name} needs {process.prediction}"
        )
    return process
