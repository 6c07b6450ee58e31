"""Does this machine compute the scorer's arithmetic right?

A 40x40 system from a real drive on which published scores went wrong (NumPy 1.23's pinv with one BLAS gave initial
speeds hundreds of m/s off; the right one is 12.5338 m/s) is solved by this project's own solver and by numpy and scipy,
and two bundled scenes are scored against NAVSIM's own results.

Caching and scoring call :func:`verdict` once per process and store what it says in their fingerprints;
``python -m navsim_ext.doctor`` prints all findings.
The system and its solution (200 digits) are by Wei Wei, EABOT, under the MIT licence in ``arithmetic_data``; the scenes
are synthetic.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from navsim_ext.errors import TriviumError
from navsim_ext.files import reading
from navsim_ext.fingerprint import package_versions
from navsim_ext.pdm.columns import COLUMNS
from navsim_ext.pdm.ego import NUM_STEPS, STEP_S
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.profiles import NUM_DISPLACEMENTS, fit_velocity
from navsim_ext.pdm.reward import PUBLISHED_REWARD
from navsim_ext.pdm.scores import score_pairs

DATA = Path(__file__).resolve().parent / "arithmetic_data"
INITIAL_SPEED = 12.5338  # m/s, the right answer, as published
SOLUTION_TOLERANCE = 1e-6  # m/s and m/s^2
SCORE_TOLERANCE = 1e-8
STATE_TOLERANCE = 1e-8  # m, rad, m/s ...


class WrongNumbers(TriviumError):
    """This machine (or its libraries) computes wrongly; nothing that it scores can be trusted."""


@dataclass(frozen=True)
class Finding:
    """One check: what was tried, what came out, and whether it is right."""

    name: str
    found: str
    right: bool


def examine() -> list[Finding]:
    """Runs all checks of arithmetic; takes a second once the kernels are compiled."""
    return [*_check_system(DATA / "lqr_system.npz"), *_check_scenes(DATA / "scenes.npz")]


@functools.cache
def verdict() -> dict[str, Any]:
    """The verdict of this process's machine for fingerprints: {"right": True, "initial_speed": ..., "versions": ...}.

    Checked once per process. Raises WrongNumbers naming the checks that failed.
    """
    findings = examine()
    wrong = [f"{finding.name}: {finding.found}" for finding in findings if not finding.right]
    if wrong:
        raise WrongNumbers(
            "this machine would give wrong numbers:\n  " + "\n  ".join(wrong) + "\nrun `python -m navsim_ext.doctor`, "
            "and install the versions that constraints.txt names"
        )
    return {
        "right": True,
        "checks": [finding.name for finding in findings],
        "versions": {"python": platform.python_version(), **package_versions("numpy", "scipy", "numba")},
        "machine": platform.machine(),
    }


def _check_system(path: Path) -> list[Finding]:
    with reading(path, "reinstall Trivium"), np.load(path, allow_pickle=False) as content:
        normal, right_side, solution = content["normal"], content["rhs"], content["solution"]
        displacements, headings = content["xy_disp"][0], content["heading_prof"][0]

    def own() -> NDArray[np.float64]:
        references = np.zeros((NUM_STEPS, 3))
        references[1:, :2] = np.cumsum(displacements, axis=0)
        references[:-1, 2] = headings
        velocities = np.empty(NUM_DISPLACEMENTS)
        fit_velocity(references, velocities)
        return np.concatenate([velocities[:1], np.diff(velocities) / STEP_S])

    solvers: dict[str, Callable[[], NDArray[np.float64]]] = {
        "40x40 system, own banded solver": own,
        "40x40 system, numpy.linalg.solve": lambda: np.linalg.solve(normal, right_side),
        "40x40 system, numpy.linalg.pinv": lambda: np.linalg.pinv(normal) @ right_side,
        "40x40 system, scipy cho_solve": lambda: scipy.linalg.cho_solve(scipy.linalg.cho_factor(normal), right_side),
    }
    return [_judge_solution(name, solve, solution) for name, solve in solvers.items()]


def _judge_solution(name: str, solve: Callable[[], NDArray[np.float64]], solution: NDArray[np.float64]) -> Finding:
    try:
        found = solve()
    except np.linalg.LinAlgError as error:
        return Finding(name, f"failed: {error}", False)
    error = float(np.max(np.abs(found - solution)))
    right = bool(error <= SOLUTION_TOLERANCE and abs(found[0] - INITIAL_SPEED) < 5e-5)
    return Finding(name, f"v0 = {found[0]:.6f} m/s (right: {INITIAL_SPEED}), largest error {error:.1e}", right)


def _check_scenes(path: Path) -> list[Finding]:
    cache, known = MemoryMetricCache.load_npz(path)
    tokens = [token for token in cache.tokens for _ in known[f"names/{token}"]]
    names = np.concatenate([known[f"names/{token}"] for token in cache.tokens])
    poses = np.concatenate([known[f"poses/{token}"] for token in cache.tokens])
    result = score_pairs(tokens, poses, cache, names=names.tolist(), reward=PUBLISHED_REWARD, keep_states=True)
    worst, column = 0.0, ""
    for name in COLUMNS:
        expected = np.concatenate([known[f"{name}/{token}"] for token in cache.tokens])
        same = (result[name] == expected) | (np.isnan(result[name]) & np.isnan(expected))
        errors = np.nan_to_num(np.abs(result[name][~same] - expected[~same]), nan=np.inf)  # NaN on one side
        error = float(np.max(errors, initial=0.0))
        if error > worst:
            worst, column = error, f" in {name}"
    state_error = 0.0
    for token in cache.tokens:
        own = result.states[np.array(tokens) == token][known["state_rows"]]
        difference = np.abs(own - known[f"states/{token}"])
        difference[..., 2] = np.minimum(difference[..., 2], 2.0 * np.pi - difference[..., 2])
        state_error = max(state_error, float(np.max(difference)))
    return [
        Finding(
            f"{len(tokens)} bundled trajectories, NAVSIM 1.1 and 2.2",
            f"largest difference {worst:.1e}{column}",
            bool(result.valid.all()) and worst <= SCORE_TOLERANCE,
        ),
        Finding("their simulated states", f"largest difference {state_error:.1e}", state_error <= STATE_TOLERANCE),
    ]
