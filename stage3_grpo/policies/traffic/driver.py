"""A traffic model that remembers what it chose while it drives, so that the same choices can be scored again.

Legend: S scenes, R rollouts, B = S R worlds (scene by scene), N road users, H half seconds of recorded past (the
present included), K decisions, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.traffic.scene import TrafficScene
from sim_agents import Agents, SceneTokens, TokenPolicy


class RememberingDriver(TokenPolicy):
    """A :class:`TokenPolicy` that keeps its tokens [B,N] of each decision."""

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        super().start(state, scenes)
        self.tokens: list[Tensor] = []

    def act(self, state: WorldState) -> Moves:
        moves = super().act(state)
        self.tokens.append(self.last_tokens)
        return moves

    def seen(self, state: WorldState) -> Agents:
        """Everybody at each half second from the oldest that the network looks back to until the last decision: what
        the network saw while it drove, all moments at once (the last K of them are decisions)."""
        now = state.scenes.now
        reach = now - TOKEN_STEPS * (self.network.settings.window - 1)
        first = max(now % TOKEN_STEPS, reach)
        moments = [self._moment(state, column) for column in range(first, state.column, TOKEN_STEPS)]
        joined = {
            one.name: torch.cat([getattr(moment, one.name) for moment in moments], dim=2)
            for one in fields(Agents)
            if one.name in ("pose", "valid", "motion", "light_state")
        }
        return replace(moments[0], **joined)

    def remembered(self, state: WorldState) -> Seen:
        """All that the network needs to score the drive's choices again."""
        agents = self.seen(state)
        users = agents.kind.shape[1]  # the state's rows go on: padding
        tokens = torch.stack([each[:, :users] for each in self.tokens], dim=2)
        return Seen(self.maps, agents, tokens, state.rollouts)


@dataclass(frozen=True)
class Seen:
    """What the network needs to score the choices of B worlds again: maps of S scenes, moments, tokens."""

    maps: SceneTokens  # of S scenes, at the present
    agents: Agents  # of B worlds, H - 1 + K moments
    tokens: Tensor  # [B,N,K] int64
    rollouts: int

    @property
    def decisions(self) -> int:
        return self.tokens.shape[2]

    def of(self, scenes: Tensor) -> Seen:
        """The part of some scenes [s], with all their worlds."""
        worlds = (scenes[:, None] * self.rollouts + torch.arange(self.rollouts, device=scenes.device)).flatten()
        maps = SceneTokens(*(getattr(self.maps, one.name)[scenes] for one in fields(SceneTokens)))
        agents = Agents(*(getattr(self.agents, one.name)[worlds] for one in fields(Agents)))
        return Seen(maps, agents, self.tokens[worlds], self.rollouts)
