"""Building, loading and storing the metric cache of both scorer versions, on one core.

    TRIVIUM_REFERENCE_DATA=FOLDER python benchmarks/bench_metric_cache.py --output benchmarks/results/metric_cache.json

Two data sets with known answers: ``golden/navsim`` (sparse synthetic scenes) and ``golden/navsim_real`` (real traffic
and map geometry: median 59 objects and 143 polygons). Building is timed per scene with maps in memory and kernels
compiled, the median over scenes of the least of several repeats; the whole command is timed apart. NAVSIM's own times,
measured on one quiet core of such a machine, are the baseline: it builds the caches of its two versions separately.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from environment import report, row

from navsim_ext.metric_cache.build import build
from navsim_ext.metric_cache.map_table import map_table
from navsim_ext.metric_cache.scene_record import MapContext, build_scene, closed_plan, read_road
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.pdm import observation
from navsim_ext.readers import SceneFilter, open_source
from navsim_ext.scene import Scene

NAVSIM_BUILD_MS = {"golden/navsim": (178, 325), "golden/navsim_real": (382, 431)}  # v1.1, v2.2
NAVSIM_LOAD_MS = {"golden/navsim": (4.0, 5.4), "golden/navsim_real": (18, 32)}
BUILD_TARGET = {"golden/navsim": ">= 10", "golden/navsim_real": ">= 5"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="also write the JSON here")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    reference = os.environ.get("TRIVIUM_REFERENCE_DATA")
    if not reference:
        sys.exit("set TRIVIUM_REFERENCE_DATA to the folder that holds golden/navsim and golden/navsim_real")
    rows = [entry for name in NAVSIM_BUILD_MS for entry in measure(Path(reference), name, arguments.repeats)]
    report(
        "metric_cache",
        rows,
        baseline="NAVSIM 1.1 and 2.2 on one quiet core: building 178 + 325 ms (sparse) and 382 + 431 ms (real) per "
        "scene for the two versions, loading 4.0 / 5.4 and 18 / 32 ms",
        output=arguments.output,
    )


def measure(reference: Path, name: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of one data set."""
    folder = reference / name
    split = os.listdir(folder / "dataset" / "navsim_logs")[0]
    tokens = sorted({path.name[:16] for path in (folder / "metric_cache").glob("*.npz")})
    source = open_source(folder / "dataset", split, scene_filter=SceneFilter(tokens=tokens))
    scenes = [scene for _, found in source.logs() for scene in found]
    contexts: dict[str, MapContext] = {}
    for scene in scenes:
        if scene.map_location not in contexts:
            vector_map = source.map_for(scene)
            contexts[scene.map_location] = MapContext(scene.map_location, vector_map, map_table(vector_map))
    build_scene(scenes[0], contexts[scenes[0].map_location])  # compiles
    per_scene = [
        least(lambda scene=scene: build_scene(scene, contexts[scene.map_location]), repeats) for scene in scenes
    ]
    median_ms, rate = statistics.median(per_scene), 1000.0 / statistics.mean(per_scene)
    v1, v2 = NAVSIM_BUILD_MS[name]
    rows = [
        row(f"{name}: scenes built, both versions", round(rate, 1), "scenes/s", BUILD_TARGET[name]),
        row(f"{name}: one scene, median", round(median_ms, 2), "ms"),
        row(f"{name}: times faster than NAVSIM ({v1} + {v2} ms)", round((v1 + v2) * rate / 1000.0, 1), "x"),
    ]
    rows += [row(f"{name}: of it {part}, mean", round(ms, 2), "ms") for part, ms in parts(scenes, contexts, repeats)]
    with tempfile.TemporaryDirectory(prefix="bench_metric_cache_") as temporary:
        settings = BuildSettings(str(folder / "dataset"), split, temporary, tokens=tuple(tokens))
        start = time.perf_counter()
        build(settings)
        rows.append(
            row(f"{name}: the whole build call, with maps and merge", round(time.perf_counter() - start, 2), "s")
        )
        rows += load_rows(name, Path(temporary), folder)
    return rows


def parts(scenes: list[Scene], contexts: dict[str, MapContext], repeats: int) -> list[tuple[str, float]]:
    """Mean times [ms] of the steps of a build."""
    times = [parts_of(scene, contexts[scene.map_location], repeats) for scene in scenes]
    names = ("route, map patch and centreline", "PDM-Closed, both versions", "tracks")
    return list(zip(names, np.mean(times, axis=0).tolist()))


def parts_of(scene: Scene, context: MapContext, repeats: int) -> tuple[float, float, float]:
    state = observation.ego_states(scene)[-1]
    road = read_road(context.vector_map, state, scene.roadblock_ids)
    return (
        least(lambda: read_road(context.vector_map, state, scene.roadblock_ids), repeats),
        least(lambda: closed_plan(scene, context, road, state), repeats),
        least(lambda: observation.tracks(scene), repeats),
    )


def load_rows(name: str, cache_folder: Path, golden: Path) -> list[dict[str, Any]]:
    """Loading, size, and whether the same PDM-Closed proposals were chosen."""
    cache = MetricCache(cache_folder)
    for token in cache.tokens:
        touch(cache, token)
    load = [least(lambda token=token: touch(cache, token), 20) for token in cache.tokens]
    files = [path for path in cache_folder.rglob("*") if path.suffix in (".safetensors", ".npy")]
    size = sum(path.stat().st_size for path in files) / len(cache)
    same, worst = 0, 0.0
    for token in cache.tokens:
        record = cache.load(token)
        for v, version in enumerate(("v11", "v22")):
            expected = np.load(golden / "metric_cache" / f"{token}_{version}.npz")
            same += int(record.pdm_closed_index[v] == expected["pc_best"])
            worst = max(worst, float(np.abs(record.pdm_closed[v] - expected["pdm_traj_state11"][:, :3]).max()))
    v1, v2 = NAVSIM_LOAD_MS[name]
    return [
        row(f"{name}: load of one scene, warm, all arrays touched", round(statistics.median(load), 4), "ms", "<= 0.1"),
        row(f"{name}: the same in NAVSIM, v1 / v2", f"{v1} / {v2}", "ms"),
        row(
            f"{name}: bytes per scene, both versions, maps included",
            round(size / 1000.0, 1),
            "kB",
            "<= 60" if name == "golden/navsim" else None,
        ),
        row(f"{name}: same PDM-Closed proposal as NAVSIM", same, "of both versions", f"== {2 * len(cache)}"),
        row(f"{name}: PDM-Closed trajectory, largest difference", worst, "m, rad", "<= 1e-8"),
    ]


def touch(cache: MetricCache, token: str) -> int:
    """Loads a record and looks into every array."""
    record = cache.load(token)
    return sum(int(array.size and array.reshape(-1)[0] is not None) for array in record.to_arrays().values())


def least(work: Callable[[], Any], repeats: int) -> float:
    """Least time [ms] of several calls."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best * 1000.0


if __name__ == "__main__":
    main()
