"""Items spread over workers: in this process, over processes and over Ray the results are the same; deaths are told."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from navsim_ext.errors import DataError
from navsim_ext.runtime.workers import (
    KINDS,
    THREAD_VARIABLES,
    UNDER_WAY,
    FunctionWorker,
    WorkerDied,
    map_items,
    spread,
)


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Each kind of workers; those of Ray find this file."""
    if request.param == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return request.param


class Notebook:
    """Writes what it did into a file of its own name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self.path.touch()

    def process(self, number: int) -> int:
        with self.path.open("a") as stream:
            stream.write(f"{number}\n")
        if number < 0:
            raise DataError(f"{number} has no root")
        return math.isqrt(number)

    def close(self) -> None:
        with self.path.open("a") as stream:
            stream.write("closed\n")


def test_every_item_is_worked_on_once_whatever_the_workers(tmp_path, kind):
    items = [4, 9, 16, 25, 36]
    found = dict(spread(partial(Notebook, tmp_path), items, kind=kind, num_workers=2))
    assert found == {0: 2, 1: 3, 2: 4, 3: 5, 4: 6}
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().split()]
    assert sorted(int(line) for line in lines if line != "closed") == items
    assert len(list(tmp_path.iterdir())) <= (1 if kind == "sequential" else 2)


def test_the_error_of_a_worker_arrives_as_it_is(tmp_path, kind):
    with pytest.raises(DataError, match="-1 has no root"):
        dict(spread(partial(Notebook, tmp_path), [4, -1], kind=kind, num_workers=1))


def broken(name: str) -> Notebook:
    raise DataError(f"{name} finds no folder")


@pytest.mark.parametrize("kind", ["sequential", "processes"])
def test_a_worker_that_cannot_be_made_says_why(kind):
    with pytest.raises(DataError, match="finds no folder"):
        list(spread(broken, [1], kind=kind))


def kill_yourself(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_named():
    with pytest.raises(WorkerDied, match="run the same command again"):
        list(spread(partial(FunctionWorker, kill_yourself), [1, 2], kind="processes", num_workers=1))


def test_unknown_kinds_and_no_workers_are_refused():
    with pytest.raises(DataError, match="there are sequential, processes, ray"):
        spread(broken, [], kind="threads")
    with pytest.raises(DataError, match="at least 1"):
        spread(broken, [], num_workers=0)


def process_and_square(number: int) -> tuple[int, int]:
    return os.getpid(), math.isqrt(number)  # raises ValueError below 0


def test_map_keeps_the_order_and_the_errors():
    numbers = [9, 4, 1, 16]
    here, there = (list(map_items(process_and_square, numbers, num_workers=workers)) for workers in (1, 2))
    assert [root for _, root in here] == [root for _, root in there] == [3, 2, 1, 4]
    assert {pid for pid, _ in here} == {os.getpid()}
    assert os.getpid() not in {pid for pid, _ in there}
    for workers in (1, 2):
        with pytest.raises(ValueError, match="nonnegative"):
            list(map_items(process_and_square, [4, -1], num_workers=workers))


def test_items_are_taken_as_they_are_needed():
    taken = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    results = spread(partial(FunctionWorker, abs), numbers(), kind="processes", num_workers=1)
    next(results)
    results.close()
    assert len(taken) <= UNDER_WAY + 1


def own_threads(name: str) -> str | None:
    return os.environ.get(name)


def test_workers_have_the_threads_asked_for_and_this_process_keeps_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert list(map_items(own_threads, THREAD_VARIABLES, kind="processes", num_workers=2, threads=1)) == ["1"] * 4
    assert list(map_items(own_threads, ["OMP_NUM_THREADS"] * 2, num_workers=2)) == ["3", "3"]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "NUMBA_NUM_THREADS" not in os.environ
