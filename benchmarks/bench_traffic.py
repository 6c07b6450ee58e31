"""Traffic scenes: reading WOMD from TFRecord without TensorFlow, storing, loading.

    python benchmarks/bench_traffic.py --output benchmarks/results/traffic.json [--npz FOLDER]

One core. Scenarios of WOMD's size are made here: 91 steps, 84 road users, 250 map pieces of 16,000 points about 0.5 m
apart, 12 lights told at every step; with ``--npz`` the scenes of a folder of neutral npz files are written as WOMD and
measured too. The baseline of reading is the same conversion through protobuf's own objects, one attribute at a time,
as a reader written by hand does it; that of storing is numpy's compressed npz of the same arrays.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import report, row

from navsim_ext.traffic import record, scene_v1
from navsim_ext.traffic.codes import AgentKind, EdgeKind, LaneType, LightState, PieceKind, Role
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore, fingerprint_of, write_scenes
from navsim_ext.traffic.tfrecord import crc32c, read_records
from navsim_ext.traffic.womd import scene_of
from navsim_ext.traffic.womd_messages import FULL
from navsim_ext.traffic.womd_writer import write_womd

STEPS, AGENTS, PIECES, POINTS, LIGHTS = 91, 84, 250, 64, 12
REPEATS = 5


def made_up(seed: int) -> TrafficScene:
    """A scene of WOMD's size: random smooth tracks with noise in the last digits, gaps, lanes in all directions."""
    rng = np.random.default_rng(seed)
    start, heading = rng.uniform(-90, 90, (AGENTS, 2)), rng.uniform(-np.pi, np.pi, AGENTS)
    speed = np.where(rng.random(AGENTS) < 0.5, 0.0, rng.uniform(1, 14, AGENTS))
    turn = heading[:, None] + np.cumsum(rng.normal(0.0, 0.004, (AGENTS, STEPS)), axis=1) * (speed[:, None] > 0)
    step = 0.1 * speed[:, None, None] * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    xy = start[:, None] + np.cumsum(step, axis=1) + rng.normal(0.0, 0.004, (AGENTS, STEPS, 2))
    valid = rng.random((AGENTS, STEPS)) < 0.97
    valid[0] = True
    valid[:, 10] |= ~valid.any(axis=1)
    direction = rng.uniform(-np.pi, np.pi, PIECES)
    bend = direction[:, None] + np.cumsum(np.full((PIECES, POINTS), 0.004) * rng.normal(size=(PIECES, 1)), axis=1)
    line = np.cumsum(0.5 * np.stack([np.cos(bend), np.sin(bend)], axis=-1), axis=1)
    points = (rng.uniform(-150, 150, (PIECES, 1, 2)) + line).reshape(-1, 2)
    kinds = rng.choice([PieceKind.LANE, PieceKind.ROAD_EDGE, PieceKind.LINE_BROKEN, PieceKind.LINE_SOLID], PIECES)
    kinds[: LIGHTS + 60] = PieceKind.LANE
    follow = np.arange(LIGHTS + 59)
    role = np.zeros(AGENTS, np.uint8)
    role[0], role[1:9] = Role.EGO, Role.PREDICT
    subtype = np.select([kinds == PieceKind.LANE, kinds == PieceKind.LINE_SOLID], [LaneType.SURFACE_STREET, 2], 1)
    return TrafficScene.make(
        id=f"made-up-{seed}", source="benchmark", licence="ours", dt=0.1, now=10,
        origin=np.array([1000.0 * seed, -4321.0, 12.0]), xy=xy, heading=turn, valid=valid,
        z=rng.normal(0.8, 0.02, (AGENTS, STEPS)), size=rng.uniform(0.5, 5.0, (AGENTS, 3)).astype(np.float32),
        kind=np.full(AGENTS, AgentKind.VEHICLE, np.uint8), role=role, agent_id=np.arange(AGENTS, dtype=np.int64),
        points=points.astype(np.float32), point_z=rng.normal(0.0, 0.3, len(points)).astype(np.float32),
        piece_start=(POINTS * np.arange(PIECES + 1)).astype(np.int32), piece_kind=kinds.astype(np.uint8),
        piece_subtype=subtype.astype(np.uint8), piece_closed=np.zeros(PIECES, np.bool_),
        piece_id=np.arange(100, 100 + PIECES, dtype=np.int64), speed_limit=np.full(PIECES, 13.4, np.float32),
        edges=np.column_stack([follow, follow + 1]).astype(np.int32),
        edge_kind=np.full(len(follow), EdgeKind.SUCCESSOR, np.uint8), has_lights=True,
        light_piece=np.arange(LIGHTS, dtype=np.int32), light_stop=points.reshape(PIECES, POINTS, 2)[:LIGHTS, 0].copy(),
        light_state=rng.choice([LightState.STOP, LightState.GO], (LIGHTS, STEPS)).astype(np.uint8),
    )  # fmt: skip


