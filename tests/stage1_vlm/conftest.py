"""Tiny models and pictures that the stage-1 tests share; built once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_vlm.backbone import load_backbone
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
