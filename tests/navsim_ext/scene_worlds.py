"""Small OpenScene logs for tests: valid frames whose numbers are functions of their index, and a writer."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np


def token(index: int, log: str = "log-a") -> str:
    """Token of frame ``index`` of ``log``."""
    return hashlib.sha256(f"{log} {index}".encode()).hexdigest()[:16]


def make_frame(index: int, log: str = "log-a", **changes) -> dict:
    """A valid frame: the car drives along x at 4 m/s and turns 0.1 rad per frame; ``changes`` replace keys."""
    heading = 0.1 * index
    frame = {
        "token": token(index, log),
        "timestamp": 1_600_000_000_000_000 + 500_000 * index,
        "log_name": log,
        "scene_token": "s",
        "map_location": "us-ma-boston",
        "roadblock_ids": ["1", "2"],
        "traffic_lights": [(17, True), (18, False)],
        "ego2global_translation": np.array([331000.0 + 2.0 * index, 4690000.0, 5.0]),
        "ego2global_rotation": np.array([np.cos(heading / 2), 0.0, 0.0, np.sin(heading / 2)]),
        "ego_dynamic_state": [4.0, 0.1, 0.2, 0.3],
        "driving_command": np.array([0, 1, 0, 0]),
        "cams": {
            camera: {
                "data_path": f"{log}/{camera}/{index}.jpg",
                "sensor2lidar_rotation": np.eye(3),
                "sensor2lidar_translation": np.array([1.6, 0.0, 1.5]),
                "cam_intrinsic": np.eye(3),
                "distortion": np.zeros(5),
            }
            for camera in ("CAM_F0", "CAM_L0", "CAM_R0")
        },
        "anns": {
            "gt_boxes": np.ones((2, 7), dtype=np.float32),
            "gt_names": np.array(["vehicle", "pedestrian"]),
            "gt_velocity_3d": np.zeros((2, 3), dtype=np.float32),
            "instance_tokens": ["i0", "i1"],
            "track_tokens": ["t0", "t1"],
        },
    }
    frame.update(changes)
    return frame


def write_log(root: Path, frames: list, log: str = "log-a") -> Path:
    """Writes ``navsim_logs/mini/<log>.pkl``."""
    path = root / "navsim_logs" / "mini" / f"{log}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(frames))
    return path
