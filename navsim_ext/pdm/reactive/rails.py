"""The vehicles of a scene as the kernels of reactive traffic get them.

Legend: n vehicles of the annotation now, in list order; p distinct paths with v vertices together, c chunks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.traffic_agents import TrafficAgents

CHUNK = 8  # path segments that share bounds


class Rails(NamedTuple):
    """The vehicles of a scene, ready for the kernel."""

    kinds: NDArray[np.uint8]  # [n] bits IS_ACTIVE, STAYS
    path: NDArray[np.int32]  # [n]
    start: NDArray[np.float64]  # [n,7]
    half_sizes: NDArray[np.float64]  # [n,2] m
    poses: NDArray[np.float64]  # [n,3] as annotated now
    path_offsets: NDArray[np.int64]  # [p+1]
    vertices: NDArray[np.float64]  # [v,4] x, y, unwrapped heading, progress
    chunk_offsets: NDArray[np.int64]  # [p+1]
    chunks: NDArray[np.float64]  # [c,4] bounds of CHUNK path segments each
    tails: NDArray[np.float64]  # [c,4] bounds of that chunk and all later ones of its path


@kernel
def chunk_bounds(path_offsets, vertices):
    """(chunk_offsets [p+1], chunks [c,4], tails [c,4]) of all paths."""
    paths = len(path_offsets) - 1
    offsets = np.zeros(paths + 1, dtype=np.int64)
    for k in range(paths):
        offsets[k + 1] = offsets[k] + (path_offsets[k + 1] - path_offsets[k] + CHUNK - 2) // CHUNK
    chunks = np.empty((offsets[paths], 4))
    for k in range(paths):
        for c in range(offsets[k], offsets[k + 1]):
            first = path_offsets[k] + (c - offsets[k]) * CHUNK
            last = min(first + CHUNK, path_offsets[k + 1] - 1)
            chunks[c, 0], chunks[c, 1], chunks[c, 2], chunks[c, 3] = math.inf, math.inf, -math.inf, -math.inf
            for i in range(first, last + 1):
                chunks[c, 0], chunks[c, 1] = min(chunks[c, 0], vertices[i, 0]), min(chunks[c, 1], vertices[i, 1])
                chunks[c, 2], chunks[c, 3] = max(chunks[c, 2], vertices[i, 0]), max(chunks[c, 3], vertices[i, 1])
    tails = chunks.copy()
    for k in range(paths):
        for c in range(offsets[k + 1] - 2, offsets[k] - 1, -1):
            tails[c, 0], tails[c, 1] = min(tails[c, 0], tails[c + 1, 0]), min(tails[c, 1], tails[c + 1, 1])
            tails[c, 2], tails[c, 3] = max(tails[c, 2], tails[c + 1, 2]), max(tails[c, 3], tails[c + 1, 3])
    return offsets, chunks, tails


def make_rails(agents: TrafficAgents, poses: NDArray[np.float64], sizes: NDArray[np.float64]) -> Rails:
    """``poses`` [n,3] and ``sizes`` [n,>=2] of the vehicles now."""
    offsets, vertices = np.array(agents.path_offsets), np.array(agents.path_vertices)
    chunk_offsets, chunks, tails = chunk_bounds(offsets, vertices)
    return Rails(
        np.array(agents.kinds),
        np.array(agents.path),
        np.array(agents.start),
        np.ascontiguousarray(np.asarray(sizes)[:, :2] / 2.0),
        np.array(poses),
        offsets,
        vertices,
        chunk_offsets,
        chunks,
        tails,
    )
