"""A drive as a traffic scene: what happened in a world, in the contract of what was recorded.

The scene holds the history as recorded and the drive after it, at 10 Hz; ``valid`` is who was in the world. Map, lights
(the last recorded state holds on), sizes and names are the source's. Road users who would have come later only are not
in it.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import from_frame, steps_per_interval
from navsim_ext.traffic.scene import TrafficScene

DERIVED = ("pose", "speed", "valid", "dt", "now", "z", "source_heading", "light_state", "command", "ego_dynamics")
TIMED = ("frame_tokens", "images", "law")  # belong to the recorded steps
OF_USERS = ("size", "kind", "role", "agent_id", "goal", "agent_tokens", "agent_names")


def drive_scene(state: WorldState, world: int) -> TrafficScene:
    """The drive of one world; its id is that of its source, its ``recipe`` says that it was driven."""
    s = int(state.scene[world])
    scenes, source = state.scenes, state.scenes.sources[s]
    ratio, n = steps_per_interval(source), source.num_agents
    begin, end = scenes.now - source.now * ratio, state.column + 1
    poses = from_frame(state.poses[world, :n, begin:end].double().cpu().numpy(), scenes.frame[s])
    there = state.there[world, :n, begin:end].cpu().numpy()
    heading = poses[..., 2]
    steps = end - begin
    at = np.minimum(np.arange(steps) // ratio, source.num_steps - 1)
    z = None if source.z is None else np.repeat(source.z[np.arange(n), source.now][:, None], steps, axis=1)
    kept = {one.name: getattr(source, one.name) for one in fields(source) if one.name not in (*DERIVED, *TIMED)}
    came = there.any(axis=1)
    kept |= {name: _of(kept[name], came) for name in OF_USERS}
    kept["recipe"] = {"driven_from": dict(source.recipe), "horizon_s": state.step * STEP_S, "world": world}
    return TrafficScene.make(
        heading=heading[came],
        xy=poses[came, :, :2],
        valid=there[came],
        dt=STEP_S,
        now=source.now * ratio,
        z=None if z is None else z[came],
        light_state=source.light_state[:, at],
        command=None if source.command is None else source.command[at],
        ego_dynamics=None,
        **kept,
    )


def _of(values: Any, chosen: NDArray[np.bool_]) -> Any:
    """The entries of some road users; what the source does not tell stays untold."""
    if values is None or not len(values):
        return values
    return tuple(compress(values, chosen)) if isinstance(values, tuple) else values[chosen]
