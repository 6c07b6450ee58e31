"""Diffusion processes by law: exact posteriors, marginals of Gaussian data, convergence, schedules, precision.

For Gaussian data x0 ~ N(m, s^2) (independent components) the best predictions are known in closed form:
x_t = a x0 + b eps has E[eps | x_t] = b (x_t - a m) / (a^2 s^2 + b^2), E[x0 | x_t] = m + a s^2 (x_t - a m) / (same).
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy import stats

from navsim_ext.errors import DataError
from stage2_dit import Exploration, build_process
from stage2_dit.diffusion.noise_schedule import cosine_betas, spaced_times
from stage2_dit.diffusion.process import NoDensity
from stage2_dit.diffusion.sampling import PROCESSES
from stage2_dit.layers import TimestepEncoder
from stage2_dit.noise import ChainNoise

MEAN, SPREAD = 0.2, 0.15  # of the data; far enough inside [-1, 1] that no clip acts
FREE = Exploration(sampling_std_floor=0.0, log_prob_std_floor=0.0, noise_clip=None, final_clip=None)


def noise_of(rows: int, steps: int, seed: int = 0) -> ChainNoise:
    generator = torch.Generator().manual_seed(seed)
    return ChainNoise(torch.randn(rows, 8, 3, generator=generator), torch.randn(rows, steps, 8, 3, generator=generator))


def predictor(process, mean: float = MEAN, spread: float = SPREAD):
    """The exact conditional expectation that a trained network approximates."""

    def predict(x, time):
        if process.prediction == "noise":
            bar = process.bar[time.long()].reshape(-1, 1, 1)
            a, b = torch.sqrt(bar), torch.sqrt(1 - bar)
            return b * (x - a * mean) / (bar * spread**2 + 1 - bar)
        t = (time.float() / 1000).reshape(-1, 1, 1)
        variance = t**2 * spread**2 + (1 - t) ** 2
        noise = (1 - t) * (x - t * mean) / variance
        data = mean + t * spread**2 * (x - t * mean) / variance
        return data - noise

    return predict


@pytest.mark.parametrize("name", PROCESSES)
def test_a_known_answer_is_found(name):
    """With one data point, a perfect prediction leads there from any noise: every process without step noise."""
    process = build_process(name)
    x0 = torch.linspace(-0.9, 0.9, 24).reshape(1, 8, 3)

    def predict(x, time):
        if process.prediction == "noise":
            bar = process.bar[time.long()].reshape(-1, 1, 1)
            return (x - torch.sqrt(bar) * x0) / torch.sqrt(1 - bar)
        t = (time.float() / 1000).reshape(-1, 1, 1)
        return (x0 - x) / (1 - t)

    states = process.sample(predict, noise_of(16, process.num_steps), Exploration.preset("deterministic"))
    assert states.shape == (16, process.num_steps + 1, 8, 3)
    if name != "ddpm_published":  # it takes 5 single steps of the 100: declared, and not a sampler of the data
        torch.testing.assert_close(states[:, -1], x0.expand(16, -1, -1), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_stochastic_step_is_the_gaussian_posterior(name):
    """Mean and deviation equal those of q(x_s | x_t, x0), computed from the joint Gaussian by conditioning."""
    process = build_process(name)
    x0, x = 0.3, torch.full((1, 8, 3), 0.4)
    for k in range(process.num_steps):
        bar_t = process.bar[process.times[k]].double()
        bar_s = process.bar[process.times[k + 1]].double() if k + 1 < process.num_steps else torch.tensor(1.0).double()
        ratio = bar_t / bar_s  # x_t = sqrt(ratio) x_s + sqrt(1 - ratio) eps, x_s ~ N(sqrt(bar_s) x0, 1 - bar_s)
        gain = (1 - bar_s) * torch.sqrt(ratio) / (1 - bar_t)
        mean = torch.sqrt(bar_s) * x0 + gain * (0.4 - torch.sqrt(bar_t) * x0)
        variance = (1 - bar_s) - gain * torch.sqrt(ratio) * (1 - bar_s)
        noise = ((x.double() - torch.sqrt(bar_t) * x0) / torch.sqrt(1 - bar_t)).float()
        found = process.step(k, x, noise, FREE)
        torch.testing.assert_close(found.mean.double(), mean.expand(1, 8, 3), atol=2e-5, rtol=1e-4)
        assert found.std.item() == pytest.approx(math.sqrt(max(variance.item(), 0.0)), abs=1e-4)


def test_published_one_step_variant_is_the_posterior_only_when_no_step_is_skipped():
    x, noise = torch.full((1, 8, 3), 0.4), torch.full((1, 8, 3), 0.1)
    for steps, equal in ((100, True), (5, False)):
        ours, theirs = build_process("ddpm", steps), build_process("ddpm_published", steps)
        k = steps // 2
        difference = (ours.step(k, x, noise, FREE).mean - theirs.step(k, x, noise, FREE).mean).abs().max().item()
        assert (difference < 1e-5) == equal


@pytest.mark.parametrize("name", ["ddpm", "ddim", "flow_ode", "flow_sde"])
def test_marginals_of_gaussian_data(name):
    """100 steps give the mean and spread of the data; DDPM's plug-in of the mean for x0 costs 1 / steps of spread."""
    errors = []
    for steps in (20, 100):
        process = build_process(name, steps)
        final = process.sample(predictor(process), noise_of(500, steps), FREE)[:, -1]
        assert final.mean().item() == pytest.approx(MEAN, abs=0.01)
        errors.append(abs(final.std().item() / SPREAD - 1))
    assert errors[1] < 0.1
    assert errors[1] < errors[0] + 0.01


