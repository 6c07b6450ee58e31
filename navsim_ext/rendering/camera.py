"""The pinhole camera: NAVSIM's eight-camera rig, projection into pixels, and clipping at the near plane.

Legend: ego frame = rear axle on the ground, x forward, y left, z up [m]. Camera axes: x right, y down, z forward [m].
A pixel's coordinates are those of its centre: the image spans [-0.5, width - 0.5].
    X_camera = R^T (X_ego - t),   u = f_x X_camera.x / X_camera.z + c_x,   v = f_y X_camera.y / X_camera.z + c_y.
Lens distortion is not applied: pictures are those of an ideal camera with the same matrix, and the rig says so with
zero coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.errors import DataError
from navsim_ext.pdm.compiled import kernel
from navsim_ext.scene import CAMERAS, Camera

FULL_SIZE = (1920, 1080)  # pixels (width, height) of NAVSIM's pictures
FULL_FOCAL = 1545.0  # pixels at FULL_SIZE, 64 degrees across
FULL_CENTRE = (960.0, 560.0)  # pixels; the sensor sits 20 rows low
NEAR_M = 0.3  # nothing nearer to the camera plane is drawn

# x, y, z [m] in the ego frame and yaw [degrees, counter-clockwise from straight ahead] of a roof-mounted ring.
_MOUNTS = {
    "CAM_F0": (1.68, 0.00, 1.56, 0.0),
    "CAM_L0": (1.62, 0.26, 1.56, 55.0),
    "CAM_L1": (1.22, 0.42, 1.56, 110.0),
    "CAM_L2": (0.90, 0.30, 1.56, 145.0),
    "CAM_R0": (1.62, -0.26, 1.56, -55.0),
    "CAM_R1": (1.22, -0.42, 1.56, -110.0),
    "CAM_R2": (0.90, -0.30, 1.56, -145.0),
    "CAM_B0": (0.78, 0.00, 1.56, 180.0),
}


def camera_rig(size: tuple[int, int]) -> dict[str, Camera]:
    """The eight NAVSIM cameras with matrices scaled to ``size`` = (width, height) [pixels].

    The rig is given for a lidar frame equal to the ego frame (``lidar2ego`` = identity). ``path`` is empty: the
    writer of the picture fills it in. Raises DataError for a size that is not 16:9 within 2 %.
    """
    width, height = size
    if width < 1 or height < 1 or abs(width / height * FULL_SIZE[1] / FULL_SIZE[0] - 1.0) > 0.02:
        raise DataError(f"picture size {size} is not 16:9; NAVSIM's cameras are {FULL_SIZE}, e.g. (960, 540)")
    intrinsics = np.array(
        [
            [FULL_FOCAL * width / FULL_SIZE[0], 0.0, FULL_CENTRE[0] * width / FULL_SIZE[0]],
            [0.0, FULL_FOCAL * height / FULL_SIZE[1], FULL_CENTRE[1] * height / FULL_SIZE[1]],
            [0.0, 0.0, 1.0],
        ]
    )
    rig = {}
    for name in CAMERAS:
        x, y, z, yaw_deg = _MOUNTS[name]
        cos, sin = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
        right, down, forward = (sin, -cos, 0.0), (0.0, 0.0, -1.0), (cos, sin, 0.0)
        rig[name] = Camera(
            path="",
            intrinsics=intrinsics.copy(),
            sensor2lidar_rotation=np.column_stack([right, down, forward]),
            sensor2lidar_translation=np.array([x, y, z]),
            distortion=np.zeros(5),
        )
    return rig


def resize_camera(camera: Camera, old_size: tuple[int, int], new_size: tuple[int, int]) -> Camera:
    """The same camera with its matrix scaled from pictures of ``old_size`` to ``new_size`` (width, height)."""
    scale = np.array([new_size[0] / old_size[0], new_size[1] / old_size[1], 1.0])
    return replace(camera, intrinsics=scale[:, None] * camera.intrinsics)


@dataclass(frozen=True)
class CameraView:
    """A camera placed in the ego frame, ready to project."""

    intrinsics: NDArray[np.float64]  # [3,3] pixels
    rotation: NDArray[np.float64]  # [3,3] camera axes in the ego frame, as columns
    position: NDArray[np.float64]  # [3] m, ego frame

    @classmethod
    def of(cls, camera: Camera, lidar2ego: ArrayLike | None = None) -> CameraView:
        """Places ``camera`` by its sensor2lidar pose and ``lidar2ego`` [4,4] (identity if None)."""
        lidar = np.eye(4) if lidar2ego is None else np.asarray(lidar2ego, dtype=np.float64)
        return cls(
            intrinsics=camera.intrinsics,
            rotation=lidar[:3, :3] @ camera.sensor2lidar_rotation,
            position=lidar[:3, :3] @ camera.sensor2lidar_translation + lidar[:3, 3],
        )

    def scaled(self, factor: float) -> CameraView:
        """The same view with ``factor`` times as many pixels along each axis (pixel centres at integers)."""
        matrix = self.intrinsics.copy()
        matrix[0, :2] *= factor
        matrix[1, :2] *= factor
        matrix[:2, 2] = (matrix[:2, 2] + 0.5) * factor - 0.5
        return replace(self, intrinsics=matrix)

    def to_camera(self, points: ArrayLike) -> NDArray[np.float64]:
        """[...,3] ego coordinates -> [...,3] camera coordinates."""
        return (np.asarray(points) - self.position) @ self.rotation

    def to_pixels(self, points_camera: NDArray[np.float64]) -> NDArray[np.float64]:
        """[...,3] camera coordinates with z > 0 -> [...,2] pixel coordinates (u, v)."""
        homogeneous = points_camera @ self.intrinsics.T
        return homogeneous[..., :2] / homogeneous[..., 2:]

    def project(self, points: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[...,3] ego coordinates -> ([...,2] pixels, [...] depth m). Pixels are NaN where depth < NEAR_M."""
        camera = self.to_camera(points)
        depth = camera[..., 2]
        visible = depth >= NEAR_M
        safe = np.where(visible[..., None], camera, [0.0, 0.0, 1.0])
        return np.where(visible[..., None], self.to_pixels(safe), np.nan), depth

    @property
    def horizon_row(self) -> float:
        """Pixel row of the horizon in the middle column; +-inf for a camera that looks straight up or down."""
        forward_flat = np.array([*self.rotation[:2, 2], 0.0])
        direction = forward_flat @ self.rotation
        if direction[2] < 1e-6:
            return np.inf if self.rotation[2, 2] > 0 else -np.inf
        return float(self.to_pixels(direction)[1])


