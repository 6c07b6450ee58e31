"""What runs on a GPU gives what the CPU gives. ``scripts/gpu_check.sh`` runs these first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.world import World
from sim_agents.model.network import NextTokenNetwork
from sim_agents.model.settings import NetworkSettings
from sim_agents.policy import TokenPolicy
from sim_agents.vocabulary import VerletVocabulary
from stage1_vlm.collate import pack
from stage1_vlm.documents import document_attention
from stage1_vlm.processor import Turn
from stage1_vlm.sampling import AnswerSampling, encode_prompt, sample_answers
from stage2_dit import DiffusionPlanner, PlannerConfig
from stage2_dit.inference import PlannerRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def planner() -> DiffusionPlanner:
    torch.manual_seed(0)
    model = DiffusionPlanner(PlannerConfig.small(64))
    for name, parameter in model.named_parameters():
        if "adaLN" in name or "modulation" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def scenes(count: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    sizes = ((count, 20, 64), (count, 4, 3), (count, 8), (count, 8, 3))
    hidden, history, status, noise = (torch.randn(size, generator=random) for size in sizes)
    return hidden, None, history, status, noise


def moved(tensors, device):
    return tuple(None if tensor is None else tensor.to(device) for tensor in tensors)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}])
@pytest.mark.parametrize("count", [1, 3])
def test_the_planner_plans_as_on_the_cpu(options, count):
    """fp32: PyTorch multiplies in full precision by default."""
    asked = scenes(count)
    expected = PlannerRunner(planner()).sample(*asked)
    runner = PlannerRunner(planner().to(DEVICE), **options)
    for _ in range(2):  # a captured graph is replayed by the second call
        found = runner.sample(*moved(asked, DEVICE)).cpu()
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_a_training_step_has_the_gradients_of_the_cpu():
    gradients = {}
    for device in ("cpu", DEVICE):
        model = planner().to(device)
        hidden, mask, history, status, noise = moved(scenes(3), device)
        conditioning = model.condition(hidden, mask, history, status, queries_per_scene=8)
        times = torch.tensor([3, 50, 99], device=device)
        model.training_loss(conditioning, 0.5 * noise.flip(0), noise, times).backward()
        gradients[device] = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    difference = (gradients[DEVICE] - gradients["cpu"]).norm() / gradients["cpu"].norm()
    assert float(difference) < 1e-4


def test_a_step_of_reinforcement_has_the_loss_of_the_cpu():
    from bench_grpo import Setup

    losses = {}
    for device in ("cpu", DEVICE):
        setup = Setup(12, device=device)
        losses[device] = [float(setup.ours()) for _ in range(3)]
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_within_conversations_equals_that_of_the_cpu(dtype, atol):
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 700, 64, generator=random) for heads in (4, 2, 2)]
    documents = [[300, 1, 350]]
    expected, _ = document_attention(nn.Module(), *tensors, None, documents=documents)
    on_device = [tensor.to(DEVICE, dtype) for tensor in tensors]
    found, _ = document_attention(nn.Module(), *on_device, None, documents=documents)
    torch.testing.assert_close(found.float().cpu(), expected, atol=atol, rtol=atol)


def test_a_vlm_samples_and_encodes_as_on_the_cpu():
    from random_internvl import random_internvl

    answers, states = {}, {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        backbone = random_internvl("cpu", tiny=True)
        backbone.model.float().to(device).eval()
        turns = [Turn("user", "Predict the trajectory of the ego car.")]
        examples = [backbone.processor.encode(turns, [], generation_prompt=True)] * 2
        with torch.no_grad():
            packed = pack([examples], backbone.processor.pad_token_id).to(device)
            states[device] = backbone.last_hidden_states(packed).cpu()
            prompts = [encode_prompt(backbone, examples[0])]
        answers[device] = sample_answers(backbone, prompts, [range(4)], AnswerSampling(max_new_tokens=12))[0]
    torch.testing.assert_close(states[DEVICE], states["cpu"], atol=1e-4, rtol=1e-4)
    for one, other in zip(answers["cpu"], answers[DEVICE]):
        assert one.tokens.tolist() == other.tokens.tolist()
        torch.testing.assert_close(one.logp, other.logp.cpu(), atol=1e-4, rtol=1e-4)


def test_the_world_moves_as_on_the_cpu():
    from bench_closed_loop import busy, tokens

    poses, events = {}, {}
    for device in ("cpu", DEVICE):
        recorded = WorldScenes.build([busy(0), busy(1)], device)
        world = World(horizon_s=4.0, events=("contact", "off_road"), device=device)
        state = world.reset(recorded)
        for move in tokens(2, recorded.num_agents)[:8]:
            world.step(state, Moves.tokens(move.to(device)))
        poses[device] = state.poses.cpu()
        found = world.events(state, 0, state.step)
        events[device] = {name: getattr(found, name).any().cpu() for name in ("contact", "off_road")}
    torch.testing.assert_close(poses[DEVICE], poses["cpu"], atol=1e-4, rtol=0)
    for name, expected in events["cpu"].items():
        assert float((events[DEVICE][name] != expected).float().mean()) < 1e-3, name  # a touch within rounding


def test_a_traffic_model_drives_as_on_the_cpu():
    from bench_closed_loop import busy

    torch.manual_seed(0)
    vocabulary = VerletVocabulary()
    network = NextTokenNetwork(NetworkSettings(vocabulary.size, width=16, heads=2, blocks=1), vocabulary).eval()
    poses, sources = {}, [busy(0)]
    for device in ("cpu", DEVICE):
        policy = TokenPolicy(network.to(device), vocabulary)
        world = World(rollouts=2, horizon_s=1.0, events=(), device=device)
        state = world.reset(WorldScenes.build(sources, device))
        policy.start(state, sources)
        world.step(state, policy.act(state))
        poses[device] = state.poses.cpu()
    apart = (poses[DEVICE] - poses["cpu"]).abs().amax(dim=-1)
    assert float((apart > 1e-3).float().mean()) < 0.01  # two tokens as probable within rounding
