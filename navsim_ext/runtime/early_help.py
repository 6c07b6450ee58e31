"""``python -m package.module --help`` is answered before the module is loaded: help needs no PyTorch and no pandas.

A command's module loads what its work needs, and that takes seconds. Python loads the packages above it first, and so
they ask here. The command's configuration is found in the text of its module: ``@job("name")``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from navsim_ext.runtime.config import config_root, options_of
from navsim_ext.runtime.usage import usage

JOB = re.compile(r'^@job\("([\w/]+)"\)$', re.MULTILINE)
HOME = Path(__file__).resolve().parents[2]  # of the packages


def answer(arguments: Sequence[str]) -> None:
    """Prints the help and ends the process where ``arguments`` (``sys.orig_argv``) start a command of Trivium's."""
    name = job_of(module_of(arguments))
    if name is not None:
        sys.stdout.write(help_of(name))
        sys.exit(0)


def help_of(name: str) -> str:
    """The help of ``configs/<name>``."""
    return usage(config_root() / name, config_root() / "shared", options_of(name))


def module_of(arguments: Sequence[str]) -> str:
    """What follows ``-m`` among the interpreter's own arguments; empty where a script, -c or nothing is run."""
    waiting = list(arguments[1:])
    while waiting and waiting[0].startswith("-"):
        flag = waiting.pop(0)
        if flag == "-m":
            return waiting[0] if waiting else ""
        if flag in ("-W", "-X") and waiting:
            waiting.pop(0)
    return ""


def commands() -> dict[str, str]:
    """Every command's module and its job."""
    packages = [folder for folder in sorted(HOME.iterdir()) if (folder / "__init__.py").is_file()]
    files = [file.relative_to(HOME) for package in packages for file in sorted(package.rglob("*.py"))]
    modules = [".".join(file.with_suffix("").parts) for file in files]
    return {module: job for module in modules if (job := job_of(module)) is not None}


def job_of(module: str) -> str | None:
    """The job that a module beside this package runs as a command, or None."""
    file = HOME.joinpath(*module.split(".")).with_suffix(".py") if module else None
    found = JOB.findall(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else []
    return found[-1] if found else None
