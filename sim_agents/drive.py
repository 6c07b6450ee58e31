"""One recorded scene goes on under a policy, many times over, and what of it is stored.

Commands that store rollouts and the validation of a training drive in the same way.
Legend: S road users, R rollouts, H steps of 0.1 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.closed_loop.policy import AgentPolicy
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import from_frame
from navsim_ext.closed_loop.world import World
from navsim_ext.traffic.scene import TrafficScene


def driven(
    policy_of: Callable[[int], AgentPolicy],
    scene: TrafficScene,
    *,
    rollouts: int,
    chunk: int,
    horizon_s: float = 8.0,
    device: torch.device | str = "cpu",
) -> Iterator[WorldState]:
    """Worlds at the end of their drives, ``chunk`` rollouts after another. ``policy_of`` makes the driver of a chunk
    from the number of its first rollout."""
    for first in range(0, rollouts, chunk):
        count = min(chunk, rollouts - first)
        world = World(rollouts=count, horizon_s=horizon_s, enter="never", device=device)
        state = world.reset([scene])
        policy = policy_of(first)
        policy.start(state, [scene])
        while state.steps_left > 0:
            state = world.step(state, policy.act(state))
        yield state


def record_of(states: Iterable[WorldState], scene: TrafficScene, horizon_s: float = 8.0) -> dict[str, np.ndarray]:
    """``ids`` [S], ``pose`` [R, S, H, 3] in the scene's frame, of everybody there at the present."""
    rows = np.flatnonzero(scene.valid[:, scene.now])
    steps = round(horizon_s / STEP_S)
    parts = []
    for state in states:
        ahead = state.poses[:, rows, state.scenes.now + 1 :][:, :, :steps]
        parts.append(from_frame(ahead.double().cpu().numpy(), state.scenes.frame[0]))
    return {"ids": scene.agent_id[rows], "pose": np.concatenate(parts).astype(np.float32)}
