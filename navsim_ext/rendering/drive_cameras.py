"""The ego's cameras in a moving world: drawn anew at every question, where everybody is then."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import from_frame, steps_per_interval
from navsim_ext.errors import DataError
from navsim_ext.frames import NUM_HISTORY_POSES, POSE_INTERVAL_S, to_local
from navsim_ext.maps.nuplan_gpkg import load_map
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.rendering.camera import camera_rig
from navsim_ext.rendering.objects import braking_tracks, models
from navsim_ext.rendering.renderer import render
from navsim_ext.scene import CAMERAS, Annotations
from navsim_ext.traffic.codes import RED, AgentKind, LightState
from navsim_ext.traffic.scenarionet import ScenarioNetTraffic
from navsim_ext.traffic.scene import TrafficScene

NAME_OF_KIND = {AgentKind.VEHICLE: "vehicle", AgentKind.PEDESTRIAN: "pedestrian", AgentKind.CYCLIST: "bicycle"}
DRAWN_WITHIN_M = 130.0
SCENARIONET = "scenarionet/"
CONNECTOR = "connector "  # before the map's own name of a lane connector in ``piece_tokens``
UNTOLD = (int(LightState.UNKNOWN), int(LightState.NOT_REPORTED))


class DriveCameras:
    """An ``EgoCameras``: pictures of ``views`` as JPEGs in ``folder``, one file per world and view, overwritten.

    ``maps_root`` holds the GeoPackages of the scenes' ``map_location`` (the synthetic build writes them into
    ``maps``); for scenes out of ScenarioNet's files it is the folder of these files, whose maps are rebuilt. Raises
    DataError for scenes without a map location, MissingError where its map is not there.
    """

    def __init__(
        self,
        maps_root: str,
        folder: str | None,
        *,
        views: Sequence[str] = ("CAM_F0",),
        image_size: Sequence[int] = (960, 540),
        quality: int = 90,
    ) -> None:
        unknown = sorted(set(views) - set(CAMERAS))
        if unknown or not views:
            raise DataError(f"cameras {unknown or list(views)} do not exist; there are {', '.join(CAMERAS)}")
        self.maps_root, self.views, self.quality = Path(maps_root), tuple(views), quality
        self.folder = Path(folder) if folder else None
        self.size = (int(image_size[0]), int(image_size[1]))
        self._rig = camera_rig(self.size)
        self._map = functools.lru_cache(maxsize=4)(lambda location: load_map(self.maps_root, location))
        self._rebuilt: dict[str, VectorMap] = {}  # by scene
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, state: WorldState, worlds: Sequence[int], ego: NDArray[np.float64]) -> list[Mapping[str, str]]:
        if self.folder is None:
            raise DataError("cameras without a folder can only be looked through: set folder=DIR for planners")
        found = []
        for world, pose in zip(worlds, ego):
            paths = {}
            for view in self.views:
                path = self.folder / f"world{world:03d}-{view}.jpg"
                Image.fromarray(self.picture(state, world, pose, view)).save(path, "JPEG", quality=self.quality)
                paths[view] = str(path.resolve())
            found.append(paths)
        return found

    def picture(self, state: WorldState, world: int, ego: NDArray[np.float64], view: str) -> NDArray[np.uint8]:
        """[H,W,3] what one camera of a world sees; ``ego`` [3] is the rear axle in the frame of the scene."""
        s = int(state.scene[world])
        scene = state.scenes.sources[s]
        annotations, braking = objects_seen(state, world, ego)
        world_pose = from_frame(ego, state.scenes.frame[s]) + np.append(scene.origin[:2], 0.0)
        return render(
            self.map_of(scene), annotations, world_pose, lights_shown(state, world), self._rig[view], self.size,
            braking=braking,
        )  # fmt: skip

    def map_of(self, scene: TrafficScene) -> VectorMap:
        if not scene.map_location:
            raise DataError(f"scene {scene.id} names no map location: its cameras cannot be drawn")
        if scene.source.startswith(SCENARIONET):
            if scene.id not in self._rebuilt:
                self._rebuilt[scene.id] = ScenarioNetTraffic(str(self.maps_root)).map_of(scene)
            return self._rebuilt[scene.id]
        return self._map(scene.map_location)


def objects_seen(state: WorldState, world: int, ego: NDArray[np.float64]) -> tuple[Annotations, set[str]]:
    """(everybody but the ego as annotations in the frame of ``ego``, tracks whose brake lights are on)."""
    s = int(state.scene[world])
    scenes = state.scenes
    scene = scenes.sources[s]
    n = scene.num_agents
    there = state.present[world, :n].cpu().numpy().copy()
    there[scene.ego] = False
    pose = state.pose[world, :n].double().cpu().numpy()
    there &= np.hypot(*(pose[:, :2] - ego[:2]).T) < DRAWN_WITHIN_M
    rows = np.flatnonzero(there)
    local = to_local(pose[rows], ego)
    size = scene.size[rows].astype(np.float64)
    boxes = np.column_stack([local[:, :2], 0.5 * size[:, 2], size, local[:, 2]])
    names, tokens = tuple(_name(scene, row) for row in rows), tuple(_token(scene, row) for row in rows)
    window = [_frame(state, world, c, rows, names, tokens) for c in _columns(state)]
    seen = Annotations(boxes, window[-1].velocities, names, tokens)
    return seen, set(braking_tracks([*window[:-1], seen], len(window) - 1, POSE_INTERVAL_S))


def _columns(state: WorldState) -> list[int]:
    """Columns of the frames, 0.5 s apart, by which pictures of logs decide whose brake lights are on."""
    columns = state.column - TOKEN_STEPS * np.arange(NUM_HISTORY_POSES - 1, -1, -1)
    return [int(column) for column in columns if column >= 0]


def _frame(state: WorldState, world: int, column: int, rows, names, tokens) -> Annotations:
    """Speeds over the 0.1 s before ``column`` (after it, where the record begins there) of those who were there."""
    a, b = (column - 1, column) if column else (column, column + 1)
    xy = state.poses[world, rows, :, :2][:, [a, b]].double().cpu().numpy()
    there = state.there[world, rows][:, [a, b]].all(dim=1).cpu().numpy()
    speed = np.where(there, np.hypot(*(xy[:, 1] - xy[:, 0]).T) / STEP_S, 0.0)
    known = np.flatnonzero(there) if column < state.column else np.arange(len(rows))
    velocities = np.column_stack([speed, np.zeros((len(rows), 2))])[known]
    boxes = np.zeros((len(known), 7))
    return Annotations(boxes, velocities, tuple(names[k] for k in known), tuple(tokens[k] for k in known))


def lights_shown(state: WorldState, world: int) -> list[tuple[str, bool]]:
    """(lane connector of the map, is red) of the lights whose state is known at this step.

    Map pieces of vector maps are called "connector <fid>". Raises DataError for a light whose connector has no name.
    """
    scene = state.scenes.sources[int(state.scene[world])]
    ratio = steps_per_interval(scene)
    shown = scene.light_state[:, min(scene.now + state.step // ratio, scene.num_steps - 1)]
    known = np.flatnonzero((scene.light_piece >= 0) & ~np.isin(shown, UNTOLD))
    names = [scene.piece_tokens[row] if scene.piece_tokens else "" for row in scene.light_piece[known]]
    strange = [name for name in names if not name.startswith(CONNECTOR)]
    if strange:
        raise DataError(
            f"scene {scene.id}: a light belongs to the map piece {strange[0]!r}, which names no lane connector: its "
            "lamp cannot be drawn"
        )
    red = np.isin(shown[known], [int(one) for one in RED])
    return [(name.removeprefix(CONNECTOR), bool(is_red)) for name, is_red in zip(names, red)]


def _name(scene: TrafficScene, row: int) -> str:
    """The source's class name where a model of that name can be drawn, else that of the kind."""
    if scene.agent_names and scene.agent_names[row] in models():
        return scene.agent_names[row]
    return NAME_OF_KIND.get(AgentKind(int(scene.kind[row])), "generic_object")


def _token(scene: TrafficScene, row: int) -> str:
    return scene.agent_tokens[row] if scene.agent_tokens else str(int(scene.agent_id[row]))
