"""Drives recorded scenes by a traffic model, or by a rule to compare it with, and stores the rollouts.

    python -m sim_agents.rollout checkpoint=CKPT scenes=DIR rollouts=32 output_dir=DIR
    python -m sim_agents.rollout driver=idm scenes=DIR output_dir=DIR

Everybody who is there at the present step is driven jointly for 8 s. The store is what ``navsim_ext.realism.score``
reads. Scenes that are done are kept, so a killed command goes on; the choices belong to scene, rollout and road
user, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from omegaconf import DictConfig

from navsim_ext.closed_loop.policies import ConstantVelocity, Idm, Replay
from navsim_ext.closed_loop.policy import AgentPolicy
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.realism.rollouts import KIND
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import spread
from navsim_ext.shards import ShardWriter, merge
from navsim_ext.traffic.store import TrafficStore
from sim_agents.drive import driven, record_of
from sim_agents.model.sampling import Sampling
from sim_agents.training.checkpoint import load_agents

logger = logging.getLogger(__name__)

SECONDS_PER_SCENE = 2.0
"""Of 32 rollouts of a small model on one core; only for the estimate that is told beforehand."""
RULES: Mapping[str, Callable[[], AgentPolicy]] = {
    "replay": lambda: Replay(at_end="stay"),
    "constant_velocity": ConstantVelocity,
    "idm": lambda: Idm("lane"),
}
"""Drivers without a checkpoint. None of them rolls dice: one rollout is driven and stands for all."""
MODEL = "model"


@dataclass(frozen=True)
class RolloutSettings:
    """``driver``: the model of ``checkpoint``, or one of ``RULES``. ``chunk`` rollouts are driven at once: memory grows
    with it, the result does not depend on it."""

    checkpoint: str | None
    scenes: str
    driver: str = MODEL
    rollouts: int = 32
    horizon_s: float = 8.0
    chunk: int = 32
    seed: int = 0
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.rollouts < 1 or self.chunk < 1:
            raise DataError(f"rollouts={self.rollouts}, chunk={self.chunk}: at least 1 of each is needed")
        if self.driver not in (MODEL, *RULES):
            raise DataError(f"driver={self.driver}: one of {', '.join((MODEL, *RULES))} was expected")
        if (self.checkpoint is None) == (self.driver == MODEL):
            raise DataError(f"driver={self.driver}, checkpoint={self.checkpoint}: the model needs one, rules take none")


class RolloutWorker:
    """Drives one scene after another; the checkpoint is read once."""

    def __init__(self, settings: RolloutSettings, name: str) -> None:
        torch.set_num_threads(1)
        self.settings, self.store = settings, TrafficStore(settings.scenes)
        self.agents = None if settings.checkpoint is None else load_agents(settings.checkpoint)

    def process(self, scene_id: str) -> tuple[str, Mapping[str, np.ndarray]]:
        scene, settings = self.store.load(scene_id), self.settings
        count = settings.rollouts if self.agents is not None else 1
        states = driven(self._policy, scene, rollouts=count, chunk=settings.chunk, horizon_s=settings.horizon_s)
        record = record_of(states, scene, settings.horizon_s)
        if self.agents is None:
            record["pose"] = np.repeat(record["pose"], settings.rollouts, axis=0)
        return scene_id, record

    def close(self) -> None:
        pass

    def _policy(self, first: int) -> AgentPolicy:
        settings = self.settings
        if self.agents is None:
            return RULES[settings.driver]()
        return self.agents.policy(sampling=settings.sampling, seed=settings.seed, first_rollout=first)


def roll_out(
    settings: RolloutSettings, output_dir: str, *, workers: str = "sequential", num_workers: int = 1,
    ray_address: str | None = None,
) -> int:  # fmt: skip
    """Drives every scene of the store; returns how many. Raises DataError for a store without scenes."""
    store = TrafficStore(settings.scenes)
    if len(store) == 0:
        raise DataError(f"{settings.scenes} holds 0 scenes")
    fields = {"rollouts": settings.rollouts, "horizon_s": settings.horizon_s}
    parents = {"scenes": store.fingerprint}
    if settings.checkpoint is None:
        fields["driver"] = settings.driver
    else:
        fields |= {"seed": settings.seed, "sampling": vars(settings.sampling)}
        parents["agents"] = load_agents(settings.checkpoint).fingerprint
    fingerprint = Fingerprint(KIND, fields, parents)
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
        cfg.checkpoint, str(cfg.scenes), cfg.driver, cfg.rollouts, cfg.horizon_s, cfg.chunk, cfg.seed,
        Sampling(**cfg.sampling),
    )  # fmt: skip
    count = roll_out(
        settings, str(cfg.output_dir), workers=cfg.workers, num_workers=cfg.num_workers, ray_address=cfg.ray_address
    )
    logger.info("%s: %d rollouts of each of %d scenes", cfg.output_dir, settings.rollouts, count)


if __name__ == "__main__":
    main()
