"""NAVSIM / OpenScene logs: ``navsim_logs/<split>/<log>.pkl``, lists of frame dictionaries at 2 Hz.

Windows are NAVSIM's own (``navsim/common/dataloader.py``, versions 1.1 and 2.2): for each start i in
range(0, n, stride) the frames i ... i + history + future - 1; short ones are dropped; the token is that of the last
history frame; windows do not respect ``scene_token`` borders. One log is held in memory at a time.
A test server's log is cut into its own windows instead (:mod:`navsim_ext.readers.hidden_scenes`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from navsim_ext import pickles
from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.readers.hidden_scenes import NUM_HISTORY, cut_windows, is_cut
from navsim_ext.readers.log_files import LogFiles
from navsim_ext.readers.navsim_frames import Frame, cameras_of, join_frames, parse_frame
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.runtime.checksums import check_listed
from navsim_ext.scene import Camera, Scene

if TYPE_CHECKING:
    from navsim_ext.maps.vector_map import VectorMap

EDITED = (
    "delete the file and run the command that made the data again; where you edited it yourself, delete the "
    "checksums.json beside it"
)
NUM_MAPS_IN_MEMORY = 4  # nuPlan has four cities


class NavsimLogs(LogFiles):
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
        self.required_cameras = tuple(required_cameras)
        self.sensor_root = self.root / "sensor_blobs" / split
        report = SkipReport(skip_bad, Path(report_path) if report_path is not None else None)
        super().__init__(*self._find_logs(), scene_filter or SceneFilter(), report)
        self._maps: dict[str, VectorMap] = {}

    def _find_logs(self) -> tuple[Path, dict[str, Path]]:
        folder = self.root / "navsim_logs" / self.split
        if not folder.is_dir():
            raise MissingError(f"{folder} does not exist: check the data root {self.root} and the split {self.split!r}")
        paths = {path.stem: path for path in sorted(folder.glob("*.pkl"))}
        if not paths:
            raise MissingError(f"{folder} holds no *.pkl: the logs of split {self.split!r} were not downloaded there")
        return folder, paths

    def scenes_of(self, log_name: str) -> list[Scene]:
        scenes: dict[str, Scene] = {}
        for scene in self._read_log(log_name, self._paths[log_name]):
            if scene.token in scenes:
                self.add_repeated(scene, log_name)
            else:
                scenes[scene.token] = scene
        self.report.write()
        return list(scenes.values())

    def map_for(self, scene: Scene) -> VectorMap:
        """The nuPlan map of the scene's location."""
        from navsim_ext.maps.nuplan_gpkg import load_map  # geopandas is slow to import; logs alone do not need it

        if scene.map_location not in self._maps:
            if len(self._maps) >= NUM_MAPS_IN_MEMORY:
                self._maps.pop(next(iter(self._maps)))
            self._maps[scene.map_location] = load_map(self.maps_root, scene.map_location)
        return self._maps[scene.map_location]

    def _read_log(self, log_name: str, path: Path) -> Iterator[Scene]:
        """Selected scenes of one log; bad frames spoil only the windows that contain them."""
        try:
            check_listed(path.parent, path, EDITED)
            frames = pickles.load(path)
            if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
                raise DataError(
                    f"{path} holds {type(frames).__name__} of {len(frames) if isinstance(frames, list) else 'no'} "
                    "frames; a list of frame dictionaries was expected: this is not an OpenScene log"
                )
        except TriviumError as error:
            self.report.add(error, log_name=log_name)
            return
        wanted = set(self.scene_filter.tokens) if self.scene_filter.tokens is not None else None
        history, cut = self.scene_filter.num_history, is_cut(frames)
        parsed: dict[int, Frame | DataError] = {}
        for indices in self._windows(frames, path, log_name, cut):
            now = indices[history - 1]
            token = frames[now].get("token")
            if wanted is not None and (not isinstance(token, str) or token not in wanted):
                continue
            parsed = {
                index: parsed[index] if index in parsed else _parse_or_error(frames[index], path, index)
                for index in indices
            }
            bad = next((index for index in indices if isinstance(parsed[index], DataError)), None)
            try:
                if bad is not None:
                    raise parsed[bad]
                window = [parsed[index] for index in indices]
                if self.scene_filter.has_route and not cut and not window[history - 1].roadblock_ids:
                    continue
                yield self._scene(log_name, window, cameras_of(frames[now], path, now))
            except TriviumError as error:
                self.report.add(error, log_name=log_name, token=f"{token!s:.40}", frame=now if bad is None else bad)

    def _windows(
        self, frames: Sequence[Mapping[str, Any]], path: Path, log_name: str, cut: bool
    ) -> Iterable[Sequence[int]]:
        """Positions of the frames of each window; of a test server's log (``cut``), of the history alone."""
        if not cut:
            size = self.scene_filter.num_frames
            starts = range(0, len(frames) - size + 1, self.scene_filter.stride)
            return (range(start, start + size) for start in starts)
        if self.scene_filter.num_history != NUM_HISTORY:
            raise DataError(
                f"{path} is a test server's log, whose scenes have {NUM_HISTORY} history frames; the scene filter asks "
                f"for {self.scene_filter.num_history}: set num_history_frames to {NUM_HISTORY}"
            )
        windows, bad = cut_windows(frames, path)
        for error in bad:
            self.report.add(error, log_name=log_name)
        return windows

    def hides_future(self) -> bool:
        """Whether the first log is a test server's: its scenes end now, whatever the filter says."""
        frames = pickles.load(next(iter(self._paths.values())))
        return isinstance(frames, list) and all(isinstance(frame, dict) for frame in frames) and is_cut(frames)

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
