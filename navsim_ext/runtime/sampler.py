"""Position-addressed batches: which items a rank sees is a pure function of (seed, epoch, position, world size).

Legend: N items, B batch size of one rank, W ranks, GB = B*W global batch; position = batches taken in this epoch.
Batch p of rank r holds entries p*GB + r*B ... + B of the epoch's order, so W ranks with batch B see in each step
exactly what one rank with batch W*B sees.
"""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from navsim_ext.errors import DataError
from navsim_ext.runtime.collectives import world
from navsim_ext.runtime.rng import ResumeMismatch, derive_seed

Grouping = Callable[[NDArray[np.int64], np.random.Generator, int], NDArray[np.int64]]


class LengthGrouped:
    """Grouping hook: items of like length share a batch, the order of batches stays random.

    The shuffled order is cut into mega-batches of ``mega`` global batches, each sorted by length (longest first), and
    the global batches are then shuffled again; the batch with the longest item comes first, so that running out of
    memory shows at once. It remains a pure function of (seed, epoch).
    """

    def __init__(self, lengths: Sequence[int], mega: int = 50) -> None:
        self.lengths = np.asarray(lengths)
        self.mega = mega

    def __call__(self, order: NDArray[np.int64], rng: np.random.Generator, global_batch: int) -> NDArray[np.int64]:
        if len(order) != len(self.lengths):
            raise DataError(f"{len(self.lengths)} lengths were given for {len(order)} items")
        size = self.mega * global_batch
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        chunks = [chunk[np.argsort(-self.lengths[chunk], kind="stable")] for chunk in chunks]
        grouped = np.concatenate(chunks)
        full = len(grouped) // global_batch * global_batch
        batches = grouped[:full].reshape(-1, global_batch)
        batches = batches[rng.permutation(len(batches))]
        if len(batches):
            longest = int(self.lengths[batches].max(axis=1).argmax())
            batches[[0, longest]] = batches[[longest, 0]]
        return np.concatenate([batches.reshape(-1), grouped[full:]])


class PositionSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler that can start anywhere; yields lists of (item index, item seed).

    ``state_dict`` is the whole truth about the data order: epoch and position plus what they are positions in.
    Raises DataError when the data cannot fill one global batch and ``drop_last`` is set, ResumeMismatch when a state
    of other data, seed, batch size or world size is loaded. Without ``drop_last`` the last batch is filled from the
    beginning of the same order, so all ranks take equally many steps.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        grouping: Grouping | None = None,
    ) -> None:
        own_rank, own_world = world()
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.shuffle, self.drop_last, self.grouping = shuffle, drop_last, grouping
        self.rank = own_rank if rank is None else rank
        self.world_size = own_world if world_size is None else world_size
        self.epoch = 0
        self.position = 0
        if num_items < 1 or (drop_last and num_items < self.global_batch):
            raise DataError(
                f"{num_items} items do not fill one global batch of {self.global_batch} ({batch_size} x "
                f"{self.world_size} processes): use a smaller batch size, more data, or drop_last=false"
            )

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches per epoch and rank."""
        batches = self.num_items / self.global_batch
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Item indices of an epoch, [len(self) * GB]."""
        rng = np.random.Generator(np.random.Philox(derive_seed(self.seed, "order", epoch)))
        order = rng.permutation(self.num_items) if self.shuffle else np.arange(self.num_items)
        if self.grouping is not None:
            order = self.grouping(order, rng, self.global_batch)
        return np.resize(order, len(self) * self.global_batch)  # cuts, or repeats from the start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.epoch, self.position)

    def _batches(self, epoch: int, position: int) -> Iterator[list[tuple[int, int]]]:
        order = self.order(epoch)
        for batch in range(position, len(self)):
            start = batch * self.global_batch + self.rank * self.batch_size
            yield [
                (int(order[place]), derive_seed(self.seed, "item", epoch, place))
                for place in range(start, start + self.batch_size)
            ]

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the start of a later epoch; the present or an earlier one changes nothing."""
        if epoch > self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "position": self.position, "seed": self.seed, "num_items": self.num_items,
            "batch_size": self.batch_size, "world_size": self.world_size, "shuffle": self.shuffle,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = self.state_dict()
        keys = [key for key in mine if key not in ("epoch", "position")]
        differing = [f"{key}: {state.get(key)!r} | {mine[key]!r}" for key in keys if state.get(key) != mine[key]]
        if differing:
            raise ResumeMismatch(
                "the data order of the checkpoint cannot be continued (checkpoint | now): " + ", ".join(differing)
                + "; use the same data and sizes, or start afresh with resume=never"
            )  # fmt: skip
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


class _SeededItems(Dataset):
    """Reads each item under its own seed: augmentation is the same whichever worker does it and after a resume."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        in_worker = get_worker_info() is not None
        saved = None if in_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
        items = []
        for index, seed in keys:
            seed_cpu(seed)
            items.append(self.dataset[index])
        if saved is not None:  # the training process keeps its own stream
            random.setstate(saved[0])
            np.random.set_state(saved[1])  # noqa: NPY002
            torch.set_rng_state(saved[2])
        return items


def seed_cpu(seed: int) -> None:
    """As :func:`navsim_ext.runtime.rng.seed_all`, leaving the generators of devices alone.

    Once per sample: ``torch.manual_seed`` would spend ten times the reading of a sample on devices it looks for.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def start_worker(then: Callable[[int], None] | None, number: int) -> None:
    """Ctrl-C reaches every process of a terminal: the training process answers it, its workers go on until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if then is not None:
        then(number)


class ResumableLoader:
    """A DataLoader over a PositionSampler whose place Lightning stores in the checkpoint and restores.

    Counts the batches that were handed out, not those that workers have prefetched, so a resume in the middle of an
    epoch continues with the very next batch for any number of workers.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: PositionSampler,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        worker_init_fn: Callable[[int], None] | None = None,
    ) -> None:
        if len(dataset) != sampler.num_items:
            raise DataError(f"the sampler was made for {sampler.num_items} items, the data set has {len(dataset)}")
        self.dataset, self.sampler = dataset, sampler
        self._loader = DataLoader(
            _SeededItems(dataset),
            batch_sampler=sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
            worker_init_fn=partial(start_worker, worker_init_fn),
            generator=torch.Generator(),  # its own: creating an iterator must not draw from the global stream
        )

    @property
    def batch_size(self) -> int:
        return self.sampler.batch_size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        if self.sampler.position >= len(self.sampler):
            self.sampler.set_epoch(self.sampler.epoch + 1)
        for batch in self._loader:
            self.sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)
