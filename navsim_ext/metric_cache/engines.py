"""Three ways to spread logs over workers: in this process, over processes, over a Ray cluster.

Each yields one LogResult per log, in the order of completion. The result on disk after the final merge is the same
for all of them, whatever the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from navsim_ext.errors import MissingError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.metric_cache.journal import LogResult
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.metric_cache.worker import LogWorker
from navsim_ext.runtime.processes import process_pool

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class WorkerDied(TriviumError):
    """A worker process ended without a word (killed, out of memory)."""


def sequential(settings: BuildSettings, fingerprint: Fingerprint, logs: Sequence[str]) -> Iterator[LogResult]:
    """One worker in this process."""
    worker = LogWorker(settings, fingerprint, "0")
    try:
        for log_name in logs:
            yield worker.process(log_name)
    finally:
        worker.close()


_worker: LogWorker | None = None  # of this pool process


def _start_worker(settings: BuildSettings, fingerprint: Fingerprint, numbers: Any) -> None:
    global _worker
    _worker = LogWorker(settings, fingerprint, f"process-{numbers.get()}")


def _process_log(log_name: str) -> LogResult:
    if _worker is None:
        raise WorkerDied("the pool process has no worker: its initializer did not run")
    return _worker.process(log_name)


def processes(
    settings: BuildSettings, fingerprint: Fingerprint, logs: Sequence[str], num_workers: int
) -> Iterator[LogResult]:
    """``num_workers`` spawned processes, one thread each. Their open shards are finished by the merge.

    Raises WorkerDied when one is killed; run the command again then, it goes on from there.
    """
    numbers = multiprocessing.get_context("spawn").SimpleQueue()
    for number in range(num_workers):
        numbers.put(number)
    with _single_threaded():
        pool = process_pool(num_workers, initializer=_start_worker, initargs=(settings, fingerprint, numbers))
        try:
            waiting = {pool.submit(_process_log, log_name) for log_name in logs}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                f"a worker process of {settings.output_dir} was killed (out of memory?); all records so far are kept: "
                "run the same command again, with a smaller num_workers if memory was short"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def ray_cluster(
    settings: BuildSettings,
    fingerprint: Fingerprint,
    logs: Sequence[str],
    num_workers: int,
    address: str | None,
) -> Iterator[LogResult]:
    """``num_workers`` Ray actors of one CPU each. ``address`` None starts a local Ray, "auto" joins a running cluster.

    On several machines ``data.root``, the maps and ``output_dir`` must be shared folders.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingError("workers=ray needs the package ray: pip install 'trivium[ray]'") from error

    started = not ray.is_initialized()
    if started:
        variables = dict.fromkeys(THREAD_VARIABLES, "1")
        local = {"num_cpus": num_workers, "include_dashboard": False} if address is None else {"address": address}
        ray.init(runtime_env={"env_vars": variables}, log_to_driver=False, configure_logging=False, **local)
    try:
        remote = ray.remote(num_cpus=1)(LogWorker)
        actors = [remote.remote(settings, fingerprint, f"ray-{number}") for number in range(num_workers)]
        yield from _over_actors(ray, actors, logs)
        ray.get([actor.close.remote() for actor in actors])
    finally:
        if started:
            ray.shutdown()


def _over_actors(ray: Any, actors: Sequence[Any], logs: Sequence[str]) -> Iterator[LogResult]:
    """Gives each actor its next log as soon as it has finished one."""
    remaining = iter(logs)
    running = {actor.process.remote(log): actor for actor, log in zip(actors, remaining)}
    try:
        while running:
            (ready,), _ = ray.wait(list(running))
            actor = running.pop(ready)
            yield ray.get(ready)
            following = next(remaining, None)
            if following is not None:
                running[actor.process.remote(following)] = actor
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TriviumError):
            raise error.cause from error
        raise
    except ray.exceptions.RayActorError as error:
        raise WorkerDied(f"a Ray worker died ({error}); run the same command again, it goes on from there") from error


class _single_threaded:
    """Children inherit one thread per numeric library: with a worker on each core, more threads only slow down."""

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))

    def __exit__(self, *exception: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
