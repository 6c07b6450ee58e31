"""Pictures of the vector world: a pinhole renderer for any scene that has a map.

Painter's algorithm: sky, skyline, the flat ground by rank, then objects from far to near in an order that is exact
for upright prisms with disjoint footprints (:func:`objects.paint_order`). Drawn with Pillow at twice the
size and averaged down, which smooths edges. The ground is the plane z = 0 of the ego frame; distortion coefficients
of real cameras are not applied (see ``camera``).

Legend: N annotated objects; pictures are [H,W,3] uint8 RGB; ``size`` is (width, height) in pixels.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from navsim_ext.errors import DataError
from navsim_ext.frames import POSE_INTERVAL_S, rotate
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.rendering.camera import NEAR_M, UNIT_BOX, CameraView, camera_rig, clip_near, place
from navsim_ext.rendering.ground import COLOURS as GROUND_COLOURS
from navsim_ext.rendering.ground import Surface, ground_of
from navsim_ext.rendering.objects import (
    EMISSIVE,
    Colour,
    Model,
    braking_tracks,
    colour_of,
    model_name,
    models,
    paint_order,
)
from navsim_ext.rendering.signals import OVERHEAD_M, POST_M, Signal, signal_model, signals_near
from navsim_ext.scene import Annotations, Camera, Scene

__all__ = ["braking_tracks", "camera_rig", "render", "render_instances", "render_scene", "scene_camera"]

SUPERSAMPLE = 2
GROUND_REACH_M = 140.0
OBJECT_REACH_M = 120.0
SIGNAL_REACH_M = 110.0
HAZE_M = 380.0  # distance at which 63 % of the colour is air
SKY_TOP, SKY_HORIZON = np.array([92.0, 146.0, 206.0]), np.array([208.0, 220.0, 228.0])
SUN = np.array([0.42, 0.36, 0.83])  # direction towards the sun, global axes
AMBIENT = 0.64  # share of light that reaches faces turned away from the sun
SKYLINE_M, SKYLINE_SECTORS = 700.0, 90


@dataclass(frozen=True)
class _Thing:
    """Something to paint: a model inside a box of the ego frame; ``number`` is its value in an instance picture."""

    model: str
    box: NDArray[np.float64]  # [7]
    track_token: str
    braking: bool
    number: int


def render(
    vector_map: VectorMap,
    annotations: Annotations,
    ego_global: ArrayLike,
    traffic_lights: Iterable[tuple[str, bool]],
    camera: Camera,
    size: tuple[int, int],
    *,
    lidar2ego: ArrayLike | None = None,
    braking: Collection[str] = (),
) -> NDArray[np.uint8]:
    """The picture [H,W,3] that ``camera`` takes.

    Args:
        vector_map: global metres.
        annotations: objects in the ego frame, as in the log.
        ego_global: rear axle x, y [m], heading [rad] in the frame of the map.
        traffic_lights: (lane connector id, is red).
        camera: its matrix belongs to pictures of ``size``; see :func:`scene_camera` and ``resize_camera``.
        size: (width, height).
        lidar2ego: [4,4], identity if None.
        braking: track tokens whose brake lights are on; see :func:`braking_tracks`.
    """
    ego = np.asarray(ego_global, dtype=np.float64)
    if ego.shape != (3,) or not np.isfinite(ego).all():
        raise DataError(f"ego_global is {ego.tolist()}; three finite numbers (x, y, heading) were expected")
    view = CameraView.of(camera, lidar2ego).scaled(SUPERSAMPLE)
    width, height = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
    image = _sky(view, width, height)
    draw = ImageDraw.Draw(image)
    _paint_skyline(draw, view, ego, vector_map.location, (width, height))
    _paint_ground(draw, view, vector_map, ego, (width, height))
    things = _things(vector_map, annotations, ego, traffic_lights, braking)
    _paint_shadows(draw, view, things)
    _haze(image, view)
    sun = np.array([*rotate(SUN[:2], -ego[2]), SUN[2]])
    for polygon, colour, _ in _faces(things, view, (width, height), sun):
        draw.polygon(polygon, fill=colour)
    return np.asarray(image.reduce(SUPERSAMPLE))


def render_instances(
    vector_map: VectorMap,
    annotations: Annotations,
    ego_global: ArrayLike,
    traffic_lights: Iterable[tuple[str, bool]],
    camera: Camera,
    size: tuple[int, int],
    *,
    lidar2ego: ArrayLike | None = None,
) -> NDArray[np.int32]:
    """[H,W] which annotated object each pixel shows: index + 1; 0 where none, -1 for traffic lights."""
    view = CameraView.of(camera, lidar2ego)
    image = Image.new("I", size)
    draw = ImageDraw.Draw(image)
    things = _things(vector_map, annotations, np.asarray(ego_global, dtype=np.float64), traffic_lights, ())
    for polygon, _, number in _faces(things, view, size, SUN):
        draw.polygon(polygon, fill=number)
    return np.asarray(image).astype(np.int32)


def render_scene(
    scene: Scene, vector_map: VectorMap, camera: str = "CAM_F0", size: tuple[int, int] = (960, 540)
) -> NDArray[np.uint8]:
    """The picture of the frame now, as the scene's own camera (else NAVSIM's rig) would take it."""
    own = camera in scene.cameras
    return render(
        vector_map,
        scene.annotations[scene.now],
        scene.ego_global[scene.now],
        scene.traffic_lights[scene.now],
        scene_camera(scene, camera, size),
        size,
        lidar2ego=scene.lidar2ego if own else None,
        braking=braking_tracks(scene.annotations[: scene.num_history], scene.now, POSE_INTERVAL_S),
    )


def scene_camera(scene: Scene, name: str, size: tuple[int, int]) -> Camera:
    """The scene's camera with its matrix scaled to ``size``, or the rig's where the scene has none.

    The stored matrix does not say which size it belongs to; NAVSIM's principal point lies in the middle column, so
    that its width is 2 c_x.
    """
    if name not in scene.cameras:
        rig = camera_rig(size)
        if name not in rig:
            raise DataError(f"camera {name!r} does not exist; there are {', '.join(rig)}")
        return rig[name]
    camera = scene.cameras[name]
    scale = size[0] / (2.0 * camera.intrinsics[0, 2])
    return replace(camera, intrinsics=camera.intrinsics * np.array([[scale], [scale], [1.0]]))


def _things(
    vector_map: VectorMap,
    annotations: Annotations,
    ego: NDArray[np.float64],
    traffic_lights: Iterable[tuple[str, bool]],
    braking: Collection[str],
) -> list[_Thing]:
    things = []
    for index, (box, name, token) in enumerate(zip(annotations.boxes, annotations.names, annotations.track_tokens)):
        if abs(box[0]) < OBJECT_REACH_M and abs(box[1]) < OBJECT_REACH_M and box[3:6].min() > 0.0:
            box = np.asarray(box, dtype=np.float64)
            things.append(_Thing(model_name(name, box), box, token, token in braking, index + 1))
    for signal in signals_near(vector_map, traffic_lights, ego[:2], SIGNAL_REACH_M):
        things += _signal_things(signal, ego)
    return things


def _signal_things(signal: Signal, ego: NDArray[np.float64]) -> list[_Thing]:
    xy = rotate(signal.box[:2] - ego[:2], -ego[2])
    head = np.array([*xy, *signal.box[2:6], signal.box[6] - ego[2]])
    colour = "signal_red" if signal.is_red else "signal_green"
    if signal.on_post:  # the post stands behind the head
        behind = xy + rotate(np.array([0.4, 0.0]), head[6])
        support = np.array([*behind, 0.5 * POST_M, 0.16, 0.16, POST_M, head[6]])
    else:  # a wire across the lane
        support = np.array([*xy, OVERHEAD_M + 1.05, 0.08, 4.2, 0.08, head[6]])
    return [_Thing("steel", support, "", False, -1), _Thing(colour, head, "", False, -1)]


@dataclass(frozen=True)
class _Shape:
    """A model ready to paint: F faces, each with the first three of its vertices, which give its normal."""

    vertices: NDArray[np.float64]  # [V,3]
    corners: NDArray[np.int64]  # [F,3]
    rings: tuple[list[int], ...]
    keys: tuple[str, ...]


@functools.lru_cache(maxsize=64)
def _shape(name: str) -> _Shape:
    if name == "steel":
        model = Model().prism((-0.5, 0.5), (-0.5, 0.5), (-0.5, 0.5), {"all": "steel"})
    elif name.startswith("signal_"):
        model = signal_model(name == "signal_red")
    else:
        model = models()[name]
    rings = tuple(list(indices) for indices, _ in model.faces)
    corners = np.array([ring[:3] for ring in rings])
    return _Shape(np.array(model.vertices), corners, rings, tuple(key for _, key in model.faces))


def _faces(things: list[_Thing], view: CameraView, size: tuple[int, int], sun: NDArray[np.float64]):
    """Yields (pixel polygon, RGB, number) of all visible faces, far objects first. ``sun`` is in the ego frame."""
    corners_xy = UNIT_BOX[:4] * (1.0, 1.0, 0.0)
    boxes = np.array([thing.box for thing in things]).reshape(-1, 7)
    centres = view.to_camera(boxes[:, :3])
    radius = 0.5 * np.linalg.norm(boxes[:, 3:6], axis=1)
    kept = np.flatnonzero(_in_view(centres, radius, view, size))
    footprints = place(corners_xy, boxes[kept])[:, :, :2]
    for position in paint_order(footprints, view.position[:2]) if len(kept) else ():
        thing = things[kept[position]]
        shape = _shape(thing.model)
        vertices = view.to_camera(place(shape.vertices, thing.box[None])[0])
        a, b, c = (vertices[shape.corners[:, k]] for k in range(3))
        normals = _cross(b - a, c - b)  # [F,3]
        seen = np.flatnonzero((normals * a).sum(axis=1) < 0.0)
        if not len(seen):
            continue
        haze = 1.0 - np.exp(-float(np.linalg.norm(centres[kept[position]])) / HAZE_M)
        near = vertices[:, 2].min() < NEAR_M
        pixels = None if near else view.to_pixels(vertices)
        normals = normals[seen] @ view.rotation.T
        cosine = (normals @ sun) / np.maximum(np.sqrt((normals * normals).sum(axis=1)), 1e-12)
        lit = AMBIENT + (1.0 - AMBIENT) * np.maximum(cosine, 0.0)
        keys = [shape.keys[face] for face in seen]
        shines = [key in EMISSIVE or (key == "tail" and thing.braking) for key in keys]
        base = np.array([colour_of(key, thing.track_token, thing.braking) for key in keys])
        base = base * np.where(shines, 1.0, lit)[:, None]
        colours = (base + haze * (SKY_HORIZON - base)).astype(int).tolist()
        for face, colour in zip(seen, colours):
            ring = shape.rings[face]
            if near:
                clipped = clip_near(vertices[ring])
                if not len(clipped):
                    continue
                polygon = view.to_pixels(clipped)
            else:
                polygon = pixels[ring]
            yield polygon.ravel().tolist(), tuple(colour), thing.number


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a x b of rows [F,3]; numpy's own costs more than the rest of a face."""
    x, y, z = a.T
    u, v, w = b.T
    return np.stack([y * w - z * v, z * u - x * w, x * v - y * u], axis=1)


