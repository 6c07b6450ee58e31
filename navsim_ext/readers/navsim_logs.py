"""NAVSIM / OpenScene logs: ``navsim_logs/<split>/<log>.pkl``, lists of frame dictionaries at 2 Hz.

Windows are NAVSIM's own (``navsim/common/dataloader.py``, versions 1.1 and 2.2): for each start i in
range(0, n, stride) the frames i ... i + history + future - 1; short ones are dropped; the token is that of the last
history frame; windows do not respect ``scene_token`` borders. One log is held in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.readers import restricted_pickle
from navsim_ext.readers.navsim_frames import Frame, cameras_of, join_frames, parse_frame
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.scene import Camera, Scene

if TYPE_CHECKING:
    from navsim_ext.maps.vector_map import VectorMap

NUM_MAPS_IN_MEMORY = 4  # nuPlan has four cities


class NavsimLogs:
    """Scenes of one split.

    ``root`` holds ``navsim_logs/<split>`` and ``sensor_blobs/<split>`` (OPENSCENE_DATA_ROOT); ``maps_root`` defaults
    to ``<root>/maps``. ``required_cameras`` names cameras whose picture of the frame now must exist on disk.
    ``skip_bad`` leaves bad logs and windows out, counted in ``report`` and listed in ``report_path``; otherwise the
    first one raises DataError or MissingError with file, frame, key, both values and the remedy.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        maps_root: str | os.PathLike[str] | None = None,
        scene_filter: SceneFilter | None = None,
        required_cameras: Sequence[str] = (),
        skip_bad: bool = False,
        report_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root, self.split = Path(root), split
        self.maps_root = Path(maps_root) if maps_root is not None else self.root / "maps"
        self.scene_filter = scene_filter or SceneFilter()
        self.required_cameras = tuple(required_cameras)
        self.sensor_root = self.root / "sensor_blobs" / split
        self.report = SkipReport(skip_bad, Path(report_path) if report_path is not None else None)
        self._log_paths = self._select_logs()
        self._log_of_token: dict[str, str] | None = None
        self._open_log: tuple[str, list[Scene]] | None = None
        self._maps: dict[str, VectorMap] = {}

    def _select_logs(self) -> dict[str, Path]:
        folder = self.root / "navsim_logs" / self.split
        if not folder.is_dir():
            raise MissingError(f"{folder} does not exist: check the data root {self.root} and the split {self.split!r}")
        paths = {path.stem: path for path in sorted(folder.glob("*.pkl"))}
        if not paths:
            raise MissingError(f"{folder} holds no *.pkl: the logs of split {self.split!r} were not downloaded there")
        wanted = self.scene_filter.log_names
        if wanted is None:
            return paths
        found = {name: paths[name] for name in sorted(wanted) if name in paths}
        if not found:
            raise MissingError(
                f"none of the {len(wanted)} logs of the scene filter (first: {next(iter(wanted), None)!r}) is among "
                f"the {len(paths)} logs in {folder} (first: {next(iter(paths))!r}): filter and split do not fit"
            )
        return found

    def __len__(self) -> int:
        return len(self._index())

    @property
    def tokens(self) -> list[str]:
        """Tokens of all selected windows, by log name and then by time. The first call reads every log once."""
        return list(self._index())

    def scene(self, token: str) -> Scene:
        """The scene of ``token``; raises MissingError for a token that was not selected."""
        log_name = self._index().get(token)
        if log_name is None:
            raise MissingError(f"token {token} is not among the {len(self)} scenes of {self.root} / {self.split}")
        if self._open_log is None or self._open_log[0] != log_name:
            self._open_log = (log_name, self.scenes_of(log_name))
        return next(scene for scene in self._open_log[1] if scene.token == token)

    @property
    def log_names(self) -> list[str]:
        """Logs that the filter admits, in alphabetical order, whether or not they hold a selected scene."""
        return list(self._log_paths)

    def scenes_of(self, log_name: str) -> list[Scene]:
        """Selected scenes of one log, by time; ``max_scenes`` and tokens of other logs are not looked at."""
        scenes: dict[str, Scene] = {}
        path = self._log_paths[log_name]
        for scene in self._read_log(log_name, path):
            if scene.token in scenes:
                self._repeated(path, scene, log_name)
            else:
                scenes[scene.token] = scene
        self.report.write()
        return list(scenes.values())

    def _repeated(self, path: Path, scene: Scene, first_log: str) -> None:
        error = DataError(
            f"{path}: token {scene.token} (now at {scene.timestamps_us[scene.now]} us) occurs a second time; log "
            f"{first_log} has it already. Tokens must be unique: remove one of the logs"
        )
        self.report.add(error, log_name=path.stem, token=scene.token)

    def logs(self) -> Iterator[tuple[str, list[Scene]]]:
        """(log name, its scenes) in alphabetical order; logs without a selected scene are left out."""
        log_of_token: dict[str, str] = {}
        limit = self.scene_filter.max_scenes
        for log_name, path in self._log_paths.items():
            scenes = []
            for scene in self.scenes_of(log_name)[: None if limit is None else limit - len(log_of_token)]:
                if scene.token in log_of_token:
                    self._repeated(path, scene, log_of_token[scene.token])
                    continue
                log_of_token[scene.token] = log_name
                scenes.append(scene)
            self.report.write()
            if scenes:
                yield log_name, scenes
            if limit is not None and len(log_of_token) >= limit:
                break
        self.report.require_some(len(log_of_token), f"{self.root / 'navsim_logs' / self.split}")
        self.require_listed(log_of_token)
        self._log_of_token = log_of_token

    def map_for(self, scene: Scene) -> VectorMap:
        """The nuPlan map of the scene's location."""
        from navsim_ext.maps.nuplan_gpkg import load_map  # geopandas is slow to import; logs alone do not need it

        if scene.map_location not in self._maps:
            if len(self._maps) >= NUM_MAPS_IN_MEMORY:
                self._maps.pop(next(iter(self._maps)))
            self._maps[scene.map_location] = load_map(self.maps_root, scene.map_location)
        return self._maps[scene.map_location]

    def _index(self) -> dict[str, str]:
        while self._log_of_token is None:  # logs() sets it when it is exhausted
            for _ in self.logs():
                pass
        return self._log_of_token

    def require_listed(self, found: Collection[str]) -> None:
        """Every token that the filter lists must be among ``found``: NAVSIM drops unknown ones without a word."""
        wanted = self.scene_filter.tokens
        if wanted is None or self.scene_filter.max_scenes is not None or self.report.skip_bad:
            return
        missing = [token for token in wanted if token not in found]
        if missing:
            raise MissingError(
                f"{len(missing)} of {len(wanted)} tokens of the scene filter are not in {self.root} / {self.split} "
                f"(first: {missing[0]}): wrong split, logs not downloaded, or windows without a route; skip_bad=true "
                "goes on without them"
            )

    def _read_log(self, log_name: str, path: Path) -> Iterator[Scene]:
        """Selected scenes of one log; bad frames spoil only the windows that contain them."""
        try:
            frames = restricted_pickle.load(path)
            if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
                raise DataError(
                    f"{path} holds {type(frames).__name__} of {len(frames) if isinstance(frames, list) else 'no'} "
                    "frames; a list of frame dictionaries was expected: this is not an OpenScene log"
                )
        except TriviumError as error:
            self.report.add(error, log_name=log_name)
            return
        wanted = set(self.scene_filter.tokens) if self.scene_filter.tokens is not None else None
        size, history = self.scene_filter.num_frames, self.scene_filter.num_history
        parsed: dict[int, Frame | DataError] = {}
        for start in range(0, len(frames) - size + 1, self.scene_filter.stride):
            now = start + history - 1
            token = frames[now].get("token")
            if wanted is not None and token not in wanted:
                continue
            for index in [index for index in parsed if index < start]:
                del parsed[index]
            for index in range(start, start + size):
                if index not in parsed:
                    parsed[index] = _parse_or_error(frames[index], path, index)
            bad = next((index for index in range(start, start + size) if isinstance(parsed[index], DataError)), None)
            try:
                if bad is not None:
                    raise parsed[bad]
                window = [parsed[index] for index in range(start, start + size)]
                if self.scene_filter.has_route and not window[history - 1].roadblock_ids:
                    continue
                yield self._scene(log_name, window, cameras_of(frames[now], path, now))
            except TriviumError as error:
                self.report.add(error, log_name=log_name, token=str(token), frame=now if bad is None else bad)

    def _scene(self, log_name: str, window: list[Frame], cameras: dict[str, Camera]) -> Scene:
        now = window[self.scene_filter.num_history - 1]
        for name in self.required_cameras:
            if name not in cameras:
                raise DataError(f"log {log_name}, frame {now.token}: cams has {sorted(cameras)}; {name} was expected")
            if not (self.sensor_root / cameras[name].path).is_file():
                raise MissingError(
                    f"log {log_name}, frame {now.token}: cams.{name}.data_path {cameras[name].path!r} is not in "
                    f"{self.sensor_root}: download the sensor blobs of split {self.split!r}"
                )
        return join_frames(window, self.scene_filter.num_history, log_name, self.split, cameras)


def _parse_or_error(content: Mapping[str, Any], path: Path, index: int) -> Frame | DataError:
    try:
        return parse_frame(content, path, index)
    except DataError as error:
        return error
