"""Progress bars with rates for everything long that is not a Lightning run (importing nothing heavy)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

Item = TypeVar("Item")
LINE_INTERVAL_S = 30.0  # between log lines where there is no terminal to draw a bar on


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, done: int = 0, console: Console | None = None
) -> Iterator[Item]:
    """Iterates with a progress bar: description, m/n, rate, elapsed and remaining time; ``done`` were done before.

    Where stderr is no terminal, a log line every half minute takes its place.
    """
    console = console or Console(stderr=True)
    if total is None and isinstance(items, Sized):
        total = len(items) + done
    if console.is_terminal:
        yield from _bar(items, description, total, done, console)
    else:
        yield from _lines(items, description, total, done)


def _bar(items: Iterable[Item], description: str, total: int | None, done: int, console: Console) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done, rate="")
        start = time.perf_counter()
        for count, item in enumerate(items, start=1):
            yield item
            progress.update(task, advance=1, rate=f"{count / (time.perf_counter() - start):.1f}/s")


def _lines(items: Iterable[Item], description: str, total: int | None, done: int) -> Iterator[Item]:
    start = told = time.perf_counter()
    count = 0
    for count, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - told >= LINE_INTERVAL_S:
            told = now
            log.info("%s: %d/%s, %.1f/s", description, done + count, total or "?", count / (now - start))
    elapsed_s = time.perf_counter() - start
    log.info("%s: %d/%s done in %.1f s", description, done + count, total or done + count, elapsed_s)
