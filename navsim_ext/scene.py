"""The written contracts: Scene (one NAVSIM window as it was recorded) and SceneBatch (what a planner sees of it).

Legend: T frames of a window (history + future, 2 Hz, oldest first), H history frames (the last one is "now"),
N annotated objects of a frame, B samples, F future poses.
Frames: "global" is UTM (float64); "ego" is the rear axle of that frame's own time, x forward, y left.
Units: metres, radians, seconds; time stamps in integer microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.frames import POSE_INTERVAL_S, to_local

if TYPE_CHECKING:  # imported where it is used: commands that only make or read Scenes save its 130 MB per process
    import torch
    from torch import Tensor

MAX_JITTER_S = 0.25  # a frame further from its place is another frame; nuPlan drops single sweeps of 0.05 s
MAX_SPEED = 100.0  # m/s; beyond it two drives meet
CAMERAS = ("CAM_F0", "CAM_L0", "CAM_L1", "CAM_L2", "CAM_R0", "CAM_R1", "CAM_R2", "CAM_B0")
COMMANDS = ("left", "straight", "right", "unknown")  # order of the driving_command one-hot
OBJECT_TYPES = (
    "vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object",
)  # fmt: skip
SYNTHETIC_TOKEN_LENGTH = 17
MAP_LOCATIONS = ("sg-one-north", "us-ma-boston", "us-nv-las-vegas-strip", "us-pa-pittsburgh-hazelwood")


@dataclass(frozen=True)
class Annotations:
    """Objects of one frame, in the ego frame of that frame."""

    boxes: NDArray[np.floating]  # [N,7] x, y, z, length, width, height, yaw
    velocities: NDArray[np.floating]  # [N,3] m/s, ego axes, no ego-motion compensation
    names: tuple[str, ...]  # N of OBJECT_TYPES
    track_tokens: tuple[str, ...]  # N, constant over time for one object


@dataclass(frozen=True, eq=False)
class GlobalObjects:
    """Objects of one instant in global coordinates (frames of the second stage have no ego pose after now)."""

    poses: NDArray[np.float64]  # [N,3] box centre x, y, heading
    velocities: NDArray[np.float64]  # [N,2] m/s
    sizes: NDArray[np.float64]  # [N,3] length, width, height [m]
    names: tuple[str, ...]  # N of OBJECT_TYPES
    track_tokens: tuple[str, ...]  # N


@dataclass(frozen=True)
class Camera:
    """One picture and how it was taken. ``path`` is relative to the sensor root of the split."""

    path: str
    intrinsics: NDArray[np.float64]  # [3,3] pixels
    sensor2lidar_rotation: NDArray[np.float64]  # [3,3]; camera axes x right, y down, z forward
    sensor2lidar_translation: NDArray[np.float64]  # [3]
    distortion: NDArray[np.float64]  # [5] k1, k2, p1, p2, k3


@dataclass(frozen=True)
class Scene:
    """One window of a log: ``num_history`` frames up to now and the frames after it."""

    token: str  # NAVSIM token of the frame "now": 16 hex characters
    log_name: str
    map_location: str
    num_history: int
    frame_tokens: tuple[str, ...]  # T
    timestamps_us: NDArray[np.int64]  # [T]
    ego_global: NDArray[np.float64]  # [T,3] rear axle x, y, heading
    ego_dynamics: NDArray[np.float32]  # [T,4] vx, vy, ax, ay in the ego frame
    commands: NDArray[np.float32]  # [T,4] one-hot of COMMANDS
    roadblock_ids: tuple[str, ...]  # route, from the frame "now"
    annotations: tuple[Annotations, ...]  # T
    traffic_lights: tuple[tuple[tuple[str, bool], ...], ...]  # T x (lane_connector_id, is_red)
    cameras: Mapping[str, Camera]  # of the frame "now", by name of CAMERAS
    split: str = ""
    map_label: str = "nuplan"  # "approx" for maps that were reconstructed: every score from them says so
    lidar2ego: NDArray[np.float64] = field(default_factory=lambda: np.eye(4))  # [4,4]
    annotated: bool = True  # False: the split hides its objects (test servers); scoring refuses such a scene
    later_objects: tuple[GlobalObjects, ...] = ()  # objects 0.5, 1.0 ... s after the last frame (second stage)
    later_lights: tuple[tuple[tuple[str, bool], ...], ...] = ()  # lights of those instants; fewer: none known
    original_token: str = ""  # of a second-stage scene: the first-stage scene that it continues

    @property
    def is_synthetic(self) -> bool:
        """A scene of NAVSIM 2's second stage: its token has 17 characters, a recorded one 16."""
        return len(self.token) == SYNTHETIC_TOKEN_LENGTH

    @property
    def now(self) -> int:
        """Index of the frame "now"."""
        return self.num_history - 1

    @property
    def num_future(self) -> int:
        return len(self.timestamps_us) - self.num_history

    def history_poses(self) -> NDArray[np.float64]:
        """[H,3] ego poses up to now, in the ego frame of now (the last one is zero)."""
        return to_local(self.ego_global[: self.num_history], self.ego_global[self.now])

    def future_poses(self, count: int) -> NDArray[np.float64]:
        """[count,3] driven poses after now, in the ego frame of now. Raises DataError if the log ends before."""
        if count > self.num_future:
            raise DataError(
                f"scene {self.token} of {self.log_name} holds {self.num_future} future frames, {count} were asked "
                "for: read it with a larger num_future or shorten the horizon"
            )
        future = self.ego_global[self.num_history : self.num_history + count]
        return to_local(future, self.ego_global[self.now])

    def status(self) -> NDArray[np.float32]:
        """[8] of the frame now: command one-hot (left, straight, right, unknown), vx, vy, ax, ay."""
        return np.concatenate([self.commands[self.now], self.ego_dynamics[self.now]]).astype(np.float32)

    def validate(self) -> Scene:
        """Returns self; raises DataError naming log, token, field and both values at the first broken promise."""
        frames = len(self.timestamps_us)
        expected = {
            "frame_tokens": (len(self.frame_tokens), frames),
            "ego_global": (self.ego_global.shape, (frames, 3)),
            "ego_dynamics": (self.ego_dynamics.shape, (frames, 4)),
            "commands": (self.commands.shape, (frames, 4)),
            "annotations": (len(self.annotations), frames),
            "traffic_lights": (len(self.traffic_lights), frames),
        }
        for name, (found, wanted) in expected.items():
            if found != wanted:
                raise DataError(f"{self._where()}: {name} has shape {found}, {wanted} was expected")
        if not 1 <= self.num_history <= frames:
            raise DataError(f"{self._where()}: num_history {self.num_history} does not fit {frames} frames")
        for name in ("ego_global", "ego_dynamics"):
            values = getattr(self, name)
            if not np.isfinite(values).all():
                frame = int(np.argwhere(~np.isfinite(values))[0, 0])
                raise DataError(f"{self._where()}: {name} of frame {frame} is {values[frame]}; finite was expected")
        self._require_continuity()
        for frame, objects in enumerate(self.annotations):
            count = len(objects.names)
            lengths = (len(objects.boxes), len(objects.velocities), count, len(objects.track_tokens))
            if len(set(lengths)) != 1:
                raise DataError(
                    f"{self._where()}: frame {frame} has boxes, velocities, names, track_tokens of unequal length "
                    f"{lengths}"
                )
            if count and not (np.isfinite(objects.boxes).all() and np.isfinite(objects.velocities).all()):
                raise DataError(f"{self._where()}: frame {frame} has a box or velocity that is not finite")
        return self

    def _require_continuity(self) -> None:
        """Frames of one drive, 0.5 s apart: whoever reads them takes frame k to be at k / 2 s."""
        steps = np.diff(self.timestamps_us) * 1e-6
        if not (steps > 0).all():
            raise DataError(f"{self._where()}: time stamps do not increase: {self.timestamps_us.tolist()}")
        apart = np.flatnonzero(np.abs(steps - POSE_INTERVAL_S) > MAX_JITTER_S)
        if len(apart):
            k = int(apart[0])
            raise DataError(
                f"{self._where()}: {steps[k]:.3f} s lie between its frames {k} and {k + 1}; {POSE_INTERVAL_S} s within "
                f"{MAX_JITTER_S} s were expected: frames are missing, or two drives meet in this log (skip_bad=true "
                "leaves such windows out)"
            )
        moved = np.hypot(*np.diff(self.ego_global[:, :2], axis=0).T)
        jumps = np.flatnonzero(moved > MAX_SPEED * steps)
        if len(jumps):
            k = int(jumps[0])
            raise DataError(
                f"{self._where()}: the ego car moves {moved[k]:.1f} m in the {steps[k]:.3f} s between its frames {k}"
                f" and {k + 1}; at most {MAX_SPEED:g} m/s were expected: two drives meet in this log (skip_bad=true "
                "leaves such windows out)"
            )

    def _where(self) -> str:
        return f"log {self.log_name}, scene {self.token}"


