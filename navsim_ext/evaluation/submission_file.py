"""NAVSIM's submission files: written, read and checked as the server would.

A submission is a pickle of team fields and ``{token: Trajectory}``, where ``Trajectory`` and ``TrajectorySampling``
are classes of NAVSIM and the nuPlan devkit. Neither is needed here: the file is written from stand-ins that pickle
under the original names, and read back by a restricted unpickler that builds the same stand-ins and nothing else.

Formats: v1.1 ``predictions``; v2.2 ``first_stage_predictions`` and ``second_stage_predictions``
(``run_create_submission_pickle.py`` of the two branches).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext import pickles
from navsim_ext.errors import DataError
from navsim_ext.files import write_atomic
from navsim_ext.frames import NUM_FUTURE_POSES, POSE_INTERVAL_S
from navsim_ext.pickles.writing import dumps_as

TEAM_FIELDS = {"team_name": "name", "authors": "authors", "email": "email", "institution": "institution",
               "country / region": "country"}  # fmt: skip
PREDICTIONS = {"v1.1": ("predictions",), "v2.2": ("first_stage_predictions", "second_stage_predictions")}


class InvalidSubmission(DataError):
    """The file would fail, or count as a failure, on the evaluation server."""


class TrajectorySampling:
    """Stands for nuPlan's class of that name: the same attributes, none of its code."""

    def __init__(self, num_poses: int = NUM_FUTURE_POSES, interval_length: float = POSE_INTERVAL_S) -> None:
        self.num_poses = num_poses
        self.time_horizon = num_poses * interval_length
        self.interval_length = interval_length


class Trajectory:
    """Stands for NAVSIM's class of that name; poses [n,3] float32 in the ego frame, ``interval`` seconds apart."""

    def __init__(self, poses: NDArray[np.float32], interval: float = POSE_INTERVAL_S) -> None:
        self.poses = poses
        self.trajectory_sampling = TrajectorySampling(len(poses), interval)


STAND_INS = {
    ("navsim.common.dataclasses", "Trajectory"): Trajectory,
    ("nuplan.planning.simulation.trajectory.trajectory_sampling", "TrajectorySampling"): TrajectorySampling,
}


@dataclass(frozen=True, eq=False)
class Submission:
    """A submission as it was read. ``malformed`` says per token what is wrong with it; those are not in the stages."""

    version: str
    team: Mapping[str, Any]
    stages: tuple[Mapping[str, NDArray[np.float32]], ...]  # of v1.1 one, of v2.2 two: token -> poses [n,3]
    intervals: Mapping[str, float]  # token -> s between poses
    malformed: Mapping[str, str]

    @property
    def poses(self) -> dict[str, NDArray[np.float32]]:
        """Of all stages."""
        return {token: poses for stage in self.stages for token, poses in stage.items()}


def write_submission(
    path: str | os.PathLike[str],
    trajectories: Mapping[str, NDArray],
    team: Mapping[str, Any],
    *,
    version: str = "v2.2",
    expected_tokens: Sequence[str] | None = None,
    second_stage: Mapping[str, NDArray] | None = None,
    expected_second_stage: Sequence[str] | None = None,
    interval: float = POSE_INTERVAL_S,
) -> None:
    """Writes the submission atomically and reads it back through :func:`check_submission` first.

    ``trajectories``: token -> poses [n,3], ego frame, metres and radians, ``interval`` seconds apart; ``second_stage``
    likewise (v2.2 only). ``team``: name, authors, email, institution, country. Raises InvalidSubmission for anything
    that the server would reject or score as a failure.
    """
    if version not in PREDICTIONS:
        raise InvalidSubmission(f"version {version!r} is not one of {sorted(PREDICTIONS)}")
    if second_stage and version != "v2.2":
        raise InvalidSubmission(f"{version} knows no second stage; {len(second_stage)} of its predictions were given")
    stages = [
        {token: Trajectory(np.asarray(poses, dtype=np.float32), interval) for token, poses in stage.items()}
        for stage in (trajectories, second_stage or {})
    ]
    submission: dict[str, Any] = {field: team.get(key) for field, key in TEAM_FIELDS.items()}
    submission |= {key: [stage] for key, stage in zip(PREDICTIONS[version], stages)}
    content = dumps_as(submission, STAND_INS)
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content)
        check_submission(draft, expected_tokens, expected_second_stage)
        write_atomic(target, content)
    finally:
        draft.unlink(missing_ok=True)


