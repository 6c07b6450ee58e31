"""Every trajectory of both golden sets, v1.1 and v2.2, from their own logs and maps: sub-scores, scores, states.

Discrete sub-scores exactly, EP and scores within 1e-8, simulated states within 1e-8 m in x and y and 1e-9 in the rest.
Records are built from the golden data sets (logs and maps), not from NAVSIM's caches, so this is the whole way that a
user's data takes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pdm_golden import CONTINUOUS, GOLDEN_COLUMNS, golden_scene

from navsim_ext.metric_cache.map_table import map_table
from navsim_ext.metric_cache.scene_record import MapContext, build_scene
from navsim_ext.pdm import score, score_pairs
from navsim_ext.pdm.ego import HEADING
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.reward import PUBLISHED_REWARD
from navsim_ext.readers import SceneFilter, open_source


@pytest.fixture(scope="module", params=["navsim", "navsim_real"])
def golden_set(request, reference):
    """(folder, tokens, cache built from the logs, result of all rows, golden frame in the same order)."""
    folder = reference(f"golden/{request.param}")
    v1 = pd.read_parquet(folder / "scores_v11.parquet")
    v2 = pd.read_parquet(folder / "scores_v22.parquet")
    assert (v1[["token", "traj"]].to_numpy() == v2[["token", "traj"]].to_numpy()).all()
    tokens = v1["token"].unique().tolist()
    split = next((folder / "dataset" / "navsim_logs").iterdir()).name
    source = open_source(
        folder / "dataset", split, maps_root=folder / "dataset" / "maps", scene_filter=SceneFilter(tokens=tokens)
    )
    contexts, records = {}, {}
    for token in tokens:
        scene = source.scene(token)
        if scene.map_location not in contexts:
            vector_map = source.map_for(scene)
            contexts[scene.map_location] = MapContext(scene.map_location, vector_map, map_table(vector_map))
        records[token] = build_scene(scene, contexts[scene.map_location])
    cache = MemoryMetricCache(records, {name: context.table for name, context in contexts.items()})
    poses = []
    for token, rows in v1.groupby("token", sort=False):
        trajectories = np.load(folder / "scores" / f"{token}_trajs.npz")
        order = {name: i for i, name in enumerate(trajectories["names"])}
        poses.append(trajectories["poses"][[order[name] for name in rows["traj"]]])
    result = score_pairs(
        v1["token"].tolist(),
        np.concatenate(poses),
        cache,
        names=v1["traj"].tolist(),
        reward=PUBLISHED_REWARD,
        keep_states=True,
    )
    return folder, cache, result, {"v1": v1, "v2": v2}


@pytest.mark.parametrize("column", GOLDEN_COLUMNS)
def test_every_row_equals_navsim(golden_set, column):
    _, _, result, frames = golden_set
    version, source = GOLDEN_COLUMNS[column]
    expected = frames[version][source].to_numpy(np.float64)
    assert len(result) == len(expected) >= 720
    assert result.valid.all()
    if column in CONTINUOUS:
        np.testing.assert_allclose(result[column], expected, rtol=0, atol=1e-8)
    else:
        np.testing.assert_array_equal(result[column], expected)


def test_states_equal_navsim(golden_set):
    folder, cache, result, frames = golden_set
    tokens = frames["v1"]["token"].to_numpy()
    for token in cache.tokens:
        rows = np.flatnonzero(tokens == token)
        for version in ("v11", "v22"):
            golden = np.load(folder / "scores" / f"{token}_{version}.npz")
            order = {name: i for i, name in enumerate(golden["names"])}
            wanted = golden["sim_state11"][[order[name] for name in frames["v1"]["traj"].to_numpy()[rows]]]
            difference = np.abs(result.states[rows] - wanted)
            difference[..., HEADING] = np.minimum(difference[..., HEADING], 2 * np.pi - difference[..., HEADING])
            assert difference[..., :2].max() <= 1e-8
            assert difference[..., 2:].max() <= 1e-9


def test_reference_terms_equal_navsim(golden_set):
    """PDM-Closed's raw progress and multiplier, which NAVSIM computes again for every prediction."""
    folder, cache, _, _ = golden_set
    for token in cache.tokens:
        record = cache.load(token)
        for v, version in enumerate(("v11", "v22")):
            golden = np.load(folder / "scores" / f"{token}_{version}.npz")
            assert record.pdm_progress[v] == pytest.approx(golden["progress_raw"][0, 0], abs=1e-8)
            assert record.pdm_multiplier[v] == golden["multi"][0, :, 0].prod()


def test_records_from_the_golden_arrays_give_the_same_scores(golden_set):
    """The same scenes taken from NAVSIM's own caches instead of the logs."""
    folder, cache, result, frames = golden_set
    tokens = frames["v1"]["token"].to_numpy()
    for token in cache.tokens[::4]:
        record, table = golden_scene(folder / "metric_cache", token)
        other = MemoryMetricCache({token: record}, {record.map_location: table})
        poses = np.load(folder / "scores" / f"{token}_trajs.npz")
        rows = np.flatnonzero(tokens == token)
        order = {name: i for i, name in enumerate(poses["names"])}
        chosen = poses["poses"][[order[name] for name in frames["v1"]["traj"].to_numpy()[rows]]]
        again = score([token] * len(rows), chosen, other)
        np.testing.assert_allclose(again.pdms_v1, result.pdms_v1[rows], rtol=0, atol=1e-8)
        np.testing.assert_array_equal(again.v2_ttc, result.v2_ttc[rows])
        np.testing.assert_array_equal(again.v2_lk, result.v2_lk[rows])
