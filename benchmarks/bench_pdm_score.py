"""Speed and equality of the PDM scorer on the golden sets, on one core and on two.

TRIVIUM_REFERENCE_DATA=<folder> python benchmarks/bench_pdm_score.py --output benchmarks/results/pdm_score.json

Records are built from the golden logs and maps and written to a temporary cache. "Scene resident": the prepared scene
is in the cache's store, as in the second and later groups of a training step. Each figure is the least over --repeats
rounds of the mean over all scenes. Baseline: NAVSIM itself on one quiet core, as the reference set's README reports it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pandas as pd

from navsim_ext.pdm.reward import PUBLISHED_REWARD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "navsim_ext"))

from pdm_golden import CONTINUOUS, GOLDEN_COLUMNS

from benchmarks.environment import report, row
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.metric_cache.map_table import map_table
from navsim_ext.metric_cache.scene_record import MapContext, build_scene
from navsim_ext.metric_cache.schema import KIND, MetricCache, cache_fields, map_folder
from navsim_ext.pdm import score, score_pairs
from navsim_ext.pdm.ego import HEADING
from navsim_ext.pdm.resident import prepare
from navsim_ext.readers import SceneFilter, open_source
from navsim_ext.runtime.processes import process_pool
from navsim_ext.shards import ShardWriter

GROUP = 8
SETS = {  # name: targets in ms for one trajectory (v1, v2) and for a group of 8 (v1, v2)
    "navsim": ((0.2, 0.3), (1.0, 1.6)),
    "navsim_real": ((0.3, 0.5), (1.5, 2.5)),
}
NAVSIM_MS = {  # NAVSIM itself: one trajectory, a group of 8 one at a time, the same in one batch
    "navsim": {"v1": (15, 129, 33), "v2": (26, 214, 74)},
    "navsim_real": {"v1": (18, 145, 41), "v2": (28, 225, 75)},
}


def build_cache(golden: Path, folder: Path) -> tuple[MetricCache, dict[str, np.ndarray], pd.DataFrame, pd.DataFrame]:
    """A metric cache of one golden set, its trajectories [T,8,3] by token, and NAVSIM's rows."""
    v1, v2 = (pd.read_parquet(golden / f"scores_{version}.parquet") for version in ("v11", "v22"))
    tokens = v1["token"].unique().tolist()
    split = next((golden / "dataset" / "navsim_logs").iterdir()).name
    maps_root = golden / "dataset" / "maps"
    source = open_source(golden / "dataset", split, maps_root=maps_root, scene_filter=SceneFilter(tokens=tokens))
    contexts, poses = {}, {}
    with ShardWriter(folder, Fingerprint(KIND, cache_fields())) as writer:
        for token in tokens:
            scene = source.scene(token)
            name = scene.map_location
            if name not in contexts:
                vector_map = source.map_for(scene)
                contexts[name] = MapContext(name, vector_map, map_table(vector_map))
                contexts[name].table.save(map_folder(folder, name))
            writer.put(token, build_scene(scene, contexts[name]).to_arrays())
            stored = np.load(golden / "scores" / f"{token}_trajs.npz")
            order = {label: i for i, label in enumerate(stored["names"])}
            poses[token] = stored["poses"][[order[label] for label in v1.loc[v1["token"] == token, "traj"]]]
    return MetricCache(folder, resident=len(tokens)), poses, v1, v2


