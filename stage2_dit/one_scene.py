"""A single picture with ego state as a scene, and any single scene as a source that an index can be built from.

The frame is that of the ego at t = 0: it stands at the origin, heading 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from navsim_ext.errors import DataError, MissingError
from navsim_ext.frames import NUM_HISTORY_POSES, POSE_INTERVAL_S
from navsim_ext.maps.layers import LaneLayer, PolygonLayer
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.pictures import open_picture
from navsim_ext.readers import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.scene import COMMANDS, Annotations, Camera, Scene

VIEW = "CAM_F0"
FOCAL_SHARE = 0.805  # focal length of nuPlan's front camera over its picture's width: 1545 px of 1920
NO_OBJECTS = Annotations(np.empty((0, 7)), np.empty((0, 3)), (), ())


@dataclass(frozen=True)
class EgoState:
    """What the command line says of the ego: ``command`` of COMMANDS, m/s and m/s^2 forward and left.

    ``history``: poses (x, y, heading) at -1.5, -1.0 and -0.5 s; None: constant velocity until now.
    """

    command: str = "straight"
    velocity: tuple[float, float] = (0.0, 0.0)
    acceleration: tuple[float, float] = (0.0, 0.0)
    history: Sequence[Sequence[float]] | None = None

    def poses(self) -> np.ndarray:
        """[4,3] poses up to now."""
        if self.history is not None:
            past = np.asarray(self.history, dtype=np.float64)
            if past.shape != (NUM_HISTORY_POSES - 1, 3) or not np.isfinite(past).all():
                raise DataError(f"ego.history has shape {past.shape}; 3 finite poses (x, y, heading) were expected")
            return np.concatenate([past, np.zeros((1, 3))])
        time = -POSE_INTERVAL_S * np.arange(NUM_HISTORY_POSES - 1, -1, -1)
        return np.stack([self.velocity[0] * time, self.velocity[1] * time, np.zeros_like(time)], axis=-1)


@dataclass(frozen=True)
class CameraMount:
    """Where the picture was taken from, for drawing: rear axle to lens [m], focal length [px] (None: nuPlan's)."""

    forward_m: float = 1.6
    height_m: float = 1.5
    focal_px: float | None = None


def scene_of_picture(path: str | Path, ego: EgoState, mount: CameraMount) -> Scene:
    """A scene of four frames that ends now. Raises MissingError or DataError for a lost or unreadable picture."""
    path = Path(path)
    if ego.command not in COMMANDS:
        raise DataError(f"ego.command is {ego.command!r}; choose one of {', '.join(COMMANDS)}")
    width, height = open_picture(path).size
    focal = mount.focal_px or FOCAL_SHARE * width
    camera = Camera(
        path=path.name,
        intrinsics=np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]),
        sensor2lidar_rotation=np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
        sensor2lidar_translation=np.array([mount.forward_m, 0.0, mount.height_m]),
        distortion=np.zeros(5),
    )
    poses = ego.poses()
    frames = len(poses)
    command = np.eye(len(COMMANDS), dtype=np.float32)[COMMANDS.index(ego.command)]
    dynamics = np.array([*ego.velocity, *ego.acceleration], dtype=np.float32)
    digest = hashlib.sha256(path.read_bytes() + repr(ego).encode()).hexdigest()
    return Scene(
        token=digest[:16],
        log_name="picture",
        map_location="",
        num_history=frames,
        frame_tokens=(*(digest[16 + i : 32 + i] for i in range(frames - 1)), digest[:16]),
        timestamps_us=np.arange(frames, dtype=np.int64) * round(POSE_INTERVAL_S * 1e6),
        ego_global=poses,
        ego_dynamics=np.tile(dynamics, (frames, 1)),
        commands=np.tile(command, (frames, 1)),
        roadblock_ids=(),
        annotations=(NO_OBJECTS,) * frames,
        traffic_lights=((),) * frames,
        cameras={VIEW: camera},
    ).validate()


def empty_map(location: str) -> VectorMap:
    """A map of nothing, for drawing where there is none."""
    none = np.empty((0, 2), np.int64)
    return VectorMap(
        location, "approx", LaneLayer.empty(), LaneLayer.empty(), PolygonLayer.empty(), PolygonLayer.empty(), none, none
    )


class OneScene:
    """One scene behind the reader protocol (:class:`navsim_ext.readers.source.SceneSource`)."""

    def __init__(self, scene: Scene, sensor_root: Path, vector_map: VectorMap) -> None:
        self._scene, self._map = scene, vector_map
        self.sensor_root = sensor_root
        self.scene_filter = SceneFilter(tokens=[scene.token], num_history=scene.num_history,
                                        num_future=scene.num_future, has_route=False)  # fmt: skip
        self.required_cameras: tuple[str, ...] = ()
        self.report = SkipReport()

    def __len__(self) -> int:
        return 1

    @property
    def tokens(self) -> list[str]:
        return [self._scene.token]

    @property
    def log_names(self) -> list[str]:
        return [self._scene.log_name]

    def scenes_of(self, log_name: str) -> list[Scene]:
        return [self._scene] if log_name == self._scene.log_name else []

    def scene(self, token: str) -> Scene:
        if token != self._scene.token:
            raise MissingError(f"token {token} is not {self._scene.token}, the only one here")
        return self._scene

    def map_for(self, scene: Scene) -> VectorMap:
        return self._map

    def require_listed(self, found: Collection[str]) -> None:
        if self._scene.token not in found:
            raise MissingError(f"token {self._scene.token} was lost between reading and indexing")

    def logs(self) -> Iterator[tuple[str, list[Scene]]]:
        yield self._scene.log_name, [self._scene]
