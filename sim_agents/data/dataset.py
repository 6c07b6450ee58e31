"""Training windows of traffic scenes: one item is a window of a scene as tokens see it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import TOKEN_S
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.data.scene_tokens import Bounds, SceneTokens, collate, scene_tokens
from sim_agents.data.stored import StoredBatches, StoredItems

logger = logging.getLogger(__name__)

LOOKED_AT = 500
"""Scenes whose road users are counted before a training."""


@dataclass(frozen=True)
class Window:
    """How much of a scene is one item: ``history_s`` before and ``future_s`` after the present. In training the
    present is any step that has both (``random``); scenes that are shorter are refused."""

    history_s: float = 1.0
    future_s: float = 8.0

    def __post_init__(self) -> None:
        for name in ("history_s", "future_s"):
            value = getattr(self, name)
            if value <= 0 or abs(value / TOKEN_S - round(value / TOKEN_S)) > 1e-6:
                raise DataError(f"{name}={value:g}: a positive multiple of the {TOKEN_S} s of a token was expected")

    @property
    def now(self) -> int:
        """Index of the present among the poses of a window."""
        return round(self.history_s / TOKEN_S)

    @property
    def poses(self) -> int:
        return self.now + 1 + round(self.future_s / TOKEN_S)

    def presents(self, scene: TrafficScene) -> np.ndarray:
        """Steps that can be the present: enough before and after, and the ego observed."""
        before, after = round(self.history_s / scene.dt), round(self.future_s / scene.dt)
        steps = np.arange(before, scene.num_steps - after)
        return steps[scene.valid[scene.ego, steps]]


class WindowDataset(StoredItems):
    """Items by number; item i is scene i of the store, in the order of ids. ``random`` draws the present (from
    numpy's global state, which the training loader seeds for each item) and mirrors half of the items if ``mirror``;
    otherwise the present is the scene's own. Raises DataError for a store without scenes, and for a scene that is too
    short."""

    def __init__(
        self, folder: str | os.PathLike[str], window: Window, bounds: Bounds, *, random: bool, mirror: bool = False
    ) -> None:
        super().__init__(folder)
        self.window, self.bounds, self.random, self.mirror = window, bounds, random, mirror

    def tell_crowded(self) -> tuple[int, int]:
        """(scenes, road users): of the first ``LOOKED_AT`` scenes those with more road users than the bound, and how
        many are left out; said in the log. The road users nearest to the scored ones are kept."""
        ids = self.store.ids[:LOOKED_AT]
        over = [count - self.bounds.agents for count in (self.store.load(one).num_agents for one in ids)]
        crowded = [count for count in over if count > 0]
        if crowded:
            logger.info(
                "%d of %d scenes have more than %d road users; %d of the farthest are left out (raise bounds.agents)",
                len(crowded), len(ids), self.bounds.agents, sum(crowded),
            )  # fmt: skip
        return len(crowded), sum(crowded)

    def __getitem__(self, item: int) -> SceneTokens:
        scene = self.scene(item)
        presents = self.window.presents(scene)
        own = scene.now in presents
        if len(presents) == 0 or not (self.random or own):
            raise DataError(
                f"{self.store.folder}: scene {scene.id} of {scene.num_steps} steps of {scene.dt:g} s (present "
                f"{scene.now}) has no window of {self.window.history_s:g} s before and {self.window.future_s:g} s "
                "after: build scenes that long, or ask for shorter windows"
            )
        present = int(np.random.choice(presents)) if self.random else scene.now  # noqa: NPY002 - seeded by the loader
        tokens, now, _ = scene_tokens(scene, self.bounds, now=present)
        first = now - self.window.now
        tokens = cut(tokens, first, first + self.window.poses)
        if self.random and self.mirror and np.random.random() < 0.5:  # noqa: NPY002
            tokens = mirrored(tokens)
        return tokens


def cut(scene: SceneTokens, first: int, last: int) -> SceneTokens:
    """Poses ``first`` to before ``last`` of a scene (or of a batch)."""
    span = slice(first, last)
    return replace(
        scene,
        pose=scene.pose[..., span, :],
        valid=scene.valid[..., span],
        displacement=scene.displacement[..., span, :],
        light_state=scene.light_state[..., span],
    )


def mirrored(scene: SceneTokens) -> SceneTokens:
    """The same scene seen in a mirror: left is right."""

    def flip(values: Tensor) -> Tensor:
        signs = [1.0, -1.0] + [-1.0] * (values.shape[-1] - 2)
        return values * values.new_tensor(signs)

    names = ("pose", "displacement", "piece_pose", "piece_shape", "light_pose")
    return replace(scene, **{name: flip(getattr(scene, name)) for name in names})


class TrafficDataModule(StoredBatches):
    """Batches of windows from stores of ``navsim_ext.traffic.build``."""

    collate = staticmethod(collate)

    def __init__(
        self,
        train: str | os.PathLike[str],
        val: str | os.PathLike[str] | None = None,
        *,
        window: Window | None = None,
        bounds: Bounds | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        mirror: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train, val, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, num_workers=num_workers
        )
        self.window, self.bounds, self.mirror = window or Window(), bounds or Bounds(), mirror

    def open(self, name: str) -> WindowDataset:
        made = WindowDataset(self.folders[name], self.window, self.bounds, random=name == "train", mirror=self.mirror)
        if name == "train":
            made.tell_crowded()
        return made

    def transfer_batch_to_device(self, batch: SceneTokens, device: torch.device, dataloader_idx: int) -> SceneTokens:
        """Lightning's hook for batches that are no plain containers."""
        return batch.to(device)
