"""Reads pickles in a process of its own with little memory, and tells how each reading ended.

python attacked.py READER FOLDER    reads every file of FOLDER; one JSON line for each
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from navsim_ext.errors import TriviumError

MEMORY = 2 << 30  # bytes beyond what the imports took


def readers() -> dict[str, Callable[[Path], object]]:
    from navsim_ext import pickles
    from navsim_ext.devkit.cache_pickle import read_cache
    from navsim_ext.devkit.submission import check_submission
    from navsim_ext.readers.navsim_logs import NavsimLogs
    from navsim_ext.readers.scenarionet import ScenarioNetScenes
    from navsim_ext.runtime.checkpoint_file import load_checkpoint
    from stage2_dit.convert import read_published

    return {
        "load": pickles.load,
        "metric_cache": read_cache,
        "submission": check_submission,
        "navsim": lambda path: NavsimLogs(path.parent.parent.parent, path.parent.name).scenes_of(path.stem),
        "checkpoint": load_checkpoint,
        "published": read_published,
        "scenarionet": lambda path: ScenarioNetScenes(path.parent).scenes_of(path.stem),
    }


def outcome(read: Callable[[Path], object], path: Path) -> str:
    try:
        read(path)
    except TriviumError:
        return "named"
    except Exception as error:  # noqa: BLE001  (the verdict is made of what came through)
        return f"raw {type(error).__name__}: {error!s:.200}"
    return "read"


def main(reader: str, folder: Path) -> None:
    read = readers()[reader]
    with open("/proc/self/statm") as stream:
        taken = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for path in sorted(folder.glob("*.pkl")):
        start = time.process_time()
        line = {"name": path.stem, "begun": True}
        print(json.dumps(line), flush=True)
        line = {"name": path.stem, "outcome": outcome(read, path), "seconds": time.process_time() - start}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
