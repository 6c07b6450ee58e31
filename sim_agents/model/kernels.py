"""Compiled loops of the neighbour attention on one core, for float32 on the CPU.

Legend: G groups of askers with a table each, Q askers of a group, C rows of a table, P neighbours of an asker, d width,
h heads, F features of a relation. What they compute is written in ``relations.py`` and ``attention.py``, whose torch
code is the same arithmetic for every other device; tests hold the two against each other.

A neighbourhood is a few dozen numbers and stays in the first cache; torch makes every intermediate step a tensor.
"""

from __future__ import annotations

import math

import numba
import numpy as np

_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROOT_HALF = np.float32(0.707106781186547524)
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in another order (so that they vectorise); infinities and NaN keep their meaning."""


@numba.njit(inline="always")
def _exp(x):
    """e^x of a float32, relative error below 2e-7 (minimax polynomial of Cephes' expf). It vectorises."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * _LOG2E + np.float32(0.5))
    x = x - n * _LN2_HIGH - n * _LN2_LOW
    y = np.float32(1.9875691500e-4)
    y = y * x + np.float32(1.3981999507e-3)
    y = y * x + np.float32(8.3334519073e-3)
    y = y * x + np.float32(4.1665795894e-2)
    y = y * x + np.float32(1.6666665459e-1)
    y = y * x + np.float32(5.0000001201e-1)
    y = y * x * x + x + np.float32(1.0)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(inline="always")
def _log(x):
    """ln x of a float32 > 0, relative error below 2e-7 (minimax polynomial of Cephes' logf)."""
    bits = np.float32(x).view(np.int32)
    e = np.float32((bits >> np.int32(23)) - np.int32(126))
    m = np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)).view(np.float32)
    low = m < _ROOT_HALF
    e = e - np.float32(1.0) if low else e
    m = m + m - np.float32(1.0) if low else m - np.float32(1.0)
    z = m * m
    y = np.float32(7.0376836292e-2)
    y = y * m - np.float32(1.1514610310e-1)
    y = y * m + np.float32(1.1676998740e-1)
    y = y * m - np.float32(1.2420140846e-1)
    y = y * m + np.float32(1.4249322787e-1)
    y = y * m - np.float32(1.6668057665e-1)
    y = y * m + np.float32(2.0000714765e-1)
    y = y * m - np.float32(2.4999993993e-1)
    y = y * m + np.float32(3.3333331174e-1)
    y = y * m * z + e * _LN2_LOW - np.float32(0.5) * z
    return m + y + e * _LN2_HIGH


