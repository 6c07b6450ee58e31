"""A next-token model as a policy of the moving world: it drives any of the road users, whoever drives the others.

Legend: B = S R worlds, N road users (padded), V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.data.scene_tokens import Bounds, SceneTokens, collate, scene_tokens
from sim_agents.model.network import Agents, NextTokenNetwork, Past, Roadside, last_motion
from sim_agents.model.sampling import Sampling, keyed_uniform, text_key
from sim_agents.vocabulary import MotionState, MotionVocabulary, class_of


class TokenPolicy:
    """Samples a token for everybody, jointly, each half second. The map is encoded once per scene, whatever the
    number of rollouts; what the network saw of the past is kept.

    ``seed`` with scene, rollout, road user and step decides the choices: they depend on nothing else.
    ``first_rollout`` is the number of the first rollout where rollouts are driven in chunks. ``bounds`` say how many
    pieces of the map and lights of a scene it sees (those of a checkpoint: ``load_agents(...).policy()``).
    ``fingerprint`` says what a policy from a checkpoint was made from.
    """

    fingerprint: Fingerprint | None = None

    def __init__(
        self,
        network: NextTokenNetwork,
        vocabulary: MotionVocabulary,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        first_rollout: int = 0,
        bounds: Bounds | None = None,
        name: str = "tokens",
    ) -> None:
        if vocabulary.size != network.settings.tokens:
            raise DataError(f"the network has {network.settings.tokens} tokens, the vocabulary {vocabulary.size}")
        self.network, self.vocabulary, self.name = network.eval(), vocabulary, name
        self.sampling = sampling or Sampling()
        self.seed, self.first_rollout, self.bounds = seed, first_rollout, bounds or Bounds()
        counts = vocabulary.counts[:, None]
        self.present = torch.arange(vocabulary.size) < counts  # [C, V]
        self.last_tokens: Tensor | None = None
        """[B, N] int64 of the last :meth:`act`; -1 in padding."""
        self.maps: SceneTokens | None = None
        """Maps, lights and present of the scenes that are driven."""
        self._side: Roadside | None = None
        self._past: Past | None = None

    @torch.no_grad()
    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        """Encodes the maps and reads the recorded past of everybody."""
        device, world = state.pose.device, state.scenes
        self.present = self.present.to(device)
        bounds = replace(self.bounds, agents=world.num_agents)
        maps = [scene_tokens(scene, bounds) for scene in scenes]
        tokens = collate([replace(one, **_cut_past(one, now)) for one, now, _ in maps]).to(device)
        self._lights = [(one.light_state, now) for one, now, _ in maps]
        self._light_rows = tokens.light_state.shape[1]
        self.maps = tokens
        self._side = self.network.roadside(tokens, 0).repeat(state.rollouts)
        B, rows = len(state.scene), state.scene
        N = self._users = max(scene.num_agents for scene in scenes)  # the state's rows go on: padding
        ego = torch.arange(N, device=device) == world.ego[rows][:, None]
        self._fixed = {"kind": world.kind[rows, :N], "size": world.size[rows, :N], "ego": ego}
        ids = np.zeros((len(scenes), N), np.int64)
        for place, scene in enumerate(scenes):
            ids[place, : scene.num_agents] = scene.agent_id
        keys = torch.tensor([text_key(scene.id) for scene in scenes], device=device)[rows][:, None]
        rollout = torch.arange(B, device=device)[:, None] % state.rollouts + self.first_rollout
        self._key = (keys, rollout, torch.from_numpy(ids).to(device)[rows])
        self._past = self.network.no_past(state.poses[:, :N], state.there[:, :N])
        first = state.column % TOKEN_STEPS
        reach = state.column - TOKEN_STEPS * (self.network.settings.window - 1)
        for column in range(max(first, reach), state.column, TOKEN_STEPS):
            _, self._past = self.network.advance(self._side, self._past, self._moment(state, column))

    @torch.no_grad()
    def act(self, state: WorldState) -> Moves:
        """Poses of the next half second and the log-probability of the choice."""
        if self._side is None or self._past is None:
            raise DataError(f"policy {self.name} was asked before it was started")
        features = self._look(state)
        B, N = self._fixed["kind"].shape
        classes = class_of(self._fixed["kind"]).flatten()
        logits = self.network.logits(features.flatten(0, 1), classes).masked_fill(~self.present[classes], -torch.inf)
        uniform = keyed_uniform(self.seed, *self._key, state.step).flatten()
        tokens, logp = self.sampling.sample(logits, uniform)
        motion = MotionState(state.pose[:, :N].flatten(0, 1), state.displacement()[:, :N].flatten(0, 1))
        poses, _ = self.vocabulary.play(motion, classes, tokens)
        whole = state.pose[:, :, None].repeat(1, 1, TOKEN_STEPS, 1)
        whole[:, :N] = poses.view(B, N, TOKEN_STEPS, 3)
        self.last_tokens = torch.full_like(state.present, -1, dtype=torch.int64)
        self.last_tokens[:, :N] = tokens.view(B, N)
        log_probability = torch.zeros_like(whole[:, :, 0, 0])
        log_probability[:, :N] = logp.view(B, N)
        return Moves.poses(whole, log_probability)

    def _look(self, state: WorldState) -> Tensor:
        """Features [B, N, d] of everybody now."""
        features, self._past = self.network.advance(self._side, self._past, self._moment(state, state.column))
        return features

    def _moment(self, state: WorldState, column: int) -> Agents:
        """Everybody at one column of the state."""
        users = slice(self._users)
        pose, there = state.poses[:, users, column], state.there[:, users, column]
        before = column - TOKEN_STEPS
        if before >= 0:
            known = there & state.there[:, users, before]
            motion = last_motion(pose, state.poses[:, users, before], known)
        else:
            motion = last_motion(pose, pose, torch.zeros_like(there))
        return Agents(
            pose[:, :, None], there[:, :, None], motion[:, :, None], self._light_state(state, column), **self._fixed
        )

    def _light_state(self, state: WorldState, column: int) -> Tensor:
        """[B, L, 1] states of the lights; after the recording its last state holds on."""
        later = (column - state.scenes.now) // TOKEN_STEPS
        whole = torch.zeros(len(self._lights), self._light_rows, dtype=torch.int64)
        for place, (lights, now) in enumerate(self._lights):
            if lights.numel():
                whole[place, : len(lights)] = lights[:, min(max(now + later, 0), lights.shape[1] - 1)]
        return whole.to(state.pose.device)[state.scene][..., None]


def _cut_past(tokens, now: int) -> dict[str, Tensor]:
    """The present alone, so that scenes of any length share a batch: the map encoder reads nothing else."""
    names = ("pose", "valid", "displacement", "light_state")
    return {name: getattr(tokens, name)[:, now : now + 1] for name in names}
