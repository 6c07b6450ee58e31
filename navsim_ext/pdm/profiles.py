"""Velocity and curvature profiles of a reference: the two least-squares fits in front of the tracker.

Legend: M = 40 displacements between 41 reference poses; dt = 0.1 s. Velocity v_i [m/s] and curvature k_i [1/m] belong
to displacement i. Source: NAVSIM ``batch_lqr_utils.py``.

NAVSIM fits (v_0, a_0 ... a_38) and (k_0, k'_0 ... k'_38) by a pseudo-inverse of 40x40 normal matrices. With
v_i = v_0 + dt sum_{j<i} a_j and k_i likewise, the same minimisers are those of

    sum_i |dp_i - dt v_i (cos h_i, sin h_i)|^2 + 1e-4 (sum_{j<=36} a_j^2 + (a_38 - a_37)^2)
    sum_i (dh_i - dt v_i k_i)^2 + 1e-10 k_0^2 + 1e-2 sum_j k'_j^2

in v and k themselves, whose normal matrices are banded and positive definite:

    (I + L) v = d,  d_i = (cos h_i dx_i + sin h_i dy_i) / dt,  L from the penalty (condition number < 10)
    (S + T) k = b,  b_i = dt v_i dh_i,  S = diag((dt v_i)^2) + 1e-10 e_0 e_0^T,  T the path Laplacian

The first penalty is what NAVSIM computes (its difference matrix lost the +1 band but for the last row), not what its
docstring says. Both systems are solved by elimination without pivoting: the first is far from singular, the second is
a ladder of positive conductances, eliminated without a single subtraction on the diagonal, so that even at standstill
(condition 1e12) the factor is accurate to rounding. No pseudo-inverse, no LAPACK.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import NUM_STEPS, STEP_S, wrap

NUM_DISPLACEMENTS = NUM_STEPS - 1
VELOCITY_PENALTY = 1e-4
CURVATURE_RATE_PENALTY = 1e-2
INITIAL_CURVATURE_PENALTY = 1e-10
MAX_CONDITION = 1e3  # of the velocity system: it is a constant, below 10


def velocity_matrix() -> NDArray[np.float64]:
    """I + L [40,40], L = (penalty / dt^4) (sum_{j<=36} D_j^T D_j + w^T w), D_j v = v_{j+1} - v_j, w v the last jump."""
    weight = VELOCITY_PENALTY / STEP_S**4
    rows = np.zeros((NUM_DISPLACEMENTS - 2, NUM_DISPLACEMENTS))
    for j in range(NUM_DISPLACEMENTS - 3):
        rows[j, j], rows[j, j + 1] = -1.0, 1.0
    rows[-1, -3:] = 1.0, -2.0, 1.0  # a_38 - a_37
    return np.eye(NUM_DISPLACEMENTS) + weight * rows.T @ rows


def factor_banded(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """L D L^T of a positive definite matrix of half bandwidth 2, as rows (l1, l2, d) [N,3].

    Raises ArithmeticError when a pivot says that the matrix is not safely positive definite.
    """
    size = len(matrix)
    factor = np.zeros((size, 3))
    for i in range(size):
        l2 = matrix[i, i - 2] / factor[i - 2, 2] if i >= 2 else 0.0
        l1 = 0.0
        if i >= 1:
            l1 = (matrix[i, i - 1] - (l2 * factor[i - 2, 2] * factor[i - 1, 0] if i >= 2 else 0.0)) / factor[i - 1, 2]
        d = matrix[i, i] - (l1 * l1 * factor[i - 1, 2] if i else 0.0)
        d -= l2 * l2 * factor[i - 2, 2] if i >= 2 else 0.0
        if not d > 0.0 or np.max(np.diag(matrix)) / d > MAX_CONDITION:
            raise ArithmeticError(f"pivot {i} of the velocity system is {d}: this machine's arithmetic is broken")
        factor[i] = l1, l2, d
    return factor


VELOCITY_FACTOR = factor_banded(velocity_matrix())


@kernel
def fit_velocity(references, velocities) -> None:
    """``references`` [41,3] -> ``velocities`` [40]: solves (I + L) v = d with the constant factor."""
    for i in range(NUM_DISPLACEMENTS):
        dx, dy = references[i + 1, 0] - references[i, 0], references[i + 1, 1] - references[i, 1]
        value = (math.cos(references[i, 2]) * dx + math.sin(references[i, 2]) * dy) / STEP_S
        if i >= 1:
            value -= VELOCITY_FACTOR[i, 0] * velocities[i - 1]
        if i >= 2:
            value -= VELOCITY_FACTOR[i, 1] * velocities[i - 2]
        velocities[i] = value
    for i in range(NUM_DISPLACEMENTS - 1, -1, -1):
        value = velocities[i] / VELOCITY_FACTOR[i, 2]
        if i + 1 < NUM_DISPLACEMENTS:
            value -= VELOCITY_FACTOR[i + 1, 0] * velocities[i + 1]
        if i + 2 < NUM_DISPLACEMENTS:
            value -= VELOCITY_FACTOR[i + 2, 1] * velocities[i + 2]
        velocities[i] = value


@kernel
def fit_curvature(references, velocities, curvatures) -> None:
    """``references`` [41,3] and ``velocities`` [40] -> ``curvatures`` [40]: solves (S + T) k = b.

    T couples neighbours with the conductance r = 1e-2 / dt^2. Eliminating node i with surplus s_i (its row sum) leaves
    s_{i+1} + r s_i / (s_i + r) and b_{i+1} + r b_i / (s_i + r) at its neighbour.
    """
    r = CURVATURE_RATE_PENALTY / (STEP_S * STEP_S)
    surplus = np.empty(NUM_DISPLACEMENTS)
    carried = INITIAL_CURVATURE_PENALTY
    right = 0.0
    for i in range(NUM_DISPLACEMENTS):
        travelled = velocities[i] * STEP_S
        surplus[i] = travelled * travelled + carried
        curvatures[i] = travelled * wrap(references[i + 1, 2] - references[i, 2]) + right
        carried = r * surplus[i] / (surplus[i] + r)
        right = r * curvatures[i] / (surplus[i] + r)
    last = NUM_DISPLACEMENTS - 1
    curvatures[last] /= surplus[last]
    for i in range(last - 1, -1, -1):
        curvatures[i] = (curvatures[i] + r * curvatures[i + 1]) / (surplus[i] + r)
