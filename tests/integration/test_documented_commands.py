"""Every command in the pages, docstrings, comments and script headers can be given as it stands: its module exists, its
options do, their values are allowed, and none that must be given is missing (unless the text says ``...``)."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_scripts import dry_run, started

from navsim_ext.runtime.command_line import flags_of, overrides_from
from navsim_ext.runtime.config import checked, options_of
from navsim_ext.runtime.options import MissingValue, OptionError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "navsim_ext|stage1_vlm|stage2_dit|stage3_grpo|sim_agents"
LAUNCHERS = "run|torchrun|train_stage[123]|export_hidden|build_metric_cache|eval_pdm|generate_qa"
MODULE = re.compile(rf"-m ((?:{PACKAGES})(?:\.\w+)+)(?![\w.<]*[(<])([^`\n]*)")
SCRIPT = re.compile(rf"((?:\b[A-Z_]+=\S+ )*)bash scripts/((?:{LAUNCHERS})\.sh)([^`\n]*)")
SOURCES = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*"), *ROOT.glob("configs/**/*.yaml"),
    *(path for package in PACKAGES.split("|") for path in (ROOT / package).glob("**/*.py")),
    *(path for package in PACKAGES.split("|") for path in (ROOT / package).glob("**/*.md")),
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """``where`` it stands, the module or the script that it starts, and its arguments."""

    where: str
    module: str
    script: str
    arguments: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


def arguments_of(text: str) -> tuple[str, ...]:
    """The options that a text begins with; what follows them is prose."""
    found = []
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        for word in lexer:
            word = word if word.endswith("...") else word.rstrip(":;,.)")
            if not re.match(r"[~+]?[\w.@]+=|[\w.]*\.\.\.$|--|\[", word):
                break
            found.append(word)
    except ValueError:  # an apostrophe of the prose
        pass
    return tuple(found)


def documented() -> list[Command]:
    """All commands of all sources, lines that go on joined."""
    commands = []
    for path in SOURCES:
        if path.suffix not in (".md", ".py", ".sh", ".yaml", ".sbatch"):
            continue
        text = re.sub(r"\\+\n[ #]*", " ", path.read_text(encoding="utf-8"))
        where = str(path.relative_to(ROOT))
        for line in text.splitlines():
            if path.suffix == ".sh" and not line.startswith("#"):
                continue
            for module, rest in MODULE.findall(line):
                commands.append(Command(where, module, "", arguments_of(rest)))
            for variables, script, rest in SCRIPT.findall(line):
                pairs = tuple(tuple(each.split("=", 1)) for each in variables.split() if "$" not in each)
                arguments = rest.split() if script in ("run.sh", "torchrun.sh") else ()
                head = arguments[:1] if arguments and re.fullmatch(rf"(?:{PACKAGES})\S+", arguments[0]) else ()
                if script in ("run.sh", "torchrun.sh") and not head:
                    continue
                after = rest.split(head[0], 1)[1] if head else rest
                commands.append(Command(where, "", script, (*head, *arguments_of(after)), pairs))
    return list(dict.fromkeys(commands))


COMMANDS = documented()


def is_open(argument: str) -> bool:
    """Whether the text leaves an argument to the reader: ``...``, ``init=...``, ``data....``."""
    return argument.endswith("...") or argument.startswith("[")


def test_there_are_commands():
    assert len(COMMANDS) > 60
    assert len({command.where for command in COMMANDS}) > 25


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}-{command.module or command.script}")
def test_a_documented_command_can_be_given(command):
    arguments = [argument for argument in command.arguments if not is_open(argument)]
    module = command.module
    if command.script:
        module, arguments = started(dry_run(command.script, *arguments, **dict(command.variables)))
    entry = getattr(importlib.import_module(module), "main", None)
    assert entry is not None, f"{module} is no command"
    if not hasattr(entry, "job"):
        return  # a helper script with arguments of its own
    options = options_of(entry.job)
    try:
        checked(entry.job, overrides_from(flags_of(arguments)[1], options))
    except MissingValue:
        if not any(map(is_open, command.arguments)) and (command.arguments or command.script):
            raise
    except OptionError as error:
        if "CUDA devices" not in str(error):
            raise
