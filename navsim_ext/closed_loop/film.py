"""``python -m navsim_ext.closed_loop.film drives=DIR scene=ID output=drive.mp4``: one drive as a moving picture.

With ``rollouts=DIR`` (of ``sim_agents.rollout``) a recorded scene goes on as one of its rollouts. Seen from above, and
from the ego's front camera beside it with ``cameras=rendered``. MP4 through the ffmpeg that imageio-ffmpeg installs;
``.gif`` and ``.png`` (animated) need nothing but Pillow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.score import rear_axle_offset
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import atomic_file
from navsim_ext.realism.rollouts import RolloutFolder, as_scene
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from navsim_ext.traffic.picture import birds_eye
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore

SUFFIXES = (".mp4", ".gif", ".png")


class FilmCamera(Protocol):
    """Draws one view of a world; ``rendering.drive_cameras.DriveCameras`` does."""

    views: Sequence[str]

    def picture(self, state: WorldState, world: int, ego: NDArray[np.float64], view: str) -> NDArray[np.uint8]: ...


def frames(
    scene: TrafficScene, *, camera: FilmCamera | None = None, every: int = 1, height: int = 360, reach_m: float = 45.0
) -> Iterator[NDArray[np.uint8]]:
    """[height,W,3] uint8 pictures of a drive from its present step on, one every ``every`` steps of 0.1 s."""
    state = _replayed(scene) if camera is not None else None
    axle = float(rear_axle_offset(state)[0]) if state is not None else 0.0
    for step in range(0, scene.num_steps - scene.now, every):
        above = birds_eye(scene, scene.now + step, reach_m=reach_m, size=height)
        parts = [np.asarray(above)[..., :3]]
        if state is not None and step <= state.step:
            then = replace(state, step=step, present=state.there[:, :, state.scenes.now + step])
            x, y, heading = then.pose[0, scene.ego].double().cpu().numpy()
            ego = np.array([x - axle * np.cos(heading), y - axle * np.sin(heading), heading])
            picture = Image.fromarray(camera.picture(then, 0, ego, camera.views[0]))
            width = round(picture.width * height / picture.height / 2) * 2
            parts.insert(0, np.asarray(picture.resize((width, height))))
        image = Image.fromarray(np.concatenate(parts, axis=1))
        ImageDraw.Draw(image).text(
            (6, 4), f"{step * STEP_S:4.1f} s  {scene.speed[scene.ego, scene.now + step]:4.1f} m/s",
            fill="black", stroke_width=1, stroke_fill="white", font=ImageFont.load_default(max(10, height // 18)),
        )  # fmt: skip
        yield np.asarray(image)


def _replayed(scene: TrafficScene) -> WorldState:
    """The state after the whole drive, as it happened."""
    world = World()
    state, policy = world.reset([scene]), Replay(at_end="stay")
    while state.steps_left >= 5:
        world.step(state, policy.act(state))
    return state


def write_film(path: Path, pictures: Iterator[NDArray[np.uint8]], fps: float) -> int:
    """Writes .mp4, .gif or animated .png atomically; returns the number of pictures.

    Raises DataError for another name or no picture, MissingError for .mp4 without imageio-ffmpeg.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"output is {path}; a name that ends in {', '.join(SUFFIXES)} was expected")
    first = next(pictures, None)
    if first is None:
        raise DataError("a film of 0 pictures: the drive ends at its present step")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        if path.suffix == ".mp4":
            return _write_mp4(temporary, first, pictures, fps)
        images = [Image.fromarray(first), *map(Image.fromarray, pictures)]
        kind = "GIF" if path.suffix == ".gif" else "PNG"
        images[0].save(temporary, kind, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
        return len(images)


def _write_mp4(path: Path, first: NDArray[np.uint8], rest: Iterator[NDArray[np.uint8]], fps: float) -> int:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingError("MP4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or write a .gif") from error
    height, width = first.shape[0] // 2 * 2, first.shape[1] // 2 * 2
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, macro_block_size=2, output_params=["-f", "mp4"], ffmpeg_log_level="error"
    )
    writer.send(None)
    count = 0
    try:
        for picture in (first, *rest):
            writer.send(np.ascontiguousarray(picture[:height, :width]))
            count += 1
    finally:
        writer.close()
    return count


@job("closed_loop_film")
def main(cfg: DictConfig) -> None:
    store = TrafficStore(cfg.drives)
    scene = store.load(store.ids[0] if cfg.scene is None else str(cfg.scene))
    if cfg.rollouts is not None:
        scene = as_scene(scene, RolloutFolder(cfg.rollouts).get(scene.id), cfg.rollout)
    camera = instantiate(cfg.cameras) if cfg.cameras else None
    total = -(-(scene.num_steps - scene.now) // cfg.every)
    pictures = frames(scene, camera=camera, every=cfg.every, height=cfg.height, reach_m=cfg.reach_m)
    count = write_film(Path(cfg.output), iter(track(pictures, "film", total=total)), 1.0 / (STEP_S * cfg.every))
    Console(stderr=True, soft_wrap=True).print(f"{cfg.output}: {count} pictures of {scene.id}", highlight=False)


if __name__ == "__main__":
    main()
