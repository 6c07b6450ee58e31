"""Batches for the three stages: ``(SceneBatch, HiddenBatch | None)`` from scene indices, in a reproducible order."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from navsim_ext.dataset import JoinHidden, SceneDataset
from navsim_ext.errors import DataError, MissingError
from navsim_ext.frames import NUM_FUTURE_POSES, NUM_HISTORY_POSES
from navsim_ext.runtime.sampler import PositionSampler, ResumableLoader

if TYPE_CHECKING:
    from navsim_ext.hidden_cache.source import HiddenStateSource


class SceneDataModule(pl.LightningDataModule):
    """Scene indices of up to three splits, and the hidden states that belong to them.

    Args:
        train, val, test: index folders (``python -m navsim_ext.dataset``); None where a split is not used.
        batch_size: samples per process and step in training; ``eval_batch_size`` otherwise (the same if None).
        seed: of the training order, which is a function of (seed, epoch, position, number of processes) alone.
        num_history, horizon, cameras, sensor_root: see :class:`SceneDataset`.
        hidden: source of hidden states for all splits; ``hidden_eval`` replaces it for val and test.
        num_workers, prefetch_factor, pin_memory: of the loaders.

    Training batches come from a :class:`ResumableLoader`: its place is stored in checkpoints, and W processes see in
    each step what one process with W times the batch size would. Val and test run in index order, each sample once
    per process group (Lightning shards them; only there may the last batch repeat a sample).
    """

    def __init__(
        self,
        train: str | os.PathLike[str] | None = None,
        val: str | os.PathLike[str] | None = None,
        test: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_history: int = NUM_HISTORY_POSES,
        horizon: int | None = NUM_FUTURE_POSES,
        cameras: Sequence[str] = ("CAM_F0",),
        sensor_root: str | os.PathLike[str] | None = None,
        hidden: HiddenStateSource | None = None,
        hidden_eval: HiddenStateSource | None = None,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self.folders = {"train": train, "val": val, "test": test}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.seed, self.shuffle = seed, shuffle
        self.view = {
            "num_history": num_history,
            "horizon": horizon,
            "cameras": tuple(cameras),
            "sensor_root": sensor_root,
        }
        self.hidden = hidden
        self.hidden_eval = hidden if hidden_eval is None else hidden_eval
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.datasets: dict[str, SceneDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Opens the indices that ``stage`` needs; fast, so every process does it."""
        names = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for name in names.get(stage, ("train", "val", "test")):
            if self.folders[name] is not None:
                self.dataset(name)

    def dataset(self, name: str) -> SceneDataset:
        """The dataset of ``train``, ``val`` or ``test``, opened once.

        Raises DataError if no folder was given for it, MissingError if a source of stored hidden states lacks some of
        its tokens: better now than after hours of training.
        """
        if self.folders[name] is None:
            raise DataError(f"no scene index for {name!r}: set datamodule.{name}=<folder of the index>")
        if name not in self.datasets:
            dataset = SceneDataset(self.folders[name], **self.view)
            hidden = self.hidden if name == "train" else self.hidden_eval
            if isinstance(hidden, Container):
                tokens = dataset.tokens
                missing = [token for token in tokens if token not in hidden]
                if missing:
                    found = f"{len(missing)} of {len(tokens)} samples of {self.folders[name]} have no hidden states"
                    try:
                        hidden.fetch(missing[:1])  # names the cache
                    except MissingError as error:
                        raise MissingError(f"{found}: {error}") from error
                    raise MissingError(f"{found} (first: {missing[0]}) in {hidden!r}: export them")
            self.datasets[name] = dataset
        return self.datasets[name]

    def train_dataloader(self) -> ResumableLoader:
        dataset = self.dataset("train")
        sampler = PositionSampler(len(dataset), self.batch_size, seed=self.seed, shuffle=self.shuffle)
        return ResumableLoader(
            dataset,
            sampler,
            collate_fn=JoinHidden(self.hidden),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch_factor,
        )

    def val_dataloader(self) -> DataLoader | list:
        return self._in_order("val") if self.folders["val"] is not None else []

    def test_dataloader(self) -> DataLoader:
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader:
        return self._in_order("test")

    def _in_order(self, name: str) -> DataLoader:
        return DataLoader(
            self.dataset(name),
            batch_size=self.eval_batch_size,
            shuffle=False,
            collate_fn=JoinHidden(self.hidden_eval),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
        )
