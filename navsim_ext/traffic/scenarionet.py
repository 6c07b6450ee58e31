"""ScenarioNet pickles -> TrafficScene: tracks at the source's rate (10 or 20 Hz), map rebuilt by the existing reader.

The ego is NAVSIM's car where the recorded one drove (:mod:`navsim_ext.readers.scenarionet_tracks` says how): it is
longer than nuScenes' car, so it may touch a neighbour that the recorded one did not. Everybody else is as recorded.
Road edges are those of the rebuilt map ("approx"): lanes, roadblocks, intersections and car parks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext import pickles
from navsim_ext.errors import DataError, MissingError
from navsim_ext.frames import POSE_INTERVAL_S
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.pdm.ego import LENGTH, REAR_AXLE_TO_CENTER, WIDTH
from navsim_ext.readers.route_matching import route_of
from navsim_ext.readers.scenarionet_map import CROP_M, build_map
from navsim_ext.readers.scenarionet_tracks import RecordedDrive, command, parked, read_drive
from navsim_ext.traffic.codes import AgentKind, LightState, Role
from navsim_ext.traffic.motion import nearest_observed, still
from navsim_ext.traffic.navsim import EGO_HEIGHT_M, EGO_TOKEN, KIND_OF_NAME
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.source import FileSource, Reading, reading
from navsim_ext.traffic.vector_pieces import route_rows, vector_pieces

LICENCE = {
    "nuscenes": "nuScenes: CC BY-NC-SA 4.0", "waymo": "Waymo Open Motion Dataset: non-commercial use only, not to be "
    "passed on", "nuplan": "nuPlan: CC BY-NC-SA 4.0", "av2": "Argoverse 2: CC BY-NC-SA 4.0",
}  # fmt: skip
_NOT_SCENARIOS = ("dataset_summary", "dataset_mapping")


class ScenarioNetTraffic(FileSource):
    """All ScenarioNet scenarios (``*.pkl``) below ``root``; the unit of work is a file. ``history_s`` lie before the
    present step (less where a scenario is shorter)."""

    suffixes = (".pkl",)
    described = "ScenarioNet scenarios (*.pkl)"

    def __init__(self, root: str, reach_m: float = CROP_M, history_s: float = 1.5) -> None:
        super().__init__(root)
        self.reach_m, self.history_s = float(reach_m), float(history_s)
        if not (self.reach_m > 0.0 and self.history_s >= 0.0):
            raise DataError(f"reach_m={reach_m}, history_s={history_s}: more than 0 and at least 0 were expected")

    def holds(self, path: Path) -> bool:
        return super().holds(path) and path.stem not in _NOT_SCENARIOS

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"reach_m": self.reach_m, "history_s": self.history_s}

    def read(self, unit: str) -> Iterator[Reading]:
        path = self.path_of(unit)
        yield reading(str(path), lambda: self._scene(path))

    def _scene(self, path: Path) -> TrafficScene:
        drive, vector_map = recorded(path)
        dt = POSE_INTERVAL_S / drive.step
        now = min(round(self.history_s / dt), len(drive.ego_fine) - 1)
        return drive_scene(drive, vector_map, vector_map.location, self.reach_m, now)

    def map_of(self, scene: TrafficScene) -> VectorMap:
        """The rebuilt map of a scene that came from here. Raises MissingError where none of the files is its own."""
        paths = sorted(self.files(), key=lambda path: path.stem != scene.id)  # mostly it has the scenario's name
        for path in paths:
            drive, vector_map = recorded(path)
            if drive.name == scene.id:
                return vector_map
        raise MissingError(f"scene {scene.id} is of none of the {len(paths)} scenarios in {self.root}")


def recorded(path: Path) -> tuple[RecordedDrive, VectorMap]:
    """The drive of a scenario file, and its map rebuilt."""
    content = pickles.load(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; a ScenarioNet dictionary was expected")
    drive = read_drive(content, str(path))
    place = f"{drive.dataset or 'scenario'}/{drive.place or drive.name}"
    return drive, build_map(
        content["map_features"], location=place, dataset=drive.dataset, driven=drive.ego_fine[:, :2],
        lights=drive.lights, parked=parked(drive),
    )  # fmt: skip


def drive_scene(drive: RecordedDrive, vector_map: VectorMap, place: str, reach_m: float, now: int) -> TrafficScene:
    """The scene of a checked scenario and its map."""
    notes: Counter[str] = Counter()
    ego, steps = drive.ego_fine, len(drive.ego_fine)
    tracks = {token: track for token, track in drive.tracks.items() if track.valid.any()}
    notes["tracks never observed"] += len(drive.tracks) - len(tracks)
    centre = ego[:, :2] + REAR_AXLE_TO_CENTER * np.column_stack([np.cos(ego[:, 2]), np.sin(ego[:, 2])])
    origin = np.append(np.rint(ego[now, :2]), 0.0)
    valid = np.stack([np.ones(steps, np.bool_), *(track.valid for track in tracks.values())])
    xy = np.stack([centre, *(track.xy for track in tracks.values())])
    local = np.where(valid[..., None], xy - origin[:2], 0.0)
    heading = np.stack([ego[:, 2], *(track.heading for track in tracks.values())])
    at = nearest_observed(valid, now)
    sizes = [(LENGTH, WIDTH, EGO_HEIGHT_M), *(track.size[k] for track, k in zip(tracks.values(), at[1:]))]
    role = np.where(still(local, valid), np.uint8(Role.STATIC), np.uint8(0))
    role[0] |= np.uint8(Role.EGO)
    pieces, rows = vector_pieces(vector_map, ego[:, :2], reach_m, origin)
    route, _ = route_rows(vector_map, rows, route_of(vector_map, drive.ego), len(pieces.kinds))
    fine = dataclasses.replace(drive, samples=np.arange(steps), ego=ego)  # the command at every step, not at 2 Hz
    node = {fid: rows[n] for fid, n in vector_map.lane_node_by_fid.items() if n in rows}
    return TrafficScene.make(
        id=drive.name,
        source=f"scenarionet/{drive.dataset or 'unknown'}",
        licence=LICENCE.get(drive.dataset, "that of the data set it was converted from"),
        dt=POSE_INTERVAL_S / drive.step,
        now=now,
        origin=origin,
        xy=local,
        heading=heading,
        valid=valid,
        size=np.array(sizes, np.float32),
        kind=np.array(
            [AgentKind.VEHICLE, *(KIND_OF_NAME.get(t.name, AgentKind.OTHER) for t in tracks.values())], np.uint8
        ),
        role=role.astype(np.uint8),
        agent_id=np.arange(len(valid), dtype=np.int64),
        agent_tokens=(EGO_TOKEN, *(f"track {token}" if token == EGO_TOKEN else token for token in tracks)),
        **pieces.arrays(),
        **_lights(drive, node, pieces.lines, steps, notes),
        route=route,
        command=np.array([int(command(fine, k).argmax()) for k in range(steps)], np.uint8),
        rear_axle=float(REAR_AXLE_TO_CENTER),
        map_location=place,
        notes={reason: count for reason, count in sorted(notes.items()) if count},
    )


def light_state(told: Any) -> LightState:
    """State of a light from a converter's word for it (``LANE_STATE_ARROW_STOP``, ``TRAFFIC_LIGHT_RED`` ...)."""
    if told is None:
        return LightState.NOT_REPORTED
    text = str(told).upper()
    arrow, flashing = "ARROW" in text, "FLASHING" in text
    for words, plain, with_arrow, blinking in (
        (("STOP", "RED"), LightState.STOP, LightState.ARROW_STOP, LightState.FLASHING_STOP),
        (("CAUTION", "YELLOW", "AMBER"), LightState.CAUTION, LightState.ARROW_CAUTION, LightState.FLASHING_CAUTION),
        (("GO", "GREEN"), LightState.GO, LightState.ARROW_GO, LightState.UNKNOWN),
    ):
        if any(word in text for word in words):
            return blinking if flashing else with_arrow if arrow else plain
    return LightState.UNKNOWN


def _lights(
    drive: RecordedDrive, node: Mapping[str, int], lines: Sequence[NDArray], steps: int, notes: Counter[str]
) -> dict[str, Any]:
    known = {lane: states for lane, states in drive.lights.items() if lane in node}
    notes["lights of lanes outside the map"] += len(drive.lights) - len(known)
    state = np.full((len(known), steps), LightState.NOT_REPORTED, np.uint8)
    for row, states in enumerate(known.values()):
        shown = states[:steps]
        state[row, : len(shown)] = [light_state(one) for one in shown]
    return {
        "has_lights": bool(drive.lights),
        "light_piece": np.array([node[lane] for lane in known], np.int32),
        "light_stop": np.array([lines[node[lane]][0] for lane in known], np.float64).reshape(-1, 2),
        "light_state": state,
    }
