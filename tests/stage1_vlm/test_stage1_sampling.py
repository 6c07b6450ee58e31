"""Sampled answers: the laws of their distribution, and that what is scored is what a plain forward pass says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from navsim_ext.errors import DataError
from stage1_vlm import sampling as module
from stage1_vlm.collate import pad
from stage1_vlm.loading import load_backbone
from stage1_vlm.processor import Turn
from stage1_vlm.sampling import (
    AnswerSampling,
    encode_prompt,
    forbidden_tokens,
    sample_answers,
    score_answers,
    score_conversations,
)


def prompt(backbone, picture, words="What does the traffic light show?"):
    return backbone.processor.encode([Turn("user", f"<image>\n{words}")], [picture], generation_prompt=True)


def words(backbone, text) -> torch.Tensor:
    return torch.tensor(backbone.processor.token_ids(text))


@pytest.fixture
def asked(backbone, make_picture):
    """Two prompts of unequal length with pictures of unequal shape."""
    return [prompt(backbone, make_picture(1)), prompt(backbone, make_picture(2, 54, 120), "Is a car ahead? yes or no")]


def plain_logp(backbone, example, tokens) -> torch.Tensor:
    """As transformers' own forward pass says, prompt and answer in one padded row."""
    ids = torch.cat([example.input_ids, tokens])
    whole = replace(example, input_ids=ids, labels=ids)
    batch = pad([whole], backbone.processor.pad_token_id)
    with torch.no_grad():
        logits = backbone.model(**backbone.model_inputs(batch)).logits[0].float()
    table = logits[-len(tokens) - 1 : -1].log_softmax(dim=-1)
    return table.gather(-1, tokens[:, None])[:, 0]


