"""What a run will cost, said before it starts: disk, memory, hours, and everything that is missing, all at once."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from navsim_ext.errors import TriviumError

log = logging.getLogger(__name__)

GIB = 2**30
MAX_LISTED = 20


class PreflightError(TriviumError):
    """The run could not have ended well: too little disk or memory, or files that are missing."""


@dataclass(frozen=True)
class CostEstimate:
    """The numbers behind a preflight; None where nothing was given to estimate from."""

    items: int
    bytes_needed: int
    bytes_free: int
    memory_needed: int
    memory_free: int
    hours: float | None
    files_checked: int

    def table(self, title: str) -> Table:
        table = Table("what", "needed", "available", title=title)
        table.add_row("items", f"{self.items:,}", "")
        table.add_row("disk", f"{self.bytes_needed / GIB:.2f} GiB", f"{self.bytes_free / GIB:.2f} GiB")
        table.add_row("memory", f"{self.memory_needed / GIB:.2f} GiB", f"{self.memory_free / GIB:.2f} GiB")
        table.add_row("time", "not measured" if self.hours is None else f"{self.hours:.2f} h", "")
        table.add_row("input files", f"{self.files_checked:,} checked", "all there")
        return table


def preflight(
    *,
    output_dir: str | os.PathLike[str],
    items: int,
    bytes_per_item: float = 0.0,
    memory_bytes: float = 0.0,
    seconds_per_item: float | None = None,
    workers: int = 1,
    files: Iterable[str | os.PathLike[str]] = (),
    margin: float = 1.1,
    title: str = "preflight",
    console: Console | None = None,
) -> CostEstimate:
    """Prints the estimate and returns it; raises PreflightError listing every reason why the run cannot succeed.

    ``bytes_per_item`` is what one item adds to ``output_dir``, ``memory_bytes`` what the run holds at its peak,
    ``seconds_per_item`` comes from :func:`measure_slice` (one worker), ``margin`` multiplies needs before comparing.
    """
    folder = existing_parent(Path(output_dir))
    checked = [Path(file) for file in files]
    missing = [path for path in checked if not path.exists()]
    estimate = CostEstimate(
        items=items,
        bytes_needed=int(items * bytes_per_item),
        bytes_free=shutil.disk_usage(folder).free,
        memory_needed=int(memory_bytes),
        memory_free=psutil.virtual_memory().available,
        hours=None if seconds_per_item is None else items * seconds_per_item / max(workers, 1) / 3600.0,
        files_checked=len(checked),
    )
    problems = []
    if items < 1:
        problems.append("there are 0 items to work on: check the split, the scene filter and the paths")
    if not os.access(folder, os.W_OK):
        problems.append(f"{folder} is not writable: choose another output_dir")
    if estimate.bytes_needed * margin > estimate.bytes_free:
        problems.append(
            f"{output_dir} needs {estimate.bytes_needed * margin / GIB:.2f} GiB (margin included), "
            f"{estimate.bytes_free / GIB:.2f} GiB are free: make room or choose another output_dir"
        )
    if estimate.memory_needed * margin > estimate.memory_free:
        problems.append(
            f"{estimate.memory_needed * margin / GIB:.2f} GiB of memory are needed (margin included), "
            f"{estimate.memory_free / GIB:.2f} GiB are available: use fewer workers or a smaller batch"
        )
    if missing:
        listed = "\n    ".join(str(path) for path in missing[:MAX_LISTED])
        more = f"\n    and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        problems.append(f"{len(missing)} of {len(checked)} input files are missing:\n    {listed}{more}")
    if problems:
        raise PreflightError(f"{title}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    (console or Console(stderr=True)).print(estimate.table(title))
    return estimate


def measure_slice(work: Callable[[Any], object], items: Sequence[Any], *, budget_s: float = 5.0) -> float:
    """Seconds per item of ``work`` over the first items, for about ``budget_s``; the first call (warm-up) not counted.

    Raises PreflightError for 0 items.
    """
    if not items:
        raise PreflightError("there are 0 items to measure: check the split, the scene filter and the paths")
    work(items[0])
    counted, start = 0, time.perf_counter()
    for item in items[1:] or items[:1]:
        work(item)
        counted += 1
        if time.perf_counter() - start > budget_s:
            break
    return (time.perf_counter() - start) / counted


def existing_parent(path: Path) -> Path:
    """The nearest folder above (or at) a path that exists already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
