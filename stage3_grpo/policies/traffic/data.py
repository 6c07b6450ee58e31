"""Traffic scenes as the batches of a reinforcement: whole scenes by id, in an order that can be resumed."""

from __future__ import annotations

import os

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.sampler import PositionSampler, ResumableLoader
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore


class StoredScenes(Dataset[TrafficScene]):
    """Scene i of the store, in the order of ids. Raises DataError for a store without scenes."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.store = TrafficStore(folder)
        if len(self.store) == 0:
            raise DataError(f"{folder} holds 0 traffic scenes: build some with navsim_ext.traffic.build")

    @property
    def fingerprint(self) -> Fingerprint:
        return self.store.fingerprint

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, item: int) -> TrafficScene:
        return self.store.load(self.store.ids[item])


class TrafficRolloutData(pl.LightningDataModule):
    """Batches are lists of scenes. The training order is a function of (seed, epoch, position, number of processes)
    alone, and its place is kept in checkpoints."""

    def __init__(
        self,
        train: str | os.PathLike[str],
        val: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.folders = {"train": train, "val": val}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self._datasets: dict[str, StoredScenes] = {}

    def dataset(self, name: str) -> StoredScenes:
        if self.folders[name] is None:
            raise DataError(f"no traffic scenes for {name!r}: set data.{name}=<folder of navsim_ext.traffic.build>")
        if name not in self._datasets:
            self._datasets[name] = StoredScenes(self.folders[name])
        return self._datasets[name]

    def train_dataloader(self) -> ResumableLoader:
        dataset = self.dataset("train")
        sampler = PositionSampler(len(dataset), self.batch_size, seed=self.seed)
        return ResumableLoader(dataset, sampler, collate_fn=list, num_workers=self.num_workers)

    def transfer_batch_to_device(self, batch: list[TrafficScene], device, dataloader_idx: int) -> list[TrafficScene]:
        """Scenes stay on the CPU: the world moves what it needs."""
        return batch

    def val_dataloader(self) -> DataLoader | list:
        if self.folders["val"] is None:
            return []
        return DataLoader(self.dataset("val"), batch_size=self.eval_batch_size, shuffle=False, collate_fn=list)