def test_cps_keeps_the_coefficients_of_the_path():
    """Around one data point: mean t' x0, deviation 1 - t' after every step, whatever the noise level."""
    process = build_process("flow_cps", 10)
    for level in (0.2, 0.7):
        exploration = dataclasses.replace(FREE, noise_level=level)
        states = process.sample(lambda x, time: (0.5 - x) / (1 - (time / 1000).reshape(-1, 1, 1)),
                                noise_of(1000, 10), exploration)  # fmt: skip
        for k in (1, 4, 8):
            assert states[:, k].mean().item() == pytest.approx(k / 10 * 0.5, abs=0.03)
            assert states[:, k].std().item() == pytest.approx(1 - k / 10, rel=0.03)


def test_published_flow_noise_widens_the_marginal():
    """Without the score correction the deviations add up: documented, and why it is not the default."""
    spreads = {}
    for name in ("flow_sde", "flow_published_sde"):
        process = build_process(name, 100)
        halfway = process.sample(predictor(process), noise_of(500, 100), FREE)[:, 50]
        spreads[name] = halfway.std().item()
    true = math.sqrt(0.25 * SPREAD**2 + 0.25)
    assert spreads["flow_sde"] == pytest.approx(true, rel=0.05)
    assert spreads["flow_published_sde"] > 1.1 * true


def test_dpm_solver_beats_ddim_at_ten_steps():
    """10 steps come closer to the exact transport of Gaussian data than DDIM's 10, and 40 much closer than 10."""
    start, spread = noise_of(64, 1).initial, 0.4
    errors = {}
    for name, steps in (("dpm_solver", 10), ("dpm_solver", 40), ("ddim", 10)):
        process = build_process(name, steps)
        end = process.sample(predictor(process, spread=spread), ChainNoise(start, torch.zeros(64, steps, 8, 3)),
                             dataclasses.replace(FREE, deterministic=True))[:, -1]  # fmt: skip
        bar = process.bar[process.times[0]]
        scale = torch.sqrt(bar * spread**2 + 1 - bar)
        exact = MEAN + spread * (start - torch.sqrt(bar) * MEAN) / scale  # the probability flow keeps quantiles
        errors[name, steps] = (end - exact).abs().mean().item()
    assert errors["dpm_solver", 10] < 0.7 * errors["ddim", 10]
    assert errors["dpm_solver", 40] < 0.3 * errors["dpm_solver", 10]


def test_schedule_has_the_published_values():
    process = build_process("ddim")
    wanted = {0: 0.99936873, 20: 0.88910311, 40: 0.63251567, 60: 0.32611522, 80: 0.085146196, 99: 2.4285e-7}
    for time, value in wanted.items():
        assert process.bar[time].item() == pytest.approx(value, rel=2e-5)
    assert cosine_betas()[[0, 99]].tolist() == pytest.approx([6.3128e-4, 0.999], rel=1e-4)
    assert process.times == (80, 60, 40, 20, 0)
    sigma = [process.step(k, torch.zeros(1, 8, 3), torch.zeros(1, 8, 3), Exploration()).std.item() for k in range(5)]
    assert sigma == pytest.approx([0.73775, 0.51397, 0.29511, 0.02506, 0.0], abs=1e-5)
    with pytest.raises(DataError, match="101 denoising steps of 100"):
        spaced_times(101)


