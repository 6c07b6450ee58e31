"""Reads golden PDM arrays (layout of the reference set's README) and makes metric-cache records from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from navsim_ext.metric_cache.polygon_table import PolygonTable
from navsim_ext.metric_cache.schema import NUM_FRAMES, NUM_FRAMES_V2, SceneMetricCache, encode_text
from navsim_ext.pdm.reference_terms import complete

LANE_CONNECTOR = 11


def golden_table(cache: dict[str, np.ndarray]) -> PolygonTable:
    """Polygons of one golden scene, then its red connectors, as a table of their own."""
    offsets, red = cache["map_off"], cache["red_off"]
    rings = [[cache["map_xy"][offsets[i] : offsets[i + 1]]] for i in range(len(offsets) - 1)]
    rings += [[cache["red_xy"][red[i] : red[i + 1]]] for i in range(len(red) - 1)]
    types = [*cache["map_types"], *[LANE_CONNECTOR] * (len(red) - 1)]
    return PolygonTable.from_rings(rings, types, [*cache["map_tokens"], *cache["red_tokens"]])


def golden_scene(folder: Path, token: str) -> tuple[SceneMetricCache, PolygonTable]:
    """Record and polygons of a token from ``<folder>/<token>_{v11,v22}.npz``, reference terms computed."""
    v1, v2 = (dict(np.load(folder / f"{token}_{version}.npz")) for version in ("v11", "v22"))
    table = golden_table(v2)
    count = len(v1["obj_tokens"])
    corners = v1["obs_corners"][::5]  # [11,n,4,2] FL, RL, RR, FR
    poses = np.full((count, NUM_FRAMES, 3), np.nan)
    poses[:, :, :2] = corners.mean(axis=2).swapaxes(0, 1)
    along = (corners[:, :, 0] - corners[:, :, 1]).swapaxes(0, 1)
    poses[:, :, 2] = np.arctan2(along[..., 1], along[..., 0])
    in_v2 = np.isin(v1["obj_tokens"], v2["obj_tokens"])
    early = np.isfinite(poses[:, :NUM_FRAMES_V2, 0]).any(axis=1)
    for j in np.flatnonzero(early & ~in_v2):  # seen once, after v2's horizon: stands at all steps of v1 only
        poses[j, : NUM_FRAMES - 1] = np.nan
    assert set(v2["obj_tokens"]) <= set(v1["obj_tokens"])
    past = v2["past_human_state11"]
    polygons = len(v2["map_types"])
    terms = {"pdm_progress": np.zeros(2), "pdm_multiplier": np.zeros(2), "human_sub_scores": np.full(8, np.nan)}
    scene = SceneMetricCache(
        token=token,
        log_name=str(v2["log_name"]),
        map_location=str(v2["map_name"]),
        map_label="nuplan",
        time_us=int(v2["ego_time_us"]),
        ego_state=v2["ego_state11"],
        past_time_us=v2["past_human_time_us"],
        past_states=past,
        human_poses=v2["human_poses"],
        centerline=v2["centerline_se2"],
        map_polygons=np.arange(polygons, dtype=np.int32),
        map_on_route=v2["map_on_route"],
        track_poses=poses,
        track_velocities=v1["obj_first_velocity"],
        track_sizes=v1["obj_lwh"],
        track_types=v1["obj_types"].astype(np.int8),
        red_polygons=np.arange(len(v2["red_tokens"]), dtype=np.int32) + polygons,
        red_frames=v2["red_active"][::5].T.copy(),
        pdm_closed=np.stack([v["pdm_traj_state11"][:, :3] for v in (v1, v2)]),
        pdm_closed_index=np.array([v1["pc_best"], v2["pc_best"]], dtype=np.int8),
        text=encode_text(
            route_lane_ids=v2["route_lane_ids"].tolist(),
            route_roadblock_ids=v2["route_block_ids_corrected"].tolist(),
            track_tokens=v1["obj_tokens"].tolist(),
        ),
        **terms,
    )
    return complete(scene.validate(), table), table
