"""Writes docs/commands.md: every command, what it does in a sentence, and the groups of its configuration.

    python scripts/commands.py            writes the page
    python scripts/commands.py --check    says with its exit code whether the page is the one that would be written
"""

from __future__ import annotations

import ast
import sys
from itertools import groupby
from pathlib import Path

from navsim_ext.files import write_atomic
from navsim_ext.runtime.config import config_root
from navsim_ext.runtime.early_help import commands
from navsim_ext.runtime.usage import groups_of, head

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
HEAD = """# Every command

Each runs as `python -m NAME key=value ...`; `python -m NAME --help` lists its keys with their meaning, and answers in a
second. A group is chosen as `group=choice`; the first choice is the default. A training also takes `trainer`,
`callbacks` and `logger`. This page is written by `python scripts/commands.py`.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for package, members in groupby(commands().items(), key=lambda item: item[0].partition(".")[0]):
        parts.append(f"\n## {package}\n\n| command | what it does | groups |\n|---|---|---|\n")
        parts += [row(module, job) for module, job in members]
    return "".join(parts)


def row(module: str, job: str) -> str:
    root = config_root() / job
    lines = head(root / "config.yaml")
    words = [line for line in lines if not line.startswith("  ")]
    if not any(f"-m {module}" in line for line in lines):  # a second command of the same configuration
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        words = (ast.get_docstring(tree) or "").splitlines()
    sentence = " ".join(words).strip().removesuffix(":").partition(". ")[0].removesuffix(".").replace("|", "or")
    groups = [f"{name}: {', '.join(choices)}" for name, choices in groups_of(root, config_root() / "shared")
              if name not in ("trainer", "callbacks", "logger")]  # fmt: skip
    return f"| `{module}` | {sentence} | {'; '.join(groups)} |\n"


def main(arguments: list[str]) -> None:
    if arguments == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/commands.md is old: python scripts/commands.py writes it anew")
    elif arguments:
        sys.exit(__doc__)
    else:
        write_atomic(PAGE, page())


if __name__ == "__main__":
    main(sys.argv[1:])
