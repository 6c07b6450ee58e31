"""ScenarioNet scene files (nuScenes, Waymo, nuPlan, Argoverse 2 through ScenarioNet): tracks and a vector map.

One file is one log. Its map is rebuilt (``scenarionet_map``), so every scene carries the label "approx". A window
whose recorded drive leaves the drivable area so built is invalid: NAVSIM would score even the human 0 there. Such
windows are left out, counted and listed in ``invalid``.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext import pickles
from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import reading
from navsim_ext.frames import POSE_INTERVAL_S, rotate
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.readers.log_files import LogFiles
from navsim_ext.readers.route_matching import route_of
from navsim_ext.readers.scenarionet_map import build_map
from navsim_ext.readers.scenarionet_tracks import (
    RecordedDrive,
    annotations,
    command,
    parked,
    read_drive,
    traffic_lights,
)
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.scene import Scene

WINDOW = SceneFilter(num_future=8)  # 4 + 8 frames: NAVSIM's 4 s horizon; its v1 metric cache wants 10
HORIZON_S = 4.0
EGO_CORNERS_M = np.array([(4.049, 1.1485), (-1.127, 1.1485), (-1.127, -1.1485), (4.049, -1.1485)])  # NAVSIM's car
SCENARIOS_IN_MEMORY = 4
_NOT_SCENARIOS = ("dataset_summary", "dataset_mapping")


@dataclass(frozen=True)
class _Scenario:
    drive: RecordedDrive
    vector_map: VectorMap
    route: tuple[str, ...]
    inside: NDArray[np.bool_]  # [S] whether all corners of NAVSIM's car are on drivable ground
    scenes: tuple[Scene, ...]
    invalid: dict[str, str]  # reason by token


class ScenarioNetScenes(LogFiles):
    """Scenes of ``root/split`` (or ``root`` where that is no folder): every ``*.pkl`` below it is a scenario.

    ``scene_filter`` as for NAVSIM logs (default: 4 + 8 frames); log names are the file names. ``invalid`` maps the
    token of a window that was left out to the reason; it fills as logs are read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "",
        *,
        scene_filter: SceneFilter | None = None,
        skip_bad: bool = False,
        report_path: str | os.PathLike[str] | None = None,
    ) -> None:
        folder = Path(root) / split
        self.root = folder if folder.is_dir() else Path(root)
        self.split = split
        self.required_cameras: tuple[str, ...] = ()  # these sources have no pictures
        self.sensor_root = self.root
        report = SkipReport(skip_bad, Path(report_path) if report_path is not None else None)
        super().__init__(self.root, self._find_scenarios(), scene_filter or WINDOW, report)
        self._open: OrderedDict[str, _Scenario] = OrderedDict()

    def _find_scenarios(self) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        for path in sorted(self.root.rglob("*.pkl"), key=lambda path: path.stem):
            if path.stem in _NOT_SCENARIOS:
                continue
            if path.stem in paths:
                raise DataError(f"{path} and {paths[path.stem]} have the same name: log names must be unique")
            paths[path.stem] = path
        if not paths:
            raise MissingError(f"{self.root} holds no ScenarioNet scenario (*.pkl): check the data root and the split")
        return paths

    def scenes_of(self, log_name: str) -> list[Scene]:
        scenario = self._scenario(log_name)
        return [] if scenario is None else list(scenario.scenes)

    def map_for(self, scene: Scene) -> VectorMap:
        scenario = self._scenario(scene.log_name)
        if scenario is None:
            raise DataError(f"log {scene.log_name} of {self.root} is bad and was skipped: it has no map")
        return scenario.vector_map

    def _scenario(self, log_name: str) -> _Scenario | None:
        """The scenario of a log, from memory or read; None for a bad one that is skipped."""
        if log_name in self._open:
            self._open.move_to_end(log_name)
            return self._open[log_name]
        try:
            scenario = self._read(log_name, self._paths[log_name])
        except TriviumError as error:
            self.report.add(error, log_name=log_name)
            return None
        self.invalid.update(scenario.invalid)
        self._open[log_name] = scenario
        while len(self._open) > SCENARIOS_IN_MEMORY:
            self._open.popitem(last=False)
        return scenario

    def _read(self, log_name: str, path: Path) -> _Scenario:
        content = pickles.load(path)
        if not isinstance(content, dict):
            raise DataError(f"{path} holds a {type(content).__name__}; a ScenarioNet dictionary was expected")
        with reading(path, "repair or remove the scenario"):  # converters differ; what is wrong must not end a run
            drive = read_drive(content, str(path))
            location = f"{drive.dataset or 'scenario'}/{drive.place or drive.name}"
            vector_map = build_map(
                content["map_features"],
                location=location,
                dataset=drive.dataset,
                driven=drive.ego_fine[:, :2],
                lights=drive.lights,
                parked=parked(drive),
            )
            scenario = _Scenario(
                drive, vector_map, route_of(vector_map, drive.ego), _inside(vector_map, drive.ego_fine), (), {}
            )
            scenes, invalid = _windows(scenario, self.scene_filter, log_name, self.split, location)
        return replace(scenario, scenes=tuple(scenes), invalid=invalid)


