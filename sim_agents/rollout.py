"""Drives recorded scenes by a traffic model and stores the rollouts.

    python -m sim_agents.rollout checkpoint=CKPT scenes=DIR rollouts=32 output_dir=DIR

Everybody who is there at the present step is driven jointly for 8 s. The store is what ``navsim_ext.realism.score``
reads. Scenes that are done are kept, so a killed command goes on; the choices belong to scene, rollout and road
user, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from omegaconf import DictConfig

from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.realism.rollouts import KIND
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import spread
from navsim_ext.shards import ShardWriter, merge
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore
from sim_agents.model.sampling import Sampling
from sim_agents.policy import TokenPolicy
from sim_agents.training.checkpoint import load_agents

logger = logging.getLogger(__name__)

SECONDS_PER_SCENE = 5.0
"""Of 32 rollouts of a small model on one core; only for the estimate that is told beforehand."""


@dataclass(frozen=True)
class RolloutSettings:
    """``chunk`` rollouts are driven at once: memory grows with it, the result does not depend on it."""

    checkpoint: str
    scenes: str
    rollouts: int = 32
    horizon_s: float = 8.0
    chunk: int = 16
    seed: int = 0
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.rollouts < 1 or self.chunk < 1:
            raise DataError(f"rollouts={self.rollouts}, chunk={self.chunk}: at least 1 of each is needed")


def drive(policy_of, scene: TrafficScene, settings: RolloutSettings) -> Mapping[str, np.ndarray]:
    """The record of a scene: ``ids`` [S], ``pose`` [R, S, H, 3] in the scene's frame, of everybody there at the
    present."""
    rows = np.flatnonzero(scene.valid[:, scene.now])
    parts = []
    for first in range(0, settings.rollouts, settings.chunk):
        world = World(
            rollouts=min(settings.chunk, settings.rollouts - first), horizon_s=settings.horizon_s, enter="never"
        )
        state = world.reset([scene])
        policy = policy_of(first)
        policy.start(state, [scene])
        while state.steps_left > 0:
            state = world.step(state, policy.act(state))
        parts.append(state.poses[:, rows, state.scenes.now + 1 :].numpy().astype(np.float64))
        frame = state.scenes.frame[0]
    pose = np.concatenate(parts)
    cosine, sine = np.cos(frame[2]), np.sin(frame[2])
    x = frame[0] + cosine * pose[..., 0] - sine * pose[..., 1]
    y = frame[1] + sine * pose[..., 0] + cosine * pose[..., 1]
    whole = np.stack([x, y, pose[..., 2] + frame[2]], axis=-1).astype(np.float32)
    return {"ids": scene.agent_id[rows], "pose": whole[:, :, : round(settings.horizon_s / STEP_S)]}


class RolloutWorker:
    """Drives one scene after another; the checkpoint is read once."""

    def __init__(self, settings: RolloutSettings, name: str) -> None:
        torch.set_num_threads(1)
        self.settings, self.store = settings, TrafficStore(settings.scenes)
        self.agents = load_agents(settings.checkpoint)

    def process(self, scene_id: str) -> tuple[str, Mapping[str, np.ndarray]]:
        return scene_id, drive(self._policy, self.store.load(scene_id), self.settings)

    def close(self) -> None:
        pass

    def _policy(self, first: int) -> TokenPolicy:
        settings = self.settings
        return self.agents.policy(sampling=settings.sampling, seed=settings.seed, first_rollout=first)


def roll_out(
    settings: RolloutSettings, output_dir: str, *, workers: str = "sequential", num_workers: int = 1,
    ray_address: str | None = None,
) -> int:  # fmt: skip
    """Drives every scene of the store; returns how many. Raises DataError for a store without scenes."""
    store = TrafficStore(settings.scenes)
    if len(store) == 0:
        raise DataError(f"{settings.scenes} holds 0 scenes")
    agents = load_agents(settings.checkpoint).fingerprint
    fields = {
        "rollouts": settings.rollouts, "horizon_s": settings.horizon_s, "seed": settings.seed,
        "sampling": vars(settings.sampling),
    }  # fmt: skip
    fingerprint = Fingerprint(KIND, fields, {"agents": agents, "scenes": store.fingerprint})
    with FolderLock(output_dir):
        with ShardWriter(output_dir, fingerprint) as writer:
            left = [scene for scene in store.ids if scene not in writer.done]
            seconds = len(left) * SECONDS_PER_SCENE * settings.rollouts / 32 / num_workers
            logger.info("%s: %d scenes (%d done before), about %.0f s on %d workers", output_dir, len(left),
                        len(store) - len(left), seconds, num_workers)  # fmt: skip
            make = partial(RolloutWorker, settings)
            results = spread(make, left, kind=workers, num_workers=num_workers, ray_address=ray_address)
            for _, (scene, record) in track(results, "rollouts, scenes", total=len(store), done=len(store) - len(left)):
                writer.put(scene, record)
        merge(output_dir)
    return len(store)


@job("rollout")
def main(cfg: DictConfig) -> None:
    settings = RolloutSettings(
        str(cfg.checkpoint), str(cfg.scenes), cfg.rollouts, cfg.horizon_s, cfg.chunk, cfg.seed, Sampling(**cfg.sampling)
    )
    count = roll_out(
        settings, str(cfg.output_dir), workers=cfg.workers, num_workers=cfg.num_workers, ray_address=cfg.ray_address
    )
    logger.info("%s: %d rollouts of each of %d scenes", cfg.output_dir, settings.rollouts, count)


if __name__ == "__main__":
    main()