@dataclass
class SceneBatch:
    """What the planner sees of B samples; the only thing that crosses from the base to a stage.

    ``history`` [B,H,3] float32: poses at -1.5, -1.0, -0.5, 0 s in the ego frame of now, oldest first.
    ``status`` [B,8] float32: command one-hot (left, straight, right, unknown), vx, vy, ax, ay.
    ``target`` [B,F,3] float32: driven poses at 0.5, 1.0 ... s; None at inference.
    ``cameras``: per sample {view: path relative to the sensor root}.
    """

    token: list[str]
    log_name: list[str]
    history: Tensor
    status: Tensor
    target: Tensor | None = None
    cameras: Sequence[Mapping[str, str]] = ()

    def __len__(self) -> int:
        return len(self.token)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SceneBatch:
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        return SceneBatch(
            self.token, self.log_name, move(self.history), move(self.status), move(self.target), self.cameras
        )

    def pin_memory(self) -> SceneBatch:
        pin = lambda tensor: None if tensor is None else tensor.pin_memory()  # noqa: E731
        return SceneBatch(
            self.token, self.log_name, pin(self.history), pin(self.status), pin(self.target), self.cameras
        )

    def validate(self) -> SceneBatch:
        """Returns self; raises DataError naming tokens, field and both shapes at the first broken promise."""
        import torch

        batch = len(self.token)
        if batch == 0:
            raise DataError("a SceneBatch of 0 samples: check the scene filter and the split")
        if len(self.log_name) != batch:
            raise DataError(f"SceneBatch has {batch} tokens and {len(self.log_name)} log names")
        wanted = {"history": (batch, self.history.shape[1], 3), "status": (batch, 8)}
        if self.target is not None:
            wanted["target"] = (batch, self.target.shape[1], 3)
        for name, shape in wanted.items():
            values = getattr(self, name)
            if tuple(values.shape) != shape:
                raise DataError(f"SceneBatch.{name} has shape {tuple(values.shape)}, {shape} was expected")
            if values.dtype != torch.float32:
                raise DataError(f"SceneBatch.{name} has dtype {values.dtype}, torch.float32 was expected")
            bad = ~torch.isfinite(values).reshape(batch, -1).all(dim=1)
            if bool(bad.any()):
                tokens = [self.token[i] for i in bad.nonzero().flatten().tolist()]
                raise DataError(f"SceneBatch.{name} is not finite for tokens {tokens[:8]}")
        return self


def collate_scenes(samples: Sequence[SceneBatch]) -> SceneBatch:
    """Joins SceneBatches along the batch axis; a target missing in one sample is an error, not None for all."""
    import torch

    if not samples:
        raise DataError("cannot collate 0 samples")
    with_target = [sample.target is not None for sample in samples]
    if any(with_target) != all(with_target):
        missing = [sample.token[0] for sample, has in zip(samples, with_target) if not has]
        raise DataError(f"tokens {missing[:8]} have no target while others have one: read them with future frames")
    return SceneBatch(
        token=[token for sample in samples for token in sample.token],
        log_name=[name for sample in samples for name in sample.log_name],
        history=torch.cat([sample.history for sample in samples]),
        status=torch.cat([sample.status for sample in samples]),
        target=torch.cat([sample.target for sample in samples]) if all(with_target) else None,
        cameras=[cameras for sample in samples for cameras in sample.cameras],
    )
