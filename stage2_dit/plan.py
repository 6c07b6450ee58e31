"""Plans one scene, or one picture with the ego state given on the command line; prints the poses, draws them.

    python -m stage2_dit.plan checkpoint=... token=0123456789abcdef data.root=... hidden.folder=CACHE output_dir=...
    python -m stage2_dit.plan checkpoint=... image=front.jpg ego.command=left ego.velocity=[8,0] \\
        hidden=live hidden.model_path=VLM output_dir=...

The picture is ``<output_dir>/<token>.png``: the front camera with the trajectory drawn in, and the bird's-eye view.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from navsim_ext.dataset import SceneDataset, build_index
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.drawing import scene_figure
from navsim_ext.frames import POSE_INTERVAL_S
from navsim_ext.hidden_cache import HiddenStateSource
from navsim_ext.readers import open_configured
from navsim_ext.runtime.config import job
from navsim_ext.scene import Scene, SceneBatch
from stage2_dit.checkpoint import LoadedPlanner, load_planner, require_hidden
from stage2_dit.diffusion.process import Exploration
from stage2_dit.diffusion.sampling import build_process, sample_chain
from stage2_dit.one_scene import VIEW, OneScene, empty_map, scene_of_picture

log = logging.getLogger(__name__)

NAME = "diffusion_il"


def find_scene(cfg: DictConfig) -> OneScene:
    """The scene that the configuration names: a token of a data set, or a picture."""
    if (cfg.token is None) == (cfg.image is None):
        raise DataError("give either token=... (with data.root and data.split) or image=..., not both or neither")
    if cfg.image is not None:
        scene = scene_of_picture(cfg.image, instantiate(cfg.ego), instantiate(cfg.camera))
        return OneScene(scene, Path(cfg.image).absolute().parent, empty_map("picture"))
    source = open_configured(cfg.data, tokens=(cfg.token,))
    scene = source.scene(cfg.token)
    try:
        vector_map = source.map_for(scene)
    except MissingError as error:
        log.warning("drawn without a map: %s", error)
        vector_map = empty_map(scene.map_location)
    return OneScene(scene, source.sensor_root, vector_map)


@torch.inference_mode()
def plan_scene(
    loaded: LoadedPlanner, batch: SceneBatch, source: HiddenStateSource, cfg: DictConfig
) -> tuple[Tensor, str]:
    """[G,F,3] trajectories of one scene, G = num_samples, and the sampler's name."""
    require_hidden(loaded, source.fingerprint, allow_mismatch=cfg.allow_hidden_mismatch)
    planner = loaded.planner.to(cfg.device)
    process = planner.process
    if cfg.process or cfg.num_steps:
        process = build_process(cfg.process or planner.process.name, cfg.num_steps).to(cfg.device)
    hidden = source.fetch(batch.token).to(cfg.device)
    batch = batch.to(cfg.device)
    conditioning = planner.condition(hidden.hidden, hidden.mask, batch.history, batch.status)
    chain = sample_chain(
        planner, conditioning, tokens=batch.token, seed=cfg.seed, group_size=cfg.num_samples,
        exploration=Exploration.preset(cfg.exploration), process=process,
    )  # fmt: skip
    return planner.trajectories(chain).cpu(), process.name


def poses_table(trajectory: np.ndarray, title: str) -> Table:
    """Time, pose, and the speed between poses of one trajectory [F,3]."""
    table = Table(title=title, title_justify="left")
    for column in ("t [s]", "x [m]", "y [m]", "heading [rad]", "speed [m/s]"):
        table.add_column(column, justify="right")
    previous = np.zeros(2)
    for i, (x, y, heading) in enumerate(trajectory.tolist(), start=1):
        speed = float(np.hypot(x - previous[0], y - previous[1])) / POSE_INTERVAL_S
        table.add_row(f"{i * POSE_INTERVAL_S:.1f}", f"{x:.2f}", f"{y:.2f}", f"{heading:+.3f}", f"{speed:.2f}")
        previous = np.array([x, y])
    return table


def draw(source: OneScene, trajectories: Mapping[str, np.ndarray], folder: Path) -> Path:
    """Writes ``<folder>/<token>.png``; without a front camera the bird's-eye view alone."""
    scene = source.scene(source.tokens[0])
    has_picture = VIEW in scene.cameras and (source.sensor_root / scene.cameras[VIEW].path).is_file()
    if VIEW in scene.cameras and not has_picture:
        log.warning("%s is missing: only the bird's-eye view is drawn", source.sensor_root / scene.cameras[VIEW].path)
    figure = scene_figure(
        scene, source.map_for(scene), trajectories, sensor_root=source.sensor_root if has_picture else None,
        title=f"{scene.token} ({scene.log_name})",
    )  # fmt: skip
    path = folder / f"{scene.token}.png"
    figure.savefig(path)
    return path


def driven(scene: Scene, horizon: int) -> dict[str, np.ndarray]:
    """The recorded future where the scene has it."""
    return {"human": scene.future_poses(horizon)} if scene.num_future >= horizon else {}


@job("plan")
def main(cfg: DictConfig) -> None:
    """Plans, prints, draws."""
    loaded = load_planner(cfg.checkpoint, ema=cfg.ema)
    source = find_scene(cfg)
    scene = source.scene(source.tokens[0])
    folder = Path(cfg.output_dir)
    index = folder / scene.token / "index"
    build_index(source, index, cameras=tuple(scene.cameras))
    options = {"index": str(index)} if "index" in cfg.hidden and cfg.hidden.index is None else {}
    hidden = instantiate(cfg.hidden, **options)
    batch = SceneDataset(index, num_history=loaded.planner.config.num_history, horizon=None, cameras=())[0]
    planned, process = plan_scene(loaded, batch, hidden, cfg)
    trajectories = {NAME if i == 0 else f"sample {i}": each.numpy() for i, each in enumerate(planned)}
    console = Console()
    console.print(poses_table(trajectories[NAME], f"{scene.token}, {process}, {cfg.exploration}"))
    truth = driven(scene, loaded.planner.config.horizon)
    for name, target in truth.items():
        distance = np.hypot(*(trajectories[NAME][:, :2] - target[:, :2]).T)
        console.print(f"against {name}: ADE {distance.mean():.2f} m, FDE {distance[-1]:.2f} m")
    console.print(f"picture: {draw(source, truth | trajectories, folder)}", soft_wrap=True)


if __name__ == "__main__":
    main()
