"""A scene from above, in the colours of the camera pictures; and the command that puts both side by side.

python -m navsim_ext.rendering.birds_eye data.root=... data.split=... token=... output=scene.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image, ImageDraw

from navsim_ext.errors import DataError
from navsim_ext.frames import rotate
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.readers import open_configured
from navsim_ext.rendering.camera import box_corners
from navsim_ext.rendering.ground import COLOURS, Surface, ground_of
from navsim_ext.rendering.objects import COLOURS as PAINT
from navsim_ext.rendering.objects import colour_of
from navsim_ext.rendering.renderer import render_scene
from navsim_ext.rendering.signals import signals_near
from navsim_ext.runtime.config import job
from navsim_ext.scene import Scene

SUPERSAMPLE = 2
EGO_BOX = np.array([1.461, 0.0, 0.9, 5.176, 2.297, 1.777, 0.0])  # NAVSIM's car around its rear axle
EGO_COLOUR, FUTURE_COLOUR, HISTORY_COLOUR = (20, 200, 230), (20, 200, 230), (250, 250, 250)


def birds_eye(scene: Scene, vector_map: VectorMap, size: int = 540, reach_m: float = 40.0) -> NDArray[np.uint8]:
    """[size,size,3] the frame now from above, ego heading up; the ego car stands at a quarter of the height.

    Shows the map, annotated objects, stop-line lights, past poses (white) and future poses (cyan).
    """
    pixels = size * SUPERSAMPLE
    scale = pixels / (2.0 * reach_m)
    ego = scene.ego_global[scene.now]
    image = Image.new("RGB", (pixels, pixels), COLOURS[Surface.EARTH])
    draw = ImageDraw.Draw(image)

    def to_pixels(points: NDArray[np.float64]) -> list[float]:
        """Ego frame [n,2] -> flat list of columns and rows; x is up, y is left."""
        x, y = points[:, 0], points[:, 1]
        return np.column_stack([(reach_m - y) * scale, (1.5 * reach_m - x) * scale]).ravel().tolist()

    ground = ground_of(vector_map)
    for k in ground.near(ego[:2], 2.2 * reach_m):
        ring = rotate(ground.xy[ground.offsets[k] : ground.offsets[k + 1]] - ego[:2], -ego[2])
        draw.polygon(to_pixels(ring), fill=COLOURS[Surface(int(ground.surface[k]))])
    objects = scene.annotations[scene.now]
    for box, name, token in zip(objects.boxes, objects.names, objects.track_tokens):
        key = {"vehicle": "body", "pedestrian": "cloth", "bicycle": "cloth"}.get(name, "orange")
        corners = box_corners(box)[0, :4, :2]
        draw.polygon(to_pixels(corners), fill=colour_of(key, token, False), outline=(20, 20, 20))
        nose = np.array([corners[[0, 3]].mean(axis=0), corners.mean(axis=0)])
        draw.line(to_pixels(nose), fill=(20, 20, 20), width=SUPERSAMPLE)
    for signal in signals_near(vector_map, scene.traffic_lights[scene.now], ego[:2], 2.0 * reach_m):
        u, v = to_pixels(rotate(signal.pose[None, :2] - ego[:2], -ego[2]))
        radius = 0.9 * scale
        fill = PAINT["lamp_red" if signal.is_red else "lamp_green"]
        draw.ellipse((u - radius, v - radius, u + radius, v + radius), fill=fill, outline=(20, 20, 20))
    draw.polygon(to_pixels(box_corners(EGO_BOX)[0, :4, :2]), fill=EGO_COLOUR, outline=(0, 0, 0))
    for poses, colour in (
        (scene.history_poses(), HISTORY_COLOUR),
        (scene.future_poses(min(scene.num_future, 8)), FUTURE_COLOUR),
    ):
        dots = np.array(to_pixels(poses[:, :2])).reshape(-1, 2)
        for u, v in dots:
            draw.ellipse((u - 5, v - 5, u + 5, v + 5), fill=colour, outline=(0, 0, 0))
    return np.asarray(image.reduce(SUPERSAMPLE))


def side_by_side(scene: Scene, vector_map: VectorMap, height: int = 540, camera: str = "CAM_F0") -> NDArray[np.uint8]:
    """[height, 16/9 height + height, 3]: the camera's picture beside the view from above."""
    picture = render_scene(scene, vector_map, camera, (height * 16 // 9, height))
    return np.concatenate([picture, birds_eye(scene, vector_map, height)], axis=1)


@job("picture")
def main(cfg: DictConfig) -> None:
    """Writes one scene as a PNG: camera and bird's-eye view."""
    if not str(cfg.output).endswith(".png"):
        raise DataError(f"output is {cfg.output}; a path that ends in .png was expected")
    source = open_configured(cfg.data)
    scene = source.scene(cfg.token or source.tokens[0])
    image = side_by_side(scene, source.map_for(scene), cfg.height, cfg.data.cameras[0])
    path = Path(cfg.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


if __name__ == "__main__":
    main()
