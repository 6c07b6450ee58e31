"""NAVSIM 2's two-stage evaluation (pseudo-simulation): from trajectories of both stages to the combined EPDMS.

Source: NAVSIM 2.2 ``run_pdm_score.py``, ``scene_aggregator.py``. Legend: a group is a recorded scene ``now``, the one
0.5 s before it ``prev``, and n pairs (now_j, prev_j) of second-stage scenes; column c a sub-score or the score.

* Two-frame extended comfort (EC) compares now with prev; both get the value. Likewise each pair.
* d_j = |endpoint(now) - start(now_j)|, the endpoint being the last pose of the prediction itself. Weights
  w_j ~ exp(-d_j^2 / 2 s^2), s^2 = 0.1 m^2, normalised; all 1/n where their sum vanishes (<= 1e-8: the nearest start is
  more than 1.9 m away).
* score = NC DAC DDC TLC (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16.
* A_c: the value of now (of prev); B_c = sum w_j x_j. Stage one is the mean of all A, stage two of all B, and

      combined = mean over groups of (A_now B_now + A_prev B_prev) / 2     (of the scores; not stage one x stage two)

The human filter changes recorded scenes only, and neither endpoints nor weights. NAVSIM loses the whole evaluation when
one scene fails; here its group becomes invalid with a reason, and the combined score says how many groups it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.errors import DataError, TriviumError
from navsim_ext.frames import to_global
from navsim_ext.pdm import score
from navsim_ext.pdm.columns import HUMAN_COLUMNS
from navsim_ext.pdm.comfort import comfort_filters, two_frame_comfort
from navsim_ext.pdm.ego import NUM_STEPS, STEP_S
from navsim_ext.pdm.resident import SceneRecords
from navsim_ext.pdm.version import require_traffic
from navsim_ext.readers.split_config import Group, SplitConfig

SUB_SCORES = {  # NAVSIM's names -> ours, in NAVSIM's order
    "no_at_fault_collisions": "v2_nc",
    "drivable_area_compliance": "v2_dac",
    "driving_direction_compliance": "v2_ddc",
    "traffic_light_compliance": "v2_tlc",
    "ego_progress": "v2_ep",
    "time_to_collision_within_bound": "v2_ttc",
    "lane_keeping": "v2_lk",
    "history_comfort": "v2_hc",
    "two_frame_extended_comfort": "v2_ec",
}
NAMES = tuple(SUB_SCORES)
EXTENDED_COMFORT = "two_frame_extended_comfort"
MULTIPLIERS = NAMES[:4]
WEIGHTS = {NAMES[4]: 5.0, NAMES[5]: 5.0, NAMES[6]: 2.0, NAMES[7]: 2.0, NAMES[8]: 2.0}
VARIANCE = 0.1  # m^2 of the weights' kernel
VANISHING = 1e-8  # a sum of weights at or below it counts as none
MAX_GAP_S = 0.55  # between prev and now, exclusive
STAGE_ROWS = ("extended_pdm_score_stage_one", "extended_pdm_score_stage_two", "extended_pdm_score_combined")


class IncompleteEvaluation(TriviumError):
    """Under ``strict`` one scene that cannot be scored ends the evaluation, as it ends NAVSIM's."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Predictions of one planner: rows of equal length may differ in number of poses and interval."""

    tokens: Sequence[str]  # [N]
    poses: Sequence[NDArray[np.float64]]  # N of [M,3], ego frame
    intervals: Sequence[float]  # [N] s between poses
    malformed: Mapping[int, str] = field(default_factory=dict)  # row -> what is wrong with it


@dataclass(frozen=True, eq=False)
class TwoStageResult:
    """One planner's evaluation."""

    rows: pd.DataFrame  # token, stage, valid, reason, NAMES, weight, score
    groups: pd.DataFrame  # now, valid, reason, stage_one, stage_two, combined (means of the group's two halves)
    stages: pd.DataFrame  # STAGE_ROWS: token, valid, <name>_stage_one, <name>_stage_two, score, groups, ..., low, high

    @property
    def combined(self) -> float:
        """The combined score over the valid groups; NaN when there is none."""
        return float(self.stages["score"].iloc[2])

    @property
    def complete(self) -> bool:
        return bool(self.stages["valid"].iloc[2])


