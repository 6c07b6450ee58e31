"""k-disks: a greedy cover of recorded segments by discs of one radius, one token a disc.

Repeat: take a random segment c that no disc covers; its disc is all uncovered segments whose end lies within epsilon
of c's (mean distance of box corners); the token is their mean. The first disc is that of standing still. Source: the
released code of SMART and CAT-K (Trajeglish, arXiv 2312.04535, names it so); they fix epsilon at 0.05 m and stop at
2048 tokens.

Chosen here: the number of tokens is given and epsilon is found by bisection, so that a vocabulary of 512 tokens
covers all data with the smallest discs that suffice, instead of leaving what was drawn last uncovered.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from sim_agents.vocabulary.motion import corner_distance

BISECTIONS = 12
LARGEST_M, SMALLEST_M = 4.0, 1e-3
SAMPLE = 20_000
"""Segments on which the radius is found; the cover itself is of all."""


def cover(
    segments: NDArray[np.float32], box: tuple[float, float], radius: float, most: int, seed: int
) -> list[NDArray[np.int64]]:
    """Rows of each disc, in the order of their making; stops when ``most`` discs are made, whatever is left.

    segments [n, J, 3], radius in m. Discs do not share segments.
    """
    ends = torch.from_numpy(segments[:, -1])
    order = np.random.default_rng(seed).permutation(len(segments))
    left = np.ones(len(segments), bool)
    discs: list[NDArray[np.int64]] = []
    sides = torch.tensor(box)
    centre = torch.zeros(3)
    position = 0
    rows = np.arange(len(segments))
    while len(discs) < most:
        near = corner_distance(ends[rows], centre, sides).numpy() <= radius
        if near.any():
            discs.append(rows[near])
            left[rows[near]] = False
            rows = rows[~near]
        while position < len(order) and not left[order[position]]:
            position += 1
        if position == len(order):
            break
        centre = ends[order[position]]
    return discs


def k_disks(
    segments: NDArray[np.float32], box: tuple[float, float], tokens: int, *, seed: int = 0
) -> tuple[NDArray[np.float32], float]:
    """Tokens [V, J, 3], V <= ``tokens``, and the radius (m) of their discs. segments [n, J, 3].

    Fewer tokens than asked for come back where the data has no more distinct motions. Raises DataError for no segments.
    """
    if len(segments) == 0:
        raise DataError("a class without segments has no k-disks: give scenes in which it moves")
    if tokens < 1:
        raise DataError(f"tokens={tokens}: a vocabulary needs at least 1")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(segments))[:SAMPLE])
    sample = segments[chosen]
    low, high = SMALLEST_M, LARGEST_M
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low * high))
        if len(cover(sample, box, middle, tokens + 1, seed)) > tokens:
            low = middle
        else:
            high = middle
    discs = cover(segments, box, high, tokens, seed)
    return np.stack([_mean(segments[rows]) for rows in discs]), high


def _mean(segments: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean [J, 3] of segments [m, J, 3]; of headings the direction of the mean unit vector."""
    mean = segments.mean(axis=0, dtype=np.float64)
    mean[:, 2] = np.arctan2(
        np.sin(segments[..., 2]).mean(axis=0, dtype=np.float64), np.cos(segments[..., 2]).mean(axis=0, dtype=np.float64)
    )
    return mean.astype(np.float32)
