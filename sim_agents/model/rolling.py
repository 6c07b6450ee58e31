"""Driving the recorded scenes of a batch by the network, half a second at a time, without the world's events.

Training needs only where everybody comes to stand: closest-token fine-tuning and fine-tuning on own rollouts both
roll the scene first and then learn from the rolled states in one parallel pass. The rule of choice is all in which
they differ.

Legend: S scenes, N road users, K1 = K + 1 poses, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from navsim_ext.errors import DataError
from sim_agents.data.scene_tokens import SceneTokens
from sim_agents.model.network import NextTokenNetwork, agents_of, last_motion
from sim_agents.model.sampling import Sampling
from sim_agents.vocabulary import MotionState, MotionVocabulary, class_of
from sim_agents.vocabulary.motion import corner_distance, matching_box


class Choice(Protocol):
    """``demonstrates``: the tokens taken are themselves what is learned; otherwise the tokens that lead nearest to the
    recording from where they led are.

    Which token is taken of logits [D, V] of D decisions. ``ends`` [D, V, 3] is where each token leads; ``target``
    [D, 3] the recorded pose there, ``known`` [D] whether it was recorded; ``uniform`` [D] in [0, 1)."""

    demonstrates: bool

    def __call__(
        self, logits: Tensor, ends: Tensor, target: Tensor, known: Tensor, classes: Tensor, uniform: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class Sampled:
    """Tokens as the network would choose them: own rollouts, corrected towards the recording."""

    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    demonstrates = False

    def __call__(self, logits, ends, target, known, classes, uniform):
        return self.sampling.sample(logits, uniform)[0]


@dataclass(frozen=True)
class ClosestOfTop:
    """Of the ``top`` most probable tokens the one that leads nearest to the recording; where there is no recording, a
    sampled one. Source: CAT-K (arXiv 2412.05334), top 32."""

    top: int = 32
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    demonstrates = False

    def __call__(self, logits, ends, target, known, classes, uniform):
        likely = logits.topk(min(self.top, logits.shape[-1]), dim=-1)
        places = ends.gather(1, likely.indices[..., None].expand(-1, -1, 3))
        distance = corner_distance(places, target[:, None], matching_box(classes)[:, None])
        distance = distance.masked_fill(likely.values == -torch.inf, torch.inf)  # tokens that the class does not have
        nearest = likely.indices.gather(1, distance.argmin(dim=1, keepdim=True))[:, 0]
        return torch.where(known, nearest, self.sampling.sample(logits, uniform)[0])


@dataclass(frozen=True)
class ClosestOfSampled:
    """Of ``samples`` tokens drawn from the network the one that leads nearest to the recording; rollouts made so are
    themselves the demonstrations that are learned. Source: RoaD (arXiv 2512.01993), whose rollouts are guided in the
    same way; from a description, without its code."""

    samples: int = 16
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    demonstrates = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError(f"samples={self.samples}: at least 1 is needed")

    def __call__(self, logits, ends, target, known, classes, uniform):
        # Evenly spread over the distribution, shifted at random: as fair as independent draws, and less alike.
        shifts = torch.arange(self.samples, device=logits.device) / self.samples
        several = torch.remainder(uniform[:, None] + shifts, 1.0)  # [D, samples]
        drawn = self.sampling.sample(logits[:, None].expand(-1, self.samples, -1), several)[0]
        places = ends.gather(1, drawn[..., None].expand(-1, -1, 3))
        distance = corner_distance(places, target[:, None], matching_box(classes)[:, None])
        nearest = drawn.gather(1, distance.argmin(dim=1, keepdim=True))[:, 0]
        return torch.where(known, nearest, drawn[:, 0])


@dataclass(frozen=True)
class Rolled:
    """``pose`` [S, N, K + 1, 3] and ``valid``: recorded up to the present, driven after it (who enters later comes in
    where it was recorded). ``tokens`` [S, N, K], -1 where nothing was chosen."""

    pose: Float[Tensor, "S N K1 3"]
    valid: Bool[Tensor, "S N K1"]
    tokens: Int64[Tensor, "S N K"]


@torch.no_grad()
def roll(
    network: NextTokenNetwork,
    vocabulary: MotionVocabulary,
    present: Bool[Tensor, "C V"],
    scenes: SceneTokens,
    now: int,
    choice: Choice,
    uniform: Float[Tensor, "S N _"],
) -> Rolled:
    """Rolls S scenes from the present to the end of the recording. ``present`` [C, V] bool: tokens that each class has;
    ``uniform`` [S, N, K] numbers in [0, 1) of the choices."""
    recorded = agents_of(scenes)
    pose, valid = scenes.pose.clone(), scenes.valid.clone()
    S, N, steps = valid.shape
    tokens = torch.full((S, N, steps - 1), -1, device=pose.device)
    displacement = scenes.displacement[:, :, now]
    side = network.roadside(scenes, now)
    classes = class_of(scenes.kind).flatten()
    rows = torch.arange(S * N, device=pose.device)
    features, past = network.begin(side, recorded.moments(0, now + 1))
    for k in range(now, steps - 1):
        if k > now:
            known = valid[:, :, k - 1] & valid[:, :, k]
            motion = last_motion(pose[:, :, k], pose[:, :, k - 1], known)
            moment = replace(
                recorded,
                pose=pose[:, :, k : k + 1],
                valid=valid[:, :, k : k + 1],
                motion=motion[:, :, None],
                light_state=scenes.light_state[..., k : k + 1],
            )
            features, past = network.advance(side, past, moment)
        logits = network.logits(features.flatten(0, 1), classes).masked_fill(~present[classes], -torch.inf)
        state = MotionState(pose[:, :, k].flatten(0, 1), displacement.flatten(0, 1))
        target, known = pose[:, :, k + 1].flatten(0, 1), scenes.valid[:, :, k + 1].flatten()
        ends = vocabulary.ends(state, classes)
        chosen = choice(logits, ends, target, known, classes, uniform[:, :, k].flatten())
        drives = valid[:, :, k]
        tokens[:, :, k] = torch.where(drives, chosen.view(S, N), -1)
        moved = ends[rows, chosen, :2].view(S, N, 2) - pose[:, :, k, :2]
        displacement = torch.where(drives[..., None], moved, scenes.displacement[:, :, k + 1])
        pose[:, :, k + 1] = torch.where(drives[..., None], ends[rows, chosen].view(S, N, 3), pose[:, :, k + 1])
        valid[:, :, k + 1] |= drives
    return Rolled(pose, valid, tokens)
