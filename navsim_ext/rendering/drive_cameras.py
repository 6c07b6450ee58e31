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
from navsim_ext.frames import to_local
from navsim_ext.maps.nuplan_gpkg import load_map
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.rendering.camera import camera_rig
from navsim_ext.rendering.renderer import render
from navsim_ext.scene import CAMERAS, Annotations
from navsim_ext.traffic.codes import RED, AgentKind
from navsim_ext.traffic.scene import TrafficScene

BRAKING = -0.8  # m/s^2 over the last half second from which brake lights are on
NAME_OF_KIND = {AgentKind.VEHICLE: "vehicle", AgentKind.PEDESTRIAN: "pedestrian", AgentKind.CYCLIST: "bicycle"}
DRAWN_WITHIN_M = 130.0


class DriveCameras:
    """An ``EgoCameras``: pictures of ``views`` as JPEGs in ``folder``, one file per world and view, overwritten.

    ``maps_root`` holds the GeoPackages of the scenes' ``map_location`` (the synthetic build writes them into
    ``maps``). Raises DataError for scenes without a map location, MissingError where its map is not there.
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
    names = tuple(NAME_OF_KIND.get(AgentKind(int(scene.kind[row])), "generic_object") for row in rows)
    tokens = tuple(_token(scene, int(row)) for row in rows)
    velocities = np.zeros((len(rows), 3))
    braking: set[str] = set()
    back = state.column - TOKEN_STEPS
    if back >= 1:
        track = state.poses[world, :n, back - 1 : state.column + 1, :2].double().cpu().numpy()
        speed = np.hypot(*np.diff(track, axis=1).transpose(2, 0, 1)) / STEP_S
        change = (speed[:, -1] - speed[:, 0]) / (TOKEN_STEPS * STEP_S)
        known = state.there[world, :n, back - 1].cpu().numpy()
        braking = {token for token, row in zip(tokens, rows) if known[row] and change[row] < BRAKING}
    return Annotations(boxes, velocities, names, tokens), braking


def lights_shown(state: WorldState, world: int) -> list[tuple[str, bool]]:
    """(map name of the controlled lane, is red) of the lights whose lane is named."""
    scene = state.scenes.sources[int(state.scene[world])]
    ratio = steps_per_interval(scene)
    at = min(scene.now + state.step // ratio, scene.num_steps - 1)
    red = np.isin(scene.light_state[:, at], [int(one) for one in RED])
    if not scene.piece_tokens:
        return []
    return [(scene.piece_tokens[row], bool(is_red)) for row, is_red in zip(scene.light_piece, red) if row >= 0]


def _token(scene: TrafficScene, row: int) -> str:
    return scene.agent_tokens[row] if scene.agent_tokens else str(int(scene.agent_id[row]))
