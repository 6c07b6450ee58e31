"""Attention inside the conversations of packed rows.

transformers tells packed conversations apart by a mask [L,L] over the whole row: its attention costs L^2 however short
the conversations are, and no fused kernel takes such a mask. Here each conversation attends to itself alone,

    o_i = softmax_j(q_i k_j / sqrt(d)) v_j   for j <= i within the conversation of i,

at the cost of the sum of l^2 over its lengths l, with the fused causal kernel of the device and without a mask.

Legend: B rows, H heads, L tokens of a row, d width of a head, l tokens of one conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_documents"  # among transformers' kinds of attention


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Sequence[Sequence[int]] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``query`` [B,H,L,d], ``key`` and ``value`` [B,H/groups,L,d] -> ([B,L,H,d], None).

    ``documents`` are the lengths of each row's conversations, in order; what is left of a row is padding and counts as
    one more. Without them this is transformers' ``sdpa`` with its mask.
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    length, rows = query.shape[2], []
    for row, lengths in enumerate(documents):
        pieces = [*lengths, length - sum(lengths)] if sum(lengths) < length else list(lengths)
        parts = [tensor[row : row + 1].split(pieces, dim=2) for tensor in (query, key, value)]
        rows.append(
            torch.cat(
                [
                    functional.scaled_dot_product_attention(
                        q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
                    )
                    for q, k, v in zip(*parts)
                ],
                dim=2,
            )
        )
    return torch.cat(rows).transpose(1, 2), None


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_within_documents(model: PreTrainedModel) -> None:
    """The language model of ``model``, loaded with ``sdpa``, understands :func:`packed_inputs` from now on.

    One with sliding windows keeps transformers' own attention.
    """
    text = model.config.get_text_config()
    if set(text.layer_types) == {"full_attention"}:
        text._attn_implementation = NAME  # noqa: SLF001


def packed_inputs(model: PreTrainedModel, documents: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """What ``model`` is called with instead of a mask; nothing where the batch is padded or another kind attends."""
    if documents is None or model.config.get_text_config()._attn_implementation != NAME:  # noqa: SLF001
        return {}
    return {"documents": documents, "attention_mask": {"full_attention": None}}
