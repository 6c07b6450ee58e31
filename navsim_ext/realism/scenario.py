"""From a TrafficScene to the scenario that the sim-agents rules see: world coordinates, chosen objects, edges, lanes,
lights.

Three rules depend on the absolute origin (states of objects that are not valid, the last segment of a short lane,
signals that are not reported), so everything is put back into the source's world frame: float32(float64(local) +
origin). Where that frame is a map projection (UTM: millions of metres), float32 would round places to half a metre, and
speeds to 5 m/s: such scenes are put near the origin instead (:func:`world_origin`), which the original cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely

from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.features import Scenario
from navsim_ext.realism.interaction import signed_distance
from navsim_ext.realism.red_light import LaneSegments, RedLights
from navsim_ext.realism.road_edge import EdgeSegments, road_edge_distances
from navsim_ext.realism.rules import HISTORY_STEPS, PRESENT, STEP_SECONDS, STEPS
from navsim_ext.traffic.codes import LANES, LaneType, LightState, PieceKind, Role
from navsim_ext.traffic.road_edges import CLOSED_GAP_M
from navsim_ext.traffic.scene import TrafficScene

FARTHEST_M = 65_536.0
"""A world frame whose origin is farther from the scene than this is a map projection; WOMD's reach some 20 km."""
NEAR_ORIGIN_M = np.array([4096.0, 4096.0, 0.0])
"""Where scenes of map projections are put: as far from the world's origin as WOMD's, so that the three rules that
depend on it do not act; float32 places there have steps of half a millimetre."""


def world_origin(scene: TrafficScene) -> np.ndarray:
    """[3] float64 m: the world position of the scene's local (0, 0, 0) in the frame that the rules are applied in."""
    return NEAR_ORIGIN_M if np.abs(scene.origin).max() > FARTHEST_M else scene.origin


def scenario_of(scene: TrafficScene) -> Scenario:
    """The scenario of a recorded scene.

    Simulated objects are the road users valid at the present step; scored ones are the ego and those that the
    source asks to predict. A map without road edges, but with drivable polygons, gets the outline of their union as
    road edges. Raises RealismError, naming the scene, where the rules cannot be applied.
    """
    if abs(scene.dt - STEP_SECONDS) > 1e-6 or scene.num_steps != STEPS or scene.now != PRESENT:
        raise RealismError(
            f"scene {scene.id}: the sim-agents rules need {STEPS} steps of {STEP_SECONDS} s with the present at step "
            f"{PRESENT}; this one has {scene.num_steps} steps of {scene.dt:g} s with the present at {scene.now}"
        )
    simulated = scene.valid[:, PRESENT]
    scored = (scene.role & (Role.EGO | Role.PREDICT)) > 0
    absent = scene.agent_id[scored & ~simulated]
    if len(absent):
        raise RealismError(f"scene {scene.id}: scored objects {absent.tolist()} are not valid at the present step")
    order = np.lexsort((scene.agent_id, ~scored))
    order = order[simulated[order]]
    height = np.zeros_like(scene.speed) if scene.z is None else scene.z
    origin = world_origin(scene)
    log = np.empty((*scene.valid.shape, 4), np.float32)
    log[..., :2] = _world(scene.pose[..., :2], origin[:2])
    log[..., 2] = _world(height, origin[2])
    log[..., 3] = scene.heading_as_recorded
    log[~scene.valid] = 0.0
    return Scenario(
        identifier=scene.id,
        ids=scene.agent_id[order],
        kind=scene.kind[order] + np.uint8(1),
        scored=int(scored.sum()),
        size=scene.size[order],
        log=log[order],
        log_valid=scene.valid[order],
        edges=_edges(scene),
        lanes=LaneSegments.from_polylines([_world(scene.piece(row), origin[:2]) for row in _lane_rows(scene)]),
        signals=_signals(scene),
        has_heights=scene.z is not None and scene.point_z is not None,
    )


def _world(local: np.ndarray, origin: np.ndarray) -> np.ndarray:
    return (local.astype(np.float64) + origin).astype(np.float32)


def _edges(scene: TrafficScene) -> EdgeSegments:
    heights = np.zeros(len(scene.points), np.float32) if scene.point_z is None else scene.point_z
    lines = []
    for row in scene.pieces(PieceKind.ROAD_EDGE):
        span = slice(scene.piece_start[row], scene.piece_start[row + 1])
        line = np.concatenate([scene.points[span], heights[span, None]], axis=1)
        if scene.piece_closed[row] and np.linalg.norm(line[0] - line[-1]) > CLOSED_GAP_M:
            line = np.concatenate([line, line[:1]])
        lines.append(line)
    if not lines:
        lines = _outlines(scene)
    offsets = np.cumsum([0, *(len(line) for line in lines)])
    points = np.concatenate(lines) if lines else np.empty((0, 3), np.float32)
    try:
        return EdgeSegments.from_polylines(_world(points, world_origin(scene)), offsets)
    except RealismError as error:
        raise RealismError(f"scene {scene.id}: {error}") from error


