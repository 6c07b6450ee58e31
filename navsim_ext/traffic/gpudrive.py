"""GPUDrive JSON (also ScenarioMax's output): one scenario of the Waymo Open Motion Dataset per file.

Invalid steps hold sentinels and are not read. Headings are radians, as files with ``metadata`` have them; files of the
first converter have degrees and no ``metadata``: they tell no ego and are refused. The format has no lane graph, no
present step (``now`` is given) and no time step (0.1 s).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext import files
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import AgentKind, EdgeType, LaneType, LightState, LineType, PieceKind, Role
from navsim_ext.traffic.motion import still
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.source import FileSource, Reading, checked, reading
from navsim_ext.traffic.womd import LICENCE, LINE_KINDS

DT_S = 0.1
KINDS = {
    "vehicle": AgentKind.VEHICLE, "pedestrian": AgentKind.PEDESTRIAN, "cyclist": AgentKind.CYCLIST,
    "other": AgentKind.OTHER, "unset": AgentKind.OTHER,
}  # fmt: skip
LANE_OF_CLASS = {0: LaneType.UNDEFINED, 1: LaneType.FREEWAY, 2: LaneType.SURFACE_STREET, 3: LaneType.BIKE}
LINE_OF_CLASS = {5: LineType.UNKNOWN, **{5 + int(line): line for line in LineType if line}}  # 6 ... 13
EDGE_OF_CLASS = {14: EdgeType.UNKNOWN, 15: EdgeType.BOUNDARY, 16: EdgeType.MEDIAN}
AREAS = {
    "crosswalk": PieceKind.CROSSWALK, "speed_bump": PieceKind.SPEED_BUMP, "driveway": PieceKind.DRIVEWAY,
    "stop_sign": PieceKind.STOP_SIGN,
}  # fmt: skip
DEGREES = 4.0 * np.pi  # headings beyond this are not radians


class GpuDriveJson(FileSource):
    """All ``*.json`` scenarios below ``root``; the unit of work is a file. ``now`` is WOMD's present step."""

    suffixes = (".json",)
    described = "GPUDrive scenarios (*.json)"

    def __init__(self, root: str, now: int = 10) -> None:
        super().__init__(root)
        self.now = int(now)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"now": self.now}

    def read(self, unit: str) -> Iterator[Reading]:
        path = self.path_of(unit)
        yield reading(str(path), lambda: read_scene(path, self.now))


def read_scene(path: Path, now: int = 10) -> TrafficScene:
    """The scene of one file; raises DataError naming it and what does not fit."""
    with files.reading(path, "it is no JSON: copy or download it again", DataError):
        content = json.loads(path.read_bytes())
    missing = [key for key in ("objects", "roads", "metadata") if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} absent: not a GPUDrive scenario with metadata")
    where = f"{path}, scenario {content.get('scenario_id') or content.get('name')!r}"
    return checked(where, lambda: _scene(content, where, now))


def _scene(content: Mapping[str, Any], where: str, now: int) -> TrafficScene:
    notes: Counter[str] = Counter()
    objects, metadata = content["objects"], content["metadata"]
    if not objects:
        raise DataError(f"{where}: no objects; the ego at least was expected")
    ego = metadata.get("sdc_track_index")
    if not isinstance(ego, int) or not 0 <= ego < len(objects):
        raise DataError(f"{where}: metadata.sdc_track_index is {ego!r}; one of {len(objects)} objects was expected")
    lengths = {len(one[key]) for one in objects for key in ("position", "heading", "valid")}
    if len(lengths) != 1:
        raise DataError(f"{where}: positions, headings and valid are of unequal length {sorted(lengths)}")
    valid = np.array([one["valid"] for one in objects]).astype(np.bool_)
    xyz = np.array([[_point(p) for p in one["position"]] for one in objects], np.float64)
    heading = np.array([one["heading"] for one in objects], np.float64)
    if not (np.isfinite(xyz[valid]).all() and np.isfinite(heading[valid]).all()):
        bad = int(np.argwhere(valid & ~(np.isfinite(xyz).all(axis=-1) & np.isfinite(heading)))[0, 0])
        raise DataError(f"{where}: object {bad} has a position or heading that is not finite")
    if np.abs(heading[valid]).max(initial=0.0) > DEGREES:
        raise DataError(f"{where}: headings reach {np.abs(heading[valid]).max():.0f}; these are degrees, not radians")
    role = np.zeros(len(objects), np.uint8)
    role[ego] |= np.uint8(Role.EGO)
    ids = np.array([int(one.get("id", k)) for k, one in enumerate(objects)], np.int64)
    for wanted in metadata.get("tracks_to_predict", ()):
        index = wanted["track_index"]
        if not 0 <= index < len(objects):
            raise DataError(f"{where}: tracks_to_predict names object {index} of {len(objects)}")
        role[index] |= np.uint8(Role.PREDICT)
    for one in metadata.get("objects_of_interest", ()):
        rows = np.flatnonzero(ids == int(one))
        role[rows] |= np.uint8(Role.INTEREST)
        notes["objects of interest without an object"] += int(not len(rows))
    seen = valid.any(axis=1)
    if not (now < valid.shape[1] and valid[ego, now]):
        raise DataError(f"{where}: the ego is not valid at step {now} of {valid.shape[1]}")
    notes["objects never observed"] += int((~seen).sum())
    origin = np.rint(xyz[ego, now])
    local = np.where(valid[..., None], xyz - origin, 0.0)[seen]
    role = role[seen] | np.where(still(local[..., :2], valid[seen]), np.uint8(Role.STATIC), np.uint8(0))
    kept = [one for one, keep in zip(objects, seen) if keep]
    goals = [one.get("goalPosition") for one in kept]
    pieces = _map(content["roads"], origin, where, notes)
    return TrafficScene.make(
        id=str(content.get("scenario_id") or content.get("name")),
        source="gpudrive",
        licence=LICENCE,
        dt=DT_S,
        now=now,
        origin=origin,
        xy=local[..., :2],
        z=local[..., 2],
        heading=heading[seen],
        valid=valid[seen],
        size=np.array([[one["length"], one["width"], one["height"]] for one in kept], np.float32),
        kind=np.array([_kind(one, where) for one in kept], np.uint8),
        role=role,
        agent_id=ids[seen],
        goal=np.array([[np.nan] * 2 if g is None else _point(g)[:2] - origin[:2] for g in goals], np.float32),
        **pieces,
        **_lights(content.get("tl_states") or {}, pieces, origin, valid.shape[1], where, notes),
        notes={reason: count for reason, count in sorted(notes.items()) if count},
    )


