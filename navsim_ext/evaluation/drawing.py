"""Pictures of one scene: bird's-eye view with map, agents and trajectories, and trajectories drawn into the camera.

Frames: everything is drawn in the ego frame of "now" (x forward = up in the bird's-eye view, y left). Metres.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Polygon
from matplotlib.path import Path as MarkerPath
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from navsim_ext.frames import rotate, to_global, to_local
from navsim_ext.maps.layers import PolygonLayer
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.pictures import open_picture
from navsim_ext.scene import Camera, Scene

EGO_LENGTH_M, EGO_WIDTH_M, REAR_AXLE_TO_CENTER_M = 5.176, 2.297, 1.461  # nuPlan's Pacifica
NEAR_PLANE_M = 0.5
TRACK_WIDTH_M = 1.6  # width of the band drawn into the camera picture

ROAD, INTERSECTION, CROSSWALK, CARPARK = "#e4e4e0", "#dadad6", "#f6f6f4", "#eceadf"
AGENT_COLOURS = {"vehicle": "#6b7c93", "pedestrian": "#c2563b", "bicycle": "#b8892b"}
STATIC_COLOUR = "#8a8a8a"
TRAJECTORY_COLOURS = {
    "human": "#1b1b1b",
    "diffusion_rl": "#0b7a53",
    "diffusion_il": "#2463c2",
    "vlm_text": "#8a4fbf",
    "pdm_closed": "#c77a00",
    "constant_velocity": "#b3364a",
}
_SPARE_COLOURS = ("#117a8b", "#7a5c1e", "#a03d8f", "#4d7a17", "#5b5b5b")


def trajectory_colour(name: str, position: int = 0) -> str:
    """A planner's colour: fixed for the known ones, from a spare list otherwise."""
    return TRAJECTORY_COLOURS.get(name, _SPARE_COLOURS[position % len(_SPARE_COLOURS)])


def box_corners(pose: ArrayLike, length: float, width: float) -> NDArray[np.float64]:
    """[4,2] corners front-left, rear-left, rear-right, front-right of a box centred at ``pose`` (x, y, heading)."""
    pose = np.asarray(pose, dtype=np.float64)
    half = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [length / 2, width / 2]
    return rotate(half, pose[2]) + pose[:2]


def ego_corners(rear_axle: ArrayLike) -> NDArray[np.float64]:
    """[4,2] corners of the ego box for a rear-axle pose."""
    center = to_global([REAR_AXLE_TO_CENTER_M, 0.0, 0.0], rear_axle)
    return box_corners(center, EGO_LENGTH_M, EGO_WIDTH_M)


def draw_bird_view(
    axes: Axes,
    scene: Scene,
    vector_map: VectorMap,
    trajectories: Mapping[str, ArrayLike],
    *,
    ahead_m: float = 50.0,
    behind_m: float = 12.0,
    aside_m: float = 25.0,
) -> None:
    """Draws map, agents now (solid) and where they go (fading), and each trajectory [F,3] in the ego frame of now."""
    origin = scene.ego_global[scene.now]
    reach = float(np.hypot(max(ahead_m, behind_m), aside_m)) + 10.0
    for layer, colour, order in (
        (vector_map.roadblocks, ROAD, 1),
        (vector_map.intersections, INTERSECTION, 2),
        (vector_map.carparks, CARPARK, 2),
        (vector_map.crosswalks, CROSSWALK, 3),
    ):
        _draw_layer(axes, layer, origin, reach, colour, order)
    _draw_lane_lines(axes, vector_map, origin, reach)
    _draw_signals(axes, scene, vector_map, origin)
    _draw_agents(axes, scene)
    axes.add_patch(Polygon(_display(ego_corners([0.0, 0.0, 0.0])), facecolor="#1b1b1b", alpha=0.85, zorder=8))
    for position, (name, poses) in enumerate(trajectories.items()):
        path = np.concatenate([np.zeros((1, 3)), np.asarray(poses, dtype=np.float64)])
        colour = trajectory_colour(name, position)
        line = _display(path[:, :2])
        axes.plot(line[:, 0], line[:, 1], color=colour, lw=2.0, zorder=9, label=name, solid_capstyle="round")
        axes.plot(line[1:, 0], line[1:, 1], ".", color=colour, ms=5, zorder=9)
    axes.set_xlim(-aside_m, aside_m)
    axes.set_ylim(-behind_m, ahead_m)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    _draw_metres(axes, -aside_m + 2.0, -behind_m + 2.0)
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")


