"""Submissions to Waymo's end-to-end driving challenge: written, checked as a whole, and scored at home.

    python -m navsim_ext.wod_e2e.submission trajectories=SCORES/trajectories.parquet frames=ROOT/test file=OUT.tar.gz \\
        method.account_name=ME ... [tokens=FILE]
    python -m navsim_ext.wod_e2e.submission frames=ROOT/test file=OUT.tar.gz [tokens=FILE]     # only checks a file

A file is a .tar.gz of shards, each an ``E2EDChallengeSubmission`` with a part of the frames; a trajectory has 20 points
at 4 Hz. ``tokens`` names the frames that the challenge wants, one a line; without it, every frame of the folder. Where
the frames hold ratings or their future (the validation split), a checked file is scored: a dry run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from navsim_ext.devkit.submission import read_tokens
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.rated_frames import measure, summary, summary_table
from navsim_ext.evaluation.rater_feedback import POINTS
from navsim_ext.evaluation.submission_file import InvalidSubmission
from navsim_ext.evaluation.table import PROBE_PREFIX
from navsim_ext.evaluation.trajectory_file import trajectory_table
from navsim_ext.evaluation.waypoints import waypoints
from navsim_ext.frames import POSE_INTERVAL_S
from navsim_ext.readers.wod_e2e import WodE2E
from navsim_ext.realism.submission import ServerMethod, archive_members, write_shards
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from navsim_ext.traffic.messages import message_types, parse

logger = logging.getLogger(__name__)

END_TO_END = 1
"""Number of the submission type."""
TABLE = {
    "Submission": "1 predictions*:Prediction, 2 submission_type:int32, 3 account_name:string, "
    "4 unique_method_name:string, 5 authors*:string, 6 affiliation:string, 7 description:string, 8 method_link:string, "
    "11 uses_public_model_pretraining:bool, 12 num_model_parameters:string, 13 public_model_names*:string",
    "Prediction": "1 frame_name:string, 2 trajectory:Trajectory",
    "Trajectory": "1 pos_x**:float, 2 pos_y**:float",
}
MESSAGES = message_types("trivium.wod_e2e_submission", TABLE)


def read_plans(path: str | Path) -> dict[str, NDArray[np.float64]]:
    """Points [20,2] by frame name, of a file of one planner's trajectories.

    ``poses`` are every ``interval`` s (0.5 s without that column). Raises DataError for several planners, a frame that
    is there twice, or a plan that :func:`navsim_ext.evaluation.waypoints.waypoints` refuses, naming it.
    """
    table = trajectory_table(path, ("token", "name", "poses")).to_pandas()
    table = table[~table["name"].str.startswith(PROBE_PREFIX)]
    names = table["name"].unique().tolist()
    if len(names) != 1:
        raise DataError(f"{path} holds planners {names}; a submission is of one planner")
    twice = table["token"][table["token"].duplicated()]
    if len(twice):
        raise DataError(f"{path}: frame {twice.iloc[0]} is there {int((table['token'] == twice.iloc[0]).sum())} times")
    intervals = table["interval"] if "interval" in table else [POSE_INTERVAL_S] * len(table)
    plans = {}
    for token, poses, interval in zip(table["token"], table["poses"], intervals, strict=True):
        try:
            plans[token] = waypoints(np.asarray(poses, np.float64).reshape(-1, 3), float(interval))
        except (DataError, TypeError, ValueError) as error:
            raise DataError(f"{path}: frame {token}: {error}") from error
    return plans


def write_submission(
    path: str | Path, plans: Mapping[str, NDArray], method: ServerMethod, wanted: Sequence[str], *, shards: int = 1
) -> None:
    """Writes the .tar.gz atomically, frames in the order of their names.

    Raises InvalidSubmission for a method that the server refuses, and for frames that are missing; no file is left
    then.
    """
    faults = method.faults() + [f"frame {name} has no trajectory" for name in sorted(set(wanted) - plans.keys())]
    if faults:
        raise InvalidSubmission(f"{path} is not written: {faults[0]} ({len(faults)} faults)")
    names = sorted(wanted)
    parts = [part for part in np.array_split(np.array(names, dtype=object), min(shards, len(names))) if len(part)]

    def message(part: NDArray[np.object_]):
        made = MESSAGES["Submission"](submission_type=END_TO_END, **asdict(method))
        for name in part:
            trajectory = made.predictions.add(frame_name=name).trajectory
            trajectory.pos_x.extend(plans[name][:, 0].tolist())
            trajectory.pos_y.extend(plans[name][:, 1].tolist())
        return made

    write_shards(path, map(message, track(parts, "submission, shards")), len(parts))


def check_submission(path: str | Path, wanted: Sequence[str]) -> tuple[dict[str, NDArray[np.float64]], list[str]]:
    """(points [20,2] of the frames that are whole, everything that is wrong with the file, one line each).

    Looked at: every shard's type and method, that each wanted frame is there once and no other is, that each has 20
    finite points. Raises MissingError for no file, DataError for what is no such archive.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"file={path} does not exist")
    names, faults = set(wanted), []
    plans: dict[str, NDArray[np.float64]] = {}
    seen: dict[str, str] = {}
    first: ServerMethod | None = None
    for shard, content in archive_members(path):
        message = parse(MESSAGES["Submission"], content, f"{path}, {shard}")
        if message.submission_type != END_TO_END:
            faults.append(f"{shard}: submission_type is {message.submission_type}, {END_TO_END} is needed")
        values = {one.name: getattr(message, one.name) for one in fields(ServerMethod)}
        method = ServerMethod(
            **{key: value if isinstance(value, str | bool) else tuple(value) for key, value in values.items()}
        )
        faults += [f"{shard}: {fault}" for fault in method.faults()]
        if first is not None and method != first:
            faults.append(f"{shard}: says another method than the first shard")
        first = first or method
        for one in message.predictions:
            name, points = one.frame_name, (np.array(one.trajectory.pos_x), np.array(one.trajectory.pos_y))
            if name in seen:
                faults.append(f"{shard}: frame {name} is there already, in {seen[name]}")
            elif name not in names:
                faults.append(f"{shard}: frame {name} is none of those wanted")
            elif [len(each) for each in points] != [POINTS, POINTS]:
                faults.append(
                    f"{shard}: frame {name} has {len(points[0])} x and {len(points[1])} y; {POINTS} are needed"
                )
            elif not np.isfinite(np.stack(points)).all():
                faults.append(f"{shard}: frame {name} has a point that is not finite")
            else:
                plans[name] = np.stack(points, axis=-1).astype(np.float64)
            seen.setdefault(name, shard)
    if first is None:
        faults.append(f"{path}: 0 shards")
    return plans, faults + [f"frame {name} is missing" for name in sorted(names - seen.keys())]


