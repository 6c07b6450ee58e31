"""Recorded traffic scenes, built once, as the batches of a reinforcement that drives them."""

from __future__ import annotations

import os

from navsim_ext.traffic.scene import TrafficScene
from sim_agents import StoredBatches, StoredItems, focused


class WholeScenes(StoredItems):
    """The scenes themselves; with ``reach_m`` without the road users that never come near the ego's way."""

    def __init__(self, folder: str | os.PathLike[str], reach_m: float | None) -> None:
        super().__init__(folder)
        self.reach_m = reach_m

    def __getitem__(self, item: int) -> TrafficScene:
        scene = self.scene(item)
        return scene if self.reach_m is None else focused(scene, self.reach_m)


class SceneBatches(StoredBatches):
    """Batches are lists of scenes. ``reach_m``: road users that never come so near to the ego's recorded way are left
    out; None: all are there, as traffic that reacts needs."""

    def __init__(
        self,
        train: str | os.PathLike[str],
        val: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        reach_m: float | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train, val, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, num_workers=num_workers
        )
        self.reach_m = reach_m

    def open(self, name: str) -> WholeScenes:
        return WholeScenes(self.folders[name], self.reach_m)
