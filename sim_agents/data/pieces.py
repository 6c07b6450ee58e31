"""The map as tokens: lanes, edges and lines cut into short pieces, and the lights that hold lanes.

Legend: M pieces of a scene, 11 points of a piece, L lights, U recorded steps. Pieces are in the frame that is asked
for. Source of the cutting rule: SMART (arXiv 2405.15677) and its code: points every 0.5 m, a cut where the line
bends sharply or has a gap, pieces of 5 m, the place of a piece being its first point and the direction there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.traffic.codes import LANES, LINES, PieceKind
from navsim_ext.traffic.scene import TrafficScene

SPACING_M = 0.5
PIECE_POINTS = 11
PIECE_M = SPACING_M * (PIECE_POINTS - 1)
BEND_RAD = np.pi / 4
"""Change of direction between two points of the source at which a line is cut."""
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
        if len(self) <= most:
            return self
        distance = np.full(len(self), np.inf)
        for centre in np.asarray(centres, np.float64):
            distance = np.minimum(distance, np.hypot(*(self.pose[:, :2] - centre).T))
        rows = np.sort(np.argsort(distance, kind="stable")[:most])
        return MapPieces(self.pose[rows], self.shape[rows], self.kind[rows], self.source[rows], self.on_route[rows])


def map_pieces(scene: TrafficScene, frame: NDArray[np.floating]) -> MapPieces:
    """All pieces of a scene's map in the frame of the pose ``frame`` [3] (given in the scene's own frame)."""
    poses, shapes, kinds, sources = [], [], [], []
    number = {int(kind): place for place, kind in enumerate(DRAWN)}
    for row in scene.pieces(*DRAWN):
        line = scene.piece(row).astype(np.float64)
        if scene.piece_closed[row] and len(line) > 2:
            line = np.concatenate([line, line[:1]])
        for stretch in _stretches(line):
            for piece in _cut(stretch):
                along = piece[1] - piece[0]
                heading = float(np.arctan2(along[1], along[0]))
                poses.append((*piece[0], heading))
                shapes.append(_turned(piece - piece[0], -heading))
                kinds.append(number[int(scene.piece_kind[row])])
                sources.append(row)
    if not poses:
        empty = np.empty(0, np.int64)
        return MapPieces(np.empty((0, 3), np.float32), np.empty((0, PIECE_POINTS, 2), np.float32), empty, empty,
                         np.empty(0, bool))  # fmt: skip
    place = np.array(poses)
    local = np.concatenate(
        [_turned(place[:, :2] - frame[:2], -frame[2]), (place[:, 2:] - frame[2] + np.pi) % (2 * np.pi) - np.pi], axis=1
    )
    source = np.array(sources)
    route = np.zeros(len(source), bool) if scene.route is None else scene.route[source]
    return MapPieces(local.astype(np.float32), np.array(shapes, np.float32), np.array(kinds), source, route)


def _turned(points: NDArray, angle: float) -> NDArray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.stack([cosine * points[:, 0] - sine * points[:, 1], sine * points[:, 0] + cosine * points[:, 1]], axis=-1)


def _stretches(line: NDArray) -> list[NDArray]:
    """The line cut where it turns sharply; points that repeat are dropped."""
    steps = np.diff(line, axis=0)
    line = line[np.concatenate([[True], np.hypot(*steps.T) > 1e-3])]
    if len(line) < 2:
        return []
    heading = np.arctan2(*np.diff(line, axis=0).T[::-1])
    turn = np.abs((np.diff(heading) + np.pi) % (2 * np.pi) - np.pi)
    return [part for part in _split(line, np.flatnonzero(turn > BEND_RAD) + 1) if len(part) >= 2]


def _split(line: NDArray, corners: NDArray[np.int64]) -> list[NDArray]:
    ends = [0, *corners.tolist(), len(line) - 1]
    return [line[low : high + 1] for low, high in itertools.pairwise(ends)]


def _cut(line: NDArray) -> NDArray:
    """Pieces [m, 11, 2] of a line, of equal length near 5 m; a line shorter than 5 m is one shorter piece."""
    steps = np.hypot(*np.diff(line, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    count = max(1, round(along[-1] / PIECE_M))
    s = np.linspace(0.0, along[-1], count * (PIECE_POINTS - 1) + 1)
    points = np.stack([np.interp(s, along, line[:, axis]) for axis in range(2)], axis=-1)
    first = np.arange(count)[:, None] * (PIECE_POINTS - 1)
    return points[first + np.arange(PIECE_POINTS)]
