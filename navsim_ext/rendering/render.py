"""Pictures for recorded drives that come without any, drawn from map and annotations, and a scene index with them:

    python -m navsim_ext.rendering.render data.root=SCENARIOS data.split=SPLIT output_dir=DIR

    DIR/sensor_blobs/<log>/<view>/<token>.jpg   the frame now of every scene
    DIR/index/                                  scene index (as of ``navsim_ext.dataset``) whose paths lead there

Can be killed at any moment and run again: a picture that is there is whole and is kept.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image
from rich.console import Console

from navsim_ext.files import cannot_write, write_atomic
from navsim_ext.fingerprint import FILE_NAME, Fingerprint
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.readers import SceneFilter, SceneSource, SkipReport, open_configured
from navsim_ext.rendering.renderer import render_scene, scene_camera
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.preflight import measure_slice, preflight
from navsim_ext.runtime.progress import track
from navsim_ext.scene import Scene
from navsim_ext.scene_index import SceneIndex, build_index

PICTURES_FOLDER, INDEX_FOLDER = "sensor_blobs", "index"
KIND = "rendered-pictures"
VERSION = 1  # raised whenever the same options give other pictures
MEASURED = 8  # pictures drawn for the estimate


@dataclass(frozen=True)
class RenderedScenes:
    """A SceneSource whose scenes have rendered pictures below ``sensor_root``; all else is that of ``source``."""

    source: SceneSource
    sensor_root: Path
    views: tuple[str, ...] = ("CAM_F0",)
    size: tuple[int, int] = (960, 540)  # pixels, width and height

    @property
    def scene_filter(self) -> SceneFilter:
        return self.source.scene_filter

    @property
    def required_cameras(self) -> tuple[str, ...]:
        return self.views

    @property
    def report(self) -> SkipReport:
        return self.source.report

    @property
    def tokens(self) -> list[str]:
        return self.source.tokens

    @property
    def log_names(self) -> list[str]:
        return self.source.log_names

    def __len__(self) -> int:
        return len(self.source)

    def scenes_of(self, log_name: str) -> list[Scene]:
        return [self._with_cameras(scene) for scene in self.source.scenes_of(log_name)]

    def scene(self, token: str) -> Scene:
        return self._with_cameras(self.source.scene(token))

    def map_for(self, scene: Scene) -> VectorMap:
        return self.source.map_for(scene)

    def require_listed(self, found: Collection[str]) -> None:
        self.source.require_listed(found)

    def logs(self) -> Iterator[tuple[str, list[Scene]]]:
        for log_name, scenes in self.source.logs():
            yield log_name, [self._with_cameras(scene) for scene in scenes]

    def _with_cameras(self, scene: Scene) -> Scene:
        cameras = {
            view: replace(scene_camera(scene, view, self.size), path=f"{scene.log_name}/{view}/{scene.token}.jpg")
            for view in self.views
        }
        return replace(scene, cameras=cameras)

    def jpeg(self, scene: Scene, view: str, quality: int) -> bytes:
        """The picture of one view, encoded."""
        stream = io.BytesIO()
        image = render_scene(scene, self.map_for(scene), view, self.size)
        Image.fromarray(image).save(stream, "JPEG", quality=quality)
        return stream.getvalue()


def render_pictures(source: RenderedScenes, folder: Path, *, quality: int = 90) -> int:
    """Draws the pictures that are not there yet and returns their number; says first what it will cost.

    Raises FingerprintMismatch when ``folder`` holds pictures of another size, quality or renderer, PreflightError when
    they cannot fit, CannotWrite when the folder takes no file.
    """
    made = Fingerprint(KIND, {"version": VERSION, "size": list(source.size), "quality": quality})
    try:
        if (folder / FILE_NAME).is_file():
            remedy = "use the options it was begun with, or another output_dir"
            made.require_equal(Fingerprint.load(folder), mine="this command", theirs=str(folder), remedy=remedy)
        else:
            made.save(folder)
    except OSError as error:
        raise cannot_write(error, folder) from error
    total = len(source) * len(source.views)
    present = sum(1 for _ in folder.glob(f"{PICTURES_FOLDER}/*/*/*.jpg"))
    if present < total:
        _, scenes = next(source.logs())
        sizes: list[int] = []
        seconds = measure_slice(
            lambda scene: sizes.append(len(source.jpeg(scene, source.views[0], quality))), scenes[:MEASURED]
        )
        preflight(
            output_dir=folder,
            items=total - present,
            bytes_per_item=sum(sizes) / len(sizes),
            seconds_per_item=seconds,
            title=f"pictures of {len(source):,} scenes, {present:,} of {total:,} there",
        )
    drawn = 0
    wanted = ((scene, view) for _, scenes in source.logs() for scene in scenes for view in source.views)
    for scene, view in track(wanted, "pictures", total=total):
        target = source.sensor_root / scene.cameras[view].path
        if not target.is_file():
            write_atomic(target, source.jpeg(scene, view, quality), durable=False)
            drawn += 1
    return drawn


def render(cfg: DictConfig) -> SceneIndex:
    """Pictures and index of a composed ``configs/render``."""
    data, folder = cfg.data, Path(cfg.output_dir)
    source = RenderedScenes(open_configured(data), folder / PICTURES_FOLDER, tuple(data.cameras), tuple(cfg.image_size))
    with FolderLock(folder):
        drawn = render_pictures(source, folder, quality=cfg.jpeg_quality)
        index = build_index(source, folder / INDEX_FOLDER, cameras=source.views)
    message = f"{index.folder}: {len(index)} samples of {len(index.logs)} logs, {drawn} pictures drawn"
    Console(stderr=True, soft_wrap=True).print(message)
    return index


@job("render")
def main(cfg: DictConfig) -> None:
    render(cfg)


if __name__ == "__main__":
    main()
