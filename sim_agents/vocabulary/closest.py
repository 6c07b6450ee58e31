"""The token that leads nearest to a pose, as a compiled loop for fixed shapes in float32 on the CPU.

Legend: D decisions, C classes, V tokens of a class (padded). Poses are (x, y, heading) in m, m, rad.

The mean distance of the corners of two boxes is no less than the distance of their centres (the corners' offsets sum to
0), so most tokens are passed over after one subtraction. ``encode.py`` holds the same in torch; tests compare them.
"""

from __future__ import annotations

import math

import numba
import numpy as np


@numba.njit(nogil=True, cache=True, error_model="numpy")
def closest(targets, classes, ends, counts, boxes, tokens):
    """Fills tokens [D] with the token of each class row [D] whose end is nearest to the targets [D, 3], which are seen
    from where the token starts. ends [C, V, 3], counts [C], boxes [C, 2]."""
    half = np.float32(0.5)
    for i in range(len(targets)):
        kind = classes[i]
        x, y, heading = targets[i, 0], targets[i, 1], targets[i, 2]
        cosine, sine = np.float32(math.cos(heading)), np.float32(math.sin(heading))
        length, width = half * boxes[kind, 0], half * boxes[kind, 1]
        best, chosen = np.float32(np.inf), 0
        for v in range(counts[kind]):
            dx, dy = ends[kind, v, 0] - x, ends[kind, v, 1] - y
            # Twice the slack of rounding: a tie is decided below.
            if dx * dx + dy * dy > best * best * np.float32(1.00001):
                continue
            dc = np.float32(math.cos(ends[kind, v, 2])) - cosine
            ds = np.float32(math.sin(ends[kind, v, 2])) - sine
            total = np.float32(0.0)
            for corner in range(4):
                along = length if corner == 0 or corner == 3 else -length
                across = width if corner < 2 else -width
                ex = dx + dc * along - ds * across
                ey = dy + ds * along + dc * across
                total += np.float32(math.sqrt(ex * ex + ey * ey))
            if total * np.float32(0.25) < best:
                best, chosen = total * np.float32(0.25), v
        tokens[i] = chosen
