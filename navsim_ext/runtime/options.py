"""What each option of a command may be: declared in the comment beside its key, checked before any work starts.

    batch_size: 32        # int >= 1 <= 65536; scenes planned at once
    workers: sequential   # sequential | processes | ray; who scores
    ray_address: null     # text or null, with workers=ray; null starts a local Ray
    image_size: [960, 540]  # list of 2 int >= 16 <= 8192; width and height in pixels

So the file that a user reads is the file that the command obeys, and ``--help`` prints the same words. A declaration is
what stands between ``#`` and the first semicolon:

    kind        int | float (with bounds: >= > <= <), bool, text (not empty), string (may be empty), path, device,
                node (a mapping with _target_), mapping, list, any, null, internal (the command sets it, it cannot be
                given); any other word is that word itself
    list of K, list of N K, mapping of K     each member is a K; a list of N has exactly N
    arguments of package.module.name         a mapping of what this function or class takes
    A or B, a | b                            one of these
    , with KEY or , with KEY=a|b             read only where KEY (beside it, else at the root) has a value, or this one

:func:`check` walks a composed configuration. A key that no file declares and no ``_target_`` takes is refused with the
nearest one that exists, whoever gave it (the command line with ``+``, or a file of one's own): what nothing reads
cannot be given. NaN and infinity are no numbers here.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from navsim_ext.errors import TriviumError

COMPARISONS = {
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    "<": lambda value, bound: value < bound,
}
BOUND = re.compile(r"\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)")
INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")
RUN_DIR = "run_dir"  # of a training
WORD = re.compile(r"[\w./:+-]+")
KINDS = (
    "int", "float", "bool", "text", "string", "path", "device", "node", "mapping", "arguments", "list", "any", "null",
    "internal",
)  # fmt: skip
SIMPLE = {int: "int", float: "float", bool: "bool", str: "string", types.NoneType: "null"}


class OptionError(TriviumError):
    """An option of a command that does not exist, has no effect here, or has a value that is not allowed."""


@dataclass(frozen=True)
class Kind:
    """One alternative: its ``name`` (of :data:`KINDS`), bounds, and what its members are; ``word`` of a literal."""

    name: str
    bounds: tuple[tuple[str, float], ...] = ()
    members: tuple[Kind, ...] = ()
    count: int | None = None
    target: str = ""  # of arguments
    word: str = ""

    def admits(self, value: Any) -> bool:
        if self.word:
            return yaml_word(value) == self.word
        if self.name in ("int", "float"):
            number = isinstance(value, (int, float)) if self.name == "float" else isinstance(value, int)
            return (
                number and not isinstance(value, bool) and math.isfinite(value)
                and all(COMPARISONS[sign](value, bound) for sign, bound in self.bounds)
            )  # fmt: skip
        if self.name == "list":
            return (
                isinstance(value, list)
                and (self.count is None or len(value) == self.count)
                and all(admitted(self.members, each) for each in value)
            )
        if self.name == "mapping":
            return isinstance(value, dict) and all(admitted(self.members, each) for each in value.values())
        return SIMPLE_TESTS[self.name](value)

    def __str__(self) -> str:
        bounds = "".join(f" {sign} {bound:.10g}" for sign, bound in self.bounds)
        if self.word:
            return self.word
        if self.target:
            return f"arguments of {self.target}"
        inner = f" of {f'{self.count} ' if self.count else ''}{spell(self.members)}" if self.members else ""
        return f"{self.name}{bounds}{inner}"


SIMPLE_TESTS = {
    "bool": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str) and bool(value.strip()) and "\0" not in value,
    "string": lambda value: isinstance(value, str) and "\0" not in value,
    "path": lambda value: isinstance(value, str) and bool(value.strip()) and "\0" not in value,
    "device": lambda value: isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value) is not None,
    "arguments": lambda value: isinstance(value, dict),
    "node": lambda value: isinstance(value, dict) and "_target_" in value,
    "any": lambda value: True,
    "internal": lambda value: True,
    "null": lambda value: value is None,
}


def admitted(kinds: Sequence[Kind], value: Any) -> bool:
    return not kinds or any(kind.admits(value) for kind in kinds)


def spell(kinds: Sequence[Kind]) -> str:
    """The alternatives as the file has them."""
    return " or ".join(map(str, kinds))


def yaml_word(value: Any) -> str:
    """A value as one writes it: ``true``, ``null``, ``0.5``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "''" if value == "" else str(value)


