"""Training windows of traffic scenes: one item is a window of a scene as tokens see it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from navsim_ext.closed_loop.kinematics import TOKEN_S
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.sampler import PositionSampler, ResumableLoader
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore
from sim_agents.data.scene_tokens import Bounds, SceneTokens, collate, scene_tokens

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


class WindowDataset(Dataset[SceneTokens]):
    """Items by number; item i is scene i of the store, in the order of ids. ``random`` draws the present (from
    numpy's global state, which the training loader seeds for each item) and mirrors half of the items if ``mirror``;
    otherwise the present is the scene's own. Raises DataError for a store without scenes, and for a scene that is too
    short."""

    def __init__(
        self, folder: str | os.PathLike[str], window: Window, bounds: Bounds, *, random: bool, mirror: bool = False
    ) -> None:
        self.store = TrafficStore(folder)
        self.window, self.bounds, self.random, self.mirror = window, bounds, random, mirror
        if len(self.store) == 0:
            raise DataError(f"{folder} holds 0 traffic scenes: build some first")

    @property
    def fingerprint(self) -> Fingerprint:
        return self.store.fingerprint

    def __len__(self) -> int:
        return len(self.store)

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
        scene = self.store.load(self.store.ids[item])
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


class TrafficDataModule(pl.LightningDataModule):
    """Batches of windows from stores of ``navsim_ext.traffic.build``. The training order is a function of (seed, epoch,
    position, number of processes) alone and its place is kept in checkpoints."""

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
        super().__init__()
        self.folders = {"train": train, "val": val}
        self.window, self.bounds = window or Window(), bounds or Bounds()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.mirror, self.seed, self.num_workers = mirror, seed, num_workers
        self._datasets: dict[str, WindowDataset] = {}

    def dataset(self, name: str) -> WindowDataset:
        if self.folders[name] is None:
            raise DataError(f"no traffic scenes for {name!r}: set data.{name}=<folder of navsim_ext.traffic.build>")
        if name not in self._datasets:
            self._datasets[name] = WindowDataset(
                self.folders[name], self.window, self.bounds, random=name == "train", mirror=self.mirror
            )
            if name == "train":
                self._datasets[name].tell_crowded()
        return self._datasets[name]

    def train_dataloader(self) -> ResumableLoader:
        dataset = self.dataset("train")
        sampler = PositionSampler(len(dataset), self.batch_size, seed=self.seed)
        return ResumableLoader(dataset, sampler, collate_fn=collate, num_workers=self.num_workers)

    def transfer_batch_to_device(self, batch: SceneTokens, device: torch.device, dataloader_idx: int) -> SceneTokens:
        """Lightning's hook for batches that are no plain containers."""
        return batch.to(device)

    def val_dataloader(self) -> DataLoader | list:
        if self.folders["val"] is None:
            return []
        return DataLoader(self.dataset("val"), batch_size=self.eval_batch_size, shuffle=False, collate_fn=collate)
