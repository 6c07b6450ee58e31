"""``--help`` of a command: what it does, how it is called, and each option with what its file says about it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from itertools import filterfalse
from pathlib import Path
from typing import Any

import yaml

from navsim_ext.runtime.options import Field, files_of, groups_named, package_of, yaml_word

WIDTH = 80
KEY_WIDTH = 26


def usage(root: Path, shared: Path, options: Mapping[str, Field]) -> str:
    """The whole text: the head of the command's file, its groups, its options."""
    lines = [*head(root / "config.yaml"), ""]
    groups = list(groups_of(root, shared))
    if groups:
        lines += ["Groups, chosen as group=name (the default stands first):"]
        lines += [textwrap.fill(f"{name}: {', '.join(choices)}", WIDTH, initial_indent="  ", subsequent_indent="    ")
                  for name, choices in groups]  # fmt: skip
        lines += [""]
    lines += ["Options, given as key=value (??? must be given):"]
    packages = {package for path in files_of(root, shared) if (package := package_of(path, _base(path, root, shared)))}
    own = [field for field in options.values() if not any(_below(field.key, package) for package in packages)]
    lines += [line for field in own for line in _option(field)]
    for package in sorted(packages):
        inside = [field for field in options.values() if _below(field.key, package) and field.key != package]
        if inside:
            lines += ["", f"Options of {package} (those of the chosen one exist):"]
            lines += [line for field in inside for line in _option(field)]
    if "experiment" in groups_named(root):
        lines += ["", "Your own FOLDER/experiment/NAME.yaml: --config-dir FOLDER experiment=NAME"]
    return "\n".join(lines) + "\n"


def _base(path: Path, root: Path, shared: Path) -> Path:
    return shared if path.is_relative_to(shared) else root


def _below(key: str, package: str) -> bool:
    return key == package or key.startswith(f"{package}.")


def head(file: Path) -> list[str]:
    """The comment that the command's file begins with: what it does, and how it is called."""
    found = re.match(r"((?:#[^\n]*\n)*)", file.read_text())
    lines = [line.removeprefix("#").removeprefix(" ") for line in found[1].splitlines()]
    words, examples = (list(each) for each in (filterfalse(_is_example, lines), filter(_is_example, lines)))
    return [*textwrap.wrap(" ".join(words), WIDTH), "", *examples]


def _is_example(line: str) -> bool:
    return line.startswith("  ")


def groups_of(root: Path, shared: Path) -> Iterator[tuple[str, list[str]]]:
    """(group, its choices with the default first) of a command."""
    defaults = (yaml.safe_load((root / "config.yaml").read_text()) or {}).get("defaults") or []
    chosen = {
        name.split()[-1]: choice for entry in defaults if isinstance(entry, dict) for name, choice in entry.items()
    }
    for group in groups_named(root):
        found = {path.stem for base in (root, shared) for path in (base / group).glob("*.yaml")}
        if found:
            default = chosen[group] if isinstance(chosen[group], list) else [chosen[group]]
            first = [str(name) for name in default if name in found]
            yield group, first + sorted(found - set(first))


def _option(field: Field) -> Iterator[str]:
    if isinstance(field.value, dict) and field.value and field.declaration is None:
        return  # its members follow
    value = "" if isinstance(field.value, dict) and "" in field.value else f"={_short(field.value)}"
    head = f"  {field.key}{value}"
    kinds = "" if field.declaration is None else str(field.declaration)
    words = field.comment if field.declaration is None else field.declaration.words
    condition = field.declaration.condition if field.declaration is not None else None
    if condition is not None:
        kinds += f", with {condition[0]}" + (f"={'|'.join(condition[1])}" if condition[1] else "")
    text = "; ".join(filter(None, (kinds, words)))
    if len(head) >= KEY_WIDTH and text:
        yield head
        head = ""
    indent = " " * KEY_WIDTH
    yield from textwrap.wrap(text, WIDTH, initial_indent=f"{head:<{KEY_WIDTH}}", subsequent_indent=indent) or [head]


def _short(value: Any) -> str:
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).strip() if isinstance(value, (dict, list)) else ""
    )
    text = text or yaml_word(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
