"""Reading ahead in a thread, and telling when storage is the limit.

Lightning's loop has the DataLoader's workers for this; :class:`ReadAhead` serves loops without them (scoring,
rollouts, evaluation), where copying in a thread costs no second copy through shared memory.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from navsim_ext.errors import DataError

log = logging.getLogger(__name__)
Item = TypeVar("Item")
END = object()
REMEDY = (
    "put the cache on a faster disk or into memory, make it smaller (python -m navsim_ext.hidden_cache.reencode "
    "codec=int8_g128), decode on the device, or give the loader more workers"
)


class WaitShare:
    """Share of the time spent waiting for data: ``waited`` and ``worked`` are called in turn."""

    def __init__(self) -> None:
        self.waited_s = self.worked_s = 0.0
        self._mark = time.perf_counter()

    def restart(self) -> None:
        """Forgets the time since the last call (validation, checkpoints)."""
        self._mark = time.perf_counter()

    def waited(self) -> None:
        now = time.perf_counter()
        self.waited_s, self._mark = self.waited_s + now - self._mark, now

    def worked(self) -> None:
        now = time.perf_counter()
        self.worked_s, self._mark = self.worked_s + now - self._mark, now

    @property
    def share(self) -> float:
        """0: never waited; 1: only waited."""
        total = self.waited_s + self.worked_s
        return self.waited_s / total if total else 0.0


class ReadAhead(Generic[Item]):
    """Iterates ``batches`` with up to ``depth`` of them fetched ahead in a thread; each iteration starts anew.

    An exception of the thread is raised where the batch would have come. ``wait.share`` is measured meanwhile.
    """

    def __init__(self, batches: Iterable[Item], depth: int = 2) -> None:
        if depth < 1:
            raise DataError(f"depth={depth}: reading ahead needs room for at least one batch")
        self.batches, self.depth = batches, depth
        self.wait = WaitShare()

    def __iter__(self) -> Iterator[Item]:
        ready: queue.Queue[Any] = queue.Queue(self.depth)
        stop = threading.Event()
        thread = threading.Thread(target=self._fill, args=(ready, stop), name="read-ahead", daemon=True)
        self.wait = WaitShare()
        thread.start()
        try:
            while True:
                item, error = ready.get()
                self.wait.waited()
                if error is not None:
                    raise error
                if item is END:
                    return
                yield item
                self.wait.worked()
        finally:
            stop.set()
            while not ready.empty():
                ready.get_nowait()
            thread.join()

    def _fill(self, ready: queue.Queue[Any], stop: threading.Event) -> None:
        try:
            for item in self.batches:
                if not self._offer(ready, stop, (item, None)):
                    return
            self._offer(ready, stop, (END, None))
        except Exception as error:  # noqa: BLE001 - it is raised in the thread that reads
            self._offer(ready, stop, (None, error))

    def _offer(self, ready: queue.Queue[Any], stop: threading.Event, entry: tuple[Any, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class WarnWhenStorageLimits(Callback):
    """Warns, once a run, when training waits for data more than ``threshold`` of the time over ``window`` batches.

    The first ``warm_up`` batches do not count: workers start and files are read for the first time.
    """

    def __init__(self, threshold: float = 0.2, window: int = 100, warm_up: int = 20) -> None:
        if not 0 < threshold < 1:
            raise DataError(f"threshold={threshold}: a share between 0 and 1")
        self.threshold, self.window, self.warm_up = threshold, window, warm_up
        self.share: float | None = None  # of the last full window
        self.warned = False
        self._seen, self._wait = 0, WaitShare()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen, self._wait = 0, WaitShare()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wait.restart()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._wait.waited()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._wait.worked()
        self._seen += 1
        if self._seen == self.warm_up:
            self._wait = WaitShare()
        elif self._seen > self.warm_up and (self._seen - self.warm_up) % self.window == 0:
            self.share, self._wait = self._wait.share, WaitShare()
            if self.share > self.threshold and not self.warned:
                self.warned = True
                log.warning("training waits for data %.0f %% of the time: %s", 100 * self.share, REMEDY)
