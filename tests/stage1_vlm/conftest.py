"""Tiny models and pictures that the stage-1 tests share; built once."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.scene import Annotations, Camera, Scene
from navsim_ext.scene_index import build_index
from stage1_vlm.loading import load_backbone
from stage1_vlm.tiny import build_tiny_internvl, build_tiny_qwen

TEXTS = [
    "What does the traffic light show? red",
    "Is a car ahead? yes. no. The ego car drives at +12.34 m/s.",
    "[PT, (+1.00, -0.10, +0.02), (+2.00, -0.20, +0.03)]",
] * 20


def picture(seed: int, width: int = 96, height: int = 54) -> Image.Image:
    """Smooth random colours: JPEG and resizing keep something of them."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def make_picture():
    return picture


@pytest.fixture(scope="session")
def tiny_internvl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("internvl")
    return build_tiny_internvl(folder, TEXTS, width=32, heads=2, vision_width=32, vision_heads=2, vocabulary=400)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory) -> Path:
    return build_tiny_qwen(tmp_path_factory.mktemp("qwen"), TEXTS, width=32, heads=2, vision_width=32, vision_heads=2)


@pytest.fixture(params=["internvl", "qwen"])
def backbone(request):
    """A fresh backbone of each family, in evaluation mode."""
    loaded = load_backbone(request.getfixturevalue(f"tiny_{request.param}"), max_image_tokens=16)
    loaded.model.eval()
    return loaded


@pytest.fixture
def internvl(tiny_internvl):
    loaded = load_backbone(tiny_internvl, max_image_tokens=16)
    loaded.model.eval()
    return loaded


@pytest.fixture(scope="session")
def toy_mixture(tmp_path_factory) -> Path:
    """Meta JSON of 24 picture questions (the answer is in the picture) and 8 texts without picture."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "pictures").mkdir()
    with open(folder / "seen.jsonl", "w") as stream:
        for i in range(24):
            size = (96, 54) if i % 3 else (54, 120)
            picture(i, *size).save(folder / "pictures" / f"{i}.jpg", quality=95)
            record = {
                "id": i,
                "image": f"{i}.jpg",
                "image_size": list(size),
                "type": "light",
                "image_dependent": True,
                "scene_id": f"scene{i}",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat does the traffic light show?" + " Look." * (i % 5)},
                    {"from": "gpt", "value": "red" if i % 2 else "green"},
                ],
            }
            stream.write(json.dumps(record) + "\n")
    with open(folder / "read.jsonl", "w") as stream:
        for i in range(8):
            turns = [{"from": "human", "value": f"Is {i} even?"}, {"from": "gpt", "value": "no" if i % 2 else "yes"}]
            stream.write(json.dumps({"id": i, "type": "parity", "conversations": turns}) + "\n")
    content = {
        "seen": {"root": "pictures", "annotation": "seen.jsonl", "repeat_time": 2, "length": 24},
        "read": {"root": "pictures", "annotation": "read.jsonl", "repeat_time": 0.5, "data_augment": False},
    }
    path = folder / "mixture.json"
    path.write_text(json.dumps(content))
    return path


class ToySource:
    """A scene source of two logs with ten scenes each, made of nothing but their numbers."""

    def __init__(self, sensor_root: Path) -> None:
        self.sensor_root = sensor_root
        self.scene_filter = SceneFilter()
        self.required_cameras = ("CAM_F0", "CAM_L0")
        self.report = SkipReport()
        self.log_names = ["log-a", "log-b"]

    def scenes_of(self, log_name: str) -> list[Scene]:
        return [self._scene(log_name, number) for number in range(10)]

    def require_listed(self, found) -> None:
        """No token was asked for by name."""

    def _scene(self, log_name: str, number: int) -> Scene:
        token = f"{self.log_names.index(log_name)}{number:015x}"
        cameras = {}
        for camera in self.required_cameras:
            path = f"{log_name}/{camera}/{token}.jpg"
            target = self.sensor_root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            size = (96, 54) if number % 3 or camera != "CAM_F0" else (54, 120)  # questions of two lengths
            picture(hash_of(path), *size).save(target, quality=95)
            cameras[camera] = Camera(path, np.eye(3), np.eye(3), np.zeros(3), np.zeros(5))
        times = np.arange(14)
        ego = np.stack([2.0 * times, 0.1 * number * times, np.zeros(14)], axis=1)
        return Scene(
            token=token, log_name=log_name, map_location="us-ma-boston", num_history=4,
            frame_tokens=tuple(f"{token}{t}" for t in times), timestamps_us=500_000 * (1 + times), ego_global=ego,
            ego_dynamics=np.tile(np.float32([4.0, 0.2 * number, 0, 0]), (14, 1)),
            commands=np.tile(np.eye(4, dtype=np.float32)[number % 4], (14, 1)), roadblock_ids=(),
            annotations=tuple(Annotations(np.zeros((0, 7)), np.zeros((0, 3)), (), ()) for _ in times),
            traffic_lights=((),) * 14, cameras=cameras,
        ).validate()  # fmt: skip


def hash_of(text: str) -> int:
    return zlib.crc32(text.encode())


@pytest.fixture(scope="session")
def scene_index(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    build_index(ToySource(folder / "sensors"), folder / "index", cameras=("CAM_F0", "CAM_L0"))
    return folder / "index"
