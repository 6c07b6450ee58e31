"""Bad command lines over every command: each ends with a named error and an exit code that is not 0, no traceback.

    python -m pytest tests/hard/test_command_lines.py -m slow -s      600 of them, in forks; some as whole processes

The lines are drawn from the declarations of the commands' options: a value that the declaration does not admit, a key
that does not exist, what is no option at all, a path that leads nowhere. The suite runs a few of them in its process.
"""

from __future__ import annotations

import importlib
import itertools
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import forked_commands

from navsim_ext.runtime.config import config_root, options_of
from navsim_ext.runtime.options import Kind

ROOT = Path(__file__).resolve().parents[2]
SEED = 14
LINES = 600
REAL = 24  # of them, as processes that import everything themselves
PACKAGES = ("navsim_ext", "stage1_vlm", "stage2_dit", "stage3_grpo", "sim_agents")
PLACES = ("nowhere", "a=b", "路径/文件", "with blanks", "x[1]", "#", "a,b", "{", "it's", "/sys/trivium/x", "", "\\")
WORDS = (
    "x", "nan", "inf", "-inf", "-1", "1e400", "10^12", "[1,2]", "{a: 1}", "[", "}", "null", "true", "''", "1,2", "$X",
)  # fmt: skip
ARGUMENTS = (
    "--multirun", "-x", "--cfg", "=", "=1", "~", "+", "++", "@=1", "word", "a b", "--config-dir", "--config-dir=/no",
)  # fmt: skip


def commands() -> dict[str, str]:
    """Module of each command by the folder of its configuration."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "\n@job(" in text:
                name = text.split("\n@job(")[1].split('"')[1]
                found[name] = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return found


def wrong_value(kinds: tuple[Kind, ...], words: random.Random) -> str:
    """A text that no alternative admits when it is read as YAML would read it."""
    numbers = [bound for kind in kinds for _, bound in kind.bounds]
    tried = [f"{bound + step:g}" for bound in numbers for step in (-1, 1)] + list(WORDS)
    return words.choice(tried)


def lines() -> Iterator[tuple[str, list[str]]]:
    """(module, arguments), without end; the same ones for the same seed."""
    words = random.Random(SEED)
    modules = sorted(commands().items())
    while True:
        for job, module in modules:
            known = options_of(job).values()
            options = [each for each in known if each.declaration is not None and each.declaration.kinds]
            given = []
            for field in options:  # what must be given, so that the line gets past it
                if field.value == "???":
                    kind = field.declaration.kinds[0]
                    value = kind.word or {"list": "[nowhere]", "int": "1"}.get(kind.name, "nowhere")
                    given.append(f"{field.key}={value}")
            draw = words.randrange(5)
            if draw == 0:
                bad = words.choice(ARGUMENTS)
            elif draw == 1:
                bad = f"+{words.choice(options).key}x=1" if options else "+x=1"
            elif draw == 2 and any(field.declaration.kinds[0].name == "path" for field in options):
                paths = [field for field in options if field.declaration.kinds[0].name == "path"]
                bad = f"{words.choice(paths).key}={words.choice(PLACES)}"
            elif options:
                field = words.choice(options)
                bad = f"{field.key}={wrong_value(field.declaration.kinds, words)}"
            else:
                bad = "nonsense=1"
            yield module, [*given, bad]


def verdict(code: int, text: str) -> str | None:
    """What is wrong with how a command ended; None for nothing. A line that is right after all may end with 0."""
    if "Traceback" in text:
        return "a traceback"
    if code not in (0, 2, 3, 130):
        return f"exit code {code}"
    if code and re.search(r"^[A-Z]\w+: \S", text, re.MULTILINE) is None:
        return "an error without a name"
    return None


def report(failures: list[tuple[str, list[str], str, str]]) -> str:
    shown = [f"{module} {arguments}: {what}\n{text[-1500:]}" for module, arguments, what, text in failures[:10]]
    return "\n\n".join(shown)


@pytest.mark.slow
def test_bad_command_lines_end_with_a_named_error(tmp_path, monkeypatch):
    """As processes that are forked from one that has imported the commands."""
    monkeypatch.chdir(tmp_path)
    source, failures = lines(), []
    with forked_commands(commands().values()) as run:
        for module, arguments in itertools.islice(source, LINES):
            ended = run(module, *arguments, kill_after=600.0)
            if (what := verdict(ended.code, ended.out + ended.err)) is not None:
                failures.append((module, arguments, what, ended.out + ended.err))
    assert not failures, report(failures)


@pytest.mark.slow
def test_some_of_them_as_processes_that_start_from_nothing(tmp_path):
    for module, arguments in random.Random(SEED).sample(list(itertools.islice(lines(), LINES)), REAL):
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
        text = done.stdout + done.stderr
        what = verdict(done.returncode, text)
        assert what is None, report([(module, arguments, what, text)])


def test_a_few_of_them_in_this_process(tmp_path, monkeypatch, capfd):
    """Two rounds over every command, as far as the check of the options."""
    monkeypatch.chdir(tmp_path)
    source, failures, refused = lines(), [], 0
    jobs = {module: job for job, module in commands().items()}
    for _ in range(2 * len(jobs)):
        module, arguments = next(source)
        code, text = checked_in_process(jobs[module], arguments)
        refused += code != 0
        if (what := verdict(code, text)) is not None:
            failures.append((module, arguments, what, text))
    assert not failures, report(failures)
    assert refused > len(jobs)


def checked_in_process(job: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and message of what a command line does before its command starts."""
    from navsim_ext.errors import TriviumError
    from navsim_ext.runtime.command_line import flags_of
    from navsim_ext.runtime.config import configured

    try:
        flags, rest = flags_of(arguments)
        configured(job, rest)
    except TriviumError as error:
        return error.exit_code, f"{type(error).__name__}: {error}"
    return 0, f"{flags}"


def test_every_command_is_found():
    found = commands()
    assert set(found) == {str(path.parent.relative_to(config_root())) for path in config_root().rglob("config.yaml")}
    assert all(hasattr(importlib.import_module(module), "main") for module in list(found.values())[:3])
