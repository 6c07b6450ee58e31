"""Pools of processes that do not outlive the command that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any


def process_pool(
    workers: int,
    *,
    context: BaseContext | None = None,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> ProcessPoolExecutor:
    """``workers`` spawned processes (or of another ``context``) that end when this one does, even by kill -9.

    Those of a bare ProcessPoolExecutor would finish their task, writing beside the same command run again, and then
    wait for the next one for ever.
    """
    spawned = context or multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawned, _start, (initializer, initargs))


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # all that workers write is whole or absent, so any moment is as good