def dry_run(plans: Mapping[str, NDArray[np.float64]], frames: WodE2E) -> pd.DataFrame:
    """Figures of each frame (:data:`navsim_ext.evaluation.rated_frames.COLUMNS`), NaN where the frames cannot tell."""
    rows = []
    for name in track(sorted(plans), "dry run (frames)"):
        frame = frames.frame(name)
        rows.append({"token": name, "log_name": frame.sequence, "valid": True, **measure(plans[name], frame)})
    return pd.DataFrame(rows)


@job("wod_e2e_submission")
def main(cfg: DictConfig) -> None:
    console = Console()
    folder = Path(cfg.frames)
    frames = WodE2E(folder.parent, folder.name)
    wanted = read_tokens(cfg.tokens) if cfg.tokens else list(frames.store.tokens)
    unknown = [name for name in wanted if name not in frames.store]
    if unknown or not wanted:
        raise DataError(f"tokens={cfg.tokens}: {len(unknown)} of {len(wanted)} are no frames of {folder} {unknown[:3]}")
    if cfg.trajectories is not None:
        values = OmegaConf.to_container(cfg.method)
        method = ServerMethod(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )
        write_submission(cfg.file, read_plans(cfg.trajectories), method, wanted, shards=cfg.shards)
    plans, faults = check_submission(cfg.file, wanted)
    for fault in faults[:50]:
        console.print(fault, markup=False, highlight=False, soft_wrap=True)
    if faults:
        raise InvalidSubmission(f"{cfg.file}: {len(faults)} faults (at most 50 are listed): not to be sent")
    console.print(
        f"{cfg.file}: {len(plans)} frames, whole, ready to be sent", markup=False, highlight=False, soft_wrap=True
    )
    estimates = summary(dry_run(plans, frames))
    if estimates:
        console.print(summary_table("dry run", estimates))


if __name__ == "__main__":
    main()
