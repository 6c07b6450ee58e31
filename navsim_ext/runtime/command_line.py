"""What a user typed, in the form that Hydra reads: paths and texts arrive as they were given.

Hydra's grammar gives meaning to ``=``, commas, brackets, blanks, ``#``, backslashes and quotes, and has no word for
letters such as Chinese ones: an unquoted ``checkpoint=runs/epoch=1-step=4.ckpt`` is an error, and a token ``12e45`` a
number. Here a value is quoted when its key is declared (:mod:`navsim_ext.runtime.options`) a path or a text, or when
Hydra could not read it as it stands. What is quoted already, ``null``, ``???`` and interpolations keep their meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from navsim_ext.runtime.options import Field, Kind, OptionError

VERBATIM = ("path", "text", "string")
FLAGS_WITH_VALUE = ("--config-dir", "-cd", "--package", "-p", "--info", "-i", "--cfg", "-c")
FLAGS = ("--resolve", "--version", "--hydra-help")


def overrides_from(arguments: Sequence[str], options: Mapping[str, Field]) -> list[str]:
    """Overrides for Hydra's parser, from the arguments of a command line without flags.

    Raises OptionError for an argument that is no ``key=value``.
    """
    return [_override(argument, options) for argument in arguments]


def flags_of(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags for Hydra, the rest). ``--config-dir`` becomes an entry of Hydra's search path."""
    flags, rest, waiting = [], [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, sign, value = argument.partition("=")
        if not argument.startswith("-"):
            rest.append(argument)
        elif name in FLAGS_WITH_VALUE:
            if not sign:
                if not waiting:
                    raise OptionError(f"{name} needs a value: {name} VALUE")
                value = waiting.pop(0)
            if name in ("--config-dir", "-cd"):
                if not Path(value).is_dir():
                    raise OptionError(f"--config-dir {value} is no folder")
                rest.append(f"hydra.searchpath=[{quote(f'file://{Path(value).resolve()}')}]")
            else:
                flags += [name, value]
        elif name in FLAGS:
            flags.append(argument)
        else:
            raise OptionError(f"there is no flag {argument}: options are given as key=value, --help lists them")
    return flags, rest


def _override(argument: str, options: Mapping[str, Field]) -> str:
    key, sign, value = argument.partition("=")
    if not sign or not key:
        if key.startswith("~") and key != "~":
            return argument
        raise OptionError(f"{argument!r} is no option: give key=value")
    if not re.fullmatch(r"[~+]*[\w./@:-]*\w[\w./@:-]*", key) or key.startswith("@"):
        raise OptionError(f"{key!r} of {argument!r} is no name of an option")
    field = options.get(key.lstrip("+~").partition("@")[0])
    kinds = field.declaration.kinds if field is not None and field.declaration is not None else ()
    if _keeps_meaning(value):
        return argument
    if _list_of_verbatim(kinds) and (members := _members(value)) is not None:
        return f"{key}=[{','.join(map(quote, members))}]"
    if value.startswith(("[", "{")) and value.endswith(("]", "}")) and not _only_verbatim(kinds):
        return argument if _parses(argument) else f"{key}={_nested(key, value)}"
    if any(kind.name in VERBATIM for kind in kinds) and not _another_kind(kinds, value):
        return f"{key}={quote(value)}"
    return argument if _parses(argument) else f"{key}={quote(value)}"


def _keeps_meaning(value: str) -> bool:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return quoted or value in ("", "null", "???") or value.startswith("${")


def _only_verbatim(kinds: Sequence[Kind]) -> bool:
    return bool(kinds) and all(kind.name in (*VERBATIM, "null") for kind in kinds)


def _list_of_verbatim(kinds: Sequence[Kind]) -> bool:
    return any(kind.name == "list" and kind.members and _only_verbatim(kind.members) for kind in kinds)


def _members(value: str) -> list[str] | None:
    """The texts of ``[a,b[1],c]``; None for what is no list of unquoted texts, or has a list or a mapping in it."""
    if not (value.startswith("[") and value.endswith("]")) or set("{}'\"") & set(value):
        return None
    members, depth = [""], 0
    for letter in value[1:-1]:
        depth += (letter == "[") - (letter == "]")
        if depth < 0:
            return None
        if letter == "," and depth == 0:
            members.append("")
        else:
            members[-1] += letter
    members = [each.strip() for each in members if each.strip()]
    return None if depth or any(each.startswith("[") for each in members) else members


def _another_kind(kinds: Sequence[Kind], value: str) -> bool:
    """Whether another alternative of the declaration (a number, true) takes the value as Hydra reads it."""
    try:
        read = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError):
        return False
    return any(kind.name not in (*VERBATIM, "any") and kind.admits(read) for kind in kinds)


def _parses(argument: str) -> bool:
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return not override.is_sweep_override()


def _nested(key: str, value: str) -> str:
    """A list or mapping that Hydra could not read, read as YAML: ``[a=1.ckpt, b c]``."""
    refused = OptionError(
        f"{key}={value} cannot be read: give a list [a,b] or a mapping {{name: value}}, and quote texts"
    )
    try:
        written = _written(yaml.safe_load(value))
    except (yaml.YAMLError, RecursionError):
        raise refused from None
    if not _parses(f"k={written}"):
        raise refused
    return written


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str):
        return quote(value)
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def quote(text: str) -> str:
    """A single-quoted value of Hydra's grammar that means exactly this text."""
    out, backslashes = [], 0
    for letter in text:
        if letter == "\\":
            backslashes += 1
            continue
        out.append("\\" * (2 * backslashes if letter == "'" else backslashes))
        out.append("\\'" if letter == "'" else letter)
        backslashes = 0
    out.append("\\" * (2 * backslashes))
    return "'" + "".join(out) + "'"
