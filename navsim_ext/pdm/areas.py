"""Where the ego stands at each step: in several lanes, off the road, off the route, in an intersection.

Source: NAVSIM ``pdm_scorer._calculate_ego_area`` and ``PDMDrivableMap.is_in_layer``. A point is "in" a polygon when it
lies strictly inside.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import (
    HALF_LENGTH,
    HALF_WIDTH,
    HEADING,
    NUM_STEPS,
    REAR_AXLE_TO_CENTER,
    X,
    Y,
    box_corners,
)
from navsim_ext.pdm.map_index import MapIndex, points_inside
from navsim_ext.pdm.polygon_table import CARPARK_AREA, INTERSECTION, LANE, LANE_CONNECTOR, ROADBLOCK

# bits of a step's area
MULTIPLE_LANES, NON_DRIVABLE, ONCOMING, CENTER_IN_INTERSECTION, REAR_AXLE_IN_INTERSECTION = 1, 2, 4, 8, 16

# bits of a polygon's role
IS_LANE, IS_DRIVABLE, IS_ON_ROUTE, IS_INTERSECTION = 1, 2, 4, 8

ROLE_OF_TYPE = np.zeros(max(LANE, INTERSECTION, LANE_CONNECTOR, CARPARK_AREA, ROADBLOCK) + 1, dtype=np.uint8)
ROLE_OF_TYPE[[LANE, LANE_CONNECTOR]] = IS_LANE
ROLE_OF_TYPE[[ROADBLOCK, CARPARK_AREA]] = IS_DRIVABLE
ROLE_OF_TYPE[INTERSECTION] = IS_DRIVABLE | IS_INTERSECTION

CORNERS, CENTER, REAR_AXLE = 15, 16, 32  # bits of the points that are looked up


class Surroundings(NamedTuple):
    """The fixed part of a scene: its map polygons and the centreline. P polygons in range, C vertices."""

    index: MapIndex
    polygons: NDArray[np.int32]  # [P] rows of the map
    roles: NDArray[np.uint8]  # [P] bits IS_LANE ...
    centerline: NDArray[np.float64]  # [C,2]


def make_surroundings(
    index: MapIndex,
    polygons: NDArray[np.integer],
    types: NDArray[np.integer],
    on_route: NDArray[np.bool_],
    centerline: NDArray[np.float64],
) -> Surroundings:
    """``polygons`` [P] rows of the indexed map, their types [P] and whether they are on the route [P], centreline."""
    roles = ROLE_OF_TYPE[types]
    lane = roles & IS_LANE != 0
    return Surroundings(
        index,
        np.array(polygons, dtype=np.int32),
        np.where(lane & on_route, roles | IS_ON_ROUTE, roles).astype(np.uint8),
        np.array(np.asarray(centerline)[:, :2], dtype=np.float64),
    )


@kernel
def place_boxes(states, corners, centers) -> None:
    """``states`` [41,11] -> box corners [41,4,2] and centres [41,2]."""
    for t in range(NUM_STEPS):
        heading = states[t, HEADING]
        centers[t, 0] = states[t, X] + REAR_AXLE_TO_CENTER * math.cos(heading)
        centers[t, 1] = states[t, Y] + REAR_AXLE_TO_CENTER * math.sin(heading)
        box_corners(centers[t, 0], centers[t, 1], heading, HALF_LENGTH, HALF_WIDTH, corners[t])


@kernel
def classify_areas(surroundings, states, corners, centers, areas) -> None:
    """Writes the bits of each step into ``areas`` [41].

    MULTIPLE_LANES: more than one lane or connector holds a corner, and none holds all four. NON_DRIVABLE: some corner
    is in no roadblock, intersection or car park. ONCOMING: the centre is in no lane or connector of the route.
    """
    index = surroundings.index
    boxes = np.empty((NUM_STEPS, 4))  # bounds of the ego box at each step
    for t in range(NUM_STEPS):
        boxes[t, 0] = min(min(corners[t, 0, 0], corners[t, 1, 0]), min(corners[t, 2, 0], corners[t, 3, 0]))
        boxes[t, 1] = min(min(corners[t, 0, 1], corners[t, 1, 1]), min(corners[t, 2, 1], corners[t, 3, 1]))
        boxes[t, 2] = max(max(corners[t, 0, 0], corners[t, 1, 0]), max(corners[t, 2, 0], corners[t, 3, 0]))
        boxes[t, 3] = max(max(corners[t, 0, 1], corners[t, 1, 1]), max(corners[t, 2, 1], corners[t, 3, 1]))
    low_x, low_y = boxes[:, 0].min(), boxes[:, 1].min()
    high_x, high_y = boxes[:, 2].max(), boxes[:, 3].max()
    near = np.empty(len(surroundings.polygons), dtype=np.int64)
    bounds = np.empty((len(surroundings.polygons), 4))
    found = 0
    for p in range(len(surroundings.polygons)):
        q = surroundings.polygons[p]
        if (
            index.bounds[q, 0] <= high_x
            and index.bounds[q, 1] <= high_y
            and index.bounds[q, 2] >= low_x
            and index.bounds[q, 3] >= low_y
        ):
            near[found] = p
            bounds[found] = index.bounds[q]
            found += 1

    points = np.empty((6, 2))  # corners, centre, rear axle
    for t in range(NUM_STEPS):
        points[:4] = corners[t]
        points[4] = centers[t]
        points[5, 0], points[5, 1] = states[t, X], states[t, Y]
        lanes_with_corner, all_in_one, on_route, drivable, crossing = 0, False, False, 0, 0
        for n in range(found):
            if (
                bounds[n, 0] > boxes[t, 2]
                or bounds[n, 1] > boxes[t, 3]
                or bounds[n, 2] < boxes[t, 0]
                or bounds[n, 3] < boxes[t, 1]
            ):
                continue
            role = surroundings.roles[near[n]]
            if role & IS_LANE:
                wanted = CORNERS | CENTER if role & IS_ON_ROUTE and not on_route else CORNERS
            elif role & IS_INTERSECTION:
                wanted = CORNERS | CENTER | REAR_AXLE
            elif role & IS_DRIVABLE and drivable != CORNERS:
                wanted = CORNERS & ~drivable
            else:
                continue
            inside = points_inside(index, surroundings.polygons[near[n]], points, wanted)
            if role & IS_LANE:
                lanes_with_corner += inside & CORNERS > 0
                all_in_one |= inside & CORNERS == CORNERS
                on_route |= inside & CENTER > 0
            else:
                drivable |= inside & CORNERS
                crossing |= inside
        areas[t] = (
            MULTIPLE_LANES * (lanes_with_corner > 1 and not all_in_one)
            + NON_DRIVABLE * (drivable != CORNERS)
            + ONCOMING * (not on_route)
            + CENTER_IN_INTERSECTION * (crossing & CENTER > 0)
            + REAR_AXLE_IN_INTERSECTION * (crossing & REAR_AXLE > 0)
        )