def evaluate(
    trajectories: Trajectories,
    split: SplitConfig,
    metric_cache: SceneRecords,
    *,
    traffic: str = "reactive",
    human_filter: bool = True,
    strict: bool = False,
    threads: int | None = None,
) -> TwoStageResult:
    """Scores both stages and combines them.

    Raises DataError for a split without groups or a token that is predicted twice; under ``strict``
    IncompleteEvaluation naming what NAVSIM would fail on.
    """
    groups = split.require_groups()
    require_traffic(traffic)
    scored = _score_rows(trajectories, split, metric_cache, traffic, human_filter, threads)
    used = [group for group in groups if any(token in scored for token in group.tokens)]
    problems = {group.now: _join_group(group, scored) for group in used}
    in_groups = {token for group in groups for token in group.tokens}
    if strict:
        _require_strict(groups, problems, scored, in_groups)
    rows = _row_table(scored, in_groups)
    return TwoStageResult(rows, *_aggregate(groups, problems, scored))


def stage_one_score(
    trajectories: Trajectories,
    split: SplitConfig,
    metric_cache: SceneRecords,
    *,
    traffic: str = "reactive",
    human_filter: bool = True,
    threads: int | None = None,
) -> float:
    """Mean score of the first stage alone, over the pairs that can be scored; NaN when there is none."""
    scored = _score_rows(trajectories, split, metric_cache, traffic, human_filter, threads)
    for group in split.require_groups():
        _join_pair(scored.get(group.now), scored.get(group.prev), group.now, group.prev)
    known = [row.score for row in scored.values() if row.stage == 1 and not math.isnan(row.score)]
    return float(np.mean(known)) if known else math.nan


class _Row:
    """One scene of one planner while it is scored."""

    def __init__(self, token: str, stage: int, reason: str = "") -> None:
        self.token, self.stage, self.reason = token, stage, reason
        self.values = dict.fromkeys(NAMES, math.nan)
        self.states: NDArray[np.float64] | None = None
        self.weight = self.score = self.seconds = math.nan
        self.endpoint = self.start = np.full(2, math.nan)
        self.log = ""

    @property
    def scored(self) -> bool:
        return self.states is not None


def _score_rows(
    trajectories: Trajectories,
    split: SplitConfig,
    cache: SceneRecords,
    traffic: str,
    human_filter: bool,
    threads: int | None,
) -> dict[str, _Row]:
    """Every predicted token, then the expected ones that nobody predicted, by token."""
    second = set(split.second_stage_tokens)
    grouped = {token for group in split.groups or () for pair in group.pairs for token in pair}
    rows: dict[str, _Row] = {}
    batches: dict[tuple[float, int], list[int]] = {}
    for i, token in enumerate(trajectories.tokens):
        if token in rows:
            raise DataError(f"token {token} is predicted twice: which of the two is meant? Give each token once")
        rows[token] = _Row(token, 2 if token in second or token in grouped else 1, trajectories.malformed.get(i, ""))
        if not rows[token].reason:
            batches.setdefault((trajectories.intervals[i], len(trajectories.poses[i])), []).append(i)
    for (interval, _), members in batches.items():
        tokens = [trajectories.tokens[i] for i in members]
        poses = np.stack([trajectories.poses[i] for i in members])
        try:
            result = score(
                tokens, poses, cache, versions=("v2",), traffic=traffic, interval_s=interval, threads=threads,
                keep_states=True,
            )  # fmt: skip
        except DataError as error:  # a sampling that does not cover 4 s
            for token in tokens:
                rows[token].reason = str(error)
            continue
        for k, token in enumerate(tokens):
            if not result.valid[k]:
                rows[token].reason = str(result.reason[k])
                continue
            _fill(rows[token], result, k, poses[k], cache, traffic, human_filter)
    for token in (*split.first_stage_tokens, *split.second_stage_tokens, *grouped):
        if token not in rows and any(other in rows for other in _group_of(token, split)):
            rows[token] = _Row(token, 2 if token in second or token in grouped else 1, "no trajectory for this token")
    return rows


def _group_of(token: str, split: SplitConfig) -> tuple[str, ...]:
    return next((group.tokens for group in split.groups or () if token in group.tokens), ())


