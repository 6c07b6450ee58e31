"""Reads golden PDM arrays (layout of the reference set's README) and makes metric-cache records from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from navsim_ext.metric_cache.scene_record import with_closed_scores
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.record import NUM_FRAMES, NUM_FRAMES_V2, SceneMetricCache, encode_text
from navsim_ext.pdm.resident import prepare

LANE_CONNECTOR = 11

# our column -> (version, NAVSIM's column in scores_v11 / scores_v22.parquet)
GOLDEN_COLUMNS = {
    "v1_nc": ("v1", "no_at_fault_collisions"),
    "v1_dac": ("v1", "drivable_area_compliance"),
    "v1_ttc": ("v1", "time_to_collision_within_bound"),
    "v1_ep": ("v1", "ego_progress"),
    "v1_comfort": ("v1", "comfort"),
    "v1_ddc": ("v1", "driving_direction_compliance"),
    "pdms_v1": ("v1", "score"),
    "reward": ("v1", "score_recog_rl_10_5_2"),
    "progress_m": ("v1", "progress_raw"),
    "v1_collision_s": ("v1", "time_to_at_fault_collision"),
    "v1_ttc_s": ("v1", "time_to_ttc_infraction"),
    "v2_nc": ("v2", "no_at_fault_collisions"),
    "v2_dac": ("v2", "drivable_area_compliance"),
    "v2_ddc": ("v2", "driving_direction_compliance"),
    "v2_tlc": ("v2", "traffic_light_compliance"),
    "v2_ep": ("v2", "ego_progress"),
    "v2_ttc": ("v2", "time_to_collision_within_bound"),
    "v2_lk": ("v2", "lane_keeping"),
    "v2_hc": ("v2", "history_comfort"),
    "v2_ec": ("v2", "two_frame_extended_comfort"),
    "epdms_v2_nofilter": ("v2", "epdms_score"),
    "epdms_v2": ("v2", "filter_epdms_score"),
    "v2_collision_s": ("v2", "time_to_at_fault_collision"),
    "v2_ttc_s": ("v2", "time_to_ttc_infraction"),
}
CONTINUOUS = ("v1_ep", "pdms_v1", "reward", "progress_m", "v2_ep", "epdms_v2_nofilter", "epdms_v2")


def golden_table(cache: dict[str, np.ndarray]) -> PolygonTable:
    """Polygons of one golden scene, then its red connectors, as a table of their own."""
    offsets, red = cache["map_off"], cache["red_off"]
    rings = [[cache["map_xy"][offsets[i] : offsets[i + 1]]] for i in range(len(offsets) - 1)]
    rings += [[cache["red_xy"][red[i] : red[i + 1]]] for i in range(len(red) - 1)]
    types = [*cache["map_types"], *[LANE_CONNECTOR] * (len(red) - 1)]
    return PolygonTable.from_rings(rings, types, [*cache["map_tokens"], *cache["red_tokens"]])


def exact_poses(corners: np.ndarray, sizes: np.ndarray, headings: np.ndarray) -> np.ndarray:
    """Corners [K,n,4,2] -> poses [K,n,3] whose boxes have these very corners, where such poses exist.

    ``headings`` [K,n] are taken where finite; elsewhere they come from the corners (to about 1e-10 rad).
    Corners are sums rounded at UTM magnitude, so a centre is known to a few units in the last place only; neighbours
    of the mean are tried until the rounding fits.
    """
    along = corners[:, :, 0] - corners[:, :, 1] + corners[:, :, 3] - corners[:, :, 2]
    heading = np.where(np.isfinite(headings), headings, np.arctan2(along[..., 1], along[..., 0]))
    length, width = sizes[:, 0] / 2.0, sizes[:, 1] / 2.0
    lx, ly = length * np.cos(heading), length * np.sin(heading)
    wx, wy = width * np.cos(heading + np.pi / 2), width * np.sin(heading + np.pi / 2)
    offsets = np.stack([[wx + lx, wx - lx, -wx - lx, -wx + lx], [wy + ly, wy - ly, -wy - ly, -wy + ly]], axis=-1)
    offsets = np.moveaxis(offsets, 0, 2)  # [K,n,4,2]
    first = corners[:, :, :1] - offsets[:, :, :1]
    best, misfit = first[:, :, 0].copy(), np.full(first[:, :, 0].shape, np.inf)
    for ulps in (0, 1, -1, 2, -2, 3, -3):
        center = first[:, :, 0] + ulps * np.spacing(np.abs(first[:, :, 0])) / 2.0 ** (ulps == 0)
        wrong = (center[:, :, None] + offsets != corners).sum(axis=2).astype(float)
        better = wrong < misfit
        best, misfit = np.where(better, center, best), np.where(better, wrong, misfit)
    return np.concatenate([best, heading[..., None]], axis=-1)


def golden_scene(folder: Path, token: str) -> tuple[SceneMetricCache, PolygonTable]:
    """Record and polygons of a token from ``<folder>/<token>_{v11,v22}.npz``, reference terms computed."""
    v1, v2 = (dict(np.load(folder / f"{token}_{version}.npz")) for version in ("v11", "v22"))
    table = golden_table(v2)
    corners = v1["obs_corners"][::5]  # [11,n,4,2] FL, RL, RR, FR
    headings = np.full(corners.shape[:2], np.nan)
    rows = [v1["obj_tokens"].tolist().index(name) for name in v2["obj_tokens"]]
    headings[:NUM_FRAMES_V2, rows] = v2["obs_heading"][::5]
    along = corners[NUM_FRAMES_V2:, :, 0] - corners[NUM_FRAMES_V2:, :, 1]
    last = headings[NUM_FRAMES_V2 - 1]  # v2 ends there; who drives straight on keeps its heading to the bit
    straight = np.abs(np.arctan2(along[..., 1], along[..., 0]) - last) < 1e-8
    headings[NUM_FRAMES_V2:] = np.where(straight, last, np.nan)
    poses = exact_poses(corners, v1["obj_lwh"], headings).swapaxes(0, 1).copy()
    poses[np.isnan(poses[..., 0])] = np.nan  # seen by v2 only: once, and so at every step
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
    return with_closed_scores(scene.validate(), prepare(scene, table)), table
