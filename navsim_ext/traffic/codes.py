"""The numbers that a TrafficScene speaks in: kinds of road users, roles, map pieces, lane edges, states of lights.

Light states and the ``subtype`` of map pieces are those of the Waymo Open Motion Dataset (WOMD), which tell the most
of all sources; every reader translates into them.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np


class AgentKind(IntEnum):
    """What a road user is."""

    VEHICLE = 0
    PEDESTRIAN = 1
    CYCLIST = 2
    OTHER = 3  # cones, barriers, animals, whatever the source does not name


class Role(IntFlag):
    """Bits of ``TrafficScene.role``; 0 is a road user without a special part."""

    EGO = 1
    PREDICT = 2  # the source asks for a prediction of it
    INTEREST = 4  # the source marks it as interacting
    STATIC = 8  # never moves in the recording (or is an object that cannot)


class PieceKind(IntEnum):
    """What a piece of the map is."""

    LANE = 0  # centre line, in driving direction
    BIKE_LANE = 1
    ROAD_EDGE = 2  # drivable side on the left
    LINE_BROKEN = 3
    LINE_SOLID = 4
    LINE_DOUBLE = 5
    CROSSWALK = 6  # polygon
    SPEED_BUMP = 7  # polygon
    DRIVEWAY = 8  # polygon
    STOP_SIGN = 9  # one point
    DRIVABLE_AREA = 10  # polygon; off-road is outside the union of them
    STOP_LINE = 11
    UNKNOWN = 255


LANES = (PieceKind.LANE, PieceKind.BIKE_LANE)
POLYGONS = (PieceKind.CROSSWALK, PieceKind.SPEED_BUMP, PieceKind.DRIVEWAY, PieceKind.DRIVABLE_AREA)
LINES = (PieceKind.LINE_BROKEN, PieceKind.LINE_SOLID, PieceKind.LINE_DOUBLE)


class LaneType(IntEnum):
    """``subtype`` of a lane."""

    UNDEFINED = 0
    FREEWAY = 1
    SURFACE_STREET = 2
    BIKE = 3


class EdgeType(IntEnum):
    """``subtype`` of a road edge."""

    UNKNOWN = 0
    BOUNDARY = 1
    MEDIAN = 2


class LineType(IntEnum):
    """``subtype`` of a road line."""

    UNKNOWN = 0
    BROKEN_WHITE = 1
    SOLID_WHITE = 2
    DOUBLE_SOLID_WHITE = 3
    BROKEN_YELLOW = 4
    DOUBLE_BROKEN_YELLOW = 5
    SOLID_YELLOW = 6
    DOUBLE_SOLID_YELLOW = 7
    PASSING_DOUBLE_YELLOW = 8


class EdgeKind(IntEnum):
    """What the row (i, j) of the lane graph says of piece j, seen from piece i."""

    PREDECESSOR = 0  # j leads into i
    SUCCESSOR = 1  # i leads into j
    LEFT = 2  # j is the neighbour on the left of i
    RIGHT = 3
    STOPS = 4  # the stop sign or stop line i holds traffic of lane j


class LightState(IntEnum):
    """State of the light of one lane at one step."""

    UNKNOWN = 0
    ARROW_STOP = 1
    ARROW_CAUTION = 2
    ARROW_GO = 3
    STOP = 4
    CAUTION = 5
    GO = 6
    FLASHING_STOP = 7
    FLASHING_CAUTION = 8
    NOT_REPORTED = 255  # the source says nothing of this lane at this step


RED = (LightState.ARROW_STOP, LightState.STOP)  # states that forbid crossing the stop point


_CODES = {"kind": AgentKind, "piece_kind": PieceKind, "edge_kind": EdgeKind, "light_state": LightState}
CODES = {name: np.array([int(code) for code in codes], np.uint8) for name, codes in _CODES.items()}
LANE_KINDS = np.array([int(kind) for kind in LANES], np.uint8)
