"""Items spread over workers: in this process, over processes, or over a Ray cluster.

    for number, result in spread(make_worker, items, kind="processes", num_workers=8): ...   # as they are finished
    results = map_items(function, items, num_workers=8)                                      # in order

A worker is made where it works, once, by ``make_worker(name)``; it has ``process(item)`` and ``close()``. Names are
unique (``process-3``), so that each worker may write files of its own. ``make_worker``, items and results are pickled.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.runtime.processes import process_pool

KINDS = ("sequential", "processes", "ray")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
UNDER_WAY = 4  # items for each process, being worked on or waiting: enough to keep it busy, whatever their number

Item, Result = TypeVar("Item"), TypeVar("Result")
Item_contra, Result_co = TypeVar("Item_contra", contravariant=True), TypeVar("Result_co", covariant=True)


class WorkerDied(TriviumError):
    """A worker process ended without a word (killed, out of memory)."""


class Worker(Protocol[Item_contra, Result_co]):
    """What works on one item after another, in one process."""

    def process(self, item: Item_contra) -> Result_co:
        """The result of an item."""

    def close(self) -> None:
        """Ends the work. Not called in a process of a pool, nor when the command is killed."""


def spread(
    make: Callable[[str], Worker[Item, Result]],
    items: Iterable[Item],
    *,
    kind: str = "processes",
    num_workers: int = 1,
    ray_address: str | None = None,
    threads: int | None = 1,
    preload: Sequence[str] = (),
) -> Generator[tuple[int, Result], None, None]:
    """Yields (number of the item, its result) as items are finished; at most a few items per worker are under way.

    Args:
        make: makes a worker from its name, in the process that it works in.
        items: taken as they are needed.
        kind: ``sequential`` (one worker in this process), ``processes`` or ``ray``.
        num_workers: processes, or Ray actors of one CPU each.
        ray_address: None starts a local Ray, "auto" joins a running cluster, whose machines must share the folders.
        threads: of each numeric library in a worker; None leaves that to the environment.
        preload: modules that a server process loads once, for all processes to share (forkserver instead of spawn).

    Raises what a worker raised, WorkerDied when one was killed, MissingError without the package ray, DataError for an
    unknown ``kind`` or a ``num_workers`` below 1.
    """
    if kind not in KINDS:
        raise DataError(f"workers={kind!r}: there are {', '.join(KINDS)}")
    if num_workers < 1:
        raise DataError(f"num_workers={num_workers}: at least 1 is needed")
    if kind == "sequential":
        return _in_this_process(make, items)
    if kind == "processes":
        return _over_processes(make, items, num_workers, threads, preload)
    return _over_ray(make, items, num_workers, ray_address, threads)


def map_items(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    kind: str = "processes",
    num_workers: int = 1,
    ray_address: str | None = None,
    threads: int | None = None,
) -> Iterator[Result]:
    """Yields ``function`` of each item, in order. One worker works in this process, where a debugger can follow it."""
    kind = "sequential" if num_workers == 1 and kind == "processes" else kind
    make = partial(FunctionWorker, function)
    results = spread(make, items, kind=kind, num_workers=num_workers, ray_address=ray_address, threads=threads)
    waiting: dict[int, Result] = {}
    following = 0
    with closing(results):
        for number, result in results:
            waiting[number] = result
            while following in waiting:
                yield waiting.pop(following)
                following += 1


class FunctionWorker(Generic[Item, Result]):
    """A function as a worker: ``make`` is then ``partial(FunctionWorker, function)``."""

    def __init__(self, function: Callable[[Item], Result], name: str) -> None:
        self.process = function

    def close(self) -> None:
        pass


def _in_this_process(make: Callable[[str], Worker], items: Iterable[Any]) -> Generator[tuple[int, Any], None, None]:
    worker = make("0")
    try:
        for number, item in enumerate(items):
            yield number, worker.process(item)
    finally:
        worker.close()


_worker: Worker | TriviumError | None = None  # of this pool process, or why it could not be made


def _start_worker(make: Callable[[str], Worker], numbers: Any) -> None:
    global _worker
    try:
        _worker = make(f"process-{numbers.get()}")
    except TriviumError as error:
        _worker = error


def _process(item: Any) -> Any:
    if isinstance(_worker, TriviumError):
        raise _worker
    if _worker is None:
        raise WorkerDied("the pool process has no worker: its initializer did not run")
    return _worker.process(item)


def _over_processes(
    make: Callable[[str], Worker], items: Iterable[Any], num_workers: int, threads: int | None, preload: Sequence[str]
) -> Generator[tuple[int, Any], None, None]:
    context = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    numbers = context.SimpleQueue()
    for number in range(num_workers):
        numbers.put(number)
    pool = process_pool(num_workers, context=context, initializer=_start_worker, initargs=(make, numbers))
    remaining = enumerate(items)
    running: dict[Future, int] = {}

    def submit(count: int) -> None:
        with _threads(threads):  # a pool starts its processes when it is given work
            for number, item in itertools.islice(remaining, count):
                running[pool.submit(_process, item)] = number

    try:
        submit(UNDER_WAY * num_workers)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                number, result = running.pop(future), future.result()
                submit(1)
                yield number, result
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process was killed (out of memory?); what is finished is kept: run the same command again, with "
            "fewer workers if memory was short"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _over_ray(
    make: Callable[[str], Worker], items: Iterable[Any], num_workers: int, address: str | None, threads: int | None
) -> Generator[tuple[int, Any], None, None]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingError("workers=ray needs the package ray: pip install 'trivium[ray]'") from error

    started = not ray.is_initialized()
    if started:
        variables = {} if threads is None else dict.fromkeys(THREAD_VARIABLES, str(threads))
        local = {"num_cpus": num_workers, "include_dashboard": False} if address is None else {"address": address}
        ray.init(runtime_env={"env_vars": variables}, log_to_driver=False, configure_logging=False, **local)
    try:
        remote = ray.remote(num_cpus=1)(_RayWorker)
        actors = [remote.remote(make, f"ray-{number}") for number in range(num_workers)]
        yield from _over_actors(ray, actors, items)
        ray.get([actor.close.remote() for actor in actors])
    finally:
        if started:
            ray.shutdown()


class _RayWorker:
    def __init__(self, make: Callable[[str], Worker], name: str) -> None:
        self._worker = make(name)

    def process(self, item: Any) -> Any:
        return self._worker.process(item)

    def close(self) -> None:
        self._worker.close()


def _over_actors(ray: Any, actors: Sequence[Any], items: Iterable[Any]) -> Generator[tuple[int, Any], None, None]:
    """Gives each actor its next item as soon as it has finished one."""
    remaining = enumerate(items)
    running: dict[Any, tuple[int, Any]] = {}
    for actor, (number, item) in zip(actors, remaining):  # actors first: an item without an actor would be lost
        running[actor.process.remote(item)] = number, actor
    try:
        while running:
            (ready,), _ = ray.wait(list(running))
            done, actor = running.pop(ready)
            result = ray.get(ready)
            for number, item in itertools.islice(remaining, 1):
                running[actor.process.remote(item)] = number, actor
            yield done, result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TriviumError):
            raise error.cause from error
        raise
    except ray.exceptions.RayActorError as error:
        raise WorkerDied(f"a Ray worker died ({error}); run the same command again, it goes on from there") from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Processes that start within inherit ``count`` threads per numeric library: more than cores only slow down."""
    if count is None:
        yield
        return
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
