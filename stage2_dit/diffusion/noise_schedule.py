"""The cosine noise schedule (Nichol & Dhariwal, arXiv 2102.09672) with the rounding of the published weights.

abar*(i) = cos^2(((i / T + 0.008) / 1.008) pi / 2) / abar*(0),  i = 0 ... T
beta_j = clip(1 - abar*(j + 1) / abar*(j), 0, 0.999) in float64, then float32;  abar_j = prod alpha in float32
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Shaped
from torch import Tensor, nn

from navsim_ext.errors import DataError

TRAINING_STEPS = 100  # T
COSINE_OFFSET = 0.008
MAX_BETA = 0.999


class Float32Tables(nn.Module):
    """Buffers that follow the module to a device but keep float32 when the network goes to half precision.

    In bfloat16 1 - abar_0 rounds to 0, which would divide by zero.
    """

    def _apply(self, fn, recurse: bool = True):
        for name, table in self._buffers.items():
            self._buffers[name] = table.to(fn(table).device)
        return self


def cosine_betas(count: int = TRAINING_STEPS) -> Float32[Tensor, " T"]:
    """[T] float32 betas."""
    fraction = torch.arange(count + 1, dtype=torch.float64) / count
    bar = torch.cos((fraction + COSINE_OFFSET) / (1 + COSINE_OFFSET) * torch.pi * 0.5) ** 2
    bar = bar / bar[0]
    return (1 - bar[1:] / bar[:-1]).clamp(0, MAX_BETA).float()


def spaced_times(num_steps: int, count: int = TRAINING_STEPS) -> list[int]:
    """Times in sampling order with the published spacing T // K: 80, 60, 40, 20, 0 for 5 of 100 (never 99)."""
    if not 1 <= num_steps <= count:
        raise DataError(f"{num_steps} denoising steps of {count} training steps are not possible; choose 1 ... {count}")
    stride = count // num_steps
    return [stride * k for k in reversed(range(num_steps))]


def _sqrt(table: Tensor) -> Tensor:
    """Correctly rounded: float32 roots of some vector libraries, of MKL on AVX-512 for one, are off by one ulp."""
    return table.double().sqrt().float()


def published_tables(num_steps: int | None, count: int = TRAINING_STEPS) -> dict[str, Shaped[Tensor, " _"]]:
    """The schedule buffers of a published checkpoint by name; ``num_steps`` adds those of DDIM."""
    betas = cosine_betas(count)
    alphas = 1.0 - betas
    bar = torch.cumprod(alphas, dim=0)
    previous = torch.cat([torch.ones(1), bar[:-1]])
    variance = betas * (1.0 - previous) / (1.0 - bar)
    tables = {
        "ddpm_betas": betas,
        "ddpm_alphas": alphas,
        "ddpm_alphas_cumprod": bar,
        "ddpm_alphas_cumprod_prev": previous,
        "ddpm_sqrt_alphas_cumprod": _sqrt(bar),
        "ddpm_sqrt_one_minus_alphas_cumprod": _sqrt(1.0 - bar),
        "ddpm_sqrt_recip_alphas_cumprod": _sqrt(1.0 / bar),
        "ddpm_sqrt_recipm1_alphas_cumprod": _sqrt(1.0 / bar - 1.0),
        "ddpm_var": variance,
        "ddpm_logvar_clipped": torch.log(variance.clamp_min(1e-20)),
        "ddpm_mu_coef1": betas * _sqrt(previous) / (1.0 - bar),
        "ddpm_mu_coef2": (1.0 - previous) * _sqrt(alphas) / (1.0 - bar),
    }
    if num_steps is not None:
        times = torch.tensor(spaced_times(num_steps, count))
        step_bar = bar[times]
        step_previous = torch.cat([step_bar[1:], torch.ones(1)])
        tables |= {
            "ddim_t_schedule": times.flip(0),
            "ddim_t": times,
            "ddim_alphas": step_bar,
            "ddim_alphas_sqrt": _sqrt(step_bar),
            "ddim_alphas_prev": step_previous,
            "ddim_sqrt_one_minus_alphas": _sqrt(1.0 - step_bar),
            "ddim_sigmas": torch.zeros(num_steps),  # of eta 0, read by nobody
        }
    return tables
