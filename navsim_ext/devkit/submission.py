"""NAVSIM submission files: write, validate, and score locally before the server's queue does.

What such a file is stands in :mod:`navsim_ext.evaluation.submission_file`.

    python -m navsim_ext.devkit.submission trajectories=SCORES/trajectories.parquet output=submission.pkl \\
        team.name=... team.authors=... team.email=... team.institution=... team.country=... [tokens=FILE]
    python -m navsim_ext.devkit.submission check=submission.pkl [tokens=FILE | split_config=YAML] [metric_cache=DIR]
    python -m navsim_ext.devkit.submission merge=[a.pkl,b.pkl] output=submission.pkl [split_config=YAML]

Both stages of NAVSIM 2: ``split_config`` names the expected tokens; predictions of 17-character tokens go into the
second stage, and with a metric cache the dry run is the two-stage protocol.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.submission_file import (
    TEAM_FIELDS,
    InvalidSubmission,
    check_submission,
    merge_submissions,
    read_submission,
    write_submission,
)
from navsim_ext.evaluation.table import PROBE_PREFIX
from navsim_ext.files import reading
from navsim_ext.frames import POSE_INTERVAL_S
from navsim_ext.readers import read_split
from navsim_ext.runtime.config import job
from navsim_ext.runtime.parquet import read_table
from navsim_ext.scene import SYNTHETIC_TOKEN_LENGTH


def read_tokens(path: str | os.PathLike[str] | None) -> list[str] | None:
    """Tokens of a text file, one a line; None for no file."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise MissingError(f"token list {path} does not exist")
    with reading(path, "write it in UTF-8, one token a line"):
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


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


def two_stage_dry_run(path: str | os.PathLike[str], metric_cache_folder: str, split_config: str) -> list[str]:
    """What the two-stage protocol gives for a submission (reactive traffic, human filter), as lines to print."""
    from navsim_ext.evaluation import two_stage_file as two_stage
    from navsim_ext.metric_cache.schema import MetricCache

    cache, options = MetricCache(metric_cache_folder), two_stage.Options()
    split = two_stage.open_split({"split_config": split_config}, cache)
    snapshot = two_stage.take_snapshot(split, cache, options)
    (result,) = two_stage.evaluate_planners(two_stage.read_planners(path), split, cache, options).values()
    named = zip(("one", "two", "combined"), result.stages["score"])
    scores = ", ".join(f"{stage} {100 * value:.2f}" for stage, value in named)
    groups = f"{int(result.groups['valid'].sum())} of {len(result.groups)} groups"
    bad = [f"  {reason}" for reason in result.groups.loc[~result.groups["valid"], "reason"].head(5)]
    return [f"dry run, two stages: {scores}, over {groups}", *bad, snapshot.line()]


def _write(cfg: DictConfig, expected: tuple[Sequence[str] | None, Sequence[str] | None]) -> None:
    """Writes ``cfg.output`` from a table of trajectories, or from several submissions."""
    if cfg.merge:
        merged = merge_submissions(list(cfg.merge))
        team = {key: merged.team[field] for field, key in TEAM_FIELDS.items()}
        first, second, version = merged.stages[0], (*merged.stages, {})[1], merged.version
        intervals = set(merged.intervals.values())
    else:
        if cfg.trajectories is None:
            raise MissingError("nothing to write and nothing to check: give trajectories=..., merge=[...] or check=...")
        if not Path(cfg.trajectories).is_file():
            raise MissingError(f"trajectories={cfg.trajectories} does not exist: give what the scoring command wrote")
        remedy = "write it again with python -m navsim_ext.evaluation.score"
        table = read_table(cfg.trajectories, remedy, required=False).to_pandas()
        table = table[~table["name"].str.startswith(PROBE_PREFIX)]  # blind planners that were scored beside it
        names = table["name"].unique().tolist()
        if len(names) != 1:
            raise DataError(f"{cfg.trajectories} holds planners {names}; a submission is of one planner")
        poses = {row.token: np.asarray(row.poses).reshape(-1, 3) for row in table.itertuples()}
        first = {token: value for token, value in poses.items() if len(token) != SYNTHETIC_TOKEN_LENGTH}
        second = {token: value for token, value in poses.items() if len(token) == SYNTHETIC_TOKEN_LENGTH}
        intervals = set(table["interval"]) if "interval" in table else {POSE_INTERVAL_S}
        team, version = cfg.team, cfg.version
    if len(intervals) != 1:
        raise InvalidSubmission(f"poses are {sorted(intervals)} s apart; a submission has one sampling")
    write_submission(
        cfg.output, first, team, version=version, expected_tokens=expected[0], second_stage=second,
        expected_second_stage=expected[1], interval=float(intervals.pop()),
    )  # fmt: skip


@job("submission")
def main(cfg: DictConfig) -> None:
    console = Console()
    expected: tuple[Sequence[str] | None, Sequence[str] | None] = (read_tokens(cfg.tokens), None)
    if cfg.split_config:
        if cfg.tokens:
            raise DataError("split_config names the tokens of both stages; leave tokens out")
        split = read_split(cfg.split_config)
        expected = (split.first_stage_tokens, split.second_stage_tokens)
    path = cfg.check or cfg.output
    if not cfg.check:
        _write(cfg, expected)
    poses = check_submission(path, *expected)
    stages = read_submission(path).stages
    counts = " + ".join(str(len(stage)) for stage in stages)
    console.print(f"{path}: {counts} tokens, format and values are valid", soft_wrap=True)
    if cfg.metric_cache and cfg.split_config:
        for line in two_stage_dry_run(path, cfg.metric_cache, cfg.split_config):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    elif cfg.metric_cache:
        frame = dry_run(poses, cfg.metric_cache)
        valid = frame[frame["valid"]]
        console.print(
            f"dry run: PDMS v1.1 {valid['pdms_v1'].mean() * 100:.2f}, EPDMS v2.2 {valid['epdms_v2'].mean() * 100:.2f} "
            f"over {len(valid)} tokens, {len(frame) - len(valid)} invalid",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
