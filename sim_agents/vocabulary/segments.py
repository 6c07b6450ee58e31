"""Half-second segments of recorded motion, from which vocabularies are built.

Legend: n segments, J = 5 poses of 0.1 s. A segment is in the frame of the pose before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS, relative
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.vocabulary.motion import CLASS_NAMES, CLASSES

MOST_PER_CLASS = 200_000
"""Segments of a class that are kept: more change no vocabulary, but time and memory."""


def segments_of(
    scenes: Iterable[TrafficScene],
    *,
    mirror: bool,
    seed: int = 0,
    stretch: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """{class name: [n, J, 3]} of all stretches of six recorded poses, each starting at any step.

    ``mirror`` adds each segment turned left to right. ``stretch`` {class name: factors} gives each segment that many
    times as long, once for each factor: somebody who runs where training saw only walkers has a token then. Of more
    than ``MOST_PER_CLASS`` (divided by the number of factors) a random subset is kept, in the order of the scenes.
    Raises DataError for scenes at another interval than 0.1 s: the poses inside a token
    would be invented.
    """
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in CLASS_NAMES}
    for scene in scenes:
        if abs(scene.dt - STEP_S) > 1e-6:
            raise DataError(
                f"scene {scene.id} of {scene.source} has a step of {scene.dt:g} s; a vocabulary is built from scenes "
                f"of {STEP_S} s"
            )
        steps = scene.num_steps - TOKEN_STEPS
        if steps < 1:
            continue
        windows = np.arange(steps)[:, None] + np.arange(TOKEN_STEPS + 1)
        for name, kind in zip(CLASS_NAMES, CLASSES, strict=True):
            rows = np.flatnonzero(scene.kind == kind)
            whole = scene.valid[rows][:, windows].all(axis=-1)
            poses = torch.from_numpy(scene.pose[rows][:, windows][whole])
            found[name].append(relative(poses[:, 0], poses[:, 1:]).numpy())
    rng = np.random.default_rng(seed)
    result = {}
    for name, parts in found.items():
        segments = np.concatenate(parts) if parts else np.empty((0, TOKEN_STEPS, 3), np.float32)
        factors = (stretch or {}).get(name, (1.0,))
        most = MOST_PER_CLASS // len(factors)
        if len(segments) > most:
            segments = segments[np.sort(rng.choice(len(segments), most, replace=False))]
        segments = np.concatenate([segments * np.array([factor, factor, 1.0], np.float32) for factor in factors])
        if mirror:
            segments = np.concatenate([segments, segments * np.array([1.0, -1.0, -1.0], np.float32)])
        result[name] = segments
    return result
