"""Speed of the scene index: opening 100,000 samples, reading 10,000 through the DataLoader, and reading logs.

python benchmarks/bench_dataset.py --output benchmarks/results/dataset.json

The logs are made here (valid OpenScene frames with ``--objects`` annotated objects each). Baseline: the same samples
read from the logs themselves, one scene at a time, as a loader without an index has to.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row
from navsim_ext.datamodule import SceneDataModule
from navsim_ext.dataset import SceneDataset, build_index
from navsim_ext.readers import NavsimLogs
from navsim_ext.runtime.checksums import file_checksums, read_checked_json, write_checked_json
from navsim_ext.scene import CAMERAS
from navsim_ext.scene_index import ARRAYS

OPEN_SAMPLES, READ_SAMPLES = 100_000, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--objects", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.repeats, arguments.objects)
    report("Scene index", rows, baseline="scenes read from the logs one by one", output=arguments.output)


def measure(root: Path, repeats: int, objects: int) -> list[dict]:
    frames_per_log, logs = 213, 10  # 200 windows in each log
    write_logs(root, logs, frames_per_log, objects)
    source = NavsimLogs(root, "mini")
    start = time.perf_counter()
    index = build_index(source, root / "index", cameras=CAMERAS)
    build_s = time.perf_counter() - start
    grow(root / "index", root / "large", OPEN_SAMPLES)
    grow(root / "index", root / "medium", READ_SAMPLES)
    open_s = least(lambda: SceneDataset(root / "large")[OPEN_SAMPLES - 1], repeats)
    tokens_s = least(lambda: SceneDataset(root / "large").tokens, repeats)
    rows = [
        row("building the index from logs", len(index) / build_s, "scenes/s"),
        row(f"opening {OPEN_SAMPLES} samples and reading the last", open_s, "s", "< 2"),
        row(f"listing {OPEN_SAMPLES} tokens", tokens_s, "s", "< 2"),
    ]
    read_logs_s = least(
        lambda: [scene.status() for _, scenes in NavsimLogs(root, "mini").logs() for scene in scenes], 1
    )
    baseline = len(index) / read_logs_s
    rows.append(row("reading scenes from the logs (baseline)", baseline, "samples/s"))
    for cameras in (("CAM_F0",), CAMERAS):
        for workers in (0, 2):
            seconds = least(
                lambda cameras=cameras, workers=workers: read_all(root / "medium", cameras, workers), repeats
            )
            name = f"DataLoader, {READ_SAMPLES} samples, {len(cameras)} view(s), {workers} workers"
            rows.append(row(name, READ_SAMPLES / seconds, "samples/s", ">= 3000"))
    return rows


def read_all(folder: Path, cameras: tuple[str, ...], workers: int) -> None:
    module = SceneDataModule(folder, batch_size=64, cameras=cameras, num_workers=workers)
    count = sum(len(scenes) for scenes, _ in module.train_dataloader())
    if count != READ_SAMPLES // 64 * 64:
        raise RuntimeError(f"{count} samples were read")


def least(work: Callable[[], object], repeats: int) -> float:
    """Least seconds of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def grow(small: Path, large: Path, samples: int) -> None:
    """An index of ``samples`` samples that repeats those of a small one under new tokens."""

    shutil.copytree(small, large)
    arrays = {name: np.load(small / f"{name}.npy") for name in ARRAYS}
    count = len(arrays["tokens"])
    rows = np.resize(np.arange(count), samples)
    views = (len(arrays["camera_offsets"]) - 1) // count
    lengths = np.diff(arrays["camera_offsets"]).reshape(count, views)[rows].reshape(-1)
    text = [
        arrays["camera_text"][arrays["camera_offsets"][r * views] : arrays["camera_offsets"][(r + 1) * views]]
        for r in rows
    ]
    grown = {name: arrays[name][rows] for name in ("log", "timestamp_us", "history", "status", "target")}
    grown["tokens"] = np.array([f"{i:016x}" for i in range(samples)], dtype="S16")
    grown["camera_offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    grown["camera_text"] = np.concatenate(text)
    for name, values in grown.items():
        np.save(large / f"{name}.npy", values)
    content = read_checked_json(large / "index.json", "build it again") | {"num_samples": samples}
    write_checked_json(large / "index.json", content | {"files": file_checksums(large, content["files"])})


def write_logs(root: Path, logs: int, frames: int, objects: int) -> None:
    random = np.random.default_rng(0)
    folder = root / "navsim_logs" / "mini"
    folder.mkdir(parents=True)
    for log in range(logs):
        name = f"2021.01.{log + 1:02d}.12.00.00_veh-35_00000_00300"
        content = []
        for frame in range(frames):
            boxes = random.normal(0.0, 30.0, (objects, 7)).astype(np.float32)
            boxes[:, 3:6] = (4.6, 1.9, 1.6)
            content.append(
                {
                    "token": f"{log * frames + frame:016x}",
                    "timestamp": 1_600_000_000_000_000 + 500_000 * frame,
                    "log_name": name,
                    "map_location": "us-ma-boston",
                    "roadblock_ids": ["1", "2", "3"],
                    "traffic_lights": [(k, k % 2 == 0) for k in range(12)],
                    "ego2global_translation": np.array([331000.0 + 4.0 * frame, 4690000.0, 0.0]),
                    "ego2global_rotation": np.array([1.0, 0.0, 0.0, 0.0]),
                    "ego_dynamic_state": [8.0, 0.0, 0.1, 0.0],
                    "driving_command": np.array([0, 1, 0, 0]),
                    "cams": {
                        camera: {
                            "data_path": f"{name}/{camera}/{frame:016x}.jpg",
                            "sensor2lidar_rotation": np.eye(3),
                            "sensor2lidar_translation": np.zeros(3),
                            "cam_intrinsic": np.eye(3),
                            "distortion": np.zeros(5),
                        }
                        for camera in CAMERAS
                    },
                    "anns": {
                        "gt_boxes": boxes,
                        "gt_names": np.array(["vehicle"] * objects),
                        "gt_velocity_3d": np.zeros((objects, 3), np.float32),
                        "instance_tokens": [f"{k:016x}" for k in range(objects)],
                        "track_tokens": [f"{k:016x}" for k in range(objects)],
                    },
                }
            )
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(content))


if __name__ == "__main__":
    main()