def clip_near(ring: NDArray[np.float64], near: float = NEAR_M) -> NDArray[np.float64]:
    """The part of a polygon [n,3] (camera coordinates) with z >= near (Sutherland and Hodgman 1974); maybe empty."""
    kept = np.empty((2 * len(ring), 3))
    count = _clip(np.ascontiguousarray(ring), near, kept)
    return kept[:count] if count >= 3 else np.empty((0, 3))


@kernel
def _clip(ring, near, kept):
    """Writes every vertex inside, and the point where an edge crosses the plane; returns how many."""
    count = 0
    for i in range(len(ring)):
        j = i + 1 if i + 1 < len(ring) else 0
        z, z_following = ring[i, 2] - near, ring[j, 2] - near
        if z >= 0.0:
            kept[count] = ring[i]
            count += 1
        if (z >= 0.0) != (z_following >= 0.0):
            share = z / (z - z_following)
            for axis in range(3):
                kept[count, axis] = ring[i, axis] + share * (ring[j, axis] - ring[i, axis])
            count += 1
    return count


def box_corners(boxes: ArrayLike) -> NDArray[np.float64]:
    """[N,8,3] corners of boxes [N,7] (x, y, z of the centre, length, width, height, yaw): bottom four, then top.

    Order of each four: front-left, rear-left, rear-right, front-right.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 7)
    return place(UNIT_BOX, boxes)


UNIT_BOX = np.array([(x, y, z) for z in (-0.5, 0.5) for x, y in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))])


def place(unit_points: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N,V,3] ego coordinates of points [V,3] given in fractions of a box's length, width and height."""
    local = unit_points[None] * boxes[:, None, 3:6]
    cos, sin = np.cos(boxes[:, 6])[:, None], np.sin(boxes[:, 6])[:, None]
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    return np.stack([x, y, local[..., 2]], axis=-1) + boxes[:, None, :3]
