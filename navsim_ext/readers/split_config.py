"""NAVSIM 2's two-stage splits: which scenes there are, and how they hang together.

``train_test_split/NAME.yaml`` names the logs' split and the groups, ``train_test_split/scene_filter/NAME.yaml`` the
scenes. A group is a recorded scene ("now"), the one 0.5 s before it ("prev"), and pairs of second-stage scenes that
start 4 s after them. A split of a test server has no groups (``reactive_all_mapping: null``): it can be planned and
submitted, but only the server can score it.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import reading
from navsim_ext.readers.hidden_scenes import META_FOLDER
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.second_stage import PICKLES_FOLDER, stage_files

SECOND_STAGE_TOKENS = "reactive_synthetic_initial_tokens"
MAPPING = "reactive_all_mapping"


@dataclass(frozen=True)
class Group:
    """One entry of the mapping. ``problem`` says why it cannot be scored whatever is predicted; empty: it can."""

    now: str
    prev: str
    pairs: tuple[tuple[str, str], ...]  # (now_j, prev_j)
    problem: str = ""

    @property
    def tokens(self) -> tuple[str, ...]:
        return (self.now, self.prev, *(token for pair in self.pairs for token in pair))


@dataclass(frozen=True)
class SplitConfig:
    """A two-stage split as its two YAML files say it."""

    name: str
    data_split: str  # folder of navsim_logs and sensor_blobs
    scene_filter: SceneFilter  # of the first stage
    second_stage_tokens: tuple[str, ...]
    groups: tuple[Group, ...] | None  # None: the split has no mapping

    @property
    def first_stage_tokens(self) -> tuple[str, ...]:
        return tuple(self.scene_filter.tokens or ())

    def require_groups(self) -> tuple[Group, ...]:
        """Raises DataError for a split whose groups only a server knows."""
        if self.groups is None:
            raise DataError(
                f"split {self.name} has no {MAPPING}: its scenes can be planned and submitted, but how they form "
                "groups only the evaluation server knows, so it cannot be scored here "
                "(protocol=plan of navsim_ext.evaluation.score plans it for a submission)"
            )
        return self.groups


def read_split(path: str | os.PathLike[str]) -> SplitConfig:
    """Reads ``train_test_split/NAME.yaml`` and the scene filter beside it.

    Groups that contradict themselves or each other keep their reason in ``problem``. Raises MissingError for an absent
    file, DataError for a key or value that is not as NAVSIM writes it.
    """
    file = Path(path)
    content = _mapping(file)
    data_split = content.get("data_split")
    if not isinstance(data_split, str):
        raise DataError(f"{file}: data_split is {data_split!r}; the name of a folder of navsim_logs was expected")
    filter_file = file.parent / "scene_filter" / f"{_filter_name(content, file)}.yaml"
    tokens = second_stage_tokens(filter_file)
    entries = content.get(MAPPING)
    groups = None if entries is None else _groups(entries, file)
    return SplitConfig(file.stem, data_split, SceneFilter.from_yaml(filter_file, two_stage=True), tokens, groups)


def second_stage_tokens(filter_file: str | os.PathLike[str]) -> tuple[str, ...]:
    """The second-stage scenes that a scene filter lists. Raises MissingError or DataError naming the file."""
    filter_file = Path(filter_file)
    listed = _mapping(filter_file)
    tokens = listed.get(SECOND_STAGE_TOKENS) or []
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise DataError(f"{filter_file}: {SECOND_STAGE_TOKENS} is a {type(tokens).__name__}; a list of tokens expected")
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise DataError(
            f"{filter_file}: {SECOND_STAGE_TOKENS} lists {repeated[0]} more than once ({len(repeated)} are)"
        )
    return tuple(tokens)


def _mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise MissingError(
            f"{file} does not exist: give the YAML of a split, e.g. config/train_test_split/navhard.yaml"
        )
    with reading(file, "correct or copy it again"):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}; a mapping was expected")
    return content


def _filter_name(content: dict[str, Any], file: Path) -> str:
    """The scene filter that ``defaults`` names; the split's own name where it names none."""
    for entry in content.get("defaults") or ():
        if isinstance(entry, dict) and isinstance(entry.get("scene_filter"), str):
            return entry["scene_filter"]
    return file.stem


def _groups(entries: Any, file: Path) -> tuple[Group, ...]:
    if not isinstance(entries, list):
        raise DataError(f"{file}: {MAPPING} is a {type(entries).__name__}; a list of [now, prev, pairs] was expected")
    groups = [_group(entry, f"{file}: {MAPPING}[{i}]") for i, entry in enumerate(entries)]
    uses = Counter(token for group in groups for token in set(group.tokens))
    checked = []
    for group in groups:
        shared = [token for token in group.tokens if uses[token] > 1]
        repeated = [token for token, count in Counter(group.tokens).items() if count > 1]
        problem = ""
        if not group.pairs:
            problem = f"group {group.now} has no second-stage pair"
        elif shared:
            problem = f"token {shared[0]} stands in {uses[shared[0]]} groups"
        elif repeated:
            problem = f"token {repeated[0]} stands twice in group {group.now}"
        checked.append(Group(group.now, group.prev, group.pairs, problem))
    return tuple(checked)


def _group(entry: Any, where: str) -> Group:
    if not isinstance(entry, list | tuple) or len(entry) != 3 or not isinstance(entry[2], list | tuple):
        raise DataError(f"{where} is {str(entry)[:80]}; [now token, prev token, [[now_1, prev_1], ...]] was expected")
    now, prev, pairs = entry
    texts = [now, prev, *(token for pair in pairs if isinstance(pair, list | tuple) for token in pair)]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs) or not all(
        isinstance(text, str) for text in texts
    ):
        raise DataError(f"{where}: its pairs are {str(pairs)[:80]}; pairs of tokens (text) were expected")
    return Group(now, prev, tuple((str(a), str(b)) for a, b in pairs))


def second_stage_folder(root: str | os.PathLike[str], name: str, given: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a split's second stage: as given, ``<root>/<name>``, or the only one under the root.

    Raises MissingError where there is none, DataError where several could be meant.
    """
    if given is not None:
        folder = Path(given)
        if not stage_files(folder).is_dir():
            raise MissingError(f"data.second_stage={folder} holds no folder {PICKLES_FOLDER} or {META_FOLDER}")
        return folder
    if stage_files(Path(root) / name).is_dir():
        return Path(root) / name
    found = sorted({path.parent for kind in (PICKLES_FOLDER, META_FOLDER) for path in Path(root).glob(f"*/{kind}")})
    if not found:
        raise MissingError(
            f"{root} holds no */{PICKLES_FOLDER} or */{META_FOLDER}: the second stage of {name} is not there. Download "
            "it, or set data.second_stage to the folder that holds it"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{root} holds several second stages: {names}; choose one with data.second_stage=")
    return found[0]