@dataclass(frozen=True)
class Declaration:
    """What a key may hold, under which condition it is read, what it means, and which file says so."""

    kinds: tuple[Kind, ...]
    condition: tuple[str, tuple[str, ...]] | None = None  # (key, its values; none: any but null)
    words: str = ""
    file: Path | None = None

    @classmethod
    def parse(cls, comment: str, file: Path | None = None) -> Declaration | None:
        """The declaration that a comment begins with; None for a comment of words alone."""
        head, _, words = comment.partition(";")
        head, _, condition = head.partition(", with ")
        kinds = parse_kinds(head.strip())
        if kinds is None:
            return None
        key, _, values = condition.strip().partition("=")
        wanted = (key, tuple(values.split("|")) if values else ()) if key else None
        return cls(kinds, wanted, words.strip(), file)

    def __str__(self) -> str:
        return spell(self.kinds)


def parse_kinds(text: str) -> tuple[Kind, ...] | None:
    """``int >= 1 or null`` -> its alternatives; None where the text is none of this language."""
    kinds: list[Kind] = []
    for part in text.split(" or "):
        collection = re.fullmatch(r"(list|mapping)(?: of (?:(\d+) )?(.+))?", part.strip())
        if collection:
            members = parse_kinds(collection[3].strip()) if collection[3] else ()
            if members is None:
                return None
            kinds.append(Kind(collection[1], members=members, count=int(collection[2]) if collection[2] else None))
            continue
        if arguments := re.fullmatch(r"arguments of ([\w.]+)", part.strip()):
            kinds.append(Kind("arguments", target=arguments[1]))
            continue
        for word in part.split("|"):
            name, rest = WORD.match(word.strip()), ""
            if name is None:
                return None
            rest = word.strip()[name.end() :]
            bounds = tuple((sign, float(bound)) for sign, bound in BOUND.findall(rest))
            if BOUND.sub("", rest).strip() or (bounds and name[0] not in ("int", "float")):
                return None
            kinds.append(Kind(name[0], bounds) if name[0] in KINDS else Kind("word", word=name[0]))
    if len(kinds) == 1 and kinds[0].word:
        return None  # one word that is no kind is prose
    return tuple(kinds)


@dataclass(frozen=True)
class Field:
    """A key of a configuration file: its dotted name, declaration (None: words alone) and comment."""

    key: str
    declaration: Declaration | None
    comment: str
    value: Any


def fields_of(path: Path, package: str = "") -> Iterator[Field]:
    """The keys of one file, with what is declared beside them. ``_target_`` and the like are not options."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):
        yield from _fields(root, package, lines, path, None)


def _fields(
    node: yaml.MappingNode, above: str, lines: Sequence[str], path: Path, outer: Declaration | None
) -> Iterator[Field]:
    for key_node, value_node in node.value:
        name = str(key_node.value)
        if name.startswith("_") or (key_node.start_mark.column == 0 and name in ("defaults", "hydra")):
            continue
        key = f"{above}.{name}" if above else name
        block = isinstance(value_node, yaml.CollectionNode) and not value_node.flow_style
        end = key_node.end_mark if block else value_node.end_mark
        rest = lines[end.line][end.column :] if end.line < len(lines) else ""
        comment = rest.partition("#")[2].strip() if not node.flow_style else ""
        declaration = (Declaration.parse(comment, path) if comment else None) or outer
        value = yaml.safe_load(yaml.serialize(value_node))
        yield Field(key, declaration, comment, value)
        if isinstance(value_node, yaml.MappingNode):
            members = None
            if declaration is not None and (not declaration.kinds or declaration.kinds[0].name == "mapping"):
                kinds = declaration.kinds[0].members if declaration.kinds else ()
                members = Declaration(kinds, None, declaration.words, path)
            yield from _fields(value_node, key, lines, path, members)


@cache
def declared(root: Path, shared: Path) -> dict[str, Field]:
    """All options of the command whose folder is ``root``: its own file, its groups, and the shared groups it names.

    Experiments give values and declare nothing. Where several files have a key, the one with a declaration counts. A
    key whose value is another's (``${data.root}``) may hold what the other may.
    """
    found: dict[str, Field] = {}
    for path in files_of(root, shared):
        package = package_of(path, shared if path.is_relative_to(shared) else root)
        for i in range(len(parts := package.split(".")) if package else 0):
            group = ".".join(parts[: i + 1])
            found.setdefault(group, Field(group, None, "", {"": None}))
        for field in fields_of(path, package):
            known = found.get(field.key)
            if known is None or (known.declaration is None and field.declaration is not None):
                found[field.key] = field
    for key, field in found.items():
        if field.declaration is None and (source := INTERPOLATION.fullmatch(str(field.value))) and source[1] in found:
            found[key] = dataclasses.replace(field, declaration=found[source[1]].declaration)
    return found


def files_of(root: Path, shared: Path) -> list[Path]:
    """The command's file first, then its groups."""
    groups = {
        group for folder in (root, shared) for group in (each.name for each in folder.iterdir() if each.is_dir())
    } & set(groups_named(root))
    own = [path for group in sorted(groups) for path in sorted((root / group).glob("*.yaml")) if group != "experiment"]
    others = [path for group in sorted(groups) for path in sorted((shared / group).glob("*.yaml"))]
    return [root / "config.yaml", *own, *others]