def read_submission(path: str | os.PathLike[str]) -> Submission:
    """Reads every stage, token, type, sampling and value. A bad token is kept out and named in ``malformed``.

    Raises InvalidSubmission where the file as a whole is no submission.
    """
    content = pickles.load(path, also_allowed=pickles.holders(STAND_INS))
    if not isinstance(content, dict):
        raise InvalidSubmission(f"{path} holds a {type(content).__name__}; a dict was expected")
    version = next((v for v, keys in PREDICTIONS.items() if keys[0] in content), None)
    if version is None:
        keys = sorted(map(str, content))
        raise InvalidSubmission(f"{path} has keys {keys!r:.200}: neither v1.1 nor v2.2 predictions are among them")
    stages: list[dict[str, NDArray[np.float32]]] = []
    intervals: dict[str, float] = {}
    malformed: dict[str, str] = {}
    for key in PREDICTIONS[version]:
        found = content.get(key)
        if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
            raise InvalidSubmission(f"{path}: {key} must be a list of one dict of token to Trajectory")
        stage: dict[str, NDArray[np.float32]] = {}
        for token, trajectory in found[0].items():
            if not isinstance(token, str):
                raise InvalidSubmission(f"{path}: the token {token!r:.60} of {key} is no text")
            if token in intervals:
                raise InvalidSubmission(f"{path}: token {token} stands in both stages")
            try:
                stage[token] = _checked_poses(path, token, trajectory)
                intervals[token] = float(trajectory.trajectory_sampling.interval_length)
            except DataError as error:  # a field that is absent, as well
                malformed[token] = str(error)
        stages.append(stage)
    return Submission(
        version, {field: content.get(field) for field in TEAM_FIELDS}, tuple(stages), intervals, malformed
    )


def check_submission(
    path: str | os.PathLike[str],
    expected_tokens: Sequence[str] | None = None,
    expected_second_stage: Sequence[str] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Reads a submission and returns {token: poses} of all stages; raises InvalidSubmission naming what is wrong."""
    found = read_submission(path)
    for field, value in found.team.items():
        if not isinstance(value, str | list) or not value:
            raise InvalidSubmission(f"{path}: the field {field!r} is empty or no text; the server wants it")
    if found.malformed:
        first = next(iter(found.malformed.values()))
        raise InvalidSubmission(f"{first} ({len(found.malformed)} tokens are malformed)")
    if not found.stages[0]:
        raise InvalidSubmission(f"{path} predicts 0 tokens")
    counts = {len(poses): token for token, poses in found.poses.items()}
    if len(counts) > 1:
        raise InvalidSubmission(f"{path} mixes samplings: tokens with {counts} poses; give every token the same")
    expected = (expected_tokens, expected_second_stage)
    for number, (stage, wanted) in enumerate(zip(found.stages, expected), start=1):
        if wanted is None:
            continue
        missing, extra = sorted(set(wanted) - stage.keys()), sorted(stage.keys() - set(wanted))
        if missing or extra:
            raise InvalidSubmission(
                f"{path}, stage {number}: {len(missing)} expected tokens are missing (e.g. {missing[:3]}) and "
                f"{len(extra)} are unknown (e.g. {extra[:3]}); the server scores a missing token as a failure. Plan "
                "the whole split"
            )
    return found.poses


def merge_submissions(paths: Sequence[str | os.PathLike[str]]) -> Submission:
    """Several parts of one submission as one; the team is the first part's.

    Raises InvalidSubmission when versions differ, a part is malformed, or two parts predict a token differently.
    """
    parts = [read_submission(path) for path in paths]
    if len({part.version for part in parts}) != 1:
        raise InvalidSubmission(f"{[str(path) for path in paths]} are of versions {[part.version for part in parts]}")
    stages: list[dict[str, NDArray[np.float32]]] = [{} for _ in parts[0].stages]
    intervals: dict[str, float] = {}
    for path, part in zip(paths, parts):
        if part.malformed:
            raise InvalidSubmission(next(iter(part.malformed.values())))
        for merged, stage in zip(stages, part.stages):
            for token, poses in stage.items():
                if token in merged and not np.array_equal(merged[token], poses):
                    raise InvalidSubmission(f"{path}: token {token} is predicted differently by an earlier part")
                merged[token] = poses
        intervals |= part.intervals
    return Submission(parts[0].version, parts[0].team, tuple(stages), intervals, {})


def _checked_poses(path: str | os.PathLike[str], token: str, trajectory: object) -> NDArray[np.float32]:
    if not isinstance(trajectory, pickles.Holder) or trajectory.kind != "Trajectory":
        raise InvalidSubmission(f"{path}: token {token} has a {type(trajectory).__name__}; a Trajectory was expected")
    poses, sampling = trajectory.poses, trajectory.trajectory_sampling
    if not isinstance(sampling, pickles.Holder) or sampling.kind != "TrajectorySampling":
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
    if interval <= 0.0 or horizon < NUM_FUTURE_POSES * POSE_INTERVAL_S - 1e-6:
        raise InvalidSubmission(
            f"{path}: token {token} has poses {poses.shape} every {interval} s, which cover {horizon} s; at least "
            f"{NUM_FUTURE_POSES * POSE_INTERVAL_S:g} s are needed"
        )
    if not np.isfinite(poses).all():
        raise InvalidSubmission(f"{path}: token {token} has a pose that is not finite")
    return poses.astype(np.float32)
