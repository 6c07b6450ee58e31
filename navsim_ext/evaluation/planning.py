"""Runs a planner over a scene index and keeps what it planned, resumably: the first half of scoring.

Trajectories are written in parts of ``PART_BATCHES`` batches under ``<output_dir>/planned``; a run that was killed
goes on after the last finished part. A folder that another planner (or other hidden states, or another index) began
is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Subset

from navsim_ext.dataset import JoinHidden, SceneDataset
from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.fingerprint import FILE_NAME, Fingerprint
from navsim_ext.frames import NUM_FUTURE_POSES
from navsim_ext.hidden_cache.source import HiddenStateSource
from navsim_ext.planners import Planner
from navsim_ext.runtime.checksums import check_stamp
from navsim_ext.runtime.parquet import read_frame, write_table
from navsim_ext.runtime.progress import track

log = logging.getLogger(__name__)

PART_BATCHES = 16
PLANNED_FOLDER = "planned"
REMEDY = "run the same command again: it plans only what is missing or damaged"


def planner_fingerprint(planner: Planner) -> Fingerprint:
    """What drives: a trained planner's own fingerprint, or the name of one without parameters."""
    own = getattr(planner, "fingerprint", None)
    return own if isinstance(own, Fingerprint) else Fingerprint("planner", {"name": planner.name})


def plan_scenes(
    planner: Planner,
    dataset: SceneDataset,
    hidden: HiddenStateSource | None,
    output_dir: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "cpu",
    longer: bool = False,
) -> tuple[pd.DataFrame, Fingerprint]:
    """Trajectories of all samples: DataFrame of ``token``, ``name``, ``log_name``, ``poses`` (24 float64, row-major).

    ``longer`` admits plans of more than 8 poses, all of one length.

    A pose that is not finite stays in the table; the scorer marks it invalid with its reason.
    Raises FingerprintMismatch when ``output_dir`` was begun by another planner.
    """
    folder = Path(output_dir) / PLANNED_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    parents = {"planner": planner_fingerprint(planner), "scenes": dataset.fingerprint}
    if hidden is not None:
        parents["hidden"] = hidden.fingerprint
    made = Fingerprint("planned", {"name": planner.name, "samples": len(dataset), "batch_size": batch_size}, parents)
    if (folder / FILE_NAME).is_file():
        made.require_equal(
            Fingerprint.load(folder),
            mine="this planner",
            theirs=f"the trajectories in {folder}",
            remedy="Choose another output_dir, or delete the folder to plan again.",
        )
    else:
        made.save(folder)
    part_size = PART_BATCHES * batch_size
    starts = range(0, len(dataset), part_size)
    missing = [start for start in starts if not _is_intact(_part(folder, start))]
    done = len(dataset) - sum(min(part_size, len(dataset) - start) for start in missing)
    samples = _plan_parts(planner, dataset, hidden, missing, part_size, batch_size, num_workers, device, folder, longer)
    for _ in track(samples, f"planning ({planner.name})", total=len(dataset), done=done):
        pass
    return pd.concat([read_frame(_part(folder, start), REMEDY) for start in starts], ignore_index=True), made


def _plan_parts(
    planner: Planner,
    dataset: SceneDataset,
    hidden: HiddenStateSource | None,
    starts: Sequence[int],
    part_size: int,
    batch_size: int,
    num_workers: int,
    device: str,
    folder: Path,
    longer: bool,
):
    """Plans and writes the parts that begin at ``starts``; yields once per sample, for the progress bar."""
    numbers = [i for start in starts for i in range(start, min(start + part_size, len(dataset)))]
    if not numbers:
        return
    loader = DataLoader(
        Subset(dataset, numbers), batch_size=batch_size, collate_fn=JoinHidden(hidden), num_workers=num_workers
    )
    rows: list[pd.DataFrame] = []
    remaining = list(starts)
    with torch.inference_mode():
        for scenes, states in loader:
            batch = scenes.to(device)
            poses = planner.plan(batch, None if states is None else states.to(device)).double().cpu().numpy()
            fits = poses.ndim == 3 and len(poses) == len(batch) and poses.shape[2] == 3
            if not (fits and (poses.shape[1] == NUM_FUTURE_POSES or (longer and poses.shape[1] > NUM_FUTURE_POSES))):
                raise DataError(
                    f"planner {planner.name} gave {poses.shape}; {(len(batch), NUM_FUTURE_POSES, 3)} expected"
                )
            rows.append(
                pd.DataFrame(
                    {
                        "token": scenes.token,
                        "name": planner.name,
                        "log_name": scenes.log_name,
                        "poses": list(np.ascontiguousarray(poses.reshape(len(batch), -1))),
                    }
                )
            )
            if sum(map(len, rows)) == min(part_size, len(dataset) - remaining[0]):
                write_table(_part(folder, remaining.pop(0)), pd.concat(rows, ignore_index=True))
                rows = []
            yield from range(len(batch))


def _is_intact(part: Path) -> bool:
    """Whether a part is there; a damaged one, or one of an earlier version, is planned again."""
    try:
        check_stamp(part, REMEDY)
    except MissingError:
        return False
    except CorruptFile as error:
        log.warning("%s", error)
        return False
    return True


def _part(folder: Path, start: int) -> Path:
    return folder / f"part-{start:09d}.parquet"
