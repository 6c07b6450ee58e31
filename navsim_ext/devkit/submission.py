"""NAVSIM submission files: write, validate, and score locally before the server's queue does.

A submission is a pickle of team fields and ``{token: Trajectory}``, where ``Trajectory`` and ``TrajectorySampling``
are classes of NAVSIM and the nuPlan devkit. Neither is needed here: the file is written from stand-ins that pickle
under the original names, and read back by a restricted unpickler that builds the same stand-ins and nothing else.

Formats: v1.1 ``predictions``; v2.2 ``first_stage_predictions`` and ``second_stage_predictions``
(``run_create_submission_pickle.py`` of the two branches).

    python -m navsim_ext.devkit.submission trajectories=SCORES/trajectories.parquet output=submission.pkl \\
        team.name=... team.authors=... team.email=... team.institution=... team.country=... [tokens=FILE]
    python -m navsim_ext.devkit.submission check=submission.pkl [tokens=FILE] [metric_cache=DIR]
"""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.errors import DataError, MissingError
from navsim_ext.frames import NUM_FUTURE_POSES, POSE_INTERVAL_S
from navsim_ext.readers import restricted_pickle
from navsim_ext.runtime.config import job
from navsim_ext.runtime.parquet import read_table

TEAM_FIELDS = {"team_name": "name", "authors": "authors", "email": "email", "institution": "institution",
               "country / region": "country"}  # fmt: skip
PREDICTIONS = {"v1.1": ("predictions",), "v2.2": ("first_stage_predictions", "second_stage_predictions")}


class InvalidSubmission(DataError):
    """The file would fail, or count as a failure, on the evaluation server."""


class TrajectorySampling:
    """Stands for nuPlan's class of that name: the same attributes, none of its code."""

    def __init__(self) -> None:
        self.num_poses = NUM_FUTURE_POSES
        self.time_horizon = NUM_FUTURE_POSES * POSE_INTERVAL_S
        self.interval_length = POSE_INTERVAL_S


class Trajectory:
    """Stands for NAVSIM's class of that name; poses [8,3] float32 in the ego frame."""

    def __init__(self, poses: NDArray[np.float32]) -> None:
        self.poses = poses
        self.trajectory_sampling = TrajectorySampling()


STAND_INS = {
    ("navsim.common.dataclasses", "Trajectory"): Trajectory,
    ("nuplan.planning.simulation.trajectory.trajectory_sampling", "TrajectorySampling"): TrajectorySampling,
}


@contextmanager
def _original_names() -> Iterator[None]:
    """While open, the stand-ins are importable, and so picklable, under the names of the originals."""
    saved_modules = dict(sys.modules)
    saved_names = {stand_in: (stand_in.__module__, stand_in.__qualname__) for stand_in in STAND_INS.values()}
    try:
        for (module_name, class_name), stand_in in STAND_INS.items():
            parts = module_name.split(".")
            for depth in range(1, len(parts) + 1):
                sys.modules[".".join(parts[:depth])] = types.ModuleType(".".join(parts[:depth]))
            setattr(sys.modules[module_name], class_name, stand_in)
            stand_in.__module__, stand_in.__qualname__ = module_name, class_name
        yield
    finally:
        for (module_name, _), stand_in in STAND_INS.items():
            stand_in.__module__, stand_in.__qualname__ = saved_names[stand_in]
            parts = module_name.split(".")
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name in saved_modules:
                    sys.modules[name] = saved_modules[name]
                else:
                    sys.modules.pop(name, None)


def write_submission(
    path: str | os.PathLike[str],
    trajectories: Mapping[str, NDArray],
    team: Mapping[str, Any],
    *,
    version: str = "v2.2",
    expected_tokens: Sequence[str] | None = None,
) -> None:
    """Writes the submission atomically and reads it back through :func:`check_submission` first.

    ``trajectories``: token -> poses [8,3], ego frame, metres and radians. ``team``: name, authors, email, institution,
    country. Raises InvalidSubmission for anything that the server would reject or score as a failure.
    """
    if version not in PREDICTIONS:
        raise InvalidSubmission(f"version {version!r} is not one of {sorted(PREDICTIONS)}")
    predictions = {token: Trajectory(np.asarray(poses, dtype=np.float32)) for token, poses in trajectories.items()}
    first, *rest = PREDICTIONS[version]
    submission: dict[str, Any] = {field: team.get(key) for field, key in TEAM_FIELDS.items()}
    submission |= {first: [predictions]} | {key: [{}] for key in rest}
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _original_names():
        content = pickle.dumps(submission, protocol=4)
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    try:
        check_submission(temporary, expected_tokens)
    except InvalidSubmission:
        temporary.unlink()
        raise
    os.replace(temporary, target)


