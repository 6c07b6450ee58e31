"""WOD-E2E (Waymo's end-to-end data), unpacked: camera frames with past, future, command and ratings -> Scene.

``python -m navsim_ext.wod_e2e.unpack`` makes of the TFRecord files what is read here: a store of :class:`E2EFrame` and
a folder of pictures. A sequence (20 s at 10 Hz) is one log; every frame of it is a scene of its own, its token the name
of the frame. Frames of a sequence share no coordinates: the global frame of such a scene is the ego frame of its now
(rear axle, x forward, y left), which is where the data set gives past and future.

The data set's 4 Hz are thinned out to the 2 Hz of a Scene: every second point, nothing is interpolated. It holds no
headings: they are the direction of the driven path, over the neighbouring points,

    h_k = angle(p_k+1 - p_k-1),   h_now = 0

(a rear axle does not slip sideways); slower than STILL_M_S the heading stays as it is nearer to now. It is turned by pi
where the car drives backwards. Velocity and acceleration are the data set's own up to now, differences of positions
after it.

What WOD-E2E lacks: maps, routes, objects, lights. So there are no PDM scores, nor collisions;
``navsim_ext.evaluation.score protocol=rater_feedback`` gives the rater feedback score and distances. The routing
command is known at now alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import inside, read_json
from navsim_ext.frames import POSE_INTERVAL_S, rotate, wrap_angle
from navsim_ext.readers.log_files import LogFiles
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.scene import COMMANDS, SYNTHETIC_TOKEN_LENGTH, Annotations, Camera, Scene
from navsim_ext.shards import ShardStore

if TYPE_CHECKING:
    from navsim_ext.maps.vector_map import VectorMap

KIND, VERSION = "wod-e2e-frames", 1
PERIOD_S = 0.25  # between the points of past, future and rated trajectories
PAST, FUTURE = 16, 20  # points: t = -3.75 ... 0 s and 0.25 ... 5 s
PER_POSE = round(POSE_INTERVAL_S / PERIOD_S)
STILL_M_S = 0.5
INTENTS = ("unknown", "straight", "left", "right")  # order of the data set's codes
CAMERA_NAMES = {  # code of the data set -> name in a Scene
    1: "CAM_F0", 2: "CAM_L0", 3: "CAM_R0", 4: "CAM_L1", 5: "CAM_R1", 6: "CAM_L2", 7: "CAM_B0", 8: "CAM_R2",
}  # fmt: skip
FROM_OPTICAL = np.array(
    [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
)  # x right, y down, z forward -> x forward
NOTE_FUTURE, NOTE_RATED = "frames with a future", "frames with rated trajectories"
REPORT_FILE = "report.json"
REMEDY = "unpack the TFRecord files again with python -m navsim_ext.wod_e2e.unpack"
_NAME = re.compile(r"(.+)-(\d+)")
_EMPTY = Annotations(np.zeros((0, 7)), np.zeros((0, 3)), (), ())


@dataclass(frozen=True, eq=False)
class FrameCamera:
    """One picture of a frame, as the data set describes it. ``path`` is relative to the unpacked folder."""

    path: str
    intrinsics: NDArray[np.float64]  # [9] f_u, f_v, c_u, c_v [pixels], k1, k2, p1, p2, k3
    to_vehicle: NDArray[np.float64]  # [4,4] camera (x forward, y left, z up) -> ego
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class E2EFrame:
    """One frame of WOD-E2E, all in the ego frame of now (rear axle, x forward, y left, z up); metres, seconds."""

    id: str  # SEQUENCE-NUMBER
    time_us: int
    intent: int  # index of INTENTS
    past: NDArray[np.float64]  # [16,7] x, y, z, vx, vy, ax, ay at t = -3.75 ... 0 s
    future: NDArray[np.float64]  # [20,3] x, y, z at t = 0.25 ... 5 s; [0,3] where it is hidden
    cameras: Mapping[str, FrameCamera]  # by name of scene.CAMERAS
    rated: tuple[NDArray[np.float64], ...] = ()  # each [.,2], as many points as were given
    ratings: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0))  # [P] 0 to 10

    @property
    def sequence(self) -> str:
        return name_parts(self.id)[0]

    @property
    def speed(self) -> float:
        """m/s at now."""
        return float(np.hypot(*self.past[-1, 3:5]))

    @property
    def notes(self) -> dict[str, int]:
        """What the report of the unpacking counts."""
        return {NOTE_FUTURE: int(len(self.future) > 0), NOTE_RATED: int(len(self.rated) > 0)}

    def validate(self) -> E2EFrame:
        """Returns self; raises DataError naming the frame, the field and both values at the first broken promise."""
        name_parts(self.id)
        if not 0 <= self.intent < len(INTENTS):
            raise DataError(f"frame {self.id}: intent is {self.intent}; 0 to 3 ({', '.join(INTENTS)}) was expected")
        for name, values, shapes in (
            ("past_states", self.past, [(PAST, 7)]), ("future_states", self.future, [(FUTURE, 3), (0, 3)]),
        ):  # fmt: skip
            if values.shape not in shapes:
                raise DataError(f"frame {self.id}: {name} has shape {values.shape}; {shapes[0]} was expected")
            if not np.isfinite(values).all():
                raise DataError(f"frame {self.id}: {name} holds a value that is not finite")
        if not self.cameras:
            raise DataError(f"frame {self.id} has no camera; at least one picture was expected")
        for name, camera in self.cameras.items():
            _check_camera(camera, f"frame {self.id}: {name}")
        if len(self.rated) != len(self.ratings):
            raise DataError(f"frame {self.id}: {len(self.rated)} rated trajectories with {len(self.ratings)} ratings")
        for path, rating in zip(self.rated, self.ratings.tolist(), strict=True):
            if path.ndim != 2 or path.shape[1] != 2 or not len(path) or not np.isfinite(path).all():
                raise DataError(
                    f"frame {self.id}: a rated trajectory has shape {path.shape}; finite [., 2] was expected"
                )
            if not 0.0 <= rating <= 10.0:
                raise DataError(
                    f"frame {self.id}: preference_score is {rating}; 0 to 10 was expected, -1 where none is"
                )
        return self

    def to_arrays(self) -> dict[str, NDArray]:
        """The record of a store."""
        names = sorted(self.cameras)
        cameras = [self.cameras[name] for name in names]
        about = {
            "time_us": self.time_us, "intent": self.intent, "cameras": names, "paths": [one.path for one in cameras],
        }  # fmt: skip
        return {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "past": self.past,
            "future": self.future,
            "intrinsics": np.stack([one.intrinsics for one in cameras]),
            "to_vehicle": np.stack([one.to_vehicle for one in cameras]),
            "sizes": np.array([(one.width, one.height) for one in cameras], np.int64),
            "rated": np.concatenate([np.zeros((0, 2)), *self.rated]),
            "rated_points": np.array([len(path) for path in self.rated], np.int64),
            "ratings": self.ratings,
        }

    @classmethod
    def from_arrays(cls, token: str, arrays: Mapping[str, NDArray], where: str) -> E2EFrame:
        """The frame of a record. Raises DataError naming ``where`` for a record of another shape."""
        try:
            about = json.loads(np.asarray(arrays["about"]).tobytes())
            cameras = {
                name: FrameCamera(path, np.array(intrinsics), np.array(to_vehicle), int(size[0]), int(size[1]))
                for name, path, intrinsics, to_vehicle, size in zip(
                    about["cameras"], about["paths"], arrays["intrinsics"], arrays["to_vehicle"], arrays["sizes"],
                    strict=True,
                )
            }  # fmt: skip
            ends = np.cumsum(arrays["rated_points"])[:-1]
            rated = np.split(arrays["rated"], ends) if len(arrays["rated_points"]) else []
            past, future, ratings = (np.array(arrays[name]) for name in ("past", "future", "ratings"))
            frame = cls(token, about["time_us"], about["intent"], past, future, cameras, tuple(rated), ratings)
        except (KeyError, TypeError, ValueError, RecursionError, IndexError) as error:
            raise DataError(f"{where}: its record does not fit the format ({error!r:.200}): {REMEDY}") from error
        return frame.validate()


def name_parts(name: str) -> tuple[str, int]:
    """(sequence, number) of a frame's name; raises DataError for one of another form."""
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None or len(name) == SYNTHETIC_TOKEN_LENGTH:
        raise DataError(
            f"frame name {name!r:.80}; SEQUENCE-NUMBER was expected (and not {SYNTHETIC_TOKEN_LENGTH} characters: "
            "they mark a scene of NAVSIM's second stage)"
        )
    return found[1], int(found[2])


