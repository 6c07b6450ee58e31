"""The recorded drive as a teacher: its motion told in tokens, which the policy may be held to by cloning.

Legend: S scenes, N road users, L decisions (those of the recorded past among them), M = S N rows, m of them asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from navsim_ext.traffic.scene import TrafficScene
from sim_agents import (
    Bounds,
    LoadedAgents,
    NextTokenNetwork,
    SceneTokens,
    agents_of,
    class_of,
    collate,
    cut,
    encode,
    scene_tokens,
)


@dataclass(frozen=True)
class Recorded:
    """``scenes`` with the states that the tokens lead to, ``targets`` [S,N,L] and which ``counts`` [S,N,L]: those of
    road users that were recorded before, at and after the decision."""

    scenes: SceneTokens
    now: int
    targets: Tensor
    counts: Tensor

    @property
    def of_scene(self) -> Tensor:
        """[M] place of each row's scene."""
        scenes, users, _ = self.counts.shape
        return torch.arange(scenes, device=self.counts.device).repeat_interleave(users)

    def logp(self, network: NextTokenNetwork, rows: Tensor, present: Tensor) -> Tensor:
        """[m,L] ln p of the recorded tokens of ``rows`` [m], 0 where they do not count. ``present`` [C,V]: tokens that
        each class has."""
        users = self.counts.shape[1]
        chosen, place = torch.unique(rows // users, return_inverse=True)
        scenes = SceneTokens(*(getattr(self.scenes, one.name)[chosen] for one in fields(SceneTokens)))
        features = network.features(network.roadside(scenes, self.now), agents_of(scenes))[:, :, :-1]
        counts = self.counts[chosen]
        classes = class_of(scenes.kind)[..., None].expand_as(counts)[counts]
        table = network.logits(features[counts], classes).masked_fill(~present[classes], -torch.inf).log_softmax(dim=-1)
        taken = table.gather(-1, self.targets[chosen][counts][:, None])[:, 0]
        logp = torch.zeros(counts.shape, device=taken.device, dtype=taken.dtype).masked_scatter(counts, taken)
        return logp.flatten(0, 1)[place * users + rows % users]


@torch.no_grad()
def recorded_tokens(
    scenes: Sequence[TrafficScene], loaded: LoadedAgents, bounds: Bounds, horizon: int, device: torch.device
) -> Recorded:
    """The recordings of the scenes from as far back as the network looks (and all have) to ``horizon`` half seconds
    after the present (or as far as all go), told in tokens."""
    parts = [scene_tokens(scene, bounds)[:2] for scene in scenes]
    before = min(loaded.network.settings.window - 1, *(now for _, now in parts))
    after = min(horizon, *(tokens.num_steps - 1 - now for tokens, now in parts))
    whole = collate([cut(tokens, now - before, now + after + 1) for tokens, now in parts]).to(device)
    S, N, _ = whole.valid.shape
    pose, valid, displacement = (getattr(whole, name).flatten(0, 1) for name in ("pose", "valid", "displacement"))
    found = encode(loaded.vocabulary.to(device), class_of(whole.kind).flatten(), pose, valid, displacement)
    earlier = torch.cat([torch.zeros_like(valid[:, :1]), valid[:, :-2]], dim=1)
    unflatten = lambda values: values.unflatten(0, (S, N))  # noqa: E731
    states = replace(whole, pose=unflatten(found.poses))
    return Recorded(states, before, unflatten(found.tokens), unflatten(found.valid & earlier))