def groups_named(root: Path) -> list[str]:
    """Groups in the defaults list of a command's file."""
    defaults = (yaml.safe_load((root / "config.yaml").read_text()) or {}).get("defaults") or []
    names = [name for entry in defaults if isinstance(entry, dict) for name in entry]
    return [name.removeprefix("optional ").removeprefix("override ").strip() for name in names]


def package_of(path: Path, base: Path) -> str:
    """Where a group file's keys stand: its ``# @package`` line, else its folder."""
    head = re.match(r"#\s*@package\s+(\S+)", path.read_text())
    if head:
        return "" if head[1] == "_global_" else head[1]
    folder = path.parent.relative_to(base)
    return ".".join(folder.parts)


def check(cfg: DictConfig, root: Path, shared: Path, overrides: Sequence[str] = ()) -> None:
    """Raises OptionError for the first key that does not exist, has a value that is not allowed, or has none.

    ``overrides``: what was given by hand. Such a key is also refused where its condition says that nothing reads it.
    """
    options = declared(root, shared)
    given = {override.lstrip("+~").partition("=")[0].partition("@")[0] for override in overrides}
    for key in missing_keys(OmegaConf.to_container(cfg)):
        raise MissingValue(key)
    try:
        _check_node(with_run_dir(cfg), "", options, None)
    except OmegaConfBaseException as error:
        raise OptionError(" ".join(str(error).split())) from error
    for key in given:
        option = options.get(key)
        if option is None or option.declaration is None:
            continue
        if any(kind.name == "internal" for kind in option.declaration.kinds):
            raise OptionError(f"{key} cannot be given: the command sets it ({option.declaration.words})")
        if option.declaration.condition is not None:
            _check_condition(cfg, key, option.declaration)


def with_run_dir(cfg: DictConfig) -> DictConfig:
    """A copy in which ``${run_dir}`` can be resolved: a training chooses the folder when it starts."""
    if RUN_DIR in cfg:
        return cfg
    copy = cfg.copy()
    with open_dict(copy):
        copy[RUN_DIR] = "the run's version folder"
    return copy


def missing_keys(content: Any, above: str = "") -> Iterator[str]:
    """Keys of a plain configuration that have no value (``???``)."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from missing_keys(value, f"{above}.{name}" if above else str(name))
    elif content == "???":
        yield above


def _check_condition(cfg: DictConfig, key: str, declaration: Declaration) -> None:
    name, wanted = declaration.condition
    beside = f"{key.rpartition('.')[0]}.{name}".lstrip(".")
    value = OmegaConf.select(cfg, beside, default=OmegaConf.select(cfg, name, default=None))
    own = OmegaConf.select(cfg, key, default=None)
    if own is None or (yaml_word(value) in wanted if wanted else value is not None):
        return
    condition = f"{name}={'|'.join(wanted)}" if wanted else f"a value of {name}"
    raise OptionError(
        f"{key}={yaml_word(own)} would have no effect: it is read only with {condition}; {name} is {yaml_word(value)}"
    )


@dataclass(frozen=True)
class _Taken:
    """Parameters that a ``_target_`` takes, with their annotations; ``others``: it takes any other name too."""

    annotations: Mapping[str, Any]
    others: bool


def _check_node(node: DictConfig, above: str, options: Mapping[str, Field], taken: _Taken | None) -> None:
    known = {key.rpartition(".")[2] for key in options if key.rpartition(".")[0] == above}
    for name in node:
        name = str(name)
        key = f"{above}.{name}" if above else name
        if name.startswith("_") or (not above and name in ("hydra", RUN_DIR)):
            continue
        field = options.get(key)
        value = node[name]
        if taken is not None and name not in taken.annotations and not taken.others:
            raise unknown(key, sorted(taken.annotations), above)
        if taken is None and field is None and not _free(above, options, value):
            raise unknown(key, sorted(known), above, options)
        kinds = field.declaration.kinds if field is not None and field.declaration is not None else ()
        if not kinds and taken is not None and name in taken.annotations:
            kinds = from_annotation(taken.annotations[name])
        _check_value(key, value, kinds, field)
        if OmegaConf.is_interpolation(node, name):
            continue  # what it stands for is checked where it is
        if isinstance(value, DictConfig):
            _check_node(value, key, options, _parameters(value, key, kinds))
        elif isinstance(value, ListConfig):
            for i, each in enumerate(value):
                if isinstance(each, DictConfig) and "_target_" in each:
                    _check_node(each, f"{key}.{i}", options, _parameters(each, f"{key}.{i}"))


class MissingValue(OptionError):
    """An option without default was not given."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} has no value: give {key}=...")


