"""Which of several areas a search tree calls the nearest, ties included.

NAVSIM takes the leader of a vehicle from shapely's ``STRtree.nearest``. Areas that overlap all have the distance 0, so
the order in which GEOS visits its tree decides. The tree (GEOS ``TemplateSTRtree``, capacity 10): nodes are sorted by
the middle of their bounds in x, cut into slices, each sorted in y and packed into parents, level by level. The search
takes pairs from a binary heap by distance, true distances for leaves and those of the bounds for parents, and ends with
the first leaf that nothing undercuts. Equal distances come out in the order that the C++ standard library's heap gives.
"""

from __future__ import annotations

import math

import numpy as np

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.reactive.footprints import bounds_gap

CAPACITY = 10


@kernel
def tree_nearest(bounds, distances, query) -> int:
    """Index of the item that the tree returns. ``bounds`` [N,4], exact ``distances`` [N], ``query`` [4] bounds."""
    count = len(distances)
    box, item, first, last = np.empty((2 * count + 8, 4)), *_int_arrays(2 * count + 8)
    for i in range(count):
        box[i], item[i], first[i], last[i] = bounds[i], i, -1, -1
    size, begin, number = count, 0, count
    while number > 1:
        slices = int(math.ceil(math.sqrt(math.ceil(number / CAPACITY))))
        per_slice = int(math.ceil(number / slices))
        _sort(box, item, first, last, begin, begin + number, 0)
        start = begin
        for _ in range(slices):
            end = min(start + per_slice, begin + number)
            _sort(box, item, first, last, start, end, 1)
            for child in range(start, end, CAPACITY):
                stop = min(child + CAPACITY, end)
                item[size], first[size], last[size] = -1, child, stop
                box[size] = box[child]
                for i in range(child + 1, stop):
                    box[size, 0], box[size, 1] = min(box[size, 0], box[i, 0]), min(box[size, 1], box[i, 1])
                    box[size, 2], box[size, 3] = max(box[size, 2], box[i, 2]), max(box[size, 3], box[i, 3])
                size += 1
            start = end
        begin += number
        number = size - begin
    heap, keys = np.empty(size + 1, dtype=np.int64), np.empty(size + 1)
    length = _push(heap, keys, 0, size - 1, _key(box, item, distances, query, size - 1))
    bound, best = math.inf, -1
    while length and bound > 0.0:
        node, key = heap[0], keys[0]
        length = _pop(heap, keys, length)
        if best >= 0 and key >= bound:
            break
        if item[node] >= 0:
            bound, best = key, item[node]
            continue
        for child in range(first[node], last[node]):
            child_key = _key(box, item, distances, query, child)
            if bound == math.inf or child_key < bound:
                length = _push(heap, keys, length, child, child_key)
    return best


@kernel
def _int_arrays(count: int):
    return np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)


@kernel
def _key(box, item, distances, query, node: int) -> float:
    return distances[item[node]] if item[node] >= 0 else bounds_gap(box[node], query)


@kernel
def _sort(box, item, first, last, begin: int, end: int, axis: int) -> None:
    """Sorts nodes by the middle of their bounds along an axis (0 x, 1 y); equal ones keep their order."""
    for i in range(begin + 1, end):
        held, a, b, c = box[i].copy(), item[i], first[i], last[i]
        middle = held[axis] + held[axis + 2]
        k = i
        while k > begin and middle < box[k - 1, axis] + box[k - 1, axis + 2]:
            box[k], item[k], first[k], last[k] = box[k - 1], item[k - 1], first[k - 1], last[k - 1]
            k -= 1
        box[k], item[k], first[k], last[k] = held, a, b, c


@kernel
def _push(heap, keys, length: int, node: int, key: float) -> int:
    """``std::push_heap``: sifts up past parents that are strictly farther."""
    return _sift_up(heap, keys, length, 0, node, key) + length + 1


@kernel
def _sift_up(heap, keys, hole: int, top: int, node: int, key: float) -> int:
    while hole > top and keys[(hole - 1) // 2] > key:
        parent = (hole - 1) // 2
        heap[hole], keys[hole] = heap[parent], keys[parent]
        hole = parent
    heap[hole], keys[hole] = node, key
    return 0


@kernel
def _pop(heap, keys, length: int) -> int:
    """``std::pop_heap`` as libstdc++ has it: the hole sinks to the bottom, then the last element rises from there."""
    length -= 1
    node, key = heap[length], keys[length]
    hole, child = 0, 0
    while child < (length - 1) // 2:
        child = 2 * (child + 1)
        if keys[child] > keys[child - 1]:
            child -= 1
        heap[hole], keys[hole] = heap[child], keys[child]
        hole = child
    if length % 2 == 0 and child == (length - 2) // 2:
        child = 2 * (child + 1)
        heap[hole], keys[hole] = heap[child - 1], keys[child - 1]
        hole = child - 1
    if length:
        _sift_up(heap, keys, hole, 0, node, key)
    return length
