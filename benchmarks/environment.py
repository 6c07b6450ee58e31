"""What a benchmark ran on, and the one shape in which every benchmark reports.

A benchmark measures, builds its rows with :func:`row` and ends with :func:`report`, which prints the JSON

    {"name", "command", "environment", "baseline", "rows": [{"what", "value", "unit", "target", "met"}, ...]}

and writes it to ``--output`` (``benchmarks/results/<name>.json``); ``python benchmarks/results.py`` renders all of
these to ``RESULTS.md``.
"""

from __future__ import annotations

import datetime
import json
import operator
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("trivium", "torch", "lightning", "transformers", "numpy", "numba", "scipy", "safetensors", "xxhash")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
RELATIONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


def environment() -> dict[str, Any]:
    """Versions, CPU model, cores, memory [GB], GPU, thread settings, commit, load averages and the date (UTC)."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES} | {"torch": torch.get_num_threads()},
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def row(what: str, value: float | int | str, unit: str, target: str | None = None) -> dict[str, Any]:
    """One measured figure; ``target`` is a relation such as ``"<= 8.6"`` in the same unit, or None without a promise.

    Raises ValueError when the target is not a relation and a number.
    """
    met = None
    if target is not None:
        relation, _, bound = target.partition(" ")
        if relation not in RELATIONS:
            raise ValueError(f"target {target!r} of {what!r} must read like '<= 8.6' with one of {list(RELATIONS)}")
        met = bool(RELATIONS[relation](float(value), float(bound)))
    return {"what": what, "value": value, "unit": unit, "target": target, "met": met}


def report(
    name: str, rows: Sequence[Mapping[str, Any]], *, baseline: str, output: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """Prints the benchmark's JSON and writes it to ``output``; ``baseline`` says in words what was compared with."""
    content = {
        "name": name,
        "command": command_line(),
        "environment": environment(),
        "baseline": baseline,
        "rows": [dict(entry) for entry in rows],
    }
    text = json.dumps(content, indent=1) + "\n"
    print(text, end="")
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return content


def command_line() -> str:
    """The command as a reader can repeat it from the root of a checkout (no absolute paths)."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    shown = script.relative_to(root) if script.is_relative_to(root) else Path(script.name)
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def cpu_model() -> str:
    """Model name of the processor as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return f"{fields.get('model name', platform.machine())} ({family})"


def installed_version(name: str) -> str | None:
    """Version of an installed distribution; None when it is absent, which is a fact worth recording."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Short git commit of the checkout, with ``+`` when tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=9", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
