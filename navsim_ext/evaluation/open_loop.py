"""How far a plan is from the driven path, and whether it hits anything: what can be measured without a map.

Legend: F poses at 0.5 s ... F / 2 s. d_f = |p_f - q_f|, distance of plan and drive at pose f [m]; c_f is 1 where the
car at p_f overlaps a recorded road user of that instant, else 0.

The field reports two different things under one name; both are given, and named apart:

    at    L2_at(k s)   = d_2k                     UniAD (arXiv:2212.10156)
    mean  L2_mean(k s) = mean of d_1 ... d_2k     ST-P3 (arXiv:2207.07601), VAD (arXiv:2303.12077)

and likewise for collisions. Poses at which the recorded car itself overlaps a road user are left out of both, as there.
Deviations: boxes are tested exactly and turned with the plan (there: cells of 0.5 m, the car never turned); vehicles,
bicycles and pedestrians are hit (UniAD: vehicles). The car is nuScenes' Renault Zoe.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.planning import plan_scenes
from navsim_ext.evaluation.table import SCORES_FILE, TRAJECTORIES_FILE
from navsim_ext.files import atomic_file, write_json_atomic
from navsim_ext.fingerprint import Fingerprint, digest_tokens
from navsim_ext.frames import POSE_INTERVAL_S, rotate, to_global, to_local
from navsim_ext.readers import open_configured
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.progress import track
from navsim_ext.scene import Scene

SECONDS = (1, 2, 3)
LENGTH_M, WIDTH_M = 4.084, 1.850  # Renault Zoe
REAR_AXLE_TO_CENTRE_M = 1.44
HIT = ("vehicle", "bicycle", "pedestrian")
PER_SECOND = round(1.0 / POSE_INTERVAL_S)
COLUMNS = tuple(f"{what}_{how}_{k}s" for what in ("l2", "collision") for how in ("at", "mean") for k in SECONDS)


def measure(planned: NDArray[np.float64], scene: Scene) -> dict[str, float]:
    """:data:`COLUMNS` of one plan [F,3] in the ego frame of now: metres, and collisions in [0, 1] or NaN.

    NaN where the recorded car overlaps at every pose that a column looks at. Raises DataError for a plan or a window
    that is too short, and for a scene without annotations.
    """
    last = SECONDS[-1] * PER_SECOND
    if len(planned) < last or scene.num_future < last:
        raise DataError(
            f"scene {scene.token}: the plan has {len(planned)} poses, the window {scene.num_future} frames after now; "
            f"{last} were expected for {SECONDS[-1]} s"
        )
    if not scene.annotated:
        raise DataError(f"scene {scene.token}: its split hides its objects, so collisions cannot be told")
    driven = scene.future_poses(last)
    planned = np.asarray(planned, dtype=np.float64)[:last]
    if not np.isfinite(planned).all():
        raise DataError(f"scene {scene.token}: the plan holds a pose that is not finite")
    distance = np.hypot(*(planned[:, :2] - driven[:, :2]).T)
    hit = overlaps(planned, scene).astype(np.float64)
    hit[overlaps(driven, scene)] = np.nan
    figures = {}
    for what, values in (("l2", distance), ("collision", hit)):
        for k in SECONDS:
            part = values[: k * PER_SECOND]
            known = part[np.isfinite(part)]
            figures[f"{what}_at_{k}s"] = float(part[-1])
            figures[f"{what}_mean_{k}s"] = float(known.mean()) if len(known) else float("nan")
    return figures


def overlaps(poses: NDArray[np.float64], scene: Scene) -> NDArray[np.bool_]:
    """[F] whether the car at each pose [F,3] (ego frame of now) overlaps a road user of that instant."""
    cars = _rectangles(poses, LENGTH_M, WIDTH_M, REAR_AXLE_TO_CENTRE_M)
    origin, hit = scene.ego_global[scene.now], np.zeros(len(poses), dtype=bool)
    for f, car in enumerate(cars):
        frame = scene.num_history + f
        objects = scene.annotations[frame]
        chosen = np.array([name in HIT for name in objects.names], dtype=bool)
        boxes = np.asarray(objects.boxes, dtype=np.float64)[chosen]
        if len(boxes):
            middles = to_local(to_global(boxes[:, [0, 1, 6]], scene.ego_global[frame]), origin)
            hit[f] = bool(shapely.intersects(car, _rectangles(middles, boxes[:, 3], boxes[:, 4])).any())
    return hit


def _rectangles(poses: NDArray[np.float64], length, width, ahead: float = 0.0) -> NDArray[np.object_]:
    """[n] polygons of boxes whose middle lies ``ahead`` of each pose [n,3]."""
    half = np.stack(np.broadcast_arrays(0.5 * np.asarray(length), 0.5 * np.asarray(width)), axis=-1)
    corners = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * np.broadcast_to(half, (len(poses), 2))[:, None]
    corners[..., 0] += ahead
    return shapely.polygons(rotate(corners, poses[:, None, 2]) + poses[:, None, :2])


def score_open_loop(cfg: DictConfig, console: Console) -> pd.DataFrame:
    """``protocol=open_loop`` of :mod:`navsim_ext.evaluation.score`: plans, measures, prints and writes; the table.

    Raises MissingError without ``data.root``, DataError for an option that only PDM scores have.
    """
    unread = {"traffic": cfg.traffic is not None, "probes": cfg.probes is not False, "reward": cfg.reward is not None}
    unread |= {"two_frame": cfg.two_frame is not True, "workers": cfg.workers != "sequential"}
    given = [key for key, changed in unread.items() if changed]
    if given:
        raise DataError(f"{', '.join(given)} belong to the PDM scores; protocol=open_loop computes none")
    if cfg.data.root is None:
        raise MissingError("protocol=open_loop compares plans with the recorded scenes: give data.root and data.split")
    output = Path(cfg.output_dir)
    dataset = SceneDataset(cfg.data.index, sensor_root=cfg.data.sensor_root, cameras=list(cfg.data.cameras))
    planner, hidden = instantiate(cfg.planner), instantiate(cfg.hidden) if cfg.hidden else None
    if hidden is not None and hasattr(planner, "require_hidden"):
        planner.require_hidden(hidden.fingerprint)
    options = {"batch_size": cfg.batch_size, "num_workers": cfg.num_loaders, "device": cfg.device}
    planned, made = plan_scenes(planner, dataset, hidden, output, **options)
    if cfg.name:
        planned["name"] = cfg.name
    write_table(output / TRAJECTORIES_FILE, planned[["token", "name", "poses"]])
    plans = dict(zip(planned["token"], planned["poses"], strict=True))
    found = {}
    for _, scenes in track(open_configured(cfg.data, tokens=list(plans)).logs(), "measuring (logs)"):
        found |= {scene.token: _row(plans[scene.token], scene) for scene in scenes}
    rows = pd.DataFrame([found[token] for token in planned["token"]])
    scores = pd.concat([planned[["token", "name", "log_name"]], rows], axis=1)
    fields = {"tokens": digest_tokens(scores["token"]), "car": [LENGTH_M, WIDTH_M, REAR_AXLE_TO_CENTRE_M], "hit": HIT}
    fingerprint = Fingerprint("open_loop", fields, {"planned": made})
    write_table(output / SCORES_FILE, scores)
    with atomic_file(output / "scores.csv") as temporary:
        scores.to_csv(temporary, index=False)
    valid = scores[scores["valid"]]
    if valid.empty:
        raise DataError(f"all {len(scores)} plans are invalid ({scores['reason'].iloc[0]}): see {output / SCORES_FILE}")
    logs = valid["log_name"].tolist()
    estimates = {column: bootstrap_mean(valid[column].to_numpy(float), logs) for column in COLUMNS}
    content = {
        "tokens": len(scores),
        "logs": int(scores["log_name"].nunique()),
        "failures": scores.loc[~scores["valid"], "reason"].value_counts().to_dict(),
        "estimates": {column: estimate.to_json() for column, estimate in estimates.items()},
    }
    write_json_atomic(output / "aggregate.json", content)
    fingerprint.save(output)
    console.print(_table(str(planned["name"].iloc[0]), estimates))
    console.print(f"{content['tokens']} tokens in {content['logs']} logs, {len(scores) - len(valid)} invalid | "
                  f"{fingerprint.digest[:12]}", soft_wrap=True, highlight=False)  # fmt: skip
    return scores


def _row(poses: NDArray[np.float64], scene: Scene) -> dict[str, object]:
    """Figures of one plan, or why there are none: one bad plan or scene costs no other."""
    try:
        return {"valid": True, "reason": "", **measure(np.asarray(poses).reshape(-1, 3), scene)}
    except DataError as error:
        return {"valid": False, "reason": str(error), **dict.fromkeys(COLUMNS, float("nan"))}


def _table(name: str, estimates: dict[str, Estimate]) -> Table:
    """Both conventions side by side; at most 80 columns."""
    table = Table(title=f"{name}: mean [95 % by log]", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("after")
    for what in ("L2 [m] at", "L2 [m] mean", "collision % at", "collision % mean"):
        table.add_column(what, justify="right", no_wrap=True)
    for k in SECONDS:
        cells = []
        for what, scale, digits in (("l2", 1.0, 2), ("collision", 100.0, 1)):
            cells += [estimates[f"{what}_{how}_{k}s"].format(scale, digits) for how in ("at", "mean")]
        table.add_row(f"{k} s", *cells)
    return table