def test_shared_and_packed_scores_equal_a_plain_forward_pass_and_those_of_sampling(backbone, asked):
    with torch.no_grad():
        prompts = [encode_prompt(backbone, one) for one in asked]
        drawn = sample_answers(backbone, prompts, [[1, 2, 3], [4, 5]], AnswerSampling(max_new_tokens=9))
        tokens = [[answer.tokens for answer in row] for row in drawn]
        shared = score_answers(backbone, prompts, tokens)
        packed = score_conversations(backbone, asked, tokens)
    flat = [(one, answer) for one, row in zip(asked, drawn) for answer in row]
    for row, (example, answer) in enumerate(flat):
        plain = plain_logp(backbone, example, answer.tokens)
        for scores in (shared, packed):
            torch.testing.assert_close(scores.logp[row][scores.mask[row]], plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(answer.logp, plain, atol=1e-4, rtol=0)
    assert not shared.logp[~shared.mask].any()


def test_gradients_of_shared_and_packed_scores_agree(backbone, asked):
    tokens = [[words(backbone, "red. yes"), words(backbone, "no")], [words(backbone, "is it")]]
    gradients = []
    for score in (
        lambda: score_answers(backbone, [encode_prompt(backbone, one) for one in asked], tokens),
        lambda: score_conversations(backbone, asked, tokens),
    ):
        backbone.model.zero_grad()
        score().logp.sum().backward()
        gradients.append([p.grad.clone() for p in backbone.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_the_picture_reaches_every_log_probability(backbone, make_picture):
    tokens = [[words(backbone, "red. yes, no")]]
    one, other = (prompt(backbone, make_picture(number)) for number in (1, 2))
    assert torch.equal(one.input_ids, other.input_ids)
    with torch.no_grad():
        scores = [score_answers(backbone, [encode_prompt(backbone, each)], tokens).logp for each in (one, other)]
        packed = [score_conversations(backbone, [each], tokens).logp for each in (one, other)]
    assert ((scores[0] - scores[1]).abs() > 1e-6).all()
    assert ((packed[0] - packed[1]).abs() > 1e-6).all()


def test_answers_depend_on_their_key_alone(backbone, asked):
    with torch.no_grad():
        prompts = [encode_prompt(backbone, one) for one in asked]
    settings = AnswerSampling(max_new_tokens=12)
    together = sample_answers(backbone, prompts, [[11, 12], [13, 14]], settings)
    alone = sample_answers(backbone, prompts[1:], [[14]], settings)[0][0]
    assert torch.equal(alone.tokens, together[1][1].tokens)
    other_order = sample_answers(backbone, prompts[::-1], [[14, 13], [12]], settings)
    assert torch.equal(other_order[1][0].tokens, together[0][1].tokens)
    twice = sample_answers(backbone, prompts[:1], [[11, 11]], settings)[0]
    assert torch.equal(twice[0].tokens, twice[1].tokens)


def test_greedy_answers_are_those_of_generate(backbone, asked):
    with torch.no_grad():
        prompts = [encode_prompt(backbone, one) for one in asked]
    drawn = sample_answers(backbone, prompts, [[0], [0]], AnswerSampling(temperature=0.0, max_new_tokens=10))
    batch = pad(asked, backbone.processor.pad_token_id, side="left")
    generated = backbone.model.generate(
        **backbone.model_inputs(batch), max_new_tokens=10, do_sample=False,
        eos_token_id=backbone.processor.end_of_turn_id, pad_token_id=backbone.processor.pad_token_id,
        suppress_tokens=forbidden_tokens(backbone).nonzero()[:, 0].tolist(),
    )[:, batch.input_ids.shape[1] :]  # fmt: skip
    for (answer,), tokens in zip(drawn, generated):
        assert answer.tokens.tolist() == tokens[: len(answer.tokens)].tolist()


def test_picture_tokens_are_never_drawn_and_the_end_ends(internvl, make_picture):
    with torch.no_grad():
        internvl.model.lm_head.weight[internvl.processor.image_token_id] *= 50.0  # it would love to
        one = encode_prompt(internvl, prompt(internvl, make_picture(1)))
    end = internvl.processor.end_of_turn_id
    drawn = sample_answers(internvl, [one], [range(24)], AnswerSampling(max_new_tokens=30))[0]
    for answer in drawn:
        assert internvl.processor.image_token_id not in answer.tokens.tolist()
        assert end not in answer.tokens[:-1].tolist()
        assert answer.truncated == (int(answer.tokens[-1]) != end)


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1]])).expand(4000, -1)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forbidden = torch.tensor([False, True, False, False])

    def shares(**settings):
        chosen, _, _ = module._draw(logits, uniform, forbidden, AnswerSampling(**settings))
        return torch.bincount(chosen, minlength=4) / 4000

    torch.testing.assert_close(shares(), torch.tensor([0.625, 0.0, 0.25, 0.125]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([5 / 7, 0, 2 / 7, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_p=0.5), torch.tensor([1.0, 0, 0, 0]))
    hot = torch.tensor([0.5, 0, 0.2, 0.1]) ** 0.5
    torch.testing.assert_close(shares(temperature=2.0), hot / hot.sum(), atol=0.03, rtol=0)
    _, logp, entropy = module._draw(logits, uniform, forbidden, AnswerSampling(top_k=1))
    torch.testing.assert_close(logp.exp(), torch.full((4000,), 0.5))  # of the whole softmax
    torch.testing.assert_close(entropy[0], -(logits[0].exp() * logits[0]).sum())
    assert module._draw(logits[:1], torch.ones(1, dtype=torch.float64), forbidden, AnswerSampling())[0] == 3


def test_what_cannot_be_sampled_or_scored_is_refused(internvl, make_picture):
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            AnswerSampling(**wrong)
    with torch.no_grad():
        one = encode_prompt(internvl, prompt(internvl, make_picture(1)))
    with pytest.raises(DataError, match="answers"):
        sample_answers(internvl, [one], [[]], AnswerSampling())
    with pytest.raises(DataError, match="at least the token"):
        score_answers(internvl, [one], [[torch.tensor([], dtype=torch.long)]])


def test_bfloat16_weights_are_scored_in_float32(tiny_internvl, make_picture):
    backbone = load_backbone(tiny_internvl, max_image_tokens=16, dtype="bfloat16")
    backbone.model.eval()
    with torch.no_grad():
        scores = score_answers(backbone, [encode_prompt(backbone, prompt(backbone, make_picture(1)))],
                               [[words(backbone, "red")]])  # fmt: skip
    assert scores.logp.dtype == torch.float32