def _check_camera(camera: FrameCamera, where: str) -> None:
    inside(camera.path, f"{where}: path of its picture")
    for name, values, shape in (("intrinsic", camera.intrinsics, (9,)), ("extrinsic", camera.to_vehicle, (4, 4))):
        if values.shape != shape or not np.isfinite(values).all():
            raise DataError(f"{where}: {name} has shape {values.shape}; {shape} finite numbers were expected")
    turn = camera.to_vehicle[:3, :3]
    if np.abs(turn @ turn.T - np.eye(3)).max() > 1e-3 or np.linalg.det(turn) < 0 or (camera.intrinsics[:2] <= 0).any():
        raise DataError(f"{where}: its extrinsic is no rotation, or its focal lengths {camera.intrinsics[:2]} are none")


def is_wod_e2e(root: str | os.PathLike[str], split: str) -> bool:
    """Whether ``root/split`` holds unpacked frames."""
    folder = Path(root) / split
    if not split or not (folder / "store.json").is_file() or not (folder / REPORT_FILE).is_file():
        return False
    return ShardStore(folder).fingerprint.kind == KIND


class WodE2E(LogFiles):
    """Scenes of the unpacked frames in ``root/split``.

    A window of a scene filter is one frame: ``frame_interval`` counts frames of the sequence (10 a second),
    ``num_history`` is at most 8 and ``num_future`` at most 10. A split whose future is hidden (the test server's) gives
    scenes that end now. Raises MissingError for a folder that is not unpacked, DataError for a filter of longer
    windows.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        scene_filter: SceneFilter | None = None,
        required_cameras: Sequence[str] = (),
        skip_bad: bool = False,
        report_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.sensor_root = Path(root) / split
        self.root, self.split = Path(root), split
        self.required_cameras = tuple(required_cameras)
        self.store = ShardStore(self.sensor_root)
        found = (self.store.fingerprint.kind, self.store.fingerprint.fields.get("record"))
        if found != (KIND, VERSION):
            raise DataError(f"{self.sensor_root} holds {found[0]} of version {found[1]}; {KIND} of {VERSION} was "
                            f"expected: {REMEDY}")  # fmt: skip
        self._frames: dict[str, list[str]] = {}
        for token in sorted(self.store.tokens, key=name_parts):
            self._frames.setdefault(name_parts(token)[0], []).append(token)
        scene_filter = scene_filter or SceneFilter()
        if self.hides_future():
            scene_filter = dataclasses.replace(scene_filter, num_future=0)
        most = (PAST // PER_POSE, FUTURE // PER_POSE)
        if scene_filter.num_history > most[0] or scene_filter.num_future > most[1]:
            raise DataError(
                f"WOD-E2E holds {most[0]} poses up to now and {most[1]} after it; the scene filter asks for "
                f"{scene_filter.num_history} and {scene_filter.num_future}"
            )
        report = SkipReport(skip_bad, Path(report_path) if report_path is not None else None)
        place = self.sensor_root / "store.json"
        super().__init__(self.sensor_root, dict.fromkeys(sorted(self._frames), place), scene_filter, report)

    def hides_future(self) -> bool:
        """Whether no frame has a future."""
        path = self.sensor_root / REPORT_FILE
        report = read_json(path, REMEDY)
        notes = report.get("notes") if isinstance(report, dict) else None
        if not isinstance(notes, dict):
            raise DataError(f"{path} has no notes; what unpacking counted was expected: {REMEDY}")
        return not notes.get(NOTE_FUTURE)

    def frame(self, token: str) -> E2EFrame:
        """The frame as it was recorded, with its rated trajectories. Raises MissingError for an unknown token."""
        return E2EFrame.from_arrays(token, self.store.get(token), f"{self.sensor_root}, frame {token}")

    def scenes_of(self, log_name: str) -> list[Scene]:
        wanted = None if self.scene_filter.tokens is None else set(self.scene_filter.tokens)
        scenes = []
        for place, token in list(enumerate(self._frames[log_name]))[:: self.scene_filter.stride]:
            if wanted is None or token in wanted:
                try:
                    scenes.append(self._scene(self.frame(token)))
                except TriviumError as error:
                    self.report.add(error, log_name=log_name, token=token, frame=place)
        self.report.write()
        return scenes

    def map_for(self, scene: Scene) -> VectorMap:
        """Raises DataError: there is no map."""
        raise DataError(
            f"scene {scene.token} of {self._folder} has no map that PDM scores could use: WOD-E2E holds none. "
            "navsim_ext.evaluation.score protocol=rater_feedback measures its plans"
        )

    def _scene(self, frame: E2EFrame) -> Scene:
        history, future = self.scene_filter.num_history, self.scene_filter.num_future
        if future and not len(frame.future):
            raise DataError(f"frame {frame.id} of {self._folder} has no future; {future} poses were expected")
        for name in self.required_cameras:
            if name not in frame.cameras:
                raise DataError(f"frame {frame.id} has cameras {sorted(frame.cameras)}, not {name}: {REMEDY}")
            if not (self.sensor_root / frame.cameras[name].path).is_file():
                raise MissingError(
                    f"frame {frame.id}: {frame.cameras[name].path!r} is not in {self.sensor_root}: {REMEDY}"
                )
        poses, dynamics = driven(frame)
        first, last = PAST - 1 - PER_POSE * (history - 1), PAST + PER_POSE * future
        chosen = np.arange(first, last, PER_POSE)
        seconds = (chosen - (PAST - 1)) * PERIOD_S
        commands = np.tile(np.eye(4, dtype=np.float32)[COMMANDS.index("unknown")], (len(chosen), 1))
        commands[history - 1] = np.eye(4, dtype=np.float32)[COMMANDS.index(INTENTS[frame.intent])]
        return Scene(
            token=frame.id,
            log_name=frame.sequence,
            map_location="",
            num_history=history,
            frame_tokens=tuple(frame.id if t == 0 else f"{frame.id}{t:+g}s" for t in seconds.tolist()),
            timestamps_us=frame.time_us + np.rint(seconds * 1e6).astype(np.int64),
            ego_global=poses[chosen],
            ego_dynamics=dynamics[chosen].astype(np.float32),
            commands=commands,
            roadblock_ids=(),
            annotations=(_EMPTY,) * len(chosen),
            traffic_lights=((),) * len(chosen),
            cameras={name: _camera(camera) for name, camera in frame.cameras.items()},
            split=self.split,
            annotated=False,
        ).validate()


def _camera(camera: FrameCamera) -> Camera:
    f_u, f_v, c_u, c_v = camera.intrinsics[:4]
    return Camera(
        path=camera.path,
        intrinsics=np.array([[f_u, 0.0, c_u], [0.0, f_v, c_v], [0.0, 0.0, 1.0]]),
        sensor2lidar_rotation=camera.to_vehicle[:3, :3] @ FROM_OPTICAL,  # the "lidar" of such a scene is the rear axle
        sensor2lidar_translation=camera.to_vehicle[:3, 3],
        distortion=camera.intrinsics[4:].copy(),
    )


def driven(frame: E2EFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(poses [n,3], vx, vy, ax, ay in each pose's own frame [n,4]) at 4 Hz from t = -3.75 s to the end of the frame."""
    xy = np.concatenate([frame.past[:, :2], frame.future[:, :2]])
    now, n = PAST - 1, len(xy)
    before, after = np.maximum(np.arange(n) - 1, 0), np.minimum(np.arange(n) + 1, n - 1)
    moved = (xy[after] - xy[before]) / ((after - before) * PERIOD_S)[:, None]
    angle, moves = np.arctan2(moved[:, 1], moved[:, 0]), np.hypot(*moved.T) > STILL_M_S
    heading = np.zeros(n)
    for order in (range(now - 1, -1, -1), range(now + 1, n)):
        nearer = 0.0
        for k in order:
            if moves[k]:
                apart = float(wrap_angle(angle[k] - nearer))
                nearer = float(angle[k] if abs(apart) <= np.pi / 2 else wrap_angle(angle[k] + np.pi))
            heading[k] = nearer
    acceleration = (moved[after] - moved[before]) / ((after - before) * PERIOD_S)[:, None]
    velocity = np.concatenate([frame.past[:, 3:5], moved[PAST:]])
    acceleration = np.concatenate([frame.past[:, 5:7], acceleration[PAST:]])
    dynamics = np.column_stack([rotate(velocity, -heading), rotate(acceleration, -heading)])
    return np.column_stack([xy, heading]), dynamics