def _draw_metres(axes: Axes, left: float, bottom: float, length_m: float = 10.0) -> None:
    """A bar of ``length_m`` with its length, in the corner of the page."""
    axes.plot([left, left + length_m], [bottom, bottom], color="#444444", lw=2.0, zorder=10, solid_capstyle="butt")
    axes.annotate(f"{length_m:g} m", (left + length_m / 2, bottom), xytext=(0, 3), textcoords="offset points",
                  ha="center", fontsize=7, color="#444444", zorder=10)  # fmt: skip


def _display(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ego frame to page: forward is up, left is left."""
    return np.stack([-xy[..., 1], xy[..., 0]], axis=-1)


def _local_xy(xy: NDArray[np.float64], origin: NDArray[np.float64]) -> NDArray[np.float64]:
    return rotate(xy - origin[:2], -origin[2])


def _draw_layer(
    axes: Axes, layer: PolygonLayer, origin: NDArray[np.float64], reach: float, colour: str, order: int
) -> None:
    patches = []
    for position in range(len(layer)):
        rings = [_local_xy(ring, origin) for ring, _ in layer.rings_of(position)]
        if not any(_within(ring, reach) for ring in rings):
            continue
        vertices = np.concatenate([_display(ring) for ring in rings])
        codes = np.concatenate([_ring_codes(len(ring)) for ring in rings])
        patches.append(PathPatch(MarkerPath(vertices, codes)))
    axes.add_collection(PatchCollection(patches, facecolor=colour, edgecolor="none", zorder=order))


def _within(ring: NDArray[np.float64], reach: float) -> bool:
    """Whether the bounding box of a ring comes within ``reach`` of the origin."""
    return bool((ring.min(axis=0) < reach).all() and (ring.max(axis=0) > -reach).all())


def _ring_codes(count: int) -> NDArray[np.uint8]:
    codes = np.full(count, MarkerPath.LINETO, dtype=np.uint8)
    codes[0], codes[-1] = MarkerPath.MOVETO, MarkerPath.CLOSEPOLY
    return codes


def _draw_lane_lines(axes: Axes, vector_map: VectorMap, origin: NDArray[np.float64], reach: float) -> None:
    for layer, style in ((vector_map.lanes, "-"), (vector_map.lane_connectors, ":")):
        for position in range(len(layer)):
            line = _local_xy(layer.baseline_of(position)[:, :2], origin)
            if _within(line, reach):
                page = _display(line)
                axes.plot(page[:, 0], page[:, 1], style, color="#c2c2bd", lw=0.7, zorder=4)


def _draw_signals(axes: Axes, scene: Scene, vector_map: VectorMap, origin: NDArray[np.float64]) -> None:
    connectors = vector_map.lane_connectors
    for fid, is_red in scene.traffic_lights[scene.now]:
        if fid in connectors.index:
            line = _display(_local_xy(connectors.baseline_of(connectors.index[fid])[:, :2], origin))
            axes.plot(line[:, 0], line[:, 1], color="#cc3a3a" if is_red else "#3a9a4a", lw=1.6, alpha=0.7, zorder=5)


def _draw_agents(axes: Axes, scene: Scene) -> None:
    """Boxes now, and lighter boxes of the later frames, all in the ego frame of now."""
    origin = scene.ego_global[scene.now]
    last = min(len(scene.annotations), scene.num_history + 8)
    for frame in range(scene.now, last):
        objects = scene.annotations[frame]
        centers = to_local(to_global(objects.boxes[:, [0, 1, 6]], scene.ego_global[frame]), origin)
        now = frame == scene.now
        for center, box, name in zip(centers, objects.boxes, objects.names, strict=True):
            moves = name in AGENT_COLOURS
            if not now and not moves:
                continue
            axes.add_patch(
                Polygon(
                    _display(box_corners(center, box[3], box[4])),
                    facecolor=AGENT_COLOURS.get(name, STATIC_COLOUR),
                    edgecolor="white" if now else "none",
                    lw=0.5,
                    alpha=0.95 if now else 0.10,
                    zorder=7 if now else 6,
                )
            )


def project_to_camera(points_ego: ArrayLike, camera: Camera, lidar2ego: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels and depth [n,3] (u, v, z) of points [n,3] in the ego frame. NaN for points behind the near plane.

    p_lidar = T_lidar2ego^-1 p_ego, p_cam = R^T (p_lidar - t), (u, v) = K p_cam / z. Distortion is left out.
    """
    points = np.asarray(points_ego, dtype=np.float64)
    in_lidar = (points - lidar2ego[:3, 3]) @ lidar2ego[:3, :3]
    in_camera = (in_lidar - camera.sensor2lidar_translation) @ camera.sensor2lidar_rotation
    depth = in_camera[:, 2]
    pixels = in_camera @ camera.intrinsics.T
    with np.errstate(invalid="ignore", divide="ignore"):
        uv = np.where(depth[:, None] > NEAR_PLANE_M, pixels[:, :2] / pixels[:, 2:3], np.nan)
    return np.column_stack([uv, depth])


def draw_in_camera(
    picture: Image.Image, scene: Scene, trajectories: Mapping[str, ArrayLike], *, view: str = "CAM_F0"
) -> Image.Image:
    """The camera picture with each trajectory as a band on the ground plane (z = 0 of the ego frame)."""
    camera = scene.cameras[view]
    overlay = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(overlay)
    for position, (name, poses) in enumerate(trajectories.items()):
        colour = trajectory_colour(name, position)
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        path = _dense(np.concatenate([np.zeros((1, 3)), np.asarray(poses, dtype=np.float64)]))
        normal = np.stack([-np.sin(path[:, 2]), np.cos(path[:, 2])], axis=-1) * TRACK_WIDTH_M / 2
        sides = [np.column_stack([path[:, :2] + sign * normal, np.zeros(len(path))]) for sign in (1, -1)]
        left, right = (project_to_camera(side, camera, scene.lidar2ego) for side in sides)
        for i in range(len(path) - 1):
            quad = np.array([left[i, :2], left[i + 1, :2], right[i + 1, :2], right[i, :2]])
            if np.isfinite(quad).all() and np.abs(quad).max() < 20 * max(picture.size):
                pen.polygon([tuple(corner) for corner in quad], fill=(red, green, blue, 130))
    return Image.alpha_composite(picture.convert("RGBA"), overlay).convert("RGB")


def _dense(path: NDArray[np.float64], per_segment: int = 8) -> NDArray[np.float64]:
    """Poses interpolated linearly between waypoints, headings along the shorter arc."""
    knots = np.arange(len(path))
    at = np.linspace(0, len(path) - 1, (len(path) - 1) * per_segment + 1)
    heading = np.unwrap(path[:, 2])
    return np.stack([np.interp(at, knots, column) for column in (path[:, 0], path[:, 1], heading)], axis=-1)


def scene_figure(
    scene: Scene,
    vector_map: VectorMap,
    trajectories: Mapping[str, ArrayLike],
    *,
    sensor_root: Path | None = None,
    title: str = "",
    view: str = "CAM_F0",
) -> Figure:
    """Front camera with the trajectories drawn in, beside the bird's-eye view. Raises MissingError for a lost picture.

    Without ``sensor_root``, or for a scene without that camera, only the bird's-eye view is drawn.
    """
    with_camera = sensor_root is not None and view in scene.cameras
    figure = Figure(figsize=(10.5, 4.6) if with_camera else (4.6, 5.6), dpi=110)
    if with_camera:
        picture = open_picture(Path(sensor_root) / scene.cameras[view].path)
        camera_axes, bird_axes = figure.subplots(1, 2, width_ratios=(1.9, 1.0))
        camera_axes.imshow(np.asarray(draw_in_camera(picture, scene, trajectories, view=view)))
        camera_axes.set_axis_off()
        camera_axes.set_title(title, fontsize=9, loc="left")
    else:
        bird_axes = figure.subplots()
        bird_axes.set_title(title, fontsize=9, loc="left")
    draw_bird_view(bird_axes, scene, vector_map, trajectories)
    if trajectories:
        bird_axes.legend(loc="lower right", fontsize=7, framealpha=0.9)
    figure.tight_layout(pad=0.6)
    return figure
