"""Scene-filter YAMLs in NAVSIM's own format: train, val and test by log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from navsim_ext.files import write_atomic
from navsim_ext.synthetic.manifest import LogRecord
from navsim_ext.synthetic.recipe import FOLDER_OF_PART, FUTURE_FRAMES, HISTORY_FRAMES, PARTS

FOLDER = "train_test_split"


def write_splits(folder: Path, records: Sequence[LogRecord]) -> None:
    """``train_test_split/<part>.yaml`` and ``train_test_split/scene_filter/<part>.yaml``, as in NAVSIM's configs."""
    for part in PARTS:
        logs = [record for record in records if record.part == part]
        scene_filter = {
            "_target_": "navsim.common.dataclasses.SceneFilter",
            "_convert_": "all",
            "num_history_frames": HISTORY_FRAMES,
            "num_future_frames": FUTURE_FRAMES,
            "frame_interval": 1,
            "has_route": True,
            "max_scenes": None,
            "log_names": [record.name for record in logs],
            "tokens": [token for record in logs for token in record.tokens],
        }
        split = {"defaults": [{"scene_filter": part}], "data_split": FOLDER_OF_PART[part]}
        for name, content in ((f"scene_filter/{part}.yaml", scene_filter), (f"{part}.yaml", split)):
            text = yaml.safe_dump(content, sort_keys=False, default_flow_style=False)
            write_atomic(folder / FOLDER / name, text)
