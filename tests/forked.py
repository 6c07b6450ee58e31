"""Programs of tests as forks of one process that has imported what is slow to import.

    done = run("-m", "stage2_dit.plan", "token=...")                      # as subprocess.run([sys.executable, ...])
    process = start(program, "epochs=3", environment={"TROUBLE": "x"})    # as subprocess.Popen([sys.executable, ...])
    ranks = [start(..., environment=rank_variables(k, 2, port)) for k in (0, 1)]

Importing torch, Lightning and transformers costs some eight seconds of a processor, more than what most programs of the
tests do. The server is itself a fork of pytest, made when the tests are collected and none has run; its children end
as processes do, by exit code or signal, and get a session, an environment and standard streams of their own. Where the
start from nothing is what is tested, tests use subprocess.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

ORPHANS_S = 60.0  # at most waited for
_server: _Server | None = None


class Process:
    """A running program, with the methods of subprocess.Popen that tests use."""

    def __init__(self, pid: int, out: Any, err: Any, server: _Server) -> None:
        self.pid, self.returncode = pid, None
        self._out, self._err, self._server = out, err, server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(what="poll", pid=self.pid)["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        pause = 0.001
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it and its own children wrote to standard output and error, when they have ended.

        Workers of a killed program live on for some seconds, and hold its locks; a pipe would be open as long.
        """
        self.wait(timeout)
        end = time.monotonic() + ORPHANS_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(self.pid, 0)
                time.sleep(0.01)
        return self.written()

    def written(self) -> tuple[str, str]:
        """What it has written to its standard output and error so far."""
        return self.said(), _text(self._err)

    def said(self) -> str:
        """What it has written to its standard output so far."""
        return _text(self._out)

    def send_signal(self, number: int, *, family: bool = False) -> None:
        """Nothing happens when it has ended; until it is waited for, its number is its own."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # the family may not be founded yet
                (os.killpg if family else os.kill)(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self, *, family: bool = False) -> None:
        """With ``family`` its own children too."""
        if family:
            self.send_signal(signal.SIGKILL, family=True)
        self.send_signal(signal.SIGKILL)


def _text(stream: Any) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def start(
    *arguments: object, environment: Mapping[str, str] | None = None, folder: str | os.PathLike[str] | None = None
) -> Process:
    """Starts what ``python *arguments`` would: ``-m module ...``, ``-c code ...`` or ``script ...``.

    ``environment`` is added to that of the tests; ``folder`` is where the program runs.
    """
    server = the_server()
    out, err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()
    asked = {
        "what": "start", "arguments": [str(each) for each in arguments],
        "environment": {**os.environ, **(environment or {})}, "folder": str(folder or os.getcwd()),
        "streams": [out.name, err.name],
    }  # fmt: skip
    return Process(server.ask(**asked)["pid"], out, err, server)


def run(
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    timeout: float = 600.0,
) -> subprocess.CompletedProcess[str]:
    """Starts a program and waits for its end, whatever its exit code."""
    process = start(*arguments, environment=environment, folder=folder)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess([str(each) for each in arguments], process.returncode, out, err)


def preload(modules: Iterable[str]) -> None:
    """Has modules imported where all later programs find them."""
    failed = the_server().ask(what="preload", modules=list(modules))["failed"]
    if failed:
        raise ImportError(failed)


def rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells each of its processes on one machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def the_server() -> _Server:
    """The server of this process, made where there is none."""
    global _server
    if _server is None or _server.owner != os.getpid():
        _server = _Server()
    return _server


class _Server:
    """The other end of the socket is the process that forks."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        mine, theirs = socket.socketpair()
        if os.fork() == 0:
            mine.close()
            _serve(theirs)
        theirs.close()
        self._stream = mine.makefile("rw", encoding="utf-8")

    def ask(self, **asked: Any) -> dict[str, Any]:
        self._stream.write(json.dumps(asked) + "\n")
        self._stream.flush()
        return json.loads(self._stream.readline())


def _serve(connection: socket.socket) -> NoReturn:
    """Answers until pytest ends; what is written by a module that is imported here goes nowhere."""
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        _streams(nowhere, nowhere, nowhere)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logging.root.handlers.clear()  # those of pytest
        importlib.reload(warnings)  # pytest collects them in a list
        gc.freeze()  # a collection in a child leaves the parent's pages shared
        stream = connection.makefile("rw", encoding="utf-8")
        for line in stream:
            stream.write(json.dumps(_answer(**json.loads(line), connection=connection)) + "\n")
            stream.flush()
    finally:
        os._exit(0)


def _answer(what: str, connection: socket.socket, **asked: Any) -> dict[str, Any]:
    if what == "poll":
        ended, status = os.waitpid(asked["pid"], os.WNOHANG)
        return {"code": os.waitstatus_to_exitcode(status) if ended else None}
    if what == "preload":
        return {"failed": _preloaded(asked["modules"])}
    child = os.fork()
    if child == 0:
        connection.close()
        _execute(**asked)
    return {"pid": child}


def _preloaded(modules: list[str]) -> str | None:
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError:
        return traceback.format_exc()
    gc.freeze()
    return None


def _execute(arguments: list[str], environment: dict[str, str], folder: str, streams: list[str]) -> NoReturn:
    """Is the program, to its end; nothing is torn down: that would copy all of the parent's memory."""
    code = 1
    try:
        os.setsid()
        _streams(os.open(os.devnull, os.O_RDONLY), *(os.open(name, os.O_WRONLY | os.O_APPEND) for name in streams))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        multiprocessing.util._finalizer_registry.clear()
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        code = _program(arguments)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        multiprocessing.util._exit_function()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _program(arguments: list[str]) -> int:
    """Runs ``python *arguments`` in this process; its exit code."""
    first, *rest = arguments
    try:
        if first == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.path.insert(0, os.getcwd())
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(first).parent))
            sys.argv = [first, *rest]
            sys.modules.pop(Path(first).stem, None)  # a test may have imported it, with another environment
            runpy.run_path(first, run_name="__main__")
    except SystemExit as leave:
        if leave.code is not None and not isinstance(leave.code, int):
            print(leave.code, file=sys.stderr)
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


def _streams(standard_in: int, out: int, err: int) -> None:
    for number, descriptor in enumerate((standard_in, out, err)):
        os.dup2(descriptor, number)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
