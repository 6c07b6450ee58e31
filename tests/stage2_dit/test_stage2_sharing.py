"""Keys and values computed once per scene equal the naive computation; padding; noise that is addressed by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from navsim_ext.errors import DataError
from stage2_dit import (
    Chain,
    DiffusionPlanner,
    Exploration,
    NoDensity,
    PlannerConfig,
    WrongProcess,
    build_process,
    keyed_noise,
    log_prob,
    sample_chain,
)

WIDTH, TOKENS, SCENES = 20, 11, 3


@pytest.fixture(scope="module")
def planner() -> DiffusionPlanner:
    torch.manual_seed(5)
    planner = DiffusionPlanner(tiny())
    for parameter in planner.parameters():  # adaLN starts at zero: without this no block would do anything
        torch.nn.init.normal_(parameter, std=0.15)
    return planner.eval()


def tiny(**changes) -> PlannerConfig:
    sizes = {"num_heads": 2, "head_width": 8, "num_layers": 4, "output_width": 12, "encoder_width": 24}
    return PlannerConfig(**{"hidden_width": WIDTH, **sizes, **changes})


def scenes(count: int = SCENES, tokens: int = TOKENS):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, tokens, WIDTH, generator=generator)
    mask = torch.arange(tokens)[None] < torch.tensor([tokens, tokens - 4, 2])[:count, None]
    history = torch.randn(count, 4, 3, generator=generator)
    status = torch.randn(count, 8, generator=generator)
    return hidden, mask, history, status


NAMES = [f"token{i}" for i in range(SCENES)]


@pytest.mark.parametrize("queries", [None, 8])
def test_shared_context_equals_one_row_at_a_time(planner, queries):
    hidden, mask, history, status = scenes()
    group = 4
    shared = planner.condition(hidden, mask, history, status, queries_per_scene=queries)
    x = torch.randn(SCENES * group, 8, 3)
    time = torch.randint(0, 100, (SCENES * group,))
    together = planner(x, time, shared)
    for row in range(len(x)):
        scene = row // group
        valid = hidden[scene : scene + 1, mask[scene]]
        alone = planner.condition(valid, None, history[scene : scene + 1], status[scene : scene + 1])
        torch.testing.assert_close(planner(x[row : row + 1], time[row : row + 1], alone)[0], together[row],
                                   atol=1e-6, rtol=1e-5)  # fmt: skip


def test_deferred_values_have_the_same_gradients(planner):
    hidden, mask, history, status = scenes()
    target, noise = torch.randn(SCENES, 8, 3), torch.randn(SCENES, 8, 3)
    time = torch.tensor([3, 50, 97])
    gradients = []
    for queries in (None, 8):
        planner.zero_grad()
        conditioning = planner.condition(hidden, mask, history, status, queries_per_scene=queries)
        assert (conditioning.layers[0].value is None) == (queries is not None)
        planner.training_loss(conditioning, target, noise, time).backward()
        gradients.append({name: p.grad.clone() for name, p in planner.named_parameters()})
    planner.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_selected_scenes_equal_the_whole(planner):
    hidden, mask, history, status = scenes()
    conditioning = planner.condition(hidden, mask, history, status)
    with torch.no_grad():
        chain = sample_chain(planner, conditioning, tokens=NAMES, group_size=2)
        whole = log_prob(planner, conditioning, chain)
        part = log_prob(planner, conditioning.select([2, 0]), chain.select([2, 0]))
    torch.testing.assert_close(part.unflatten(0, (2, 2)), whole.unflatten(0, (3, 2))[[2, 0]], atol=2e-5, rtol=1e-5)


def test_masked_padding_has_no_influence(planner):
    hidden, mask, history, status = scenes()
    x, time = torch.randn(SCENES, 8, 3), torch.zeros(SCENES)
    changed = torch.where(mask[..., None], hidden, torch.full_like(hidden, 100.0))
    first = planner(x, time, planner.condition(hidden, mask, history, status))
    second = planner(x, time, planner.condition(changed, mask, history, status))
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_upstream_padding_counts_zero_rows(planner):
    """A merged zero row that counts n times equals n zero rows without a mask."""
    hidden, mask, history, status = scenes()
    upstream = DiffusionPlanner(tiny(padding="upstream", padded_length=30)).eval()
    upstream.load_state_dict(planner.state_dict())
    naive = DiffusionPlanner(tiny(padding="upstream")).eval()
    naive.load_state_dict(planner.state_dict())
    padded = torch.zeros(SCENES, 30, WIDTH)
    padded[:, :TOKENS] = hidden * mask[..., None]
    x, time = torch.randn(SCENES, 8, 3), torch.zeros(SCENES)
    merged = upstream(x, time, upstream.condition(hidden, mask, history, status))
    long = naive(x, time, naive.condition(padded, torch.ones(SCENES, 30, dtype=torch.bool), history, status))
    masked = planner(x, time, planner.condition(hidden, mask, history, status))
    torch.testing.assert_close(merged, long, atol=1e-6, rtol=1e-5)
    assert (masked - long).abs().max() > 1e-3


def test_noise_depends_on_names_alone(planner):
    options = {"group_size": 3, "num_steps": 5, "horizon": 8}
    whole = keyed_noise(1, 7, NAMES, **options)
    turned = keyed_noise(1, 7, NAMES[::-1], **options)
    assert torch.equal(whole.steps.unflatten(0, (3, 3)), turned.steps.unflatten(0, (3, 3)).flip(0))
    fewer = keyed_noise(1, 7, NAMES[1:2], group_size=2, num_steps=5, horizon=8)
    assert torch.equal(fewer.initial, whole.initial[3:5])
    assert not torch.equal(keyed_noise(1, 8, NAMES, **options).initial, whole.initial)
    assert not torch.equal(keyed_noise(2, 7, NAMES, **options).initial, whole.initial)
    many = keyed_noise(0, 0, [str(i) for i in range(400)], group_size=2, num_steps=5, horizon=8)
    values = torch.cat([many.initial.flatten(), many.steps.flatten()])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    pairs = many.initial.flatten(1).unflatten(0, (400, 2))
    correlation = np.corrcoef(pairs[:, 0].flatten(), pairs[:, 1].flatten())[0, 1]
    assert abs(correlation) < 0.03


def test_samples_do_not_depend_on_the_batch(planner):
    hidden, mask, history, status = scenes()
    with torch.no_grad():
        whole = sample_chain(planner, planner.condition(hidden, mask, history, status), tokens=NAMES, group_size=2)
        alone = sample_chain(planner, planner.condition(hidden[1:2], mask[1:2], history[1:2], status[1:2]),
                             tokens=NAMES[1:2], group_size=2)  # fmt: skip
    torch.testing.assert_close(alone.states, whole.states[2:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "ddpm_published", "flow_sde", "flow_cps"])
def test_equal_floors_score_with_the_density_that_drew(name):
    """log p of the drawn states equals the standard normal density of the noise, minus log std."""
    torch.manual_seed(0)
    planner = DiffusionPlanner(tiny(process=name)).eval()
    conditioning = planner.condition(*scenes())
    exploration = Exploration(noise_clip=None, final_clip=None)
    with torch.no_grad():
        noise = keyed_noise(0, 0, NAMES, group_size=2, num_steps=5, horizon=8)
        chain = sample_chain(planner, conditioning, noise=noise, group_size=2, exploration=exploration)
        density = log_prob(planner, conditioning, chain)
        std = [planner.process.step(k, chain.states[:, k], torch.zeros(6, 8, 3), exploration).std for k in range(5)]
    std = torch.stack([each.expand(6, 1, 1) for each in std], dim=1).clamp_min(0.04)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise.steps) - torch.log(std)
    torch.testing.assert_close(density, expected, atol=2e-4, rtol=1e-4)


def test_errors_name_both_sides(planner):
    hidden, mask, history, status = scenes()
    conditioning = planner.condition(hidden, mask, history, status)
    with pytest.raises(DataError, match=r"hidden states are 21 wide, the planner was built for 20"):
        planner.condition(torch.zeros(1, 2, 21), None, history[:1], status[:1])
    with pytest.raises(DataError, match="2 tokens were given for 3"):
        sample_chain(planner, conditioning, tokens=NAMES[:2])
    with pytest.raises(DataError, match="7 rows cannot be shared among 3 scenes"):
        planner(torch.zeros(7, 8, 3), torch.zeros(7), conditioning)
    with pytest.raises(WrongProcess, match="predicts noise; flow_sde needs velocity"):
        sample_chain(planner, conditioning, tokens=NAMES, process=build_process("flow_sde"))
    with pytest.raises(DataError, match="choose one of ddim"):
        build_process("dddim")
    with torch.no_grad():
        chain = sample_chain(planner, conditioning, tokens=NAMES, exploration=Exploration.preset("deterministic"))
    with pytest.raises(NoDensity, match="deterministic=True"):
        log_prob(planner, conditioning, chain)
    stochastic = Chain(chain.states, chain.times, Exploration(), chain.process, 1)
    with pytest.raises(WrongProcess, match="ddpm"):
        log_prob(planner, conditioning, stochastic, process=build_process("ddpm"))
