"""Host memory for batches that is used again once nothing refers to the batch.

A fresh batch of 70 MB costs as much in page faults as in copying; pinned memory costs far more to allocate.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

SPARE = 1.25  # of the asked size: batches of a little more tokens fit as well
IDLE = 4  # buffers kept that nobody uses


class BufferPool:
    """Gives arrays whose memory returns to the pool when the last view or tensor of them is gone."""

    def __init__(self, *, pin_memory: bool = False) -> None:
        self.pin_memory = pin_memory
        self._idle: list[Tensor] = []  # flat uint8, shortest first
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An uninitialised array of this shape."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self._lock:
            fitting = next((number for number, buffer in enumerate(self._idle) if size <= len(buffer)), None)
            buffer = None if fitting is None else self._idle.pop(fitting)
        if buffer is None:
            buffer = self._allocate(int(size * SPARE))
        lent = buffer[:size].numpy()  # every view of it, numpy's or torch's, keeps this very object alive
        weakref.finalize(lent, self._give_back, buffer).atexit = False
        return lent.view(dtype).reshape(shape)

    def _allocate(self, size: int) -> Tensor:
        if self.pin_memory and torch.cuda.is_available():
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.empty(size, np.uint8))  # numpy, unlike torch, asks for huge pages: fewer TLB misses

    def _give_back(self, buffer: Tensor) -> None:
        with self._lock:
            self._idle.append(buffer)
            self._idle.sort(key=len)
            del self._idle[: max(0, len(self._idle) - IDLE)]

    def __getstate__(self) -> dict[str, Any]:
        return {"pin_memory": self.pin_memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