def by_attributes(data: bytes) -> int:
    """The values of a scenario through protobuf's objects, one attribute at a time; nothing is made of them."""
    message = FULL["Scenario"].FromString(data)
    states = [
        [[s.center_x, s.center_y, s.center_z, s.length, s.width, s.height, s.heading, s.valid] for s in track.states]
        for track in message.tracks
    ]
    points = []
    for feature in message.map_features:
        for name in ("lane", "road_line", "road_edge"):
            if feature.HasField(name):
                points += [(p.x, p.y, p.z) for p in getattr(feature, name).polyline]
    lights = [
        (one.lane, one.state, one.stop_point.x, one.stop_point.y)
        for state in message.dynamic_map_states
        for one in state.lane_states
    ]
    return np.array(states).size + np.array(points).size + len(lights)


def seconds(work: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Mean seconds an item in the best of the repeats."""
    best = np.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        for item in items:
            work(item)
        best = min(best, (time.perf_counter() - began) / len(items))
    return best


def npz_bytes(scene: TrafficScene) -> int:
    stream = io.BytesIO()
    np.savez_compressed(stream, **{k: v for k, v in vars(scene).items() if isinstance(v, np.ndarray)})
    return len(stream.getvalue())


def measure(scenes: list[TrafficScene], name: str, promised: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tfrecord"
        write_womd(path, scenes)
        data = [one for _, one in read_records(path)]
        framing = seconds(lambda p: sum(1 for _ in read_records(p)), [path]) / len(data)
        convert = seconds(lambda one: scene_of(one, "benchmark"), data)
        naive = seconds(by_attributes, data)
        read = [scene_of(one, "benchmark") for one in data]
        encode = seconds(record.encode, read)
        write_scenes(Path(folder) / "store", iter(read), fingerprint_of({"made": "benchmark"}))
        store = TrafficStore(Path(folder) / "store")
        load = seconds(store.load, store.ids)
        stored = [store.store.record_bytes(one) for one in store.ids]
        zipped = [npz_bytes(scene) for scene in read]
        megabytes = sum(map(len, data)) / len(data) / 1e6
    rate = 1.0 / (framing + convert)
    return [
        row(f"{name}: read and converted from TFRecord", rate, "scenarios/s", ">= 30" if promised else None),
        row(f"{name}: read, converted and encoded for the store", 1.0 / (framing + convert + encode), "scenarios/s"),
        row(f"{name}: protobuf's objects, values read one by one, nothing made of them", 1.0 / naive, "scenarios/s"),
        row(f"{name}: a scenario as TFRecord", megabytes, "MB"),
        row(f"{name}: a scenario in the store, largest", max(stored) / 1000, "kB", "<= 250" if promised else None),
        row(f"{name}: the same arrays as compressed npz, largest", max(zipped) / 1000, "kB"),
        row(f"{name}: loaded from the store, mean", 1e3 * load, "ms", "<= 1" if promised else None),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--npz", type=Path, help="folder of scene.v1 files, measured too")
    arguments = parser.parse_args()
    rows = measure([made_up(seed) for seed in range(8)], "made up, 84 road users, 16,000 points", True)
    if arguments.npz is not None:
        scenes = list(scene_v1.read_scenes(arguments.npz))
        rows += measure(scenes, f"{len(scenes)} recorded scenes", False)
    noise = np.random.default_rng(0).bytes(1 << 24)
    rows.append(row("CRC-32C", len(noise) / seconds(crc32c, [noise]) / 1e6, "MB/s"))
    report(
        "Traffic scenes: WOMD without TensorFlow, store",
        baseline="protobuf's own objects read attribute by attribute; numpy's compressed npz",
        rows=rows,
        output=arguments.output,
    )


if __name__ == "__main__":
    main()
