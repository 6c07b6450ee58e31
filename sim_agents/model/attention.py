"""Attention over a few neighbours whose relation to the asker enters keys and values.

Legend: G groups of askers that ask the same table, Q askers of a group, C rows of its table, P neighbours of an
asker, d width, h heads, F features of a relation.

    a_qp = softmax_p( q . (k_p + E_k r_qp) / sqrt(d / h) ),   out_q = sum_p a_qp (v_p + E_v r_qp)

Nothing of size Q P d is ever made. Scores against the whole table are one product per group, of which the
neighbours' are picked; weights are put back into a row of the table and averaged by another product; and E_k, E_v
go to the side of the asker: q . E_k r = (E_k^T q) . r, and sum a E_v r = E_v (sum a r). Source: the relative
attention of SMART (arXiv 2405.15677, after QCNet); linear in the features of a relation, where the original has a
small network on each edge.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from sim_agents.model.relations import RELATION_FEATURES


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

        ``rows`` [G, Q, P]: each asker's neighbours, no row twice; None: everybody asks the whole table (P = C).
        ``relation`` [G, Q, P, F]. Askers without a neighbour keep what they have.
        """
        key, value = key_value.unflatten(-1, (2, self.heads, -1)).unbind(-3)  # [G, C, h, d / h]
        query = self.to_query(self.norm_asker(x)).unflatten(-1, (self.heads, -1)) * self.scale  # [G, Q, h, d / h]
        logits = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1))  # [G, h, Q, C]
        if rows is not None:
            rows = rows[:, None].expand(-1, self.heads, -1, -1)
            logits = logits.gather(-1, rows)
        if self.from_relation is not None:
            for_key, for_value = self.from_relation.unflatten(0, (2, self.heads, -1)).unbind(0)  # [h, d / h, F]
            asked = torch.einsum("gqhk,hkf->gqhf", query, for_key)
            logits = logits + torch.matmul(asked, relation.transpose(-2, -1)).transpose(1, 2)
        somebody = mask.any(dim=-1)
        shown = mask | ~somebody[..., None]
        weights = logits.masked_fill(~shown[:, None], -torch.inf).softmax(dim=-1)  # [G, h, Q, P]
        if rows is None:
            spread = weights
        else:
            spread = weights.new_zeros(*weights.shape[:3], key_value.shape[1]).scatter(-1, rows, weights)
        out = torch.matmul(spread, value.transpose(1, 2)).transpose(1, 2)  # [G, Q, h, d / h]
        if self.from_relation is not None:
            seen = torch.matmul(weights.transpose(1, 2), relation)  # [G, Q, h, F]
            out = out + torch.einsum("gqhf,hkf->gqhk", seen, for_value)
        out = torch.where(somebody[..., None], self.to_out(out.flatten(-2)), 0.0)
        x = x + self.dropout(out)
        return x + self.dropout(self.feed_forward(x))


def gather_rows(table: Shaped[Tensor, "G C w"], rows: Int64[Tensor, "G Q P"]) -> Shaped[Tensor, "G Q P w"]:
    """Rows [G, Q, P] of tables [G, C, w] -> [G, Q, P, w]."""
    group = torch.arange(len(table), device=table.device)[:, None, None]
    return table[group, rows]