def least_ms(work: Callable[[], int], repeats: int) -> float:
    """Least wall time [ms] per call counted by ``work`` (it returns how many it made), over the rounds."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        calls = work()
        best = min(best, (time.perf_counter() - started) / calls * 1e3)
    return best


def equality_rows(name: str, cache: MetricCache, poses: dict, v1: pd.DataFrame, v2: pd.DataFrame, golden: Path) -> list:
    tokens, labels = v1["token"].tolist(), v1["traj"].tolist()
    batch = np.concatenate([poses[token] for token in v1["token"].unique()])
    result = score_pairs(tokens, batch, cache, names=labels, reward=PUBLISHED_REWARD, keep_states=True)
    wrong, worst = 0, 0.0
    for column, (version, source) in GOLDEN_COLUMNS.items():
        expected = (v1 if version == "v1" else v2)[source].to_numpy(np.float64)
        same = (result[column] == expected) | (np.isnan(result[column]) & np.isnan(expected))
        if column in CONTINUOUS:
            worst = max(worst, float(np.max(np.abs(result[column][~same] - expected[~same]), initial=0.0)))
        else:
            wrong += int((~same).sum())
    xy = other = 0.0
    for token in v1["token"].unique():
        rows = np.flatnonzero(v1["token"] == token)
        stored = np.load(golden / "scores" / f"{token}_v11.npz")
        order = {label: i for i, label in enumerate(stored["names"])}
        states = stored["sim_state11"][[order[label] for label in v1["traj"].to_numpy()[rows]]]
        difference = np.abs(result.states[rows] - states)
        difference[..., HEADING] = np.minimum(difference[..., HEADING], 2 * np.pi - difference[..., HEADING])
        xy, other = max(xy, float(difference[..., :2].max())), max(other, float(difference[..., 2:].max()))
    return [
        row(f"{name}: rows compared with NAVSIM (both versions)", len(tokens), "rows"),
        row(f"{name}: discrete sub-scores that differ", wrong, "values", "<= 0"),
        row(f"{name}: EP, progress and scores, largest difference", worst, "", "<= 1e-8"),
        row(f"{name}: simulated x, y, largest difference", xy, "m", "<= 1e-8"),
        row(f"{name}: rest of the state, largest difference", other, "SI", "<= 1e-9"),
    ]


def speed_rows(name: str, cache: MetricCache, poses: dict, repeats: int) -> list:
    tokens = list(poses)
    for token in tokens:
        cache.resident.scene(token)

    def singles(version: str) -> Callable[[], int]:
        def work() -> int:
            for token in tokens:
                for i in range(GROUP):
                    score([token], poses[token][i : i + 1], cache, versions=(version,), threads=1)
            return len(tokens) * GROUP

        return work

    def groups(version: str) -> Callable[[], int]:
        names = {token: [token] * GROUP for token in tokens}

        def work() -> int:
            for token in tokens:
                score(names[token], poses[token][:GROUP], cache, versions=(version,), threads=1)
            return len(tokens)

        return work

    def loads() -> int:
        for token in tokens:
            cache.load(token)
        return len(tokens)

    records = [cache.load(token) for token in tokens]
    tables = [cache.polygons(record.map_location) for record in records]

    def prepares() -> int:
        for record, table in zip(records, tables):
            prepare(record, table)
        return len(records)

    rows = []
    one, group = SETS[name]
    for v, version in enumerate(("v1", "v2")):
        upstream = NAVSIM_MS[name][version]
        single_ms, group_ms = least_ms(singles(version), repeats), least_ms(groups(version), repeats)
        rows.append(row(f"{name}: one trajectory, {version}, resident", single_ms, "ms", f"<= {one[v]}"))
        rows.append(row(f"{name}: group of 8, {version}, resident", group_ms, "ms", f"<= {group[v]}"))
        rows.append(row(f"{name}: group of 8, {version}, times NAVSIM one at a time", upstream[1] / group_ms, "x"))
        rows.append(row(f"{name}: group of 8, {version}, times NAVSIM batched", upstream[2] / group_ms, "x"))
    rows.append(row(f"{name}: load one scene, warm", least_ms(loads, repeats), "ms", "<= 0.1"))
    rows.append(row(f"{name}: prepare it for the kernels", least_ms(prepares, repeats), "ms"))
    sizes = [cache.store.record_bytes(token) for token in tokens]
    target = "<= 60" if name == "navsim" else None
    rows.append(row(f"{name}: mean record, both versions", float(np.mean(sizes)) / 1e3, "kB", target))
    table_bytes = sum(path.stat().st_size for path in (cache.folder / "maps").rglob("*.npy"))
    rows.append(
        row(f"{name}: the same with its share of the maps", (sum(sizes) + table_bytes) / len(sizes) / 1e3, "kB")
    )
    return rows


def whole_call(tokens: Sequence[str], batch: np.ndarray, cache: MetricCache, threads: int) -> Callable[[], int]:
    def work() -> int:
        score(tokens, batch, cache, threads=threads)
        return 1

    return work


def scaling_rows(cache: MetricCache, poses: dict, repeats: int) -> list:
    """One call with all rows, on one thread and on two, in turn."""
    tokens = [token for token in poses for _ in range(len(poses[token]))] * 4
    batch = np.concatenate([np.concatenate(list(poses.values()))] * 4)

    one = two = float("inf")
    for _ in range(repeats):
        one = min(one, least_ms(whole_call(tokens, batch, cache, 1), 1))
        two = min(two, least_ms(whole_call(tokens, batch, cache, 2), 1))
    rate = len(tokens) / one * 1e3
    meeting = multiprocessing.get_context("spawn").Barrier(2)
    with process_pool(2, initializer=meet_at, initargs=(meeting,)) as pool:
        apart = [pool.submit(alone_ms, cache.folder, tokens, batch, repeats) for _ in range(2)]
        beside = sum(len(tokens) / each.result() * 1e3 for each in apart)
    return [
        row("both versions, one call, 1 thread", rate, "trajectories/s"),
        row("both versions, one call, 2 threads", len(tokens) / two * 1e3, "trajectories/s"),
        row("scaling to 2 cores", one / two, "x", ">= 1.8"),
        row("what two processes that share nothing reach: sum of both against one alone", beside / rate, "x"),
    ]


def meet_at(barrier: Barrier) -> None:
    global meeting
    meeting = barrier


def alone_ms(folder: Path, tokens: Sequence[str], batch: np.ndarray, repeats: int) -> float:
    """Least time of one call on one thread, in a process that begins its rounds together with its neighbour."""
    cache = MetricCache(folder)
    work = whole_call(tokens, batch, cache, 1)
    work()  # compiles, and makes the scenes resident
    meeting.wait()
    return least_ms(work, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    reference = Path(os.environ["TRIVIUM_REFERENCE_DATA"]) / "golden"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in SETS:
            cache, poses, v1, v2 = build_cache(reference / name, Path(scratch) / name)
            rows += equality_rows(name, cache, poses, v1, v2, reference / name)
            rows += speed_rows(name, cache, poses, arguments.repeats)
            if name == "navsim":
                rows += scaling_rows(cache, poses, arguments.repeats)
    baseline = "NAVSIM 1.1 and 2.2 on one quiet core: one trajectory, a group of 8 one at a time and batched"
    report("PDM score", rows, baseline=baseline, output=arguments.output)


if __name__ == "__main__":
    main()
