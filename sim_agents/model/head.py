"""Motions as vectors: what a road user has just done, and what its tokens would do, by one and the same embedding.

Legend: [...] any shape, D decisions, C classes, V tokens of a class (padded), F numbers of a motion, d width.

    e(m) = P f(m) + MLP(f(m)),   x_0 = e(last motion) + ...,   logit_v = s h . (e(motion of token v) + W_cv) + b_cv

with h = A LayerNorm(x), A = 1, W = b = 0 at the start. f holds sines and cosines of several periods, so the product
P f(m) . P f(m') falls with the distance of two motions: before any training the most probable token is the one that
goes on as the road user went, and what is learned is when not to. A recorded motion also teaches the tokens that lead
nearby. With a plain matrix of logits for all classes (SMART's head) each of hundreds of tokens is learned from
nothing, and row 17 means one motion for cars and another for pedestrians: after a demo's training such a head knew who
stands, and little of how those go on that move (4.8 nats a token, where going on as before alone gives 3.5).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sim_agents.vocabulary.motion import CLASSES, MotionState, MotionVocabulary

LENGTHS_M = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Periods of the sines and cosines in which motions are told apart."""
TURNS = (1.0, 4.0)
"""A change of heading is told by the sines and cosines of these multiples."""
MOTION_FEATURES = 2 + 4 * len(LENGTHS_M) + 2 * len(TURNS)
SHARPNESS = 24.0
"""s at the start: how many nats going on as before is worth."""


def motion_features(motion: Float[Tensor, "*any 3"]) -> Float[Tensor, "*any F"]:
    """A motion [..., 3] (m along, m across, rad) as numbers [..., F]: scaled, then its sines and cosines."""
    xy, turn = motion[..., :2], motion[..., 2:]
    phase = (2.0 * torch.pi * xy[..., None] / xy.new_tensor(LENGTHS_M)).flatten(-2)
    turned = turn * turn.new_tensor(TURNS)
    return torch.cat([xy / 10.0, phase.sin(), phase.cos(), turned.sin(), turned.cos()], dim=-1)


class MotionEmbedding(nn.Module):
    """e of motions [..., 3] -> [..., d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(MOTION_FEATURES, width, bias=False)
        nn.init.normal_(self.linear.weight, std=MOTION_FEATURES**-0.5)
        self.curved = nn.Sequential(nn.Linear(MOTION_FEATURES, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, motion: Float[Tensor, "*any 3"]) -> Float[Tensor, "*any d"]:
        f = motion_features(motion)
        return self.linear(f) + self.curved(f)


class TokenHead(nn.Module):
    """Logits of the tokens of each decision's class; those of padding mean nothing (who reads them masks them)."""

    def __init__(self, width: int, vocabulary: MotionVocabulary) -> None:
        super().__init__()
        C, V = len(CLASSES), vocabulary.size
        standing = MotionState(torch.zeros(C, 3), torch.zeros(C, 2))
        # By the vocabulary, which checkpoints carry beside the weights: [C, V, 3], from a standing start.
        self.register_buffer("motions", vocabulary.ends(standing, torch.arange(C)), persistent=False)
        self.norm, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        nn.init.eye_(self.query.weight)
        nn.init.zeros_(self.query.bias)
        self.own = nn.Parameter(torch.zeros(C, V, width))
        self.bias = nn.Parameter(torch.zeros(C, V))
        self.log_sharpness = nn.Parameter(torch.tensor(SHARPNESS / width).log())

    def forward(
        self, x: Float[Tensor, "*any d"], classes: Int64[Tensor, "*any"], embedding: MotionEmbedding
    ) -> Float[Tensor, "*any V"]:
        """Features x [..., d] of road users of class rows [...] -> [..., V]."""
        tokens = (embedding(self.motions) + self.own) * self.log_sharpness.exp()  # [C, V, d]
        h, row = self.query(self.norm(x)).flatten(0, -2), classes.flatten()
        logits = h.new_empty(len(h), tokens.shape[1])
        for number in range(len(tokens)):
            of_class = (row == number).nonzero()[:, 0]
            found = torch.addmm(self.bias[number], h[of_class], tokens[number].T)
            logits = logits.index_copy(0, of_class, found.to(logits.dtype))
        return logits.view(*classes.shape, -1)