def _check_value(key: str, value: Any, kinds: Sequence[Kind], field: Field | None) -> None:
    plain = OmegaConf.to_container(value, resolve=True) if isinstance(value, (DictConfig, ListConfig)) else value
    if not admitted(kinds, plain):
        for kind in kinds if isinstance(plain, dict) else ():
            for name, each in plain.items() if kind.name == "mapping" else ():
                _check_value(f"{key}.{name}", each, kind.members, field)
        words = field.declaration.words if field is not None and field.declaration is not None else ""
        raise OptionError(f"{key}={yaml_word(plain)} is not allowed: {spell(kinds)}{f' ({words})' if words else ''}")
    if any(kind.name == "device" for kind in kinds) and isinstance(plain, str):
        require_device(key, plain)


def require_device(key: str, name: str) -> None:
    """Raises OptionError when this machine has no such device."""
    if name in ("cpu", "auto"):
        return
    import torch

    count = torch.cuda.device_count()
    number = int(name.partition(":")[2] or 0)
    if name.startswith("cuda") and number >= count:
        raise OptionError(f"{key}={name}: this machine has {count} CUDA devices; cpu works everywhere")
    if name == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"{key}={name}: this machine has no such device; cpu works everywhere")


def _free(above: str, options: Mapping[str, Field], value: Any) -> bool:
    """Whether a name that no file has may stand below this key: in a mapping that the file leaves open (null or {}), or
    as one more node among nodes (callbacks, loggers, rules)."""
    if not above:
        return False
    siblings = [each.value for key, each in options.items() if key.rpartition(".")[0] == above]
    if siblings and all(each is None or (isinstance(each, dict) and "_target_" in each) for each in siblings):
        if value is None or (isinstance(value, DictConfig) and "_target_" in value):
            return True
    while above:
        field = options.get(above)
        if field is not None and not field.value and field.declaration is not None:
            return any(kind.name in ("mapping", "any") for kind in field.declaration.kinds)
        above = above.rpartition(".")[0]
    return False


def _parameters(node: DictConfig, key: str, kinds: Sequence[Kind] = ()) -> _Taken | None:
    """What the node's target takes, or the one that the key is declared for. Raises OptionError for no such target."""
    target = node.get("_target_") or next((kind.target for kind in kinds if kind.target), None)
    if target is None:
        return None
    if not isinstance(target, str):
        raise OptionError(f"{key}._target_={target}: the dotted name of a class or function was expected")
    try:
        found = get_object(target)
    except (ImportError, ValueError, AttributeError) as error:
        raise OptionError(f"{key}._target_={target} does not exist: {error}") from error
    return taken_by(found)


@cache
def taken_by(found: Any) -> _Taken:
    """Parameters of a class or function that can be given by name."""
    if not callable(found):
        raise OptionError(f"{found!r} can not be called: give the dotted name of a class or function as _target_")
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # builtins that say nothing
        return _Taken({}, True)
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return _Taken({}, True)
    try:
        hints = typing.get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except (NameError, TypeError):  # names that exist for type checkers only
        hints = {}
    named = [each for each in parameters if each.kind is not each.POSITIONAL_ONLY]
    return _Taken({each.name: hints.get(each.name, each.annotation) for each in named}, False)


def from_annotation(annotation: Any) -> tuple[Kind, ...]:
    """Kinds of a plain annotation (numbers, words, None, lists of them); empty, which admits all, for any other."""
    if annotation in SIMPLE:
        return (Kind(SIMPLE[annotation]),)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return tuple(Kind("word", word=yaml_word(each)) for each in arguments)
    if origin in (typing.Union, types.UnionType):
        parts = [from_annotation(each) for each in arguments]
        return tuple(kind for part in parts for kind in part) if all(parts) else ()
    return ()


def unknown(key: str, known: Sequence[str], above: str, options: Mapping[str, Field] | None = None) -> OptionError:
    """The error of a key that nothing reads, with the nearest one that something does."""
    name = key.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {f'{above}.' if above else ''}{near[0]}?" if near else ""
    if not hint and options is not None:
        elsewhere = difflib.get_close_matches(key, list(options), n=1)
        hint = f"did you mean {elsewhere[0]}?" if elsewhere else ""
    hint = hint or f"there {'are' if known else 'is'} {', '.join(known) or 'nothing'} here; --help lists all"
    return OptionError(f"there is no key {key}, nothing would read it: {hint}")
