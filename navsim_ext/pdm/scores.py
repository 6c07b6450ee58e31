"""``score`` and ``score_pairs``: predicted trajectories -> PDM results, on the metric cache.

Legend: N rows (a token may repeat: a GRPO group is G rows of one token), trajectories [N,8,3] in the ego frame of now:
x forward, y left [m], heading counter-clockwise [rad], at 0.5, 1.0 ... 4.0 s.

Kernels run without the GIL, so plain threads scale; there are no thread pools that a fork could break, and the calls
may be made in DataLoader workers and inside a training process.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.errors import DataError
from navsim_ext.pdm.columns import NUM_COLUMNS, V2_EC, finish_epdms, finish_reward
from navsim_ext.pdm.comfort import comfort_filters, two_frame_comfort
from navsim_ext.pdm.ego import NUM_POSES, NUM_STEPS, POSE_INTERVAL_S, STATE_SIZE, STEP_S
from navsim_ext.pdm.reactive.idm import DONE
from navsim_ext.pdm.reactive.world import CANNOT_GO_ON, score_reactive
from navsim_ext.pdm.record import UnscorableScene
from navsim_ext.pdm.resident import LoadedScene, SceneRecords
from navsim_ext.pdm.result import PdmResult
from navsim_ext.pdm.reward import NO_REWARD, RewardWeights
from navsim_ext.pdm.scorer import score_trajectories
from navsim_ext.pdm.traffic import V1, V2
from navsim_ext.pdm.version import VERSIONS, require_traffic

MAX_FRAME_GAP_S = 0.55  # two scenes of a log at most this far apart are neighbours
ROWS_PER_THREAD = 8  # below this, starting a thread costs more than it saves
CHUNK_ROWS = 32  # of one call of the kernel: its states stay in a core's cache, and threads end nearly together

BEYOND_SCALE = "the simulation of this trajectory is not finite: its poses are beyond any scale of driving"


class TrajectoryShapeError(DataError):
    """Trajectories that are not [N,8,3] numbers, or not as many as tokens."""


def score(
    tokens: Sequence[str],
    trajectories: ArrayLike,
    metric_cache: SceneRecords,
    *,
    versions: Sequence[str] | None = None,
    reward: RewardWeights | None = None,
    threads: int | None = None,
    keep_states: bool = False,
    traffic: str = "log_replay",
    interval_s: float = POSE_INTERVAL_S,
) -> PdmResult:
    """Scores N trajectories, each alone against PDM-Closed; two-frame comfort is left out (v2_ec NaN, weight 14).

    ``versions``: which of "v1" (PDMS, NAVSIM 1.1) and "v2" (EPDMS, NAVSIM 2.2) to compute; None: both, or v2 alone
    where ``traffic`` ("log_replay", "reactive", "constant_velocity") is not log replay, which v1 does not know.
    ``reward`` adds a column. ``interval_s``: time between poses; [N,M,3] with M interval_s >= 4 s (40 poses at 0.1 s).
    ``threads``: None takes the cores this process may use, 1 stays in the calling thread.
    Rows that cannot be scored are invalid with a reason: NaN or infinite poses, a token without a record, a scene that
    allows no score. A scene without a reference for one of the versions is scored in the other; the columns of the
    first (and a reward of that version) are NaN, and the reason names it.
    Raises TrajectoryShapeError for wrong shapes, DataError for an unknown version.
    """
    start = time.perf_counter()
    poses = check_trajectories(tokens, trajectories, interval_s)
    bits, weights = _options(versions, reward, traffic)
    states = _no_states(len(poses)) if keep_states else None
    rows, loaded, valid, reasons = _run(
        list(tokens), poses, metric_cache, bits, weights, threads, states, traffic, interval_s
    )
    return _result(tokens, rows, states, loaded, valid, reasons, start)


def score_pairs(
    tokens: Sequence[str],
    trajectories: ArrayLike,
    metric_cache: SceneRecords,
    *,
    names: Sequence[str] | None = None,
    previous: Sequence[int] | None = None,
    versions: Sequence[str] | None = None,
    reward: RewardWeights | None = None,
    threads: int | None = None,
    keep_states: bool = False,
    traffic: str = "log_replay",
) -> PdmResult:
    """As ``score``, with v2's two-frame comfort (v2_ec) for every row that has a predecessor.

    The predecessor of a row is the valid row of the same ``names`` entry (default: all one planner) whose scene comes
    before it in the same log, at most 0.55 s earlier; or the row that ``previous`` [N] says (-1: none). Rows without a
    predecessor keep v2_ec NaN and the weight 14, as in NAVSIM. Raises DataError when a planner has a token twice (the
    predecessor would be ambiguous) or ``previous`` is out of range.
    """
    start = time.perf_counter()
    poses = check_trajectories(tokens, trajectories)
    bits, weights = _options(versions, reward, traffic)
    if not bits & V2:
        raise DataError("score_pairs computes two-frame comfort, a part of v2: versions must include 'v2'")
    tokens = list(tokens)
    states = _no_states(len(poses))
    rows, loaded, valid, reasons = _run(tokens, poses, metric_cache, bits, weights, threads, states, traffic)
    comparable = [bool(valid[row]) and bool(loaded[token].versions & V2) for row, token in enumerate(tokens)]
    if previous is None:
        previous = _predecessors(tokens, names, loaded, comparable)
    elif len(previous) != len(tokens) or not all(-1 <= other < len(tokens) for other in previous):
        raise DataError(f"previous must hold {len(tokens)} row numbers below {len(tokens)}, or -1")
    for row, other in enumerate(previous):
        if other < 0 or not comparable[row] or not comparable[other]:
            continue
        scene, before = loaded[tokens[row]].arrays, loaded[tokens[other]].arrays
        shift = _shift(scene.time_us * 1e-6 - before.time_us * 1e-6)
        if shift is None:
            raise DataError(
                f"previous[{row}] = {other}: scene {tokens[other]} is {(scene.time_us - before.time_us) * 1e-6:.3f} s "
                f"before {tokens[row]}; more than 0.05 s and at most {MAX_FRAME_GAP_S} s were expected"
            )
        filters = comfort_filters("two_frame", NUM_STEPS - shift)
        rows[row, V2_EC] = two_frame_comfort(filters, states[row, :-shift], states[other, shift:])
        finish_epdms(rows[row], scene.human)
        finish_reward(rows[row], weights)
    states = states if keep_states else None
    return dataclasses.replace(_result(tokens, rows, states, loaded, valid, reasons, start), two_frame=True)


def check_trajectories(
    tokens: Sequence[str], trajectories: ArrayLike, interval_s: float = POSE_INTERVAL_S
) -> NDArray[np.float64]:
    """[N,8,3] (or [N,M,3] of another interval) contiguous float64; raises TrajectoryShapeError naming both shapes."""
    if isinstance(tokens, str):
        raise TrajectoryShapeError(f"tokens is the single string {tokens!r}; a sequence of tokens was expected")
    try:
        poses = np.ascontiguousarray(trajectories, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TrajectoryShapeError(f"trajectories are not an array of numbers: {error!s:.300}") from error
    if interval_s != POSE_INTERVAL_S:
        horizon = NUM_POSES * POSE_INTERVAL_S
        if not (poses.ndim == 3 and poses.shape[::2] == (len(tokens), 3) and interval_s > 0.0) or (
            poses.shape[1] * interval_s < horizon - 1e-9
        ):
            raise TrajectoryShapeError(
                f"trajectories have shape {list(poses.shape)} for {len(tokens)} tokens at {interval_s} s; "
                f"[{len(tokens)},M,3] with M poses that cover {horizon} s were expected"
            )
    elif poses.shape != (len(tokens), NUM_POSES, 3):
        raise TrajectoryShapeError(
            f"trajectories have shape {list(poses.shape)} for {len(tokens)} tokens; [{len(tokens)},{NUM_POSES},3] was "
            "expected: x, y [m], heading [rad] at 0.5 ... 4.0 s in the ego frame"
        )
    return poses


def _options(
    versions: Sequence[str] | None, reward: RewardWeights | None, traffic: str
) -> tuple[int, NDArray[np.float64]]:
    if versions is None:
        versions = VERSIONS if require_traffic(traffic) == "log_replay" else ("v2",)
    if traffic != require_traffic("log_replay") and "v1" in versions:
        raise DataError(f"traffic={traffic} is NAVSIM 2's: v1 (PDMS) is scored on log replay only; ask for ('v2',)")
    unknown = [version for version in versions if version not in VERSIONS]
    if unknown or not versions or isinstance(versions, str):
        raise DataError(f"versions is {versions!r}; a non-empty choice of {VERSIONS} was expected")
    bits = sum({"v1": V1, "v2": V2}[version] for version in set(versions))
    if reward is None:
        return bits, NO_REWARD
    if reward.version not in versions:
        raise DataError(
            f"the reward weighs {reward.version} sub-scores, but versions is {tuple(versions)} (traffic={traffic}; "
            "only log replay has v1)"
        )
    return bits, reward.as_array()


def _run(
    tokens: list[str],
    poses: NDArray[np.float64],
    cache: SceneRecords,
    bits: int,
    weights: NDArray[np.float64],
    threads: int | None,
    states: NDArray[np.float64] | None,
    traffic: str,
    interval_s: float = POSE_INTERVAL_S,
) -> tuple[NDArray[np.float64], dict[str, LoadedScene], NDArray[np.bool_], NDArray[np.object_]]:
    """Rows [N,columns], the scenes that were scored, validity [N], reasons [N]; fills ``states`` [N,41,11] if given."""
    count = len(tokens)
    valid = np.zeros(count, dtype=bool)
    rows = np.full((count, NUM_COLUMNS), np.nan)
    reasons = np.full(count, "", dtype=object)
    loaded: dict[str, LoadedScene] = {}
    finite = np.isfinite(poses).all(axis=(1, 2))
    for row in np.flatnonzero(~finite):
        bad = int(np.argwhere(~np.isfinite(poses[row]).all(axis=1))[0, 0])
        reasons[row] = f"trajectory is not finite: pose {bad} is {poses[row, bad].tolist()}"

    groups: dict[str, list[int]] = {}
    for row in range(count):
        if finite[row]:
            groups.setdefault(tokens[row], []).append(row)

    def work(token: str, members: list[int]) -> None:
        if token not in cache:
            reasons[members] = cache.why_missing(token)
            return
        try:
            scene = cache.resident.scene(token, traffic)
        except UnscorableScene as error:
            reasons[members] = str(error)
            return
        present = bits & scene.versions
        if present != bits:
            reasons[members] = _without_pdm_closed(bits & ~scene.versions)
        if not present:
            return
        loaded[token] = scene
        part = np.full((len(members), NUM_COLUMNS), np.nan)
        part_states = np.empty((len(members), NUM_STEPS, STATE_SIZE))
        codes = np.full(len(members), DONE)
        if scene.world is not None:
            score_reactive(poses[members], interval_s, scene.arrays, scene.world, weights, part, part_states, codes)
        else:
            score_trajectories(poses[members], interval_s, scene.arrays, present, weights, part, part_states)
        # what once is inf or NaN stays so through the integration: the last state tells of all
        good = np.isfinite(part_states[:, -1]).all(axis=1)
        if not good.all():
            part[~good] = np.nan
            reasons[np.array(members)[~good]] = BEYOND_SCALE
        if codes.any():
            part[codes != DONE] = np.nan
            for stuck in np.flatnonzero(good & (codes != DONE)):
                reasons[members[stuck]] = CANNOT_GO_ON[int(codes[stuck])]
            good &= codes == DONE
        rows[members], valid[members] = part, good
        if states is not None:
            states[members] = part_states

    jobs = [
        (token, members[start : start + CHUNK_ROWS])
        for token, members in groups.items()
        for start in range(0, len(members), CHUNK_ROWS)
    ]
    if threads is None:
        threads = min(available_cores(), count // ROWS_PER_THREAD)
    if threads > 1 and len(jobs) > 1:
        with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
            list(pool.map(lambda job: work(*job), jobs))
    else:
        for token, members in jobs:
            work(token, members)

    return rows, loaded, valid, reasons


def _no_states(count: int) -> NDArray[np.float64]:
    """[N,41,11] for simulated states; NaN where there will be none."""
    return np.full((count, NUM_STEPS, STATE_SIZE), np.nan)


def _without_pdm_closed(missing: int) -> str:
    names = " and ".join(name for name, bit in (("v1", V1), ("v2", V2)) if missing & bit)
    return f"no scores of {names}: the metric cache holds no PDM-Closed of that NAVSIM version for this scene"


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _result(
    tokens: Sequence[str],
    rows: NDArray[np.float64],
    states: NDArray[np.float64] | None,
    loaded: dict[str, LoadedScene],
    valid: NDArray[np.bool_],
    reasons: NDArray[np.object_],
    start: float,
) -> PdmResult:
    labels = np.array([loaded[token].map_label if token in loaded else "" for token in tokens], dtype=object)
    return PdmResult(tokens, rows, valid, reasons, labels, states, time.perf_counter() - start)


def _predecessors(
    tokens: list[str], names: Sequence[str] | None, loaded: dict[str, LoadedScene], comparable: Sequence[bool]
) -> list[int]:
    """Row of each row's predecessor, or -1: neighbours among the comparable rows of one planner in one log, by time."""
    if names is not None and len(names) != len(tokens):
        raise DataError(f"{len(names)} names were given for {len(tokens)} tokens")
    drives: dict[tuple[str, str], list[tuple[float, int]]] = {}
    seen: dict[tuple[str, str], int] = {}
    for row, token in enumerate(tokens):
        name = "" if names is None else names[row]
        if (name, token) in seen:
            raise DataError(
                f"token {token} stands twice for planner {name!r} (rows {seen[name, token]} and {row}): its "
                "predecessor would be ambiguous; give each sample its own name, or pass `previous`"
            )
        seen[name, token] = row
        if comparable[row]:
            scene = loaded[token]
            drives.setdefault((name, scene.log_name), []).append((scene.arrays.time_us * 1e-6, row))
    previous = [-1] * len(tokens)
    for drive in drives.values():
        drive.sort()
        for (before, other), (now, row) in itertools.pairwise(drive):
            if _shift(now - before) is not None:
                previous[row] = other
    return previous


def _shift(gap_s: float) -> int | None:
    """Steps by which two scenes ``gap_s`` apart overlap shifted; None when they are no neighbours."""
    shift = round(gap_s / STEP_S)
    return shift if shift >= 1 and gap_s <= MAX_FRAME_GAP_S else None
