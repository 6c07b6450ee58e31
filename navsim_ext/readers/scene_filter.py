"""Which windows of which logs are read: NAVSIM's scene filter."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import reading

MOST = 1_000_000_000
# Keys of NAVSIM's own YAML files -> fields here; the rest selects NAVSIM 2's synthetic second stage.
_YAML_KEYS = {
    "log_names": "log_names",
    "tokens": "tokens",
    "frame_interval": "frame_interval",
    "num_history_frames": "num_history",
    "num_future_frames": "num_future",
    "has_route": "has_route",
    "max_scenes": "max_scenes",
}
_SECOND_STAGE_KEYS = (
    "include_synthetic_scenes",
    "all_mapping",
    "synthetic_scene_tokens",
    "reactive_synthetic_initial_tokens",
    "non_reactive_synthetic_initial_tokens",
)


@dataclass(frozen=True)
class SceneFilter:
    """Selection of windows; None means no restriction.

    A window starts at every ``frame_interval``-th frame of a log and has ``num_history + num_future`` frames; its
    token is that of the frame "now", the last history frame. ``frame_interval=None`` is NAVSIM's default: windows
    that do not overlap. ``has_route`` drops windows whose frame now has no roadblocks. ``max_scenes`` stops early
    (logs in alphabetical order; NAVSIM takes them in directory order).
    """

    log_names: Sequence[str] | None = None
    tokens: Sequence[str] | None = None
    frame_interval: int | None = 1
    num_history: int = 4
    num_future: int = 10
    has_route: bool = True
    max_scenes: int | None = None

    def __post_init__(self) -> None:
        for name in ("log_names", "tokens"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise DataError(f"scene filter: {name} is the single string {values!r:.80}; a list was expected")
            if values is not None:
                if not isinstance(values, Sequence | Set) or not all(isinstance(value, str) for value in values):
                    raise DataError(f"scene filter: {name} is {values!r:.80}; a list of texts was expected")
                object.__setattr__(self, name, tuple(values))
                twice = [value for value, count in Counter(values).items() if count > 1]
                if twice:
                    raise DataError(
                        f"scene filter: {name} lists {twice[0]!r:.80} {Counter(values)[twice[0]]} times "
                        f"({len(twice)} entries are repeated): list each once"
                    )
        for name, least in (("frame_interval", 1), ("num_history", 1), ("num_future", 0), ("max_scenes", 1)):
            value = getattr(self, name)
            optional = name in ("frame_interval", "max_scenes")
            if (value is None and optional) or (type(value) is int and least <= value <= MOST):
                continue
            raise DataError(f"scene filter: {name} is {value!r:.80}; a whole number of {least} to {MOST} was expected")
        if type(self.has_route) is not bool:
            raise DataError(f"scene filter: has_route is {self.has_route!r:.80}; true or false was expected")

    @property
    def num_frames(self) -> int:
        return self.num_history + self.num_future

    @property
    def stride(self) -> int:
        """Frames between the starts of two windows."""
        return self.num_frames if self.frame_interval is None else self.frame_interval

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], *, two_stage: bool = False) -> SceneFilter:
        """Reads a scene-filter YAML in NAVSIM's own format. Raises DataError for a key that would be ignored.

        ``two_stage``: the filter chooses second-stage scenes too, which :mod:`navsim_ext.readers.split_config` reads.
        """
        file = Path(path)
        if not file.is_file():
            raise MissingError(f"scene filter {file} does not exist")
        with reading(file, "correct or copy it again"):
            content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise DataError(f"scene filter {file} holds a {type(content).__name__}; a mapping of texts was expected")
        fields = {}
        for key, value in content.items():
            if key in _YAML_KEYS:
                fields[_YAML_KEYS[key]] = value
            elif key in _SECOND_STAGE_KEYS and (two_stage or not value):
                continue
            elif not key.startswith("_"):  # _target_, _convert_
                remedy = "give the split's YAML as data.split_config" if key in _SECOND_STAGE_KEYS else "remove it"
                raise DataError(f"scene filter {file}: key {key!r:.80} = {str(value)[:60]} is not supported; {remedy}")
        return cls(**fields)

    def describe(self) -> dict[str, Any]:
        """JSON-able content for fingerprints and messages; long lists are kept whole."""
        listed = {name: None if (v := getattr(self, name)) is None else sorted(v) for name in ("log_names", "tokens")}
        return {
            **listed,
            "frame_interval": self.stride,
            "num_history": self.num_history,
            "num_future": self.num_future,
            "has_route": self.has_route,
            "max_scenes": self.max_scenes,
        }
