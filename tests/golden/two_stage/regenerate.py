"""Makes the small golden set of NAVSIM 2's two-stage evaluation out of the shared one.

    TRIVIUM_REFERENCE_DATA=... python tests/golden/two_stage/regenerate.py

``groups.npz`` holds the metric cache of two groups (records and the polygons they use), trajectories of four planners,
and what the real NAVSIM says about them: sub-scores, weights, scores and tracks of the reactive traffic. ``pickles``
holds three second-stage scenes as NAVSIM wrote them. Synthetic scenes; nothing of nuPlan or OpenScene.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from navsim_ext.evaluation.two_stage import NAMES
from navsim_ext.metric_cache.build import build
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.record import SceneMetricCache
from navsim_ext.readers import read_split

HERE = Path(__file__).parent
KINDS = ("cut_in", "dense")
PLANNERS = ("slow", "swerve", "dense_10hz", "to_pair")
VARIANTS = ("posix", "inline_future", "no_lights")
POLICIES = {"idm": "reactive", "log_replay": "log_replay"}


def main() -> None:
    golden = Path(os.environ["TRIVIUM_REFERENCE_DATA"]) / "golden/navsim_two_stage"
    index = {scene["token"]: scene for scene in json.loads((golden / "dataset/index.json").read_text())["scenes"]}
    config = golden / "dataset/config/train_test_split/synth_two_stage.yaml"
    groups = [group for group in read_split(config).groups if index[group.now]["kind"] in KINDS]
    tokens = [token for group in groups for token in group.tokens]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(golden / "dataset", f"{folder}/data")
        build(BuildSettings.two_stage(f"{folder}/data", str(config), f"{folder}/cache"))
        cache = MetricCache(f"{folder}/cache")
        records, tables = compact({token: cache.load(token) for token in tokens}, cache)
        MemoryMetricCache(records, tables).save(HERE / "groups.npz", **expectations(golden, groups, tokens))
    (HERE / "pickles").mkdir(exist_ok=True)
    for variant in VARIANTS:
        scene = next(scene for scene in index.values() if variant in (scene.get("variant") or {}))
        source = golden / "dataset/navhard_two_stage/synthetic_scene_pickles" / scene["file"]
        shutil.copy(source, HERE / "pickles" / f"{variant}.pkl")


def compact(
    records: dict[str, SceneMetricCache], cache: MetricCache
) -> tuple[dict[str, SceneMetricCache], dict[str, PolygonTable]]:
    """The records with tables of just the polygons that they use."""
    tables, kept = {}, {}
    for location in {record.map_location for record in records.values()}:
        here = {token: record for token, record in records.items() if record.map_location == location}
        table = cache.polygons(location)
        used = sorted({int(row) for record in here.values() for row in (*record.map_polygons, *record.red_polygons)})
        number = {row: i for i, row in enumerate(used)}
        types, ids = [int(table.types[row]) for row in used], [str(table.ids[row]) for row in used]
        tables[location] = PolygonTable.from_rings([table.rings(row) for row in used], types, ids)
        for token, record in here.items():
            rows = {
                name: np.array([number[int(row)] for row in getattr(record, name)], dtype=np.int32)
                for name in ("map_polygons", "red_polygons")
            }
            kept[token] = dataclasses.replace(record, **rows)
    return kept, tables


def expectations(golden: Path, groups: list, tokens: list[str]) -> dict[str, np.ndarray]:
    planners, scores = np.load(golden / "planners.npz"), pd.read_parquet(golden / "scores.parquet")
    order = planners["tokens"].tolist()
    mapping = json.dumps([[group.now, group.prev, [list(pair) for pair in group.pairs]] for group in groups])
    extra = {"tokens": np.array(tokens), "mapping": np.frombuffer(mapping.encode(), dtype=np.uint8)}
    for name in PLANNERS:
        extra[f"poses/{name}"] = planners[f"{name}__poses"][[order.index(token) for token in tokens]]
        extra[f"interval/{name}"] = planners[f"{name}__interval"]
        for policy, traffic in POLICIES.items():
            for human_filter in (False, True):
                of_run = (scores["planner"] == name) & (scores["policy"] == policy)
                run = scores[of_run & (scores["human_filter"] == human_filter)]
                values = run.set_index("token").loc[tokens, [*NAMES, "weight", "score"]].to_numpy()
                extra[f"scores/{name}/{traffic}/{human_filter}"] = values
    tracks = np.load(golden / "idm_tracks__slow.npz")
    for i, token in enumerate(tracks["tokens"].tolist()):
        if token in tokens:
            first, last = tracks["row_off"][i : i + 2]
            extra[f"tracks/{token}"] = tracks["rows"][first:last]
            extra[f"ids/{token}"] = tracks["ids"][tracks["ids_off"][i] : tracks["ids_off"][i + 1]]
    return extra


if __name__ == "__main__":
    main()
