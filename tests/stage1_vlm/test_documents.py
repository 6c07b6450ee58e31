"""Attention inside packed conversations: equal to the dense masked form, and it never looks across."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from stage1_vlm import documents
from stage1_vlm.collate import pack, pad
from stage1_vlm.documents import NAME, document_attention
from stage1_vlm.processor import Turn


def dense(query, key, value, documents, scaling):
    """The same by a mask over the whole row."""
    rows, length = query.shape[0], query.shape[2]
    allowed = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row, lengths in enumerate(documents):
        start = 0
        for piece in [*lengths, length - sum(lengths)]:
            allowed[row, 0, start : start + piece, start : start + piece] = torch.ones(piece, piece).tril().bool()
            start += piece
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling).transpose(1, 2)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_values_and_gradients_equal_the_masked_form(heads):
    torch.manual_seed(0)
    lengths, (all_heads, groups) = [[5, 1, 7], [9]], heads
    tensors = [torch.randn(2, n, 13, 8, dtype=torch.float64, requires_grad=True) for n in (all_heads, groups, groups)]
    ours, _ = document_attention(nn.Module(), *tensors, None, documents=lengths, scaling=0.3)
    theirs = dense(*tensors, lengths, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), tensors), torch.autograd.grad((theirs * weight).sum(), tensors)
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def examples(backbone, make_picture):
    return [
        backbone.processor.encode([Turn("user", f"<image>\n{text}"), Turn("assistant", "yes")], [make_picture(k)])
        for k, text in enumerate(["What is ahead?", "Is it near? Say yes or no.", "Go"])
    ]


def test_packed_rows_use_it_and_padded_ones_do_not(backbone, make_picture, monkeypatch):
    assert backbone.model.config.get_text_config()._attn_implementation == NAME
    asked = []
    plain = documents.sdpa_attention_forward
    monkeypatch.setattr(documents, "sdpa_attention_forward", lambda *args, **kw: asked.append(1) or plain(*args, **kw))
    several = examples(backbone, make_picture)
    with torch.no_grad():
        backbone.last_hidden_states(pack([several], 0))
        assert not asked
        backbone.last_hidden_states(pad(several, 0))
    assert asked