def _fill(row: _Row, result, k: int, poses: NDArray, cache: SceneRecords, traffic: str, human_filter: bool) -> None:
    scene = cache.resident.scene(row.token, traffic)
    ego, human = scene.arrays.ego_state, scene.arrays.human
    if row.stage == 1 and human_filter and np.isnan(human[0]):
        row.reason = "the human filter needs the driven future, which this scene does not have (human_filter=false)"
        return
    for name, column in SUB_SCORES.items():
        row.values[name] = float(result[column][k])
        if row.stage == 1 and human_filter and column != "v2_ec":
            if human[HUMAN_COLUMNS.index(column.removeprefix("v2_"))] == 0.0:
                row.values[name] = 1.0
    row.states = result.states[k]
    row.endpoint = to_global(poses[-1], ego[:3])[:2]
    row.start, row.seconds, row.log = ego[:2], scene.arrays.time_us * 1e-6, scene.log_name


def _join_group(group: Group, rows: Mapping[str, _Row]) -> str:
    """Fills EC, scores and weights of a group's rows; returns why the group is invalid, or nothing."""
    problem = group.problem
    for now, prev in ((group.now, group.prev), *group.pairs):
        problem = _join_pair(rows.get(now), rows.get(prev), now, prev) or problem
    for column, token in ((0, group.now), (1, group.prev)):
        first = rows.get(token)
        if first is not None:
            first.weight = 1.0
        if first is None or not first.scored or not group.pairs:
            continue
        seconds = [rows.get(pair[column]) for pair in group.pairs]
        if all(row is not None and row.scored for row in seconds):
            starts = np.stack([row.start for row in seconds])
            for row, weight in zip(seconds, stage_two_weights(first.endpoint, starts)):
                row.weight = float(weight)
    return problem


def _join_pair(now: _Row | None, prev: _Row | None, now_token: str, prev_token: str) -> str:
    """EC and score of two neighbours; returns the first reason why they have none."""
    for row, token in ((now, now_token), (prev, prev_token)):
        if row is None:
            return f"no trajectory for token {token}"
        if not row.scored:
            return f"token {token}: {row.reason}"
    gap = now.seconds - prev.seconds
    shift = round(gap / STEP_S)
    if not 0.0 < gap < MAX_GAP_S or shift < 1:
        problem = (
            f"{now_token} is {gap:.3f} s after {prev_token}; more than 0.05 s and less than {MAX_GAP_S} s expected"
        )
        now.reason = prev.reason = f"no extended comfort: {problem}"
        return problem
    filters = comfort_filters("two_frame", NUM_STEPS - shift)
    comfort = float(two_frame_comfort(filters, now.states[:-shift], prev.states[shift:]))
    for row in (now, prev):
        row.values[EXTENDED_COMFORT] = comfort
        row.score = extended_score(row.values)
    return ""


def extended_score(values: Mapping[str, float]) -> float:
    """EPDMS of nine sub-scores under NAVSIM's names; extended comfort always counts (weight 16)."""
    product = math.prod(values[name] for name in MULTIPLIERS)
    return product * sum(weight * values[name] for name, weight in WEIGHTS.items()) / sum(WEIGHTS.values())


