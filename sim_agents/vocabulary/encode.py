"""Tokenising recorded motion: the rolling match, its noise, and the targets of a rolled state.

Legend: N road users, K tokens in time, V tokens of a class.

s_0 is the recorded pose. For each half second k the token is the one whose end, played from s_k, lies nearest to the
recorded pose (mean distance of the corners of the class's box); s_{k+1} is that end. Errors do not add up, because
every step aims at the recording again. Source: SMART (arXiv 2405.15677, section 3.2) and its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import relative
from sim_agents.vocabulary.closest import closest
from sim_agents.vocabulary.motion import (
    MATCHING_BOX_M,
    MotionState,
    MotionVocabulary,
    ShapeVocabulary,
    corner_distance,
    matching_box,
)


@dataclass(frozen=True)
class Encoding:
    """``tokens`` [N, K] int64, -1 where ``valid`` [N, K] is False; ``poses`` [N, K + 1, 3] of the rolled states, the
    recorded ones where a stretch (re)starts; ``error`` [N, K] m between the centres of rolled and recorded pose."""

    tokens: Tensor
    valid: Tensor
    poses: Tensor
    error: Tensor


def encode(
    vocabulary: MotionVocabulary,
    classes: Tensor,
    poses: Tensor,
    valid: Tensor,
    displacement: Tensor | None = None,
    *,
    nearest: int = 1,
    generator: torch.Generator | None = None,
) -> Encoding:
    """Tokens of recorded poses [N, K + 1, 3] at the ends of half seconds, ``valid`` [N, K + 1], class rows [N].

    A token is valid where both its ends are recorded; a gap restarts from the recording. ``displacement`` [N, K + 1, 2]
    is what led to each pose, read where a stretch starts (None: taken from the poses, 0 at the first). With ``nearest``
    > 1 the state goes on from one of that many nearest tokens, drawn evenly by ``generator`` (SMART's noise): the drawn
    token is what the model reads, and later targets aim at the recording from there.
    """
    N, steps = valid.shape
    both = valid[:, :-1] & valid[:, 1:]
    rows = torch.arange(N, device=poses.device)
    if displacement is None:
        displacement = torch.diff(poses[..., :2], dim=1, prepend=poses[:, :1, :2])
        displacement[:, 1:] = torch.where(both[..., None], displacement[:, 1:], 0.0)
    state = MotionState(poses[:, 0], displacement[:, 0])
    tokens, rolled, error = [], [state.pose], []
    for k in range(steps - 1):
        if nearest == 1:
            chosen = closest_tokens(vocabulary, state, classes, poses[:, k + 1])
        else:
            distance = _distances(vocabulary, state, classes, poses[:, k + 1])
            near = distance.topk(min(nearest, int(vocabulary.counts.min())), dim=1, largest=False).indices
            draw = torch.randint(near.shape[1], (N,), generator=generator, device="cpu").to(near.device)
            chosen = near[rows, draw]
        _, after = vocabulary.play(state, classes, chosen)
        error.append((after.pose[:, :2] - poses[:, k + 1, :2]).norm(dim=-1))
        tokens.append(torch.where(both[:, k], chosen, -1))
        state = after.where(both[:, k], MotionState(poses[:, k + 1], displacement[:, k + 1]))
        rolled.append(state.pose)
    return Encoding(torch.stack(tokens, 1), both, torch.stack(rolled, 1), torch.stack(error, 1))


def closest_tokens(vocabulary: MotionVocabulary, state: MotionState, classes: Tensor, target: Tensor) -> Tensor:
    """Tokens [N] whose ends, played from any ``state``, lie nearest to the poses ``target`` [N, 3]."""
    fixed = isinstance(vocabulary, ShapeVocabulary) and target.device.type == "cpu"
    if not fixed or target.dtype != torch.float32:
        return _distances(vocabulary, state, classes, target).argmin(dim=1)
    seen = relative(state.pose, target[:, None])[:, 0]
    ends, boxes = vocabulary.shapes[:, :, -1].contiguous(), np.array(MATCHING_BOX_M, np.float32)
    tokens = torch.empty(len(target), dtype=torch.int64)
    closest(seen.numpy(), classes.numpy(), ends.numpy(), vocabulary.counts.numpy(), boxes, tokens.numpy())
    return tokens


def _distances(vocabulary: MotionVocabulary, state: MotionState, classes: Tensor, target: Tensor) -> Tensor:
    """[N, V] m from where each token leads to the poses ``target`` [N, 3]; inf for tokens that the class has not."""
    distance = corner_distance(vocabulary.ends(state, classes), target[:, None], matching_box(classes)[:, None])
    rows = torch.arange(distance.shape[1], device=classes.device)
    return distance.masked_fill(rows >= vocabulary.counts.to(classes.device)[classes][:, None], torch.inf)
