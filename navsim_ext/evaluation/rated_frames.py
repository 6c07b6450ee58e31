"""Plans on WOD-E2E: the rater feedback score where people rated trajectories, and the distance to paths.

Legend: q_j the point of a plan at 0.25 j s (:mod:`navsim_ext.evaluation.waypoints`), r_j that of a path.

    ADE(k s) = mean over j = 1 ... 4 k of |q_j - r_j|

``ade_3s`` and ``ade_5s`` measure from the driven path; ``ade_rated_3s`` and ``ade_rated_5s`` from the trajectory with
the highest rating (the first of equals; cut or padded with its last point, as the score has it). Both are in use, so
both are given. A frame without ratings has no score: it is counted, never 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
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
from navsim_ext.evaluation.rater_feedback import FREQUENCY_HZ, padded, rater_feedback
from navsim_ext.evaluation.table import SCORES_FILE, TRAJECTORIES_FILE
from navsim_ext.evaluation.waypoints import LAST_S, extended_s, waypoints
from navsim_ext.files import atomic_file, write_json_atomic
from navsim_ext.fingerprint import Fingerprint, digest_tokens
from navsim_ext.frames import POSE_INTERVAL_S
from navsim_ext.readers import WodE2E, open_configured
from navsim_ext.readers.wod_e2e import E2EFrame
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.progress import track

SECONDS = (3, 5)
LONGEST = round(LAST_S / POSE_INTERVAL_S)  # poses
COLUMNS = ("rfs", "rfs_within", *(f"ade{which}_{k}s" for which in ("", "_rated") for k in SECONDS))


def measure(points: NDArray[np.float64], frame: E2EFrame) -> dict[str, float]:
    """:data:`COLUMNS` of one plan [20,2]: the score (0 to 10), whether a rated trajectory is within its thresholds (1
    or 0), metres; NaN for what the frame cannot tell."""
    figures = dict.fromkeys(COLUMNS, float("nan"))
    paths = {"": frame.future[:, :2]} if len(frame.future) else {}
    if frame.rated:
        found = rater_feedback(points[None], np.ones(1), frame.rated, frame.ratings, frame.speed)
        figures |= {"rfs": found.score, "rfs_within": float(found.within[0])}
        paths["_rated"] = padded(frame.rated[int(np.argmax(frame.ratings))])
    for which, path in paths.items():
        apart = np.linalg.norm(points - path, axis=-1)
        figures |= {f"ade{which}_{k}s": float(apart[: k * FREQUENCY_HZ].mean()) for k in SECONDS}
    return figures


def summary(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Mean and interval by sequence of each column that at least one valid row has a value of."""
    valid = rows[rows["valid"]]
    known = {column: valid[np.isfinite(valid[column])] for column in COLUMNS}
    return {
        column: bootstrap_mean(part[column].to_numpy(float), part["log_name"].tolist())
        for column, part in known.items()
        if len(part)
    }


