"""NAVSIM / OpenScene logs -> TrafficScene: a whole log at 2 Hz (``dt`` 0.5 s), nothing interpolated.

A log is cut where two frames are not 0.5 s apart; every stretch of two frames or more is a scene, shorter ones are bad
input. Road users are joined by track token; their boxes are turned from the ego frame of their own frame into the
world. The ego is road user 0: NAVSIM's car, its middle 1.461 m ahead of the recorded rear axle. Heights are not kept:
boxes are given over the ground under the ego of their frame. Traffic lights are those of lane connectors, red (STOP) or
not red (GO: NAVSIM counts amber as not red); connectors that a frame does not name are not reported.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext import pickles
from navsim_ext.errors import DataError, MissingError
from navsim_ext.frames import POSE_INTERVAL_S, rotate
from navsim_ext.maps.nuplan_gpkg import load_map, map_file
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.pdm.ego import LENGTH, REAR_AXLE_TO_CENTER, WIDTH
from navsim_ext.readers.navsim_frames import Frame, cameras_of, parse_frame
from navsim_ext.traffic.codes import AgentKind, LightState, Role
from navsim_ext.traffic.motion import nearest_observed, still
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.source import FileSource, Reading, checked, reading
from navsim_ext.traffic.vector_pieces import connector_rows, route_rows, vector_pieces

LICENCE = "nuPlan / OpenScene: CC BY-NC-SA 4.0"
KIND_OF_NAME = {"vehicle": AgentKind.VEHICLE, "pedestrian": AgentKind.PEDESTRIAN, "bicycle": AgentKind.CYCLIST}
GAP_US = 50_000  # by which the time between two frames may differ from 0.5 s
EGO_HEIGHT_M = 1.777
EGO_TOKEN = "ego"


class NavsimTraffic(FileSource):
    """The logs ``root/navsim_logs/<split>/*.pkl``; the unit of work is a log.

    ``maps_root`` defaults to ``root/maps``. The present step is that of frame ``num_history`` - 1, as in NAVSIM, or the
    last frame of a shorter stretch.
    """

    suffixes = (".pkl",)
    described = "NAVSIM logs (*.pkl)"

    def __init__(
        self, root: str, split: str, maps_root: str | None = None, reach_m: float = 120.0, num_history: int = 4
    ) -> None:
        super().__init__(str(Path(root) / "navsim_logs" / split))
        self.maps_root = str(maps_root if maps_root is not None else Path(root) / "maps")
        self.reach_m, self.num_history, self.split = float(reach_m), int(num_history), split
        if not (self.reach_m > 0.0 and self.num_history >= 1):
            raise DataError(f"reach_m={reach_m}, num_history={num_history}: more than 0 and at least 1 were expected")

    def identity(self) -> dict[str, Any]:
        settings = {"split": self.split, "reach_m": self.reach_m, "num_history": self.num_history}
        return super().identity() | settings

    def read(self, unit: str) -> Iterator[Reading]:
        path = self.path_of(unit)
        content = pickles.load(path)
        if not isinstance(content, list):
            raise DataError(f"{path} holds a {type(content).__name__}; a list of frames was expected")
        frames = checked(str(path), lambda: [parse_frame(frame, path, k) for k, frame in enumerate(content)])
        hidden = next((frame for frame in frames if frame.annotations is None), None)
        if hidden is not None:
            raise DataError(f"{path}, frame {hidden.token}: anns is absent: a split that hides them has no traffic")
        stretches = list(_stretches(frames))
        for number, (first, last) in enumerate(stretches):
            name = path.stem if len(stretches) == 1 else f"{path.stem}-{number}"
            yield reading(
                f"{path}, frames {first} to {last - 1}",
                lambda name=name, first=first, last=last: self._scene(
                    name, frames[first:last], [cameras_of(content[k], path, k) for k in range(first, last)]
                ),
            )

    def _scene(self, name: str, frames: Sequence[Frame], cameras: Sequence[Mapping[str, Any]]) -> TrafficScene:
        vector_map = _map(self.maps_root, frames[0].map_location)
        return log_scene(name, frames, cameras, vector_map, self.reach_m, min(self.num_history, len(frames)) - 1)

    def prepare(self, output_dir: Path) -> None:
        """Checks that the maps are there before the first log is read."""
        del output_dir
        if not Path(self.maps_root).is_dir():
            raise MissingError(f"{self.maps_root} is not a folder: set data.maps_root or NUPLAN_MAPS_ROOT")
        map_file(self.maps_root, "us-ma-boston")


@functools.lru_cache(maxsize=4)
def _map(maps_root: str, location: str) -> VectorMap:
    return load_map(maps_root, location)


def _stretches(frames: Sequence[Frame]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the frames that follow one another by 0.5 s."""
    first = 0
    for k in range(1, len(frames) + 1):
        steady = k < len(frames) and abs(
            frames[k].timestamp_us - frames[k - 1].timestamp_us - round(POSE_INTERVAL_S * 1e6)
        ) <= GAP_US and frames[k].map_location == frames[k - 1].map_location  # fmt: skip
        if not steady:
            yield first, k
            first = k


def log_scene(
    name: str,
    frames: Sequence[Frame],
    cameras: Sequence[Mapping[str, Any]],
    vector_map: VectorMap,
    reach_m: float,
    now: int,
) -> TrafficScene:
    """The scene of consecutive frames; raises DataError naming the log for frames that make none."""
    notes: Counter[str] = Counter()
    ego = np.stack([frame.ego_global for frame in frames])
    tokens, names, xy, heading, sizes, valid = _join(name, frames)
    centre = ego[:, :2] + REAR_AXLE_TO_CENTER * np.column_stack([np.cos(ego[:, 2]), np.sin(ego[:, 2])])
    origin = np.append(np.rint(ego[now, :2]), 0.0)
    pieces, rows = vector_pieces(vector_map, ego[:, :2], reach_m, origin)
    xy = np.concatenate([centre[None], xy])
    valid = np.concatenate([np.ones((1, len(frames)), np.bool_), valid])
    local = np.where(valid[..., None], xy - origin[:2], 0.0)
    size = np.take_along_axis(sizes, nearest_observed(valid[1:], now)[:, None, None], axis=1)[:, 0]
    kind = np.array([AgentKind.VEHICLE, *(KIND_OF_NAME.get(one, AgentKind.OTHER) for one in names)], np.uint8)
    role = np.where(still(local, valid), np.uint8(Role.STATIC), np.uint8(0))
    role[0] |= np.uint8(Role.EGO)
    route, missing = route_rows(vector_map, rows, frames[now].roadblock_ids, len(pieces.kinds))
    notes["roadblocks of the route that the map lacks"] += missing
    images = {
        camera: tuple(one[camera].path for one in cameras)
        for camera in cameras[now]
        if all(camera in one for one in cameras)
    }
    return TrafficScene.make(
        id=name,
        source="navsim",
        licence=LICENCE,
        dt=POSE_INTERVAL_S,
        now=now,
        origin=origin,
        xy=local,
        heading=np.concatenate([ego[None, :, 2], heading]),
        valid=valid,
        size=np.concatenate([[[LENGTH, WIDTH, EGO_HEIGHT_M]], size]).astype(np.float32),
        kind=kind,
        role=role.astype(np.uint8),
        agent_id=np.arange(len(kind), dtype=np.int64),
        agent_tokens=(EGO_TOKEN, *tokens),
        agent_names=("vehicle", *names),
        **pieces.arrays(),
        **_lights(frames, connector_rows(vector_map, rows), pieces.lines, notes),
        route=route,
        command=np.array([int(frame.command.argmax()) for frame in frames], np.uint8),
        ego_dynamics=np.stack([frame.ego_dynamics for frame in frames]).astype(np.float32),
        rear_axle=float(REAR_AXLE_TO_CENTER),
        map_location=frames[0].map_location,
        frame_tokens=tuple(frame.token for frame in frames),
        cameras=dict(cameras[now]),
        images=images,
        notes={reason: count for reason, count in sorted(notes.items()) if count},
    )


def _join(
    name: str, frames: Sequence[Frame]
) -> tuple[list[str], list[str], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Annotations by track as first seen: (tokens [n], names [n], world xy [n,T,2], heading, sizes, valid)."""
    row = {token: k for k, token in enumerate(dict.fromkeys(
        token for frame in frames for token in frame.annotations.track_tokens))}  # fmt: skip
    shape = (len(row), len(frames))
    xy, heading, sizes = np.zeros((*shape, 2)), np.zeros(shape), np.zeros((*shape, 3))
    valid, names = np.zeros(shape, np.bool_), [""] * len(row)
    for t, frame in enumerate(frames):
        found = frame.annotations
        rows = [row[token] for token in found.track_tokens]
        if len(set(rows)) != len(rows):
            twice = next(token for token, count in Counter(found.track_tokens).items() if count > 1)
            raise DataError(f"log {name}, frame {frame.token}: track {twice} is annotated twice")
        xy[rows, t] = rotate(found.boxes[:, :2], frame.ego_global[2]) + frame.ego_global[:2]
        heading[rows, t] = found.boxes[:, 6] + frame.ego_global[2]
        sizes[rows, t] = found.boxes[:, 3:6]
        valid[rows, t] = True
        for k, kind in zip(rows, found.names):
            names[k] = names[k] or kind
    return list(row), names, xy, heading, sizes, valid


def _lights(
    frames: Sequence[Frame], ways: Mapping[str, int], lines: Sequence[NDArray], notes: Counter[str]
) -> dict[str, Any]:
    told = dict.fromkeys(fid for frame in frames for fid, _ in frame.traffic_lights)
    known = {fid: k for k, fid in enumerate(fid for fid in told if fid in ways)}
    notes["lights of connectors outside the map"] += len(told) - len(known)
    state = np.full((len(known), len(frames)), LightState.NOT_REPORTED, np.uint8)
    for t, frame in enumerate(frames):
        for fid, is_red in frame.traffic_lights:
            if fid in known:
                state[known[fid], t] = LightState.STOP if is_red else LightState.GO
    return {
        "has_lights": True,
        "light_piece": np.array([ways[fid] for fid in known], np.int32),
        "light_stop": np.array([lines[ways[fid]][0] for fid in known], np.float64).reshape(-1, 2),
        "light_state": state,
    }
