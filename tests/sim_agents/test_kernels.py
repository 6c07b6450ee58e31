"""The compiled loops of the network are the torch code that stands beside them, gradients included."""

import numpy as np
import pytest
import torch

from navsim_ext.errors import DataError
from sim_agents.model import relations
from sim_agents.model.attention import RelativeAttention, attend, attend_by_torch
from sim_agents.model.relations import RELATION_FEATURES, gather_rows, nearest_within, relation, relation_to
from sim_agents.model.sampling import Sampling


def neighbourhood(seed: int, *, G=3, Q=7, C=20, P=6, d=16, heads=2, F=RELATION_FEATURES):
    """asked, key_value, rows, mask, relation, heads; the first asker sees nobody, the second one neighbour."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    rows = torch.rand(G, Q, C, generator=generator).argsort(-1)[..., :P]
    mask = torch.rand(G, Q, P, generator=generator) < 0.7
    mask[:, 0], mask[:, 1] = False, torch.arange(P) == 2
    return draw(G, Q, d + heads * F), draw(G, C, 2 * d), rows, mask, draw(G, Q, P, F), heads


@pytest.mark.parametrize("shape", [{}, {"F": 0}, {"P": 1, "C": 1}, {"d": 64, "heads": 4, "P": 20}])
def test_attention_and_its_gradients_are_those_of_torch(shape):
    asked, key_value, *rest = neighbourhood(0, **shape)
    found = []
    for how in (attend, attend_by_torch):
        one, other = asked.clone().requires_grad_(), key_value.clone().requires_grad_()
        out = how(one, other, *rest)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        (out * weight).sum().backward()
        found.append((out.detach(), one.grad, other.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=3e-5)
    assert found[0][0][:, 0].abs().max() == 0  # who sees nobody gets nothing


def test_hidden_neighbours_may_be_anybody():
    asked, key_value, rows, mask, pairs, heads = neighbourhood(1)
    other = torch.where(mask, rows, 0)
    one = attend(asked, key_value, rows, mask, pairs, heads)
    assert torch.equal(one, attend(asked, key_value, other, mask, pairs, heads))
    torch.testing.assert_close(one, attend_by_torch(asked, key_value, other, mask, pairs, heads), atol=3e-6, rtol=3e-5)


def test_a_layer_is_what_its_equation_says():
    """Weights folded into the layers before and after: the same as keys and values with E_k r and E_v r added."""
    torch.manual_seed(0)
    layer = RelativeAttention(16, 2).eval()
    _, _, rows, mask, pairs, _ = neighbourhood(2)
    x, table = torch.randn(3, 7, 16), torch.randn(3, 20, 16)
    got = layer(x, layer.project(table), mask, rows, pairs)
    key_value = gather_rows(layer.project(table), rows) + pairs @ layer.from_relation.T  # [G, Q, P, 2 d]
    key, value = key_value.unflatten(-1, (2, 2, 8)).unbind(-3)  # [G, Q, P, h, d / h]
    query = layer.to_query(layer.norm_asker(x)).unflatten(-1, (2, 8))
    logits = torch.einsum("gqhk,gqphk->gqhp", query, key) / 8**0.5
    somebody = mask.any(-1)
    weights = logits.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    out = layer.to_out(torch.einsum("gqhp,gqphk->gqhk", weights, value).flatten(-2))
    expected = x + torch.where(somebody[..., None], out, 0.0)
    expected = expected + layer.feed_forward(expected)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_relations_and_nearest_ones_are_those_of_torch(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    asking, asked = (torch.randn(4, n, 3, generator=generator) * torch.tensor([20.0, 20.0, 2.0]) for n in (9, 30))
    asked[:, 0] = asking[:, 0]  # poses that coincide
    allowed = torch.rand(4, 9, 30, generator=generator) < 0.8
    rows, near = nearest_within(asking, asked, allowed, 8, 15.0)
    gap = torch.arange(8) * 0.5
    features = relation_to(asking, asked, rows, gap)
    torch.testing.assert_close(features, relation(asking[:, :, None], gather_rows(asked, rows), gap), atol=3e-6, rtol=0)
    monkeypatch.setattr(relations, "compiled", lambda *tensors: False)
    theirs, near_by_torch = nearest_within(asking, asked, allowed, 8, 15.0)
    assert torch.equal(near.sum(-1), near_by_torch.sum(-1))
    assert 0 < near.float().mean() < 1
    sets = [torch.where(one, row, -1).sort(-1).values for one, row in ((near, rows), (near_by_torch, theirs))]
    assert torch.equal(*sets)


def test_every_logit_gets_its_share_and_broken_ones_are_refused():
    logits = torch.randn(40, 33, generator=torch.Generator().manual_seed(4)) * 3
    logits[:, ::5] = -torch.inf
    for sampling in (Sampling(), Sampling(top_k=4), Sampling(top_p=0.7, temperature=1.7)):
        cumulative = sampling.log_probabilities(logits).double().exp().cumsum(-1)
        for u in (0.0, 0.2, 0.77, 1.0 - 2.0**-53):
            uniform = torch.full((40,), u, dtype=torch.float64)
            tokens, logp = sampling.sample(logits, uniform)
            theirs, their_logp = sampling.sample(logits.clone().requires_grad_(), uniform)  # torch
            edge = (cumulative - u * cumulative[:, -1:]).abs().min(-1).values < 1e-6  # rounding may decide
            assert (edge | (tokens == theirs)).all()
            torch.testing.assert_close(logp[~edge], their_logp[~edge].detach(), atol=1e-5, rtol=1e-5)
            assert torch.isfinite(logp).all()
    for broken in (np.nan, np.inf):
        wrong = logits.clone()
        wrong[7, 3] = broken
        with pytest.raises(DataError, match="not finite"):
            Sampling().sample(wrong, torch.full((40,), 0.5))