def _point(point: Mapping[str, float]) -> list[float]:
    return [point["x"], point["y"], point.get("z", 0.0)]


def _kind(one: Mapping[str, Any], where: str) -> AgentKind:
    if one["type"] not in KINDS:
        raise DataError(f"{where}: an object has type {one['type']!r}; one of {sorted(KINDS)} was expected")
    return KINDS[one["type"]]


def _map(roads: Sequence[Mapping[str, Any]], origin: NDArray, where: str, notes: Counter[str]) -> dict[str, Any]:
    ids, kinds, subtypes, lines = [], [], [], []
    for number, road in enumerate(roads):
        if not road["geometry"]:
            notes["roads without points"] += 1
            continue
        kind, subtype = _piece(road, where, notes)
        ids.append(int(road.get("id", number)))
        kinds.append(kind)
        subtypes.append(subtype)
        lines.append(np.array([_point(point) for point in road["geometry"]], np.float64) - origin)
    if not lines:
        raise DataError(f"{where}: no roads with points; a scene without map cannot be used")
    xyz = np.concatenate(lines)
    return {
        "points": np.ascontiguousarray(xyz[:, :2], np.float32),
        "point_z": np.ascontiguousarray(xyz[:, 2], np.float32),
        "piece_start": np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.int32),
        "piece_kind": np.array(kinds, np.uint8),
        "piece_subtype": np.array(subtypes, np.uint8),
        "piece_closed": np.isin(kinds, [PieceKind.CROSSWALK, PieceKind.SPEED_BUMP, PieceKind.DRIVEWAY]),
        "piece_id": np.array(ids, np.int64),
        "speed_limit": np.full(len(ids), np.nan, np.float32),
        "edges": np.zeros((0, 2), np.int32),
        "edge_kind": np.zeros(0, np.uint8),
    }


def _piece(road: Mapping[str, Any], where: str, notes: Counter[str]) -> tuple[PieceKind, int]:
    """(kind, subtype); a class number that does not belong to the type counts as unknown of that type."""
    name, number = road["type"], road.get("map_element_id")
    if name in AREAS:
        return AREAS[name], 0
    tables = {"lane": LANE_OF_CLASS, "road_line": LINE_OF_CLASS, "road_edge": EDGE_OF_CLASS}
    if name not in tables:
        raise DataError(f"{where}: a road has type {name!r}; one of {sorted([*tables, *AREAS])} was expected")
    if number not in tables[name]:
        notes[f"{name} of class {number}"] += 1
    subtype = int(tables[name].get(number, 0))
    if name == "lane":
        return (PieceKind.BIKE_LANE if subtype == LaneType.BIKE else PieceKind.LANE), subtype
    return (LINE_KINDS[subtype] if name == "road_line" else PieceKind.ROAD_EDGE), subtype


def _lights(
    told: Mapping[str, Any], pieces: Mapping[str, Any], origin: NDArray, steps: int, where: str, notes: Counter[str]
) -> dict[str, Any]:
    """``tl_states``: by lane id the lists state (WOMD's names in lower case), x, y, time_index."""
    lane = np.isin(pieces["piece_kind"], [PieceKind.LANE, PieceKind.BIKE_LANE])
    row = {int(one): k for k, one in enumerate(pieces["piece_id"]) if lane[k]}
    state = np.full((len(told), steps), LightState.NOT_REPORTED, np.uint8)
    stop = np.zeros((len(told), 2))
    piece = np.full(len(told), -1, np.int32)
    for k, (name, light) in enumerate(told.items()):
        piece[k] = row.get(int(name), -1)
        notes["lights of lanes outside the map"] += int(piece[k] < 0)
        stop[k] = np.array([light["x"][0], light["y"][0]]) - origin[:2]
        for step, shown in zip(light["time_index"], light["state"], strict=True):
            text = str(shown).upper()
            if text not in LightState.__members__ or not 0 <= step < steps:
                raise DataError(f"{where}: the light of lane {name} has state {shown!r} at step {step}")
            state[k, step] = LightState[text]
    return {"has_lights": bool(told), "light_piece": piece, "light_stop": stop, "light_state": state}