def _in_view(
    centres: NDArray[np.float64], radius: NDArray[np.float64], view: CameraView, size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Which spheres (camera coordinates) may touch the picture."""
    inside = centres[:, 2] + radius > NEAR_M
    inverse = np.linalg.inv(view.intrinsics)
    w, h = size
    rays = np.array([(-0.5, -0.5, 1), (w - 0.5, -0.5, 1), (w - 0.5, h - 0.5, 1), (-0.5, h - 0.5, 1)]) @ inverse.T
    for k in range(4):
        normal = np.cross(rays[k], rays[(k + 1) % 4])
        inside &= centres @ normal > -radius * np.linalg.norm(normal)
    return inside


def _sky(view: CameraView, width: int, height: int) -> Image.Image:
    """Background: sky above the horizon, earth below."""
    rows = np.arange(height)
    horizon = np.clip(view.horizon_row, -1e6, 1e6)
    share = np.clip((horizon - rows) / (0.9 * view.intrinsics[1, 1] * 0.6), 0.0, 1.0)[:, None]
    colour = SKY_HORIZON + share * (SKY_TOP - SKY_HORIZON)
    colour[rows > horizon] = GROUND_COLOURS[Surface.EARTH]
    column = Image.fromarray(colour.astype(np.uint8)[:, None, :])
    return column.resize((width, height), Image.Resampling.NEAREST)


def _paint_skyline(
    draw: ImageDraw.ImageDraw, view: CameraView, ego: NDArray[np.float64], location: str, size: tuple[int, int]
) -> None:
    """Distant blocks and trees, fixed to compass directions of a location."""
    random = np.random.default_rng(zlib.crc32(location.encode()))
    azimuth = np.arange(SKYLINE_SECTORS) * 2.0 * np.pi / SKYLINE_SECTORS + random.uniform(-0.02, 0.02, SKYLINE_SECTORS)
    span = random.uniform(0.02, 0.05, SKYLINE_SECTORS)
    top = random.uniform(8.0, 46.0, SKYLINE_SECTORS) * (1.0 + (random.random(SKYLINE_SECTORS) < 0.15))
    tint = random.integers(0, 3, SKYLINE_SECTORS)
    left, right = azimuth - ego[2] + span, azimuth - ego[2] - span
    ring = np.stack(
        [
            np.stack([SKYLINE_M * np.cos(a), SKYLINE_M * np.sin(a), z], axis=-1)
            for a, z in ((left, np.zeros_like(top)), (left, top), (right, top), (right, np.zeros_like(top)))
        ],
        axis=1,
    )
    camera = view.to_camera(ring)
    colours: tuple[Colour, ...] = ((172, 182, 190), (156, 166, 176), (140, 160, 148))
    ahead = np.flatnonzero((camera[..., 2] > NEAR_M).all(axis=1))
    pixels = view.to_pixels(camera[ahead])
    shown = (pixels[..., 0].max(axis=1) > 0) & (pixels[..., 0].min(axis=1) < size[0])
    for block, index in zip(pixels[shown], ahead[shown]):
        draw.polygon(block.ravel().tolist(), fill=colours[tint[index]])


def _paint_ground(
    draw: ImageDraw.ImageDraw,
    view: CameraView,
    vector_map: VectorMap,
    ego: NDArray[np.float64],
    size: tuple[int, int],
) -> None:
    ground = ground_of(vector_map)
    chosen = ground.near(ego[:2], GROUND_REACH_M)
    if not len(chosen):
        return
    counts = ground.offsets[chosen + 1] - ground.offsets[chosen]
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    vertex = np.repeat(ground.offsets[chosen] - starts, counts) + np.arange(counts.sum())
    flat = rotate(ground.xy[vertex] - ego[:2], -ego[2])
    camera = view.to_camera(np.column_stack([flat, np.zeros(len(flat))]))
    nearest = np.minimum.reduceat(camera[:, 2], starts)
    farthest = np.maximum.reduceat(camera[:, 2], starts)
    safe = camera.copy()
    safe[:, 2] = np.maximum(safe[:, 2], NEAR_M)
    pixels = view.to_pixels(safe)
    low = np.stack([np.minimum.reduceat(pixels[:, axis], starts) for axis in (0, 1)], axis=1)
    high = np.stack([np.maximum.reduceat(pixels[:, axis], starts) for axis in (0, 1)], axis=1)
    whole = nearest >= NEAR_M
    on_picture = (high >= 0).all(axis=1) & (low < size).all(axis=1)
    for k in np.flatnonzero((farthest >= NEAR_M) & (on_picture | ~whole)):
        span = slice(starts[k], starts[k] + counts[k])
        polygon = pixels[span] if whole[k] else view.to_pixels(clip_near(camera[span]))
        if len(polygon) >= 3:
            draw.polygon(polygon.ravel().tolist(), fill=GROUND_COLOURS[Surface(int(ground.surface[chosen[k]]))])


def _paint_shadows(draw: ImageDraw.ImageDraw, view: CameraView, things: list[_Thing]) -> None:
    """A dark patch under everything that stands on the ground."""
    grown = np.array([(0.53, 0.56, -0.5), (-0.53, 0.56, -0.5), (-0.53, -0.56, -0.5), (0.53, -0.56, -0.5)])
    for thing in things:
        if thing.number > 0:
            ring = view.to_camera(place(grown, thing.box[None])[0])
            if ring[:, 2].min() >= NEAR_M:
                draw.polygon(view.to_pixels(ring).ravel().tolist(), fill=(48, 48, 50))


def _haze(image: Image.Image, view: CameraView) -> None:
    """Fades the far ground into the air: share 1 - exp(-depth / HAZE_M) by row (exact for a level camera)."""
    horizon = view.horizon_row
    if not 0 <= horizon < image.height:
        return
    first = int(np.ceil(horizon))
    last = min(image.height, first + int(0.06 * image.height) + 2)
    rows = np.arange(first, last)
    depth = view.intrinsics[1, 1] * view.position[2] / np.maximum(rows - horizon, 1e-3)
    share = (1.0 - np.exp(-depth / HAZE_M))[:, None, None]
    box = (0, first, image.width, last)
    band = np.asarray(image.crop(box), dtype=np.float64)
    image.paste(Image.fromarray((band + share * (SKY_HORIZON - band)).astype(np.uint8)), box[:2])
