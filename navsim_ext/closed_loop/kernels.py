"""Compiled loops of the world on a CPU: moving by a token, contacts of all tokens, distances to the road's edge.

What they compute is written as tensor code in ``kinematics.py`` (``compose``), ``world.py`` (``tensor_advance``),
``contact.py`` (``find_contacts``), ``distance_grid.py`` (``at``) and ``events.py`` (``tensor_edge_distance``), which
runs on every other device; tests hold the two against each other. They agree but for rounding: poses within 1e-5 m of
100, a contact but where two boxes are within 1e-4 m of touching, a distance within 1e-4 m where it changes steadily.
torch makes a tensor of every intermediate step, at some microseconds each; here it stays in registers, and the broad
phase sweeps along x, so that most pairs are never looked at.

No value depends on who else is in the batch, on where a loop begins, or on the number of threads.

Legend: B worlds, N road users, E steps of 0.1 s, K poses of a token, T = ceil(E / K) tokens; metres, float32.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from navsim_ext.pdm.compiled import kernel

_ZERO = np.float32(0.0)


def split(work: Callable[[int, int], object], count: int, threads: int) -> list:
    """Results of ``work(begin, end)`` over ``count`` items in order, cut into one part a thread."""
    threads = max(1, min(threads, count, os.cpu_count() or 1))
    if threads == 1:
        return [work(0, count)]
    cuts = [count * k // threads for k in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="world") as pool:
        others = [pool.submit(work, *cut) for cut in itertools.pairwise(cuts[1:])]
        return [work(0, cuts[1]), *(other.result() for other in others)]


@kernel
def compose(pose, local, result):
    """Fills result [B,N,K,3] with poses ``local`` [B,N,K,3] given in the frames of ``pose`` [B,N,3]."""
    B, N, K = local.shape[0], local.shape[1], local.shape[2]
    for b in range(B):
        for n in range(N):
            x, y, heading = pose[b, n, 0], pose[b, n, 1], pose[b, n, 2]
            c, s = np.float32(math.cos(heading)), np.float32(math.sin(heading))
            for k in range(K):
                along, across = local[b, n, k, 0], local[b, n, k, 1]
                result[b, n, k, 0] = x + c * along - s * across
                result[b, n, k, 1] = y + s * along + c * across
                result[b, n, k, 2] = heading + local[b, n, k, 2]


@kernel
def all_finite(values, present):
    """Whether all values [B,N,K,3] of those who are present [B,N] are finite."""
    B, N, K = values.shape[0], values.shape[1], values.shape[2]
    for b in range(B):
        for n in range(N):
            if present[b, n]:
                for k in range(K):
                    # x - x is 0 for finite x and NaN for all others
                    x, y, h = values[b, n, k, 0], values[b, n, k, 1], values[b, n, k, 2]
                    if not (x - x) + (y - y) + (h - h) == _ZERO:
                        return False
    return True


@kernel
def advance(values, present, column, step_s, poses, there, speed):
    """Writes the poses ``values`` [B,N,K,3] of those who are present [B,N], 0 for the others, into poses [B,N,C,3] from
    ``column`` on; who was there into there [B,N,C]; the speed along the last heading over the last step into speed
    [B,N] m/s."""
    B, N, K = values.shape[0], values.shape[1], values.shape[2]
    for b in range(B):
        for n in range(N):
            is_present = present[b, n]
            for k in range(K):
                there[b, n, column + k] = is_present
                for a in range(3):
                    poses[b, n, column + k, a] = values[b, n, k, a] if is_present else _ZERO
            last, before = poses[b, n, column + K - 1], poses[b, n, column + K - 2]
            along = np.float32(math.cos(last[2])) * (last[0] - before[0])
            across = np.float32(math.sin(last[2])) * (last[1] - before[1])
            speed[b, n] = (along + across) / step_s


@kernel
def find_contacts(x, y, c, s, half, there, K, margin, first, begin, end, touching, known):
    """All contacts of the tokens ``begin`` ... ``end`` - 1 of B T, world by world; fills touching and known [B,N,E].

    x, y, c, s [B,N,E] centres, cosines and sines of headings, half [B,N,2] half length and width, there [B,N,E].
    Returns int64 [P,4]: world, road user, other, ``first`` + step; both orders of a pair. Known are those who are there
    during the whole token.

    Broad phase: discs around the token's middle position, of the circumradius plus the farthest that the centre gets
    from there plus ``margin``, swept along x. Then the separating axes of ``contact.py`` on every pose.
    """
    N, E = x.shape[1], x.shape[2]
    tokens = -(-E // K)
    found, count = np.empty((1024, 4), np.int64), 0
    order = np.arange(N)
    low, high = np.empty(N), np.empty(N)
    middle_x, middle_y, radius = np.empty(N), np.empty(N), np.empty(N)
    for item in range(begin, end):
        b, t = item // tokens, item % tokens
        k0, k1 = t * K, min(t * K + K, E)
        middle = k0 + (k1 - k0) // 2
        present = 0
        for n in range(N):
            whole = True
            for k in range(k0, k1):
                whole = whole and there[b, n, k]
            if not whole:
                low[n] = np.inf
                continue
            present += 1
            mx, my = np.float64(x[b, n, middle]), np.float64(y[b, n, middle])
            farthest = 0.0
            for k in range(k0, k1):
                known[b, n, k] = True
                dx, dy = x[b, n, k] - mx, y[b, n, k] - my
                farthest = max(farthest, dx * dx + dy * dy)
            l, w = np.float64(half[b, n, 0]), np.float64(half[b, n, 1])
            r = math.sqrt(l * l + w * w) + math.sqrt(farthest) + margin
            middle_x[n], middle_y[n], radius[n] = mx, my, r
            low[n], high[n] = mx - r, mx + r
        if item == begin or t == 0:
            order = np.argsort(low)
        for p in range(1, N):  # nearly sorted: few have overtaken others since the last token
            n, q = order[p], p - 1
            while q >= 0 and low[order[q]] > low[n]:
                order[q + 1] = order[q]
                q -= 1
            order[q + 1] = n
        for p in range(present):
            one = order[p]
            for q in range(p + 1, present):
                other = order[q]
                if low[other] > high[one]:
                    break
                dy = middle_y[other] - middle_y[one]
                reach = radius[one] + radius[other]
                if abs(dy) > reach:
                    continue
                dx = middle_x[other] - middle_x[one]
                if dx * dx + dy * dy > reach * reach:
                    continue
                i, j = min(one, other), max(one, other)
                l_i, w_i, l_j, w_j = half[b, i, 0], half[b, i, 1], half[b, j, 0], half[b, j, 1]
                for k in range(k0, k1):
                    gap_x, gap_y = x[b, j, k] - x[b, i, k], y[b, j, k] - y[b, i, k]
                    c_i, s_i, c_j, s_j = c[b, i, k], s[b, i, k], c[b, j, k], s[b, j, k]
                    cosine, sine = abs(c_i * c_j + s_i * s_j), abs(c_i * s_j - s_i * c_j)
                    if abs(c_i * gap_x + s_i * gap_y) > l_i + l_j * cosine + w_j * sine:
                        continue
                    if abs(c_i * gap_y - s_i * gap_x) > w_i + l_j * sine + w_j * cosine:
                        continue
                    if abs(c_j * gap_x + s_j * gap_y) > l_j + l_i * cosine + w_i * sine:
                        continue
                    if abs(c_j * gap_y - s_j * gap_x) > w_j + l_i * sine + w_i * cosine:
                        continue
                    touching[b, i, k], touching[b, j, k] = True, True
                    if count + 2 > len(found):
                        larger = np.empty((2 * len(found), 4), np.int64)
                        larger[:count] = found[:count]
                        found = larger
                    found[count, 0], found[count, 1], found[count, 2], found[count, 3] = b, i, j, first + k
                    count += 1
                    found[count, 0], found[count, 1], found[count, 2], found[count, 3] = b, j, i, first + k
                    count += 1
    return found[:count].copy()


@kernel
def edge_distances(x, y, c, s, half, wanted, grids, height, width, origin, cell, row, begin, end, result):
    """Fills result [B,N,E] with the least signed distance of a box's four corners to the road's edge, for the rows
    ``begin`` ... ``end`` - 1 of B N; NaN: a corner off the grid, or not ``wanted`` [B,N,E].

    grids [S H W] signed distances, origin [S,2] in cells, row [B] which of them; the rest as above. Bilinear between
    nodes, as ``distance_grid.DistanceGrids.at``.
    """
    N, E = x.shape[1], x.shape[2]
    last_column, last_row = np.float32(width - 1.001), np.float32(height - 1.001)
    for item in range(begin, end):
        b, n = item // N, item % N
        start = row[b] * height * width
        origin_x, origin_y = origin[row[b], 0], origin[row[b], 1]
        l, w = half[b, n, 0], half[b, n, 1]
        for e in range(E):
            if not wanted[b, n, e]:
                result[b, n, e] = np.nan
                continue
            x_e, y_e, c_e, s_e = x[b, n, e], y[b, n, e], c[b, n, e], s[b, n, e]
            least = np.float32(np.inf)
            for corner in range(4):
                along = l if corner in (0, 3) else -l
                across = w if corner < 2 else -w
                right = (x_e + c_e * along - s_e * across) / cell - origin_x
                up = (y_e + s_e * along + c_e * across) / cell - origin_y
                if right != right or up != up:
                    least = np.float32(np.nan)
                    break
                right, up = min(max(right, _ZERO), last_column), min(max(up, _ZERO), last_row)
                i, j = int(up), int(right)
                u, v = right - np.float32(j), up - np.float32(i)
                at = start + i * width + j
                low = grids[at] + u * (grids[at + 1] - grids[at])
                high = grids[at + width] + u * (grids[at + width + 1] - grids[at + width])
                distance = low + v * (high - low)
                if not distance >= least:  # NaN wins, and stays
                    least = distance
                if least != least:
                    break
            result[b, n, e] = least