def test_training_times_follow_their_distributions():
    flow = build_process("flow_ode")
    generator = torch.Generator().manual_seed(0)
    time = flow.draw_times(4000, generator)
    beta = 0.999 - 0.999 * time.double()
    assert stats.kstest(beta.numpy(), stats.beta(1.5, 1).cdf).pvalue > 0.01
    assert time.min() >= -0.0011
    times = build_process("ddim").draw_times(4000, generator)
    assert stats.chisquare(torch.bincount(times, minlength=100).numpy()).pvalue > 0.01


def test_corrupted_data_has_the_stated_moments():
    for name in ("ddim", "flow_ode"):
        process = build_process(name)
        time = torch.full((2000,), 60 if name == "ddim" else 0.6)
        x0 = torch.full((2000, 8, 3), 0.5)
        corrupted = process.corrupt(x0, noise_of(2000, 1).initial, time)
        a = math.sqrt(process.bar[60]) if name == "ddim" else 0.6
        b = math.sqrt(1 - process.bar[60]) if name == "ddim" else 0.4
        assert corrupted.x.mean().item() == pytest.approx(a * 0.5, abs=0.02)
        assert corrupted.x.std().item() == pytest.approx(b, rel=0.02)
        assert corrupted.time[0].item() == (60 if name == "ddim" else 600)


def test_vectorised_steps_equal_single_ones():
    x, prediction = noise_of(5, 1, 1).initial, noise_of(5, 1, 2).initial
    for name in PROCESSES:
        process = build_process(name, 5)
        if name == "dpm_solver":
            with pytest.raises(NoDensity):
                process.step(0, x, prediction, FREE)
            continue
        together = process.step(torch.arange(5), x, prediction, FREE)
        for k in range(5):
            alone = process.step(k, x[k : k + 1], prediction[k : k + 1], FREE)
            assert torch.equal(together.mean[k], alone.mean[0]), name
            assert torch.equal(together.std.expand(5, 1, 1)[k], alone.std.expand(1, 1, 1)[0]), name


def test_schedule_stays_in_float32_when_the_network_does_not():
    process = build_process("ddim").bfloat16()
    assert process.bar.dtype == torch.float32
    assert (1 - process.bar[0]).item() > 6e-4  # 0 in bfloat16
    noise = torch.randn(1, 8, 3).bfloat16().float()
    assert torch.isfinite(process.step(4, torch.randn(1, 8, 3), noise, FREE).mean).all()


def test_time_embedding_is_that_of_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    encoder = TimestepEncoder(16)
    time = torch.tensor([0, 7, 99, 800])
    wanted = get_timestep_embedding(time, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
    angle = time.float()[:, None] * encoder.frequencies
    torch.testing.assert_close(torch.cat([angle.cos(), angle.sin()], 1), wanted, atol=2e-4, rtol=0)


def test_floors_and_clips_are_those_of_the_exploration():
    process = build_process("ddim")
    for floor in (0.04, 0.3):
        exploration = Exploration(sampling_std_floor=floor, noise_clip=None, final_clip=None)
        states = process.sample(lambda x, time: torch.zeros_like(x), noise_of(400, 5), exploration)
        mean = process.step(4, states[:, 4], torch.zeros(400, 8, 3), exploration).mean
        assert (states[:, 5] - mean).std().item() == pytest.approx(floor, rel=0.05)
    wild = ChainNoise(torch.zeros(1, 8, 3), torch.full((1, 5, 8, 3), 7.0))
    for clip, largest in ((5.0, 5.0), (None, 7.0)):
        exploration = Exploration(sampling_std_floor=1.0, noise_clip=clip, final_clip=None)
        states = process.sample(lambda x, time: torch.zeros_like(x), wild, exploration)
        mean = process.step(0, states[:, 0], torch.zeros(1, 8, 3), exploration).mean
        assert (states[:, 1] - mean).max().item() == pytest.approx(largest, rel=1e-5)


def test_a_sampler_refuses_a_strength_that_it_would_not_read():
    """eta is DDIM's, noise_level that of the stochastic flow steps; no sampler takes the other's."""
    reads = {"ddim": "eta", "flow_sde": "noise_level", "flow_cps": "noise_level"}
    for name in PROCESSES:
        process = build_process(name)
        for key in ("eta", "noise_level"):
            given = Exploration(**{key: 0.5})
            if reads.get(name.replace("published_", "")) == key:
                process.require_read(given)
            else:
                with pytest.raises(DataError, match=f"exploration.{key}=0.5 has no effect on {name}"):
                    process.require_read(given)
        process.require_read(Exploration())