def score_rated_frames(cfg: DictConfig, console: Console) -> pd.DataFrame:
    """``protocol=rater_feedback`` of :mod:`navsim_ext.evaluation.score`: plans, measures, prints and writes; the table.

    Raises MissingError without ``data.root``, DataError for an option that only PDM scores have, and where
    ``data.root`` holds something else than WOD-E2E's frames.
    """
    unread = {"traffic": cfg.traffic is not None, "probes": cfg.probes is not False, "reward": cfg.reward is not None}
    unread |= {"two_frame": cfg.two_frame is not True, "workers": cfg.workers != "sequential"}
    unread |= {"metric_cache": cfg.metric_cache is not None}
    given = [key for key, changed in unread.items() if changed]
    if given:
        raise DataError(f"{', '.join(given)} belong to the PDM scores; protocol=rater_feedback computes none")
    if cfg.data.root is None:
        raise MissingError("protocol=rater_feedback reads rated trajectories: give data.root and data.split, what "
                           "python -m navsim_ext.wod_e2e.unpack made")  # fmt: skip
    output = Path(cfg.output_dir)
    source = open_configured(cfg.data)
    if not isinstance(source, WodE2E):
        raise DataError(
            f"{cfg.data.root} holds {type(source).__name__}, which nobody rated; WOD-E2E's frames were expected"
        )
    horizon = None if source.hides_future() else LONGEST
    dataset = SceneDataset(
        cfg.data.index, sensor_root=cfg.data.sensor_root, cameras=list(cfg.data.cameras), horizon=horizon
    )
    planner, hidden = instantiate(cfg.planner), instantiate(cfg.hidden) if cfg.hidden else None
    if hidden is not None and hasattr(planner, "require_hidden"):
        planner.require_hidden(hidden.fingerprint)
    options = {"batch_size": cfg.batch_size, "num_workers": cfg.num_loaders, "device": cfg.device}
    planned, made = plan_scenes(planner, dataset, hidden, output, longer=True, **options)
    if cfg.name:
        planned["name"] = cfg.name
    write_table(output / TRAJECTORIES_FILE, planned[["token", "name", "poses"]].assign(interval=POSE_INTERVAL_S))
    pairs = zip(planned["token"], planned["poses"], strict=True)
    rows = [_row(poses, source, token) for token, poses in track(list(pairs), "measuring (frames)")]
    scores = pd.concat([planned[["token", "name", "log_name"]], pd.DataFrame(rows)], axis=1)
    beyond = extended_s(len(planned["poses"].iloc[0]) // 3, POSE_INTERVAL_S)
    fields = {"tokens": digest_tokens(scores["token"]), "extended_s": beyond}
    fingerprint = Fingerprint("rater_feedback", fields, {"planned": made, "frames": source.store.fingerprint})
    write_table(output / SCORES_FILE, scores)
    with atomic_file(output / "scores.csv") as temporary:
        scores.to_csv(temporary, index=False)
    if not scores["valid"].any():
        raise DataError(f"all {len(scores)} plans are invalid ({scores['reason'].iloc[0]}): see {output / SCORES_FILE}")
    estimates = summary(scores)
    content = {
        "tokens": len(scores),
        "logs": int(scores["log_name"].nunique()),
        "rated": int(np.isfinite(scores["rfs"]).sum()),
        "extended_s": beyond,
        "failures": scores.loc[~scores["valid"], "reason"].value_counts().to_dict(),
        "estimates": {column: estimate.to_json() for column, estimate in estimates.items()},
    }
    write_json_atomic(output / "aggregate.json", content)
    fingerprint.save(output)
    console.print(summary_table(str(planned["name"].iloc[0]), estimates))
    invalid = int((~scores["valid"]).sum())
    console.print(f"{len(scores)} frames of {content['logs']} sequences, {content['rated']} of them rated, {invalid} "
                  f"invalid | {fingerprint.digest[:12]}", soft_wrap=True, highlight=False)  # fmt: skip
    if beyond:
        line = f"The plans end {beyond:g} s before {LAST_S:g} s: they go on with the last speed and turning rate."
        console.print(line, soft_wrap=True, highlight=False)
    return scores


def _row(poses: NDArray[np.float64], source: WodE2E, token: str) -> dict[str, object]:
    """Figures of one plan, or why there are none: one bad plan costs no other."""
    try:
        points = waypoints(np.asarray(poses, np.float64).reshape(-1, 3), POSE_INTERVAL_S)
        return {"valid": True, "reason": "", **measure(points, source.frame(token))}
    except DataError as error:
        return {"valid": False, "reason": f"{token}: {error}", **dict.fromkeys(COLUMNS, float("nan"))}


def summary_table(name: str, estimates: dict[str, Estimate]) -> Table:
    """One row per figure; at most 80 columns."""
    table = Table(title=f"{name}: mean [95 % by sequence]", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("mean", justify="right", no_wrap=True)
    words = {"rfs": ("rater feedback score (0 to 10)", 1.0, 2), "rfs_within": ("within thresholds [%]", 100.0, 1)}
    words |= {f"ade_{k}s": (f"ADE from the driven path, {k} s [m]", 1.0, 2) for k in SECONDS}
    words |= {f"ade_rated_{k}s": (f"ADE from the best-rated one, {k} s [m]", 1.0, 2) for k in SECONDS}
    for column, (title, scale, digits) in words.items():
        table.add_row(title, estimates[column].format(scale, digits) if column in estimates else "none rated")
    return table
