"""Questions with pictures whose colours tell the decision, and tiny models that have not seen them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from navsim_ext.prompts import format_trajectory
from navsim_ext.questions.catalogue import with_reasoning
from navsim_ext.questions.meta_actions import LaneAhead
from stage1_vlm.tiny import build_tiny_internvl, build_tiny_qwen

ANSWERS = ("KEEP, STRAIGHT", "STOP, STRAIGHT", "ACCELERATE, LEFT_TURN")
ROAD = LaneAhead(np.array([[0.0, 0.0], [90.0, 0.0]]), np.zeros(2, bool), True)
CRUISE = np.stack([np.arange(1, 9) * 4.0, np.zeros(8), np.zeros(8)], axis=1)


def write_questions(folder: Path, count: int = 12, kind: str = "decision", **changes) -> Path:
    """A mixture of ``count`` questions; ``changes`` replace fields of every record (None: without it)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 54), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        answer = ANSWERS[i % 3]
        stated = answer if kind == "decision" else f"{answer} {format_trajectory(CRUISE)}"
        row = {
            "image": f"{i}.png", "image_size": [96, 54], "scene_id": f"c{i:015x}", "type": kind, "answer": answer,
            "image_dependent": True, "speed_mps": 8.0, "road": ROAD.to_json(),
            "conversations": [{"from": "human", "value": f"<image>\nSpeed {i}.0 m/s. Decide."},
                              {"from": "gpt", "value": with_reasoning("The road is free.", stated)}],
        } | changes  # fmt: skip
        rows.append({key: value for key, value in row.items() if value is not None})
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "m.json").write_text(json.dumps({"q": {"root": ".", "annotation": "q.jsonl"}}))
    return folder / "m.json"


def build_model(folder: Path, family: str = "internvl") -> Path:
    texts = [with_reasoning("The road is free.", answer) for answer in ANSWERS] * 20
    texts += ["Speed 1.0 m/s. Decide.", format_trajectory(CRUISE)] * 10
    sizes = {"width": 32, "heads": 2, "vision_width": 32, "vision_heads": 2, "vocabulary": 400}
    return (build_tiny_internvl if family == "internvl" else build_tiny_qwen)(folder, texts, **sizes)
