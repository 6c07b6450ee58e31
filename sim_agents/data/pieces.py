"""The map as tokens: lanes, edges and lines cut into short pieces, and the lights that hold lanes.

Legend: M pieces of a scene, 11 points of a piece, L lights, U recorded steps. Pieces are in the frame that is asked
for. Source of the cutting rule: SMART (arXiv 2405.15677) and its code: points every 0.5 m, a cut where the line
bends sharply or has a gap, pieces of 5 m, the place of a piece being its first point and the direction there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from navsim_ext.traffic.codes import LANES, LINES, PieceKind
from navsim_ext.traffic.scene import TrafficScene

SPACING_M = 0.5
PIECE_POINTS = 11
PIECE_M = SPACING_M * (PIECE_POINTS - 1)
BEND_RAD = np.pi / 4
"""Change of direction between two points of the source at which a line is cut."""
REPEATED_M = 1e-3
"""A point nearer than this to the one before repeats it."""
DRAWN = (*LANES, PieceKind.ROAD_EDGE, *LINES, PieceKind.CROSSWALK, PieceKind.STOP_LINE)
NUM_KINDS = len(DRAWN)


@dataclass(frozen=True)
class MapPieces:
    """``pose`` [M, 3] of the first points; ``shape`` [M, 11, 2] m in that pose's frame; ``kind`` [M] row of ``DRAWN``;
    ``source`` [M] row of the piece of the scene that it is cut from; ``on_route`` [M] bool."""

    pose: NDArray[np.float32]
    shape: NDArray[np.float32]
    kind: NDArray[np.int64]
    source: NDArray[np.int64]
    on_route: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.pose)

    def nearest(self, centres: NDArray[np.floating], most: int) -> MapPieces:
        """The ``most`` pieces nearest to any of the points ``centres`` [n, 2], in their own order."""
        if len(self) <= most or len(centres) == 0:
            return self.take(np.arange(min(most, len(self))))
        x, y = self.pose[:, 0].astype(np.float64), self.pose[:, 1].astype(np.float64)
        distance = np.full(len(self), np.inf)
        for centre in np.asarray(centres, np.float64):
            np.minimum(distance, (x - centre[0]) ** 2 + (y - centre[1]) ** 2, out=distance)
        return self.take(np.sort(np.argsort(distance, kind="stable")[:most]))

    def take(self, rows: NDArray[np.int64]) -> MapPieces:
        """The pieces of these rows."""
        return MapPieces(*(getattr(self, one.name)[rows] for one in fields(self)))


def map_pieces(scene: TrafficScene, frame: NDArray[np.floating]) -> MapPieces:
    """All pieces of a scene's map in the frame of the pose ``frame`` [3] (given in the scene's own frame)."""
    points, line = _lines(scene, scene.pieces(*DRAWN))
    segments = _segments(points, line)
    if len(segments.length) == 0:
        empty = np.empty(0, np.int64)
        return MapPieces(np.empty((0, 3), np.float32), np.empty((0, PIECE_POINTS, 2), np.float32), empty, empty,
                         np.empty(0, bool))  # fmt: skip
    pieces, source = _cut(segments)
    along = pieces[:, 1] - pieces[:, 0]
    heading = np.arctan2(along[:, 1], along[:, 0])
    shape = _turned(pieces - pieces[:, :1], -heading[:, None])
    place = _turned(pieces[:, 0] - frame[:2], -frame[2])
    local = np.column_stack([place, (heading - frame[2] + np.pi) % (2 * np.pi) - np.pi])
    number = np.full(256, -1)
    number[[int(kind) for kind in DRAWN]] = np.arange(NUM_KINDS)
    kind = number[scene.piece_kind[source]]
    route = np.zeros(len(source), bool) if scene.route is None else scene.route[source]
    return MapPieces(local.astype(np.float32), shape.astype(np.float32), kind, source, route)


def _turned(points: NDArray, angle: NDArray | float) -> NDArray:
    """Points [..., 2] turned by angles that broadcast against [...]."""
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=-1)


def _lines(scene: TrafficScene, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Points [n, 2] of the scene's pieces ``rows`` one after another, closed ones with their first point again, and the
    row that each belongs to. Points that repeat the one before are left out."""
    counts = (scene.piece_start[1:] - scene.piece_start[:-1])[rows].astype(np.int64)
    again = scene.piece_closed[rows] & (counts > 2)
    length = counts + again
    place = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)  # of a point in its line
    place[place == np.repeat(counts, length)] = 0  # the first one again
    points = scene.points[np.repeat(scene.piece_start[:-1][rows], length) + place].astype(np.float64)
    line = np.repeat(rows, length)
    moved = np.hypot(*np.diff(points, axis=0).T) > REPEATED_M
    kept = np.ones(len(points), bool)
    kept[1:] = moved | (line[1:] != line[:-1])
    return points[kept], line[kept]


@dataclass(frozen=True)
class _Segments:
    """Straight segments between two points: ``start`` [n, 2] and ``step`` [n, 2] m, ``length`` [n] m, ``line`` [n] row
    of the scene, ``first`` [n] whether a stretch begins with it: a new line, or a sharp bend."""

    start: NDArray[np.float64]
    step: NDArray[np.float64]
    length: NDArray[np.float64]
    line: NDArray[np.int64]
    first: NDArray[np.bool_]


def _segments(points: NDArray[np.float64], line: NDArray[np.int64]) -> _Segments:
    step = np.diff(points, axis=0)
    inside = line[1:] == line[:-1]
    step, start, line = step[inside], points[:-1][inside], line[:-1][inside]
    heading = np.arctan2(step[:, 1], step[:, 0])
    turn = np.abs((np.diff(heading) + np.pi) % (2 * np.pi) - np.pi)
    first = np.ones(len(line), bool)
    first[1:] = (line[1:] != line[:-1]) | (turn > BEND_RAD)
    return _Segments(start, step, np.hypot(step[:, 0], step[:, 1]), line, first)


def _cut(segments: _Segments) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pieces [m, 11, 2] and their rows of the scene: each stretch in pieces of equal length near 5 m; one that is
    shorter than 5 m is one shorter piece."""
    end = np.cumsum(segments.length)  # m along all stretches, one after another
    begin = end - segments.length
    head = np.flatnonzero(segments.first)
    last = np.append(head[1:], len(end)) - 1
    whole = end[last] - begin[head]
    count = np.maximum(1, np.round(whole / PIECE_M)).astype(np.int64)
    stretch = np.repeat(np.arange(len(head)), count)
    number = np.arange(len(stretch)) - np.repeat(np.cumsum(count) - count, count)  # of a piece in its stretch
    share = (number[:, None] + np.arange(PIECE_POINTS) / (PIECE_POINTS - 1.0)) / count[stretch, None]
    at = begin[head][stretch, None] + share * whole[stretch, None]  # [m, 11]
    row = np.searchsorted(begin, at, side="right") - 1
    row = np.clip(row, head[stretch, None], last[stretch, None])
    part = np.clip((at - begin[row]) / segments.length[row], 0.0, 1.0)
    return segments.start[row] + part[..., None] * segments.step[row], segments.line[head][stretch]
