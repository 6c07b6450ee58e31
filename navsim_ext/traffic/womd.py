"""Waymo Open Motion Dataset: ``Scenario`` messages in TFRecord files -> TrafficScene, without TensorFlow.

Local frame: world minus the ego's position at the present step, rounded to whole metres (so that nothing is lost when
a scene is written again). Sizes are those at the present step, or at the observed step nearest to it. Tracks that are
never observed are left out. Of everything that is dropped or odd a count stands in ``TrafficScene.notes``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import AgentKind, EdgeKind, LaneType, LightState, PieceKind, Role
from navsim_ext.traffic.messages import parse, unknown_fields
from navsim_ext.traffic.motion import nearest_observed, still
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.source import FileSource, Reading, reading
from navsim_ext.traffic.tfrecord import CorruptRecord, read_records
from navsim_ext.traffic.womd_messages import POINTS, READ, STATES

LICENCE = "Waymo Open Motion Dataset: non-commercial use only, not to be passed on"
KINDS = {0: AgentKind.OTHER, 1: AgentKind.VEHICLE, 2: AgentKind.PEDESTRIAN, 3: AgentKind.CYCLIST, 4: AgentKind.OTHER}
LINE_KINDS = {
    0: PieceKind.UNKNOWN, 1: PieceKind.LINE_BROKEN, 2: PieceKind.LINE_SOLID, 3: PieceKind.LINE_DOUBLE,
    4: PieceKind.LINE_BROKEN, 5: PieceKind.LINE_DOUBLE, 6: PieceKind.LINE_SOLID, 7: PieceKind.LINE_DOUBLE,
    8: PieceKind.LINE_DOUBLE,
}  # fmt: skip
AREAS = {"crosswalk": PieceKind.CROSSWALK, "speed_bump": PieceKind.SPEED_BUMP, "driveway": PieceKind.DRIVEWAY}
LANE_TYPES, EDGE_TYPES, LIGHT_STATES = range(4), range(3), range(9)
MPS_PER_MPH = 0.44704
TIME_JITTER = 0.2  # share of the time step by which single steps may differ from it
RESIZED_M = 0.1  # sizes that vary by more than this are counted
STOP_MOVED_M = 0.01
X, Y, Z, LENGTH, WIDTH, HEIGHT, HEADING, _VX, _VY, VALID = range(10)  # columns of STATES


class WomdRecords(FileSource):
    """All TFRecord files of ``Scenario`` messages below ``root``; the unit of work is a file."""

    described = "TFRecord files of scenarios"

    def holds(self, path: Any) -> bool:
        return "tfrecord" in path.name and not path.name.startswith(".")

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.suffixes = ("*tfrecord*",)

    def read(self, unit: str) -> Iterator[Reading]:
        path = self.path_of(unit)
        for offset, data in read_records(path):
            name = f"{path}, record at byte {offset}"
            if isinstance(data, CorruptRecord):
                yield name, data
            else:
                yield reading(name, lambda data=data, name=name: scene_of(data, name))


def scene_of(data: bytes, where: str) -> TrafficScene:
    """The scene of a serialized ``Scenario``; raises DataError naming ``where`` and what does not fit."""
    message = parse(READ["Scenario"], data, where)
    where = f"{where}, scenario {message.scenario_id!r}"
    notes: Counter[str] = Counter()
    for number in unknown_fields(message):
        notes[f"unknown field {number} of Scenario"] += 1
    times = np.array(message.timestamps_seconds)
    dt = _time_step(times, where)
    states, kinds, ids = _tracks(message, len(times), where, notes)
    now, ego = message.current_time_index, message.sdc_track_index
    if not 0 <= now < len(times):
        raise DataError(f"{where}: current_time_index is {now}; a step in [0, {len(times) - 1}] was expected")
    if not (message.HasField("sdc_track_index") and 0 <= ego < len(states)):
        found = ego if message.HasField("sdc_track_index") else "absent"
        raise DataError(f"{where}: sdc_track_index is {found}; one of {len(states)} tracks was expected")
    valid = states[..., VALID] > 0.0
    _require_finite(states, valid, ids, where)
    if not valid[ego, now]:
        raise DataError(f"{where}: the ego (track {ego}) is not valid at the present step {now}")
    role = _roles(message, ids, ego, where, notes)
    seen = valid.any(axis=1)
    notes["tracks never observed"] += int((~seen).sum())
    states, valid, kinds, ids, role = states[seen], valid[seen], kinds[seen], ids[seen], role[seen]
    origin = np.rint(states[np.flatnonzero(role & Role.EGO)[0], now, X : Z + 1])
    xyz = np.where(valid[..., None], states[..., X : Z + 1] - origin, 0.0)
    role |= np.where(still(xyz[..., :2], valid), np.uint8(Role.STATIC), np.uint8(0))
    size = np.take_along_axis(states, nearest_observed(valid, now)[:, None, None], axis=1)[:, 0, LENGTH : HEIGHT + 1]
    varies = np.abs(states[..., LENGTH : HEIGHT + 1] - size[:, None]).max(axis=-1)
    notes["road users whose size varies"] += int(((varies * valid).max(axis=1) > RESIZED_M).sum())
    pieces = _map(message, origin, where, notes)
    return TrafficScene.make(
        id=message.scenario_id,
        source="womd",
        licence=LICENCE,
        dt=dt,
        now=now,
        origin=origin,
        xy=xyz[..., :2],
        z=xyz[..., 2],
        heading=states[..., HEADING],
        valid=valid,
        size=size.astype(np.float32),
        kind=kinds,
        role=role,
        agent_id=ids,
        **pieces,
        **_lights(message, pieces, origin, len(times), where, notes),
        notes={name: count for name, count in sorted(notes.items()) if count},
    )


def _time_step(times: NDArray[np.float64], where: str) -> float:
    if len(times) < 2:
        raise DataError(f"{where}: {len(times)} time stamps; at least 2 were expected")
    steps = np.diff(times)
    dt = round(float(np.median(steps)), 3)
    if not (np.isfinite(steps).all() and dt > 0.0 and (np.abs(steps - dt) <= TIME_JITTER * dt).all()):
        raise DataError(
            f"{where}: time stamps are not evenly spaced: steps of {steps.min():.3f} to {steps.max():.3f} s"
        )
    return dt


def _tracks(
    message: Message, steps: int, where: str, notes: Counter[str]
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.int64]]:
    """(states [N,T,10], kinds [N], ids [N])"""
    kinds, ids, flat = [], [], []
    for number, track in enumerate(message.tracks):
        if len(track.states) != steps:
            raise DataError(f"{where}: track {track.id} has {len(track.states)} states, there are {steps} time stamps")
        if track.object_type not in KINDS:
            raise DataError(f"{where}: track {track.id} has object_type {track.object_type}; one of {sorted(KINDS)}")
        if track.object_type == 0:
            notes["tracks of no type"] += 1
        kinds.append(KINDS[track.object_type])
        ids.append(track.id)
        flat += track.states
        if number == 0:
            for field in unknown_fields(track):
                notes[f"unknown field {field} of Track"] += 1
    values, unknown = STATES.decode(flat, f"{where}, states")
    notes["unknown fields of states"] += unknown
    return values.reshape(len(ids), steps, 10), np.array(kinds, np.uint8), np.array(ids, np.int64)


def _require_finite(states: NDArray[np.float64], valid: NDArray[np.bool_], ids: NDArray[np.int64], where: str) -> None:
    bad = valid & ~np.isfinite(states).all(axis=-1)
    if bad.any():
        track, step = np.argwhere(bad)[0]
        raise DataError(f"{where}: track {ids[track]} at step {step} is {states[track, step, : HEADING + 1].tolist()}; "
                        "finite values were expected")  # fmt: skip
    states[~valid] = 0.0


def _roles(message: Message, ids: NDArray, ego: int, where: str, notes: Counter[str]) -> NDArray[np.uint8]:
    role = np.zeros(len(ids), np.uint8)
    role[ego] |= np.uint8(Role.EGO)
    for wanted in message.tracks_to_predict:
        if not 0 <= wanted.track_index < len(ids):
            raise DataError(f"{where}: tracks_to_predict names track {wanted.track_index} of {len(ids)}")
        role[wanted.track_index] |= np.uint8(Role.PREDICT)
    for one in message.objects_of_interest:
        rows = np.flatnonzero(ids == one)
        role[rows] |= np.uint8(Role.INTEREST)
        notes["objects of interest without a track"] += int(not len(rows))
    return role


def _map(message: Message, origin: NDArray, where: str, notes: Counter[str]) -> dict[str, Any]:
    """Map fields of the scene."""
    ids, kinds, subtypes, closed, limits, counts, lanes, stops = [], [], [], [], [], [], [], []
    flat: list[bytes] = []
    for feature in message.map_features:
        which = next(
            (name for name in ("lane", "road_line", "road_edge", "stop_sign", *AREAS) if feature.HasField(name)), None
        )
        if which is None:
            notes["map features of no known kind"] += 1
            continue
        one = getattr(feature, which)
        points = (
            [one.position.SerializeToString()]
            if which == "stop_sign"
            else one.polygon
            if which in AREAS
            else one.polyline
        )
        if not len(points):
            notes["map features without points"] += 1
            continue
        subtype, limit = 0, np.nan
        if which == "lane":
            subtype = _known(one.type, LANE_TYPES, f"{where}: lane {feature.id} has type")
            kind = PieceKind.BIKE_LANE if subtype == LaneType.BIKE else PieceKind.LANE
            limit = one.speed_limit_mph * MPS_PER_MPH if one.speed_limit_mph > 0.0 else np.nan
            lanes.append((len(ids), one))
        elif which == "road_line":
            subtype = _known(one.type, LINE_KINDS, f"{where}: road line {feature.id} has type")
            kind = LINE_KINDS[subtype]
        elif which == "road_edge":
            subtype, kind = (
                _known(one.type, EDGE_TYPES, f"{where}: road edge {feature.id} has type"),
                PieceKind.ROAD_EDGE,
            )
        elif which == "stop_sign":
            kind = PieceKind.STOP_SIGN
            stops.append((len(ids), one))
        else:
            kind = AREAS[which]
        ids.append(feature.id)
        kinds.append(kind)
        subtypes.append(subtype)
        closed.append(which in AREAS)
        limits.append(limit)
        counts.append(len(points))
        flat += points
    if not ids:
        raise DataError(f"{where}: no map feature with points; a scene without map cannot be used")
    xyz, unknown = POINTS.decode(flat, f"{where}, map points")
    notes["unknown fields of map points"] += unknown
    xyz -= origin
    row = {feature: number for number, feature in enumerate(ids)}
    edges = _graph(lanes, stops, row, notes)
    return {
        "points": np.ascontiguousarray(xyz[:, :2], np.float32),
        "point_z": np.ascontiguousarray(xyz[:, 2], np.float32),
        "piece_start": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        "piece_kind": np.array(kinds, np.uint8),
        "piece_subtype": np.array(subtypes, np.uint8),
        "piece_closed": np.array(closed, np.bool_),
        "piece_id": np.array(ids, np.int64),
        "speed_limit": np.array(limits, np.float32),
        "edges": np.ascontiguousarray(edges[:, :2]),
        "edge_kind": edges[:, 2].astype(np.uint8),
    }


def _known(value: int, known: Any, text: str) -> int:
    if value not in known:
        raise DataError(f"{text} {value}; one of {sorted(known)} was expected")
    return value


def _graph(lanes: list, stops: list, row: dict[int, int], notes: Counter[str]) -> NDArray[np.int32]:
    """[E,3] (i, j, EdgeKind) in the order of the lanes; edges to lanes that are not in the map are counted."""
    edges: dict[tuple[int, int, int], None] = {}
    for number, lane in lanes:
        groups = (
            (EdgeKind.PREDECESSOR, lane.entry_lanes),
            (EdgeKind.SUCCESSOR, lane.exit_lanes),
            (EdgeKind.LEFT, [neighbor.feature_id for neighbor in lane.left_neighbors]),
            (EdgeKind.RIGHT, [neighbor.feature_id for neighbor in lane.right_neighbors]),
        )
        for kind, others in groups:
            for other in others:
                if other in row:
                    edges[number, row[other], int(kind)] = None
                else:
                    notes["lane edges that leave the map"] += 1
    lane_rows = {number for number, _ in lanes}
    for number, stop in stops:
        for other in stop.lane:
            if row.get(other) in lane_rows:
                edges[number, row[other], int(EdgeKind.STOPS)] = None
            else:
                notes["stop signs of lanes outside the map"] += 1
    return np.array(list(edges), np.int32).reshape(-1, 3)


def _lights(
    message: Message, pieces: dict[str, Any], origin: NDArray, steps: int, where: str, notes: Counter[str]
) -> dict[str, Any]:
    """Light fields of the scene: one row per lane that is reported at any step, in order of first report."""
    states = message.dynamic_map_states
    if len(states) not in (0, steps):
        raise DataError(f"{where}: {len(states)} dynamic map states for {steps} time stamps")
    rows: dict[int, NDArray[np.uint8]] = {}
    stop: dict[int, tuple[float, float]] = {}
    for step, state in enumerate(states):
        told = set()
        for one in state.lane_states:
            lane, shown, at = one.lane, one.state, one.stop_point
            x, y = at.x, at.y
            if shown not in LIGHT_STATES:
                _known(shown, LIGHT_STATES, f"{where}: the light of lane {lane} at step {step} has state")
            if lane not in rows:
                rows[lane] = np.full(steps, LightState.NOT_REPORTED, np.uint8)
                stop[lane] = (x, y)
            if lane in told:
                notes["lights told twice in a step"] += 1
            if abs(x - stop[lane][0]) > STOP_MOVED_M or abs(y - stop[lane][1]) > STOP_MOVED_M:
                notes["stop points that move"] += 1
            told.add(lane)
            rows[lane][step] = shown
    row = dict(zip(pieces["piece_id"].tolist(), range(len(pieces["piece_id"]))))
    is_lane = np.isin(pieces["piece_kind"], [PieceKind.LANE, PieceKind.BIKE_LANE])
    controlled = [row[one] if one in row and is_lane[row[one]] else -1 for one in rows]
    notes["lights of lanes outside the map"] += controlled.count(-1)
    return {
        "has_lights": len(states) > 0,
        "light_piece": np.array(controlled, np.int32),
        "light_stop": np.array([stop[one] for one in rows], np.float64).reshape(-1, 2) - origin[:2],
        "light_state": np.stack(list(rows.values())) if rows else np.zeros((0, steps), np.uint8),
    }