@numba.njit(inline="always")
def _tanh(x):
    return np.float32(1.0) - np.float32(2.0) / (_exp(np.float32(2.0) * x) + np.float32(1.0))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def nearest(asking, asked, allowed, radius, rows, near):
    """Fills rows [G, Q, P] and near [G, Q, P] with the P nearest of the allowed asked poses [G, C, 3] within
    ``radius`` m of the asking ones [G, Q, 3]; allowed [G, Q, C] or [G, 1, C]. Beyond the last one rows are 0, near
    False."""
    most, count = rows.shape[2], asked.shape[1]
    square = np.float32(radius * radius)
    distance = np.empty(count, np.float32)
    best = np.empty(most, np.float32)
    for g in range(rows.shape[0]):
        x_of, y_of = asked[g, :, 0].copy(), asked[g, :, 1].copy()
        for q in range(rows.shape[1]):
            x, y = asking[g, q, 0], asking[g, q, 1]
            for c in range(count):
                dx, dy = x_of[c] - x, y_of[c] - y
                distance[c] = dx * dx + dy * dy
            may = allowed[g, q if allowed.shape[1] > 1 else 0]
            found = 0
            for c in range(count):
                if distance[c] <= square and may[c] and (found < most or distance[c] < best[most - 1]):
                    place = min(found, most - 1)
                    while place > 0 and best[place - 1] > distance[c]:
                        best[place] = best[place - 1]
                        rows[g, q, place] = rows[g, q, place - 1]
                        place -= 1
                    best[place] = distance[c]
                    rows[g, q, place] = c
                    found = min(found + 1, most)
            for p in range(most):
                near[g, q, p] = p < found
                if p >= found:
                    rows[g, q, p] = 0


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_REORDERED)
def relate(asking, asked, rows, gap, centres, shortest, nearest_m, out):
    """Fills out [G, Q, P, F] with the features of the asked poses [G, C, 3] of ``rows`` [G, Q, P] seen from the asking
    ones [G, Q, 3]; ``gap`` [P] s; ``centres`` of the bumps of log distance."""
    P, features = rows.shape[2], out.shape[3]
    table = np.empty((features, P), np.float32)
    dx, dy, turn_c, turn_s = (np.empty(P, np.float32), np.empty(P, np.float32), np.empty(P, np.float32),
                              np.empty(P, np.float32))  # fmt: skip
    for g in range(rows.shape[0]):
        cosine_of, sine_of = np.cos(asked[g, :, 2]), np.sin(asked[g, :, 2])
        for q in range(rows.shape[1]):
            x, y = asking[g, q, 0], asking[g, q, 1]
            cosine, sine = np.float32(math.cos(asking[g, q, 2])), np.float32(math.sin(asking[g, q, 2]))
            for p in range(P):
                row = rows[g, q, p]
                dx[p], dy[p] = asked[g, row, 0] - x, asked[g, row, 1] - y
                turn_c[p] = cosine_of[row] * cosine + sine_of[row] * sine
                turn_s[p] = sine_of[row] * cosine - cosine_of[row] * sine
            for p in range(P):
                along, across = cosine * dx[p] + sine * dy[p], cosine * dy[p] - sine * dx[p]
                distance = np.float32(math.sqrt(along * along + across * across + nearest_m * nearest_m))
                c, s = along / distance, across / distance
                logarithm = _log(distance + shortest)
                table[0, p] = _tanh(along * np.float32(0.1))
                table[1, p] = _tanh(across * np.float32(0.1))
                table[2, p] = logarithm * np.float32(0.25)
                table[3, p], table[4, p] = c, s
                table[5, p], table[6, p] = c * c - s * s, np.float32(2.0) * c * s
                table[7, p], table[8, p] = turn_c[p], turn_s[p]
                table[9, p] = gap[p]
                table[10, p] = _tanh(across * np.float32(0.5))
            for i in range(len(centres)):
                centre = centres[i]
                for p in range(P):
                    apart = table[2, p] * np.float32(4.0) - centre
                    table[11 + i, p] = _exp(np.float32(-2.0) * apart * apart)
            for p in range(P):
                for f in range(features):
                    out[g, q, p, f] = table[f, p]


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_REORDERED)
def attend(asked, key_value, rows, mask, relation, heads, out, weights):
    """Forward pass. ``asked`` [G, Q, d + h F]: queries, then what each head asks of a relation; ``key_value``
    [G, C, 2 d]; fills ``out`` [G, Q, d + h F] with the means of values and of relations, 0 where nobody is seen, and
    ``weights`` [G, Q, h, P] with those of the mean."""
    P, F = rows.shape[2], relation.shape[3]
    d = key_value.shape[2] // 2
    k = d // heads
    seen = np.empty(P, np.int64)
    logits = np.empty(P, np.float32)
    for g in range(rows.shape[0]):
        table = key_value[g]
        for q in range(rows.shape[1]):
            n = 0
            for p in range(P):
                if mask[g, q, p]:
                    seen[n] = p
                    n += 1
            result = out[g, q]
            result[:] = np.float32(0.0)
            weights[g, q] = np.float32(0.0)
            if n == 0:
                continue
            for head in range(heads):
                query = asked[g, q, head * k : (head + 1) * k]
                query_relation = asked[g, q, d + head * F : d + (head + 1) * F]
                top = np.float32(-np.inf)
                for i in range(n):
                    key = table[rows[g, q, seen[i]], head * k : (head + 1) * k]
                    pair = relation[g, q, seen[i]]
                    logit = np.float32(0.0)
                    for j in range(k):
                        logit += query[j] * key[j]
                    for f in range(F):
                        logit += query_relation[f] * pair[f]
                    logits[i] = logit
                    top = max(top, logit)
                total = np.float32(0.0)
                for i in range(n):
                    logits[i] = _exp(logits[i] - top)
                    total += logits[i]
                share = np.float32(1.0) / total
                of_value = result[head * k : (head + 1) * k]
                of_relation = result[d + head * F : d + (head + 1) * F]
                for i in range(n):
                    weight = logits[i] * share
                    weights[g, q, head, seen[i]] = weight
                    value = table[rows[g, q, seen[i]], d + head * k : d + (head + 1) * k]
                    pair = relation[g, q, seen[i]]
                    for j in range(k):
                        of_value[j] += weight * value[j]
                    for f in range(F):
                        of_relation[f] += weight * pair[f]


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_REORDERED)
def attend_backward(gradient, asked, key_value, rows, relation, weights, heads, of_asked, of_key_value):
    """Backward pass: adds to the gradients ``of_asked`` [G, Q, d + h F] and ``of_key_value`` [G, C, 2 d], which begin
    with 0. With w the weights and D_p = dL/dout . value_p (+ relation):  dL/dlogit_p = w_p (D_p - sum_i w_i D_i)."""
    P, F = rows.shape[2], relation.shape[3]
    d = key_value.shape[2] // 2
    k = d // heads
    change = np.empty(P, np.float32)
    for g in range(rows.shape[0]):
        table, of_table = key_value[g], of_key_value[g]
        for q in range(rows.shape[1]):
            for head in range(heads):
                query = asked[g, q, head * k : (head + 1) * k]
                for_value = gradient[g, q, head * k : (head + 1) * k]
                for_relation = gradient[g, q, d + head * F : d + (head + 1) * F]
                of_query = of_asked[g, q, head * k : (head + 1) * k]
                of_query_relation = of_asked[g, q, d + head * F : d + (head + 1) * F]
                mean = np.float32(0.0)
                for p in range(P):
                    weight = weights[g, q, head, p]
                    change[p] = np.float32(0.0)
                    if weight > 0:
                        value = table[rows[g, q, p], d + head * k : d + (head + 1) * k]
                        pair = relation[g, q, p]
                        dot = np.float32(0.0)
                        for j in range(k):
                            dot += for_value[j] * value[j]
                        for f in range(F):
                            dot += for_relation[f] * pair[f]
                        change[p] = dot
                        mean += weight * dot
                for p in range(P):
                    weight = weights[g, q, head, p]
                    if weight > 0:
                        slope = weight * (change[p] - mean)
                        row = rows[g, q, p]
                        key = table[row, head * k : (head + 1) * k]
                        of_key = of_table[row, head * k : (head + 1) * k]
                        of_value = of_table[row, d + head * k : d + (head + 1) * k]
                        pair = relation[g, q, p]
                        for j in range(k):
                            of_query[j] += slope * key[j]
                            of_key[j] += slope * query[j]
                            of_value[j] += weight * for_value[j]
                        for f in range(F):
                            of_query_relation[f] += slope * pair[f]


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_REORDERED)
def choose(logits, uniform, tokens, log_probability):
    """Fills tokens [D] with the inverse of the distributions softmax(logits [D, V]) at uniform [D], and their ln p. A
    token of logit -inf is never taken; the last one with a probability ends where the sum ends, however it was
    rounded. Where a logit is NaN or +inf, or all are -inf, the token is -1."""
    V = logits.shape[1]
    mass = np.empty(V, np.float32)
    for i in range(logits.shape[0]):
        row = logits[i]
        top = row[0]
        for v in range(V):
            top = max(top, row[v])
        for v in range(V):
            mass[v] = _exp(row[v] - top) if row[v] > -np.inf else np.float32(0.0)
        total = 0.0
        for v in range(V):
            total += np.float64(mass[v])
            if not row[v] < np.inf:
                total = np.nan
        if not total > 0.0:
            tokens[i], log_probability[i] = -1, np.nan
            continue
        wanted, reached, token = uniform[i] * total, 0.0, 0
        for v in range(V):
            if mass[v] > 0:
                token = v
                reached += np.float64(mass[v])
                if reached > wanted:
                    break
        tokens[i] = token
        log_probability[i] = row[token] - top - np.float32(math.log(total))