def check_submission(
    path: str | os.PathLike[str], expected_tokens: Sequence[str] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Reads a submission and returns {token: poses}; raises InvalidSubmission naming the first thing that is wrong."""
    content = restricted_pickle.load(path, also_allowed=restricted_pickle.holders(STAND_INS))
    if not isinstance(content, dict):
        raise InvalidSubmission(f"{path} holds a {type(content).__name__}; a dict was expected")
    for field in TEAM_FIELDS:
        value = content.get(field)
        if not isinstance(value, str | list) or not value:
            raise InvalidSubmission(f"{path}: the field {field!r} is empty or no text; the server wants it")
    version = next((v for v, keys in PREDICTIONS.items() if keys[0] in content), None)
    if version is None:
        keys = sorted(map(str, content))
        raise InvalidSubmission(f"{path} has keys {keys!r:.200}: neither v1.1 nor v2.2 predictions are among them")
    first = content[PREDICTIONS[version][0]]
    if not isinstance(first, list) or len(first) != 1 or not isinstance(first[0], dict):
        raise InvalidSubmission(f"{path}: {PREDICTIONS[version][0]} must be a list of one dict of token to Trajectory")
    strange = next((token for token in first[0] if not isinstance(token, str)), None)
    if strange is not None:
        raise InvalidSubmission(f"{path}: the token {strange!r:.60} is no text")
    poses = {token: _checked_poses(path, token, trajectory) for token, trajectory in first[0].items()}
    if not poses:
        raise InvalidSubmission(f"{path} predicts 0 tokens")
    counts = {len(found): token for token, found in poses.items()}
    if len(counts) > 1:
        raise InvalidSubmission(f"{path} mixes samplings: tokens with {counts} poses; give every token the same")
    if expected_tokens is not None:
        missing, extra = sorted(set(expected_tokens) - poses.keys()), sorted(poses.keys() - set(expected_tokens))
        if missing or extra:
            raise InvalidSubmission(
                f"{path}: {len(missing)} expected tokens are missing (e.g. {missing[:3]}) and {len(extra)} are unknown "
                f"(e.g. {extra[:3]}); the server scores a missing token as a failure. Plan the whole split"
            )
    return poses


def _checked_poses(path: str | os.PathLike[str], token: str, trajectory: object) -> NDArray[np.float32]:
    if not isinstance(trajectory, restricted_pickle.Holder) or trajectory.kind != "Trajectory":
        raise InvalidSubmission(f"{path}: token {token} has a {type(trajectory).__name__}; a Trajectory was expected")
    poses, sampling = trajectory.poses, trajectory.trajectory_sampling
    if not isinstance(sampling, restricted_pickle.Holder) or sampling.kind != "TrajectorySampling":
        raise InvalidSubmission(f"{path}: token {token} has the sampling {type(sampling).__name__}")
    count, interval, horizon = (sampling.num_poses, sampling.interval_length, sampling.time_horizon)
    if not isinstance(poses, np.ndarray) or poses.dtype.kind not in "fiu" or poses.ndim != 2 or poses.shape[1] != 3:
        raise InvalidSubmission(f"{path}: token {token} has poses that are no [n,3] array of numbers")
    known = all(isinstance(value, int | float) and np.isfinite(value) for value in (count, interval, horizon))
    if not known or len(poses) != count or abs(interval * count - horizon) > 1e-6:
        raise InvalidSubmission(
            f"{path}: token {token} has poses {poses.shape} for {count!s:.40} poses every "
            f"{interval!s:.40} s over {horizon!s:.40} s"
        )
    if not np.isfinite(poses).all():
        raise InvalidSubmission(f"{path}: token {token} has a pose that is not finite")
    return poses.astype(np.float32)


def read_tokens(path: str | os.PathLike[str] | None) -> list[str] | None:
    """Tokens of a text file, one a line; None for no file."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise MissingError(f"token list {path} does not exist")
    return [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]


def dry_run(poses: Mapping[str, NDArray], metric_cache_folder: str) -> pd.DataFrame:
    """Scores the predictions as ``navsim_ext.evaluation.score_file`` would, two-frame comfort included; one row per
    token."""
    from navsim_ext.metric_cache.schema import MetricCache
    from navsim_ext.pdm import score_pairs

    tokens = sorted(poses)
    result = score_pairs(
        tokens, np.stack([poses[token] for token in tokens]).astype(np.float64), MetricCache(metric_cache_folder)
    )
    return result.to_frame()


@job("submission")
def main(cfg: DictConfig) -> None:
    console = Console()
    tokens = read_tokens(cfg.tokens)
    if cfg.check:
        path = cfg.check
    else:
        if not Path(cfg.trajectories).is_file():
            raise MissingError(f"trajectories={cfg.trajectories} does not exist: give what the scoring command wrote")
        remedy = "write it again with python -m navsim_ext.evaluation.score"
        table = read_table(cfg.trajectories, remedy, required=False).to_pandas()
        names = table["name"].unique().tolist()
        if len(names) != 1:
            raise DataError(f"{cfg.trajectories} holds planners {names}; a submission is of one planner")
        poses = {row.token: np.asarray(row.poses).reshape(-1, 3) for row in table.itertuples()}
        write_submission(cfg.output, poses, cfg.team, version=cfg.version, expected_tokens=tokens)
        path = cfg.output
    poses = check_submission(path, tokens)
    console.print(f"{path}: {len(poses)} tokens, format and values are valid", soft_wrap=True)
    if cfg.metric_cache:
        frame = dry_run(poses, cfg.metric_cache)
        valid = frame[frame["valid"]]
        console.print(
            f"dry run: PDMS v1.1 {valid['pdms_v1'].mean() * 100:.2f}, EPDMS v2.2 {valid['epdms_v2'].mean() * 100:.2f} "
            f"over {len(valid)} tokens, {len(frame) - len(valid)} invalid",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
