"""Cloning learns: untrained it goes on as before; one scene is learned by heart and driven again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from agent_scenes import street

from navsim_ext.errors import DataError
from sim_agents.data.scene_tokens import Bounds, collate, scene_tokens
from sim_agents.model.head import MotionEmbedding, motion_features
from sim_agents.model.network import NextTokenNetwork
from sim_agents.model.rolling import Sampled, roll
from sim_agents.model.sampling import Sampling
from sim_agents.model.settings import NetworkSettings
from sim_agents.training.module import AgentModule
from sim_agents.vocabulary import MotionState, class_of, save_vocabulary
from sim_agents.vocabulary.build import VocabularySettings, make_vocabulary
from sim_agents.vocabulary.store import vocabulary_fingerprint

TOKENS, STEPS = 64, 100


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Folders of two kinds of vocabulary of the streets."""
    folder, scenes = tmp_path_factory.mktemp("words"), [street(f"s{number}", seed=number) for number in range(6)]
    for method in ("k_disks", "verlet"):
        vocabulary, _ = make_vocabulary(VocabularySettings(method, TOKENS), scenes)
        save_vocabulary(folder / method, vocabulary, vocabulary_fingerprint({"method": method}, None))
    return folder


def module(vocabularies, method="k_disks", geometry="relative", seed=0):
    torch.manual_seed(seed)
    network = {"width": 32, "heads": 2, "blocks": 1, "geometry": geometry, "latents": 8 if geometry == "scene" else 0}
    return AgentModule(str(vocabularies / method), network, smoothing="none", past_dropout=0.0)


def in_tokens(scene):
    tokens, now, _ = scene_tokens(scene, Bounds(pieces=64))
    return collate([tokens]), now


@pytest.mark.parametrize(
    ("method", "geometry", "seed"), [("k_disks", "relative", 0), ("verlet", "relative", 1), ("k_disks", "scene", 2)]
)
def test_one_scene_is_learned_by_heart_and_driven_again(vocabularies, method, geometry, seed):
    """Every token right given the past, and the most probable ones, one after another, are the recorded ones for 8 s:
    labels, frames, masks and the two ways through the network say the same."""
    batch, now = in_tokens(street(f"s{seed}", seed=seed))
    model = module(vocabularies, method, geometry, seed)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=5e-3, weight_decay=0.0)
    decisions = model.cloned(batch)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / STEPS)
        loss, accuracy, _ = model._step(batch, decisions, now)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy > 0.99
    assert loss < 0.1
    moved = batch.displacement.clone()
    moved[:, :, 1:] = torch.diff(decisions.pose[..., :2], dim=2)
    told = replace(batch, pose=decisions.pose, displacement=moved)
    greedy, uniform = Sampled(Sampling(temperature=0)), torch.zeros(*batch.valid.shape[:2], batch.num_steps - 1)
    rolled = roll(model.network.eval(), model.vocabulary, model.loss.present, told, now, greedy, uniform)
    assert (rolled.tokens == decisions.targets)[0, :, now:].float().mean() > 0.97
    apart = (rolled.pose - batch.pose)[0, :, now + 1 :, :2].norm(dim=-1).mean()
    of_tokens = (decisions.pose - batch.pose)[0, :, now + 1 :, :2].norm(dim=-1).mean()
    assert apart < of_tokens + 0.3


def test_untrained_it_goes_on_as_before(vocabularies):
    """Who has played one token again and again will most likely play it, or one like it, before any training."""
    batch, now = in_tokens(street("s1", seed=1))
    classes = class_of(batch.kind)
    for seed in range(3):
        model = module(vocabularies, seed=seed).eval()
        tokens = (torch.rand(classes.shape) * model.vocabulary.counts[classes]).long()
        pose = [batch.pose[:, :, 0]]
        for _ in range(batch.num_steps - 1):
            state = MotionState(pose[-1][0], torch.zeros(len(tokens[0]), 2))
            pose.append(model.vocabulary.play(state, classes[0], tokens[0])[1].pose[None])
        with torch.no_grad():
            logits = model.network(batch, now, torch.stack(pose, dim=2))[:, :, now]
        logp = model.loss.mask(logits, classes).log_softmax(dim=-1)
        assert -logp.gather(-1, tokens[..., None]).mean() < 0.6 * np.log(TOKENS)


def test_motions_that_differ_less_are_more_alike():
    along = torch.tensor([0.0, 0.05, 0.1, 0.2])
    motions = torch.stack([5.0 + along, torch.zeros(4), torch.zeros(4)], dim=-1)
    for seed in range(3):
        torch.manual_seed(seed)
        embedded = MotionEmbedding(4096).linear(motion_features(motions))
        alike = (embedded @ embedded[0]).tolist()
        assert alike == sorted(alike, reverse=True)


def test_each_road_user_is_asked_about_the_tokens_of_its_own_class(vocabularies):
    model = module(vocabularies)
    torch.manual_seed(3)
    for weight in (model.network.head.own, model.network.head.bias):
        torch.nn.init.normal_(weight)
    x, classes = torch.randn(2, 9, 32), torch.arange(18).view(2, 9) % 3
    head, tokens = model.network.head, model.network.motion(model.network.head.motions) + model.network.head.own
    wanted = torch.einsum("bnd,bnvd->bnv", head.query(head.norm(x)), tokens[classes]) * head.log_sharpness.exp()
    torch.testing.assert_close(model.network.logits(x, classes), wanted + head.bias[classes], atol=1e-4, rtol=1e-4)
    ends = model.vocabulary.shapes[:, :, -1]
    torch.testing.assert_close(head.motions, ends)
    with pytest.raises(DataError, match=r"the network has 9 tokens, the vocabulary \d+"):
        NextTokenNetwork(NetworkSettings(9), model.vocabulary)