def _inside(vector_map: VectorMap, poses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[S] whether NAVSIM's drivable-area test would pass: each corner in a roadblock, intersection or car park."""
    corners = rotate(EGO_CORNERS_M[None], poses[:, None, 2]) + poses[:, None, :2]
    layers = (vector_map.roadblocks, vector_map.intersections, vector_map.carparks)
    ground = shapely.union_all([polygon for layer in layers for polygon in layer.polygons])
    shapely.prepare(ground)
    return shapely.contains_xy(ground, corners[..., 0], corners[..., 1]).all(axis=1)


def token_of(drive: RecordedDrive, frame: int) -> str:
    """16 hexadecimal characters from data set, scenario and frame."""
    return hashlib.sha256(f"{drive.dataset}/{drive.name}/{frame}".encode()).hexdigest()[:16]


def _windows(
    scenario: _Scenario, scene_filter: SceneFilter, log_name: str, split: str, location: str
) -> tuple[list[Scene], dict[str, str]]:
    """(scenes, reason by token of invalid windows), as NAVSIM cuts them."""
    drive, history = scenario.drive, scene_filter.num_history
    wanted = None if scene_filter.tokens is None else set(scene_filter.tokens)
    horizon = round(HORIZON_S / POSE_INTERVAL_S) * drive.step
    known = scenario.vector_map.lane_connectors.index
    objects = [annotations(drive, frame) for frame in range(len(drive.samples))]
    lights = [
        tuple((lane, red) for lane, red in traffic_lights(drive, frame) if lane in known)
        for frame in range(len(drive.samples))
    ]
    scenes: list[Scene] = []
    invalid: dict[str, str] = {}
    for start in range(0, len(drive.samples) - scene_filter.num_frames + 1, scene_filter.stride):
        now, end = start + history - 1, start + scene_filter.num_frames
        token = token_of(drive, now)
        if wanted is not None and token not in wanted:
            continue
        if scene_filter.has_route and not scenario.route:
            invalid[token] = "no lane lies along the recorded drive"
            continue
        sample = int(drive.samples[now])
        if not scenario.inside[sample : sample + horizon + 1].all():
            invalid[token] = "the recorded drive leaves the rebuilt drivable area"
            continue
        scene = Scene(
            token=token,
            log_name=log_name,
            map_location=location,
            num_history=history,
            frame_tokens=tuple(token_of(drive, frame) for frame in range(start, end)),
            timestamps_us=np.arange(start, end, dtype=np.int64) * round(POSE_INTERVAL_S * 1e6),
            ego_global=drive.ego[start:end],
            ego_dynamics=np.column_stack([drive.velocity, drive.acceleration])[start:end].astype(np.float32),
            commands=np.stack([command(drive, frame) for frame in range(start, end)]),
            roadblock_ids=scenario.route,
            annotations=tuple(objects[start:end]),
            traffic_lights=tuple(lights[start:end]),
            cameras={},
            split=split,
            map_label="approx",
        )
        scenes.append(scene.validate())
    return scenes, invalid
