"""Runs command lines as ``python -m`` would, each in a fork of one process that has imported what is slow to import.

Reads one JSON list ``[module, overrides ...]`` per line of stdin; answers each with a JSON object: ``code``, ``out``,
``err``. So a hundred commands cost what their own work costs, and still end as processes do.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile

import datasets  # noqa: F401
import lightning.pytorch  # noqa: F401
import numba  # noqa: F401
import pandas  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401

torch.set_num_threads(1)


def run(command: list[str]) -> dict[str, str | int]:
    """Exit code and output of one command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:  # leaves by SystemExit or by its own error, as any process
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = command
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return {"code": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1]}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()