def stage_two_weights(endpoint: NDArray[np.float64], starts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights [n] of second-stage scenes by where they start [n,2], for a first stage that ends at ``endpoint`` [2]."""
    distances = np.linalg.norm(endpoint - starts, axis=1)
    weights = np.exp(-(distances**2) / (2.0 * VARIANCE))
    total = weights.sum()
    if not total > VANISHING:
        return np.full(len(starts), 1.0 / len(starts))
    return weights / total


def _aggregate(
    groups: Sequence[Group], problems: Mapping[str, str], rows: Mapping[str, _Row]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    columns = (*NAMES, "score")
    entries: list[dict[str, object]] = []
    one: list[NDArray[np.float64]] = []  # A of each half group [10]
    two: list[NDArray[np.float64]] = []  # B
    combined: list[float] = []
    logs: list[str] = []
    for group in groups:
        problem = problems.get(group.now, "no trajectory for any token of this group")
        entry: dict[str, object] = {"now": group.now, "valid": not problem, "reason": problem}
        if not problem:
            A = [_columns(rows[token], columns) for token in (group.now, group.prev)]
            B = []
            for column in (0, 1):
                w = np.array([rows[pair[column]].weight for pair in group.pairs])
                x = np.stack([_columns(rows[pair[column]], columns) for pair in group.pairs])
                B.append((w[:, None] * x).sum(axis=0) / w.sum())
            one += A
            two += B
            combined.append(0.5 * (A[0][-1] * B[0][-1] + A[1][-1] * B[1][-1]))
            logs.append(rows[group.now].log)
            entry |= {
                "stage_one": 0.5 * (A[0][-1] + A[1][-1]),
                "stage_two": 0.5 * (B[0][-1] + B[1][-1]),
                "combined": combined[-1],
            }
        entries.append(entry)
    table = pd.DataFrame(entries, columns=["now", "valid", "reason", "stage_one", "stage_two", "combined"])
    return table, _stage_rows(one, two, combined, table)


def _columns(row: _Row, columns: Sequence[str]) -> NDArray[np.float64]:
    return np.array([row.score if name == "score" else row.values[name] for name in columns])


def _stage_rows(
    one: Sequence[NDArray], two: Sequence[NDArray], combined: Sequence[float], groups: pd.DataFrame
) -> pd.DataFrame:
    """The three summary rows of NAVSIM's table, with intervals over groups and how many of them they rest on."""
    nothing = np.full(len(NAMES) + 1, math.nan)
    mean_one = np.mean(one, axis=0) if len(one) else nothing
    mean_two = np.mean(two, axis=0) if len(two) else nothing
    valid = groups[groups["valid"]]
    scores = (mean_one[-1], mean_two[-1], float(np.mean(combined)) if len(combined) else math.nan)
    whole = bool(len(groups)) and len(valid) == len(groups)
    table = []
    for stage, (token, value) in enumerate(zip(STAGE_ROWS, scores)):
        column = valid[("stage_one", "stage_two", "combined")[stage]].to_numpy(float)
        interval = bootstrap_mean(column, valid["now"].tolist())
        entry: dict[str, object] = {"token": token, "valid": whole}
        entry |= {f"{name}_stage_one": mean_one[i] if stage != 1 else math.nan for i, name in enumerate(NAMES)}
        entry |= {f"{name}_stage_two": mean_two[i] if stage != 0 else math.nan for i, name in enumerate(NAMES)}
        entry |= {"score": float(value), "groups": len(valid), "groups_expected": len(groups)}
        table.append(entry | {"low": interval.low, "high": interval.high})
    return pd.DataFrame(table)


def combined_estimate(result: TwoStageResult) -> Estimate:
    """The combined score with its interval over groups."""
    valid = result.groups[result.groups["valid"]]
    return bootstrap_mean(valid["combined"].to_numpy(float), valid["now"].tolist())


def _row_table(rows: Mapping[str, _Row], in_groups: set[str]) -> pd.DataFrame:
    entries = []
    for row in rows.values():
        reason = row.reason
        if row.scored and not reason and math.isnan(row.score):
            stray = row.token not in in_groups
            reason = "in no group of the split" if stray else "no extended comfort: its neighbour is invalid"
        entries.append(
            {"token": row.token, "stage": row.stage, "valid": row.scored, "reason": reason}
            | row.values
            | {"weight": row.weight, "score": row.score}
        )
    return pd.DataFrame(entries, columns=["token", "stage", "valid", "reason", *NAMES, "weight", "score"])


def _require_strict(
    groups: Sequence[Group], problems: Mapping[str, str], rows: Mapping[str, _Row], in_groups: set[str]
) -> None:
    """Raises where NAVSIM's evaluation ends without a result; groups without any trajectory are skipped there too."""
    found = [f"group {group.now}: {problems[group.now]}" for group in groups if problems.get(group.now)]
    found += [f"token {token} is in no group of the split" for token in rows if token not in in_groups]
    if found:
        raise IncompleteEvaluation(
            f"strict=true, and NAVSIM would end without a result ({len(found)} reasons), first: {found[0]}"
        )


def navsim_table(result: TwoStageResult) -> pd.DataFrame:
    """The evaluation in NAVSIM's CSV layout: a scene fills its own stage's columns, unweighted; then three rows."""
    columns = ["token", "valid", *(f"{name}_stage_one" for name in NAMES), *(f"{name}_stage_two" for name in NAMES)]
    entries = []
    for row in result.rows.to_dict("records"):
        stage = "one" if row["stage"] == 1 else "two"
        values = {f"{name}_stage_{stage}": row[name] for name in NAMES}
        entries.append({"token": row["token"], "valid": row["valid"], "score": row["score"]} | values)
    scenes = pd.DataFrame(entries, columns=[*columns, "score"])
    return pd.concat([scenes, result.stages[[*columns, "score"]]], ignore_index=True)
