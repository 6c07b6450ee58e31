"""From what NAVSIM hands an agent to the batch that planners take. Needs nothing of the devkit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from navsim_ext.errors import DataError
from navsim_ext.scene import SceneBatch


def scene_batch(agent_input: Any, cameras: Sequence[str], folder: Path) -> SceneBatch:
    """A batch of one from an ``AgentInput``: ego states, oldest first, and the pictures of the current frame, which are
    written losslessly into ``folder``.

    NAVSIM keeps the scene's token from agents. A digest of the ego states stands for it, so that samples keyed by token
    (a planner's initial noise) differ from scene to scene and are the same in every run.
    Raises DataError when a picture is not there.
    """
    states = agent_input.ego_statuses
    history = np.stack([np.asarray(state.ego_pose, dtype=np.float32) for state in states])[None]
    now = states[-1]
    status = np.concatenate([now.driving_command, now.ego_velocity, now.ego_acceleration]).astype(np.float32)[None]
    paths: dict[str, Any] = {}
    for camera in cameras:
        picture = getattr(agent_input.cameras[-1], camera.lower()).image
        if picture is None:
            raise DataError(f"NAVSIM gave no picture of {camera}: does the split have sensor data, and its paths fit?")
        path = folder / f"{camera}.png"
        Image.fromarray(picture).save(path)
        paths[camera] = str(path)
    token = hashlib.sha256(history.tobytes() + status.tobytes()).hexdigest()[:16]
    batch = SceneBatch([token], [""], torch.from_numpy(history), torch.from_numpy(status), None, [paths])
    return batch.validate()