def _outlines(scene: TrafficScene) -> list[np.ndarray]:
    """Outline of the union of the drivable polygons, with the drivable side on the left of each ring."""
    polygons = [shapely.Polygon(scene.piece(row)) for row in scene.pieces(PieceKind.DRIVABLE_AREA)]
    union = shapely.union_all([polygon if polygon.is_valid else polygon.buffer(0) for polygon in polygons])
    rings = []
    for polygon in shapely.get_parts(union):
        whole = shapely.orient_polygons(polygon)
        rings += [np.asarray(ring.coords)[:, :2] for ring in (whole.exterior, *whole.interiors)]
    return [np.concatenate([ring, np.zeros((len(ring), 1))], axis=1).astype(np.float32) for ring in rings]


def _lane_rows(scene: TrafficScene) -> np.ndarray:
    """Rows of the surface-street lanes with at least two points, in file order."""
    rows = scene.pieces(*LANES)
    lengths = np.diff(scene.piece_start)[rows]
    return rows[(scene.piece_subtype[rows] == LaneType.SURFACE_STREET) & (lengths >= 2)]


def _signals(scene: TrafficScene) -> RedLights | None:
    if not scene.has_lights:
        return None
    place = {int(row): place for place, row in enumerate(_lane_rows(scene))}
    lanes = list(dict.fromkeys(int(piece) for piece in scene.light_piece if int(piece) in place))
    state = np.zeros((len(lanes), STEPS), np.uint8)
    stop = np.zeros((len(lanes), STEPS, 2), np.float32)
    for k, lane in enumerate(lanes):
        for light in np.flatnonzero(scene.light_piece == lane):  # of one lane reported twice the last report wins
            reported = scene.light_state[light] != LightState.NOT_REPORTED
            state[k, reported] = scene.light_state[light, reported]
            stop[k, reported] = _world(scene.light_stop[light], world_origin(scene)[:2])
    return RedLights(np.array([place[lane] for lane in lanes], np.int64), state, stop)


@dataclass(frozen=True)
class Listed:
    """What is wrong with a recording itself. ``contacts``: (id, other id, first step) of scored objects whose full
    boxes overlap another's in the log at the present step or later; ``offroad``: ids of scored objects that are off
    the road at the present step; ``clean`` [E] bool: scored objects that are in neither list."""

    contacts: tuple[tuple[int, int, int], ...]
    offroad: tuple[int, ...]
    clean: np.ndarray


def listed(scenario: Scenario) -> Listed:
    """Scored objects whose recording itself breaks the rules: no simulation can be right about them."""
    contacts = tuple(_log_contacts(scenario))
    scored = scenario.scored
    present = slice(None, HISTORY_STEPS)
    distance = road_edge_distances(
        scenario.log[None, :scored, present],
        scenario.log_valid[None, :scored, present],
        scenario.size[:scored],
        scenario.edges,
        scenario.has_heights,
        first=PRESENT,
    )[0, :, 0]
    off = distance > 0
    touched = {one for one, _, _ in contacts}
    clean = np.array([not off[i] and int(scenario.ids[i]) not in touched for i in range(scored)], bool)
    return Listed(contacts, tuple(scenario.ids[:scored][off].tolist()), clean)


def _log_contacts(scenario: Scenario) -> list[tuple[int, int, int]]:
    centres = scenario.log[..., :2].astype(np.float64)
    reach = np.hypot(scenario.size[:, 0], scenario.size[:, 1]) / 2
    corners = _full_corners(scenario)
    found, scratch = [], np.empty((8, 2), np.float32)
    for i in range(scenario.scored):
        apart = np.linalg.norm(centres - centres[i], axis=-1) - (reach + reach[i])[:, None]
        near = (apart < 0) & scenario.log_valid & scenario.log_valid[i]
        near[:, :PRESENT], near[i] = False, False
        for j in np.flatnonzero(near.any(axis=1)):
            for step in np.flatnonzero(near[j]):
                if signed_distance(corners[i, step], corners[j, step], scratch) < 0:
                    found.append((int(scenario.ids[i]), int(scenario.ids[j]), int(step)))
                    break
    return found


def _full_corners(scenario: Scenario) -> np.ndarray:
    """Corners [S, T, 4, 2] float32 of the full boxes, counter-clockwise from the front left."""
    half = scenario.size[:, None, None, :2] / 2 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float32)
    heading = scenario.log[..., 3, None]
    cosine, sine = np.cos(heading), np.sin(heading)
    offset = np.stack([half[..., 0] * cosine - half[..., 1] * sine, half[..., 0] * sine + half[..., 1] * cosine], -1)
    return scenario.log[:, :, None, :2] + offset
