"""Runs command lines as ``python -m`` would, each in a fork of one process that has imported what is slow to import.

python fork_runner.py MODULE ... imports the modules of those commands. Reads one JSON object per line of stdin:
``command`` is ``[module, overrides ...]``, ``kill_after`` the seconds after which it is killed with -9, or null, and
``family`` whether its worker processes are killed too. Answers each with a JSON object: ``code``, ``out``, ``err``. So
a hundred commands cost what their own work costs, and still end as processes do.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import warnings
from typing import NoReturn

import torch

torch.set_num_threads(1)


def run(command: list[str], kill_after: float | None, family: bool) -> dict[str, str | int]:
    """Exit code and output of one command; -9 if it was killed before its end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.setsid()
            execute(command)
        status = os.waitpid(child, 0)[1] if kill_after is None else killed(child, kill_after, family)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return {"code": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1]}


def killed(child: int, after: float, family: bool) -> int:
    """Wait status of a child that is killed when its time is over."""
    end = time.monotonic() + after
    while (left := end - time.monotonic()) > 0:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(min(left, 0.002))
    with contextlib.suppress(ProcessLookupError):  # it may have ended, or not yet have a group of its own
        (os.killpg if family else os.kill)(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)  # until it is waited for, its number is its own
    return os.waitpid(child, 0)[1]


def execute(command: list[str]) -> NoReturn:
    """Runs the module as ``__main__`` and leaves as any process: by SystemExit, or with the traceback of its error.

    After SystemExit nothing is torn down: taking apart the modules of the parent would copy all of its memory.
    """
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # a collection in a child leaves the parent's pages shared
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(**json.loads(line))) + "\n")
        sys.stdout.flush()
