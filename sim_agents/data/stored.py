"""Stores of traffic scenes as batches of a training: what cloning, planners of the ego and reinforcement share.

What an item is differs: a window of tokens, an example of a drive, the scene itself. The order does not: it is a
function of (seed, epoch, position, number of processes) alone, and its place is kept in checkpoints.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.sampler import PositionSampler, ResumableLoader
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore


class StoredItems(Dataset, ABC):
    """Item i is made of scene i of the store, in the order of ids. Raises DataError for a store without scenes."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.store = TrafficStore(folder)
        if len(self.store) == 0:
            raise DataError(f"{folder} holds 0 traffic scenes: build some with navsim_ext.traffic.build")

    @property
    def fingerprint(self) -> Fingerprint:
        return self.store.fingerprint

    def __len__(self) -> int:
        return len(self.store)

    def scene(self, number: int) -> TrafficScene:
        return self.store.load(self.store.ids[number])

    @abstractmethod
    def __getitem__(self, item: int) -> Any: ...


class StoredBatches(pl.LightningDataModule, ABC):
    """Batches from the stores ``train`` and ``val`` (None: no validation), each opened when it is first asked for."""

    collate = staticmethod(list)
    """Makes a batch of items; a list of them stays as it is, on the CPU."""

    def __init__(
        self,
        train: str | os.PathLike[str],
        val: str | os.PathLike[str] | None,
        *,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.folders = {"train": train, "val": val}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self._datasets: dict[str, StoredItems] = {}

    @abstractmethod
    def open(self, name: str) -> StoredItems:
        """The items of ``train`` or ``val``."""

    def dataset(self, name: str) -> StoredItems:
        if self.folders[name] is None:
            raise DataError(f"no traffic scenes for {name!r}: set data.{name}=<folder of navsim_ext.traffic.build>")
        if name not in self._datasets:
            self._datasets[name] = self.open(name)
        return self._datasets[name]

    def train_dataloader(self) -> ResumableLoader:
        dataset = self.dataset("train")
        sampler = PositionSampler(len(dataset), self.batch_size, seed=self.seed)
        return ResumableLoader(dataset, sampler, collate_fn=self.collate, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader | list:
        if self.folders["val"] is None:
            return []
        return DataLoader(self.dataset("val"), batch_size=self.eval_batch_size, shuffle=False, collate_fn=self.collate)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Lists stay on the CPU: whoever reads them moves what it needs."""
        return batch
