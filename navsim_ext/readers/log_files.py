"""What readers of one file per log share: which files a filter admits, walking over them, scenes by token."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from navsim_ext.errors import DataError, MissingError
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.scene import Scene

log = logging.getLogger(__name__)


class LogFiles(ABC):
    """The logs ``paths`` (file by name, in alphabetical order) of ``folder`` that ``scene_filter`` admits.

    ``invalid`` maps the token of a window that the reader left out to the reason; it fills as logs are read. Raises
    MissingError when the filter names logs and none of them is there.
    """

    def __init__(self, folder: Path, paths: Mapping[str, Path], scene_filter: SceneFilter, report: SkipReport) -> None:
        self.scene_filter, self.report = scene_filter, report
        self.invalid: dict[str, str] = {}
        self._folder = folder
        wanted = list(paths) if scene_filter.log_names is None else sorted(scene_filter.log_names)
        self._paths = {name: paths[name] for name in wanted if name in paths}
        if not self._paths:
            raise MissingError(
                f"none of the {len(wanted)} logs of the scene filter (first: {next(iter(wanted), None)!r}) is among "
                f"the {len(paths)} logs in {folder} (first: {next(iter(paths), None)!r}): filter and split do not fit"
            )
        self.files = tuple(paths.get(name, folder / f"{name}.pkl") for name in wanted)
        self._log_of_token: dict[str, str] | None = None
        self._open_log: tuple[str, list[Scene]] | None = None

    @abstractmethod
    def scenes_of(self, log_name: str) -> list[Scene]:
        """Selected scenes of one log, by time; ``max_scenes`` and tokens of other logs are not looked at."""

    def __len__(self) -> int:
        return len(self._index())

    @property
    def log_names(self) -> list[str]:
        """Logs that the filter admits, in alphabetical order, whether or not they hold a selected scene."""
        return list(self._paths)

    @property
    def tokens(self) -> list[str]:
        """Tokens of all selected windows, by log name and then by time. The first call reads every log once."""
        return list(self._index())

    def scene(self, token: str) -> Scene:
        """The scene of ``token``; raises MissingError for a token that was not selected."""
        log_name = self._index().get(token)
        if log_name is None:
            reason = self.invalid.get(token)
            detail = f"is invalid: {reason}" if reason else f"is not among the {len(self)} scenes of {self._folder}"
            raise MissingError(f"token {token} {detail}")
        if self._open_log is None or self._open_log[0] != log_name:
            self._open_log = (log_name, self.scenes_of(log_name))
        return next(scene for scene in self._open_log[1] if scene.token == token)

    def logs(self) -> Iterator[tuple[str, list[Scene]]]:
        """(log name, its scenes) in alphabetical order; logs without a selected scene are left out."""
        log_of_token: dict[str, str] = {}
        limit = self.scene_filter.max_scenes
        for log_name in self._paths:
            scenes = []
            for scene in self.scenes_of(log_name)[: None if limit is None else limit - len(log_of_token)]:
                if scene.token in log_of_token:
                    self.add_repeated(scene, log_of_token[scene.token])
                    continue
                log_of_token[scene.token] = log_name
                scenes.append(scene)
            self.report.write()
            if scenes:
                yield log_name, scenes
            if limit is not None and len(log_of_token) >= limit:
                break
        what = f"{self._folder}"
        if self.invalid:
            share = len(self.invalid) / (len(self.invalid) + len(log_of_token))
            log.info("%s: %d windows (%.1f %%) are invalid", self._folder, len(self.invalid), 100.0 * share)
            what = f"{self._folder} ({len(self.invalid)} invalid windows)"
        self.report.require_some(len(log_of_token), what)
        self.require_listed(log_of_token)
        self._log_of_token = log_of_token

    def add_repeated(self, scene: Scene, first_log: str) -> None:
        """Reports a scene whose token ``first_log`` has already."""
        error = DataError(
            f"{self._paths[scene.log_name]}: token {scene.token} (now at {scene.timestamps_us[scene.now]} us) occurs a "
            f"second time; log {first_log} has it already. Tokens must be unique: remove one of the logs"
        )
        self.report.add(error, log_name=scene.log_name, token=scene.token)

    def require_listed(self, found: Collection[str]) -> None:
        """Every token that the filter lists must be among ``found``: NAVSIM drops unknown ones without a word."""
        wanted = self.scene_filter.tokens
        if wanted is None or self.scene_filter.max_scenes is not None or self.report.skip_bad:
            return
        missing = [token for token in wanted if token not in found]
        if missing:
            unknown = "wrong split, logs not downloaded, or a window without a route"
            raise MissingError(
                f"{len(missing)} of {len(wanted)} tokens of the scene filter are not in {self._folder} (first: "
                f"{missing[0]}, {self.invalid.get(missing[0], unknown)}); skip_bad=true goes on without them"
            )

    def _index(self) -> dict[str, str]:
        while self._log_of_token is None:  # logs() sets it when it is exhausted
            for _ in self.logs():
                pass
        return self._log_of_token
