"""Attention over a few neighbours whose relation to the asker enters keys and values.

Legend: G groups of askers that ask the same table, Q askers of a group, C rows of its table, P neighbours of an
asker, d width, h heads, F features of a relation.

    a_qp = softmax_p( q . (k_p + E_k r_qp) / sqrt(d / h) ),   out_q = sum_p a_qp (v_p + E_v r_qp)

Nothing of size Q P d is ever made: E_k and E_v go to the side of the asker, q . E_k r = (E_k^T q) . r and
sum a E_v r = E_v (sum a r), and from there into the layers before and after, W_q and W_out. What is left, the mean of
values and relations by the weights, is :func:`attend`. Source: the relative attention of SMART (arXiv 2405.15677,
after QCNet); linear in the features of a relation, where the original has a small network on each edge.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sim_agents.model import kernels
from sim_agents.model.relations import RELATION_FEATURES, compiled


class RelativeAttention(nn.Module):
    """One layer: pre-norm attention with residual, then a pre-norm feed-forward network with residual."""

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0, relative: bool = True) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm_asker, self.norm_asked = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width)
        self.to_key_value = nn.Linear(width, 2 * width)
        bound = RELATION_FEATURES**-0.5
        weight = torch.empty(2 * width, RELATION_FEATURES).uniform_(-bound, bound)
        self.from_relation = nn.Parameter(weight) if relative else None
        self.to_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def project(self, table: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch two_d"]:
        """Keys and values [..., 2 d] of what is asked [..., d]; they depend on nobody who asks."""
        return self.to_key_value(self.norm_asked(table))

    def forward(
        self,
        x: Float[Tensor, "G Q d"],
        key_value: Float[Tensor, "G C two_d"],
        mask: Bool[Tensor, "G Q P"],
        rows: Int64[Tensor, "G Q P"] | None = None,
        relation: Float[Tensor, "G Q P F"] | None = None,
    ) -> Float[Tensor, "G Q d"]:
        """Askers x [G, Q, d], table key_value [G, C, 2 d], mask [G, Q, P] -> [G, Q, d].

        ``rows`` [G, Q, P]: each asker's neighbours (those that the mask hides may stand twice); None: everybody asks
        the whole table (P = C). ``relation`` [G, Q, P, F]. Askers without a neighbour keep what they have.
        """
        G, Q, P = mask.shape
        if rows is None:
            rows = torch.arange(P, device=mask.device).expand(G, Q, P)
        if relation is None:
            relation = x.new_zeros(G, Q, P, 0)
        before, bias, after = self._folded()
        asked = nn.functional.linear(self.norm_asker(x), before, bias)
        found = attend(asked, key_value, rows, mask, relation, self.heads)
        out = nn.functional.linear(found, after, self.to_out.bias)
        somebody = mask.any(dim=-1, keepdim=True)
        x = x + self.dropout(torch.where(somebody, out, 0.0))
        return x + self.dropout(self.feed_forward(x))

    def _folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """W [d + h F, d] and bias of what is asked (queries; E_k^T of them), and W [d, d + h F] of what comes out."""
        query, bias = self.to_query.weight * self.scale, self.to_query.bias * self.scale
        if self.from_relation is None:
            return query, bias, self.to_out.weight
        for_key, for_value = self.from_relation.unflatten(0, (2, self.heads, -1)).unbind(0)  # [h, d / h, F]
        by_head = query.unflatten(0, (self.heads, -1))  # [h, d / h, d]
        relation = torch.matmul(for_key.transpose(1, 2), by_head).flatten(0, 1)
        relation_bias = torch.matmul(for_key.transpose(1, 2), bias.unflatten(0, (self.heads, -1))[..., None]).flatten()
        out = self.to_out.weight.unflatten(1, (self.heads, -1)).transpose(0, 1)  # [h, d, d / h]
        spread = torch.matmul(out, for_value).transpose(0, 1).flatten(1)  # [d, h F]
        return (
            torch.cat([query, relation]),
            torch.cat([bias, relation_bias]),
            torch.cat([self.to_out.weight, spread], dim=1),
        )


def attend(
    asked: Float[Tensor, "G Q asked"],
    key_value: Float[Tensor, "G C two_d"],
    rows: Int64[Tensor, "G Q P"],
    mask: Bool[Tensor, "G Q P"],
    relation: Float[Tensor, "G Q P F"],
    heads: int,
) -> Float[Tensor, "G Q asked"]:
    """Means [G, Q, d + h F] of the neighbours' values and relations, 0 for askers without a neighbour.

    ``asked`` [G, Q, d + h F]: queries, then what each head asks of the features of a relation; ``key_value`` [G, C, 2
    d], ``rows`` and ``mask`` [G, Q, P], ``relation`` [G, Q, P, F]. Compiled for float32 on the CPU, torch elsewhere.
    """
    if compiled(asked, key_value, relation) and not relation.requires_grad:
        return _Attend.apply(asked, key_value, rows, mask, relation, heads)
    return attend_by_torch(asked, key_value, rows, mask, relation, heads)


def attend_by_torch(
    asked: Tensor, key_value: Tensor, rows: Tensor, mask: Tensor, relation: Tensor, heads: int
) -> Tensor:
    """:func:`attend` in torch. Scores against the whole table are one product per group, of which the neighbours' are
    picked; weights are put back into a row of the table and averaged by another product."""
    d = key_value.shape[-1] // 2
    key, value = key_value.unflatten(-1, (2, heads, -1)).unbind(-3)  # [G, C, h, d / h]
    query = asked[..., :d].unflatten(-1, (heads, -1))
    by_head = rows[:, None].expand(-1, heads, -1, -1)
    logits = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1)).gather(-1, by_head)  # [G, h, Q, P]
    of_relation = asked[..., d:].unflatten(-1, (heads, -1))  # [G, Q, h, F]
    logits = logits + torch.matmul(of_relation, relation.transpose(-2, -1)).transpose(1, 2)
    somebody = mask.any(dim=-1)
    shown = mask | ~somebody[..., None]
    weights = logits.masked_fill(~shown[:, None], -torch.inf).softmax(dim=-1)
    weights = weights * somebody[:, None, :, None]
    spread = weights.new_zeros(*weights.shape[:3], key_value.shape[1]).scatter_add(-1, by_head, weights)
    out = torch.matmul(spread, value.transpose(1, 2)).transpose(1, 2)  # [G, Q, h, d / h]
    seen = torch.matmul(weights.transpose(1, 2), relation)  # [G, Q, h, F]
    return torch.cat([out.flatten(-2), seen.flatten(-2)], dim=-1)


class _Attend(torch.autograd.Function):
    """:func:`attend` by the compiled loops; no gradient goes to the relations."""

    @staticmethod
    def forward(ctx, asked, key_value, rows, mask, relation, heads):
        asked, key_value, rows, mask, relation = (
            one.detach().contiguous() for one in (asked, key_value, rows, mask, relation)
        )
        out = torch.empty_like(asked)
        weights = asked.new_empty(*rows.shape[:2], heads, rows.shape[2])
        arrays = [one.numpy() for one in (asked, key_value, rows, mask, relation)]
        kernels.attend(*arrays, heads, out.numpy(), weights.numpy())
        ctx.save_for_backward(asked, key_value, rows, relation, weights)
        ctx.heads = heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        asked, key_value, rows, relation, weights = ctx.saved_tensors
        of_asked, of_key_value = torch.zeros_like(asked), torch.zeros_like(key_value)
        arrays = [one.numpy() for one in (gradient.contiguous(), asked, key_value, rows, relation, weights)]
        kernels.attend_backward(*arrays, ctx.heads, of_asked.numpy(), of_key_value.numpy())
        return of_asked, of_key_value, None, None, None, None
