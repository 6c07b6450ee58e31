"""One worker of the build: takes logs, writes records under its own writer id."""

from __future__ import annotations

from pathlib import Path

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.metric_cache import journal
from navsim_ext.metric_cache.journal import Invalid, LogResult
from navsim_ext.metric_cache.map_table import store_map_table
from navsim_ext.metric_cache.scene_record import MapContext, build_scene
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.readers import NothingSelected, SceneSource
from navsim_ext.scene import Scene
from navsim_ext.shards import ShardWriter

MAX_MAPS = 4  # map contexts in memory; scenario files have one each, nuPlan has four


class LogWorker:
    """Caches the scenes of one log after another into ``settings.output_dir``."""

    def __init__(self, settings: BuildSettings, fingerprint: Fingerprint, writer: str) -> None:
        self.settings = settings
        self.writer = ShardWriter(settings.output_dir, fingerprint, writer=writer)
        self._maps: dict[str, MapContext] = {}

    def process(self, log_name: str) -> LogResult:
        """Caches every selected scene of a log that is not stored yet, and notes the log as finished.

        A scene that cannot be cached (DataError) becomes invalid with its reason; a missing map or a full disk ends
        the build.
        """
        cached: list[str] = []
        invalid: list[Invalid] = []
        maps: set[str] = set()
        for source in self.settings.sources(log_name):
            try:
                for _, scenes in source.logs():
                    for scene in scenes:
                        try:
                            maps.add(self._cache(source, scene))
                            cached.append(scene.token)
                        except DataError as error:
                            invalid.append(Invalid(scene.token, type(error).__name__, str(error)))
            except NothingSelected:
                pass  # no window of this log is asked for, or all were bad: the report below says so
            for token, reason in getattr(source, "invalid", {}).items():  # windows that a ScenarioNet reader refuses
                invalid.append(Invalid(token, "InvalidWindow", reason))
            for entry in source.report.entries:
                token = entry["token"]
                invalid.append(Invalid(None if token is None else str(token), str(entry["kind"]), str(entry["error"])))
        result = LogResult(log_name, tuple(cached), tuple(invalid), tuple(sorted(maps)))
        journal.append(Path(self.settings.output_dir), self.writer.writer, result)
        return result

    def close(self) -> None:
        self.writer.close()

    def _cache(self, source: SceneSource, scene: Scene) -> str:
        """Stores a scene that is not stored yet, and the polygons of its map, whose name it returns."""
        context = self._context(source, scene)
        if scene.token not in self.writer.done:
            self.writer.put(scene.token, build_scene(scene, context, self.settings.versions).to_arrays())
        return context.name

    def _context(self, source: SceneSource, scene: Scene) -> MapContext:
        """The map of a scene with its polygon table, kept between logs.

        A location names one nuPlan map; reconstructed maps differ from log to log, so theirs carry the log's name.
        """
        name = scene.map_location if scene.map_label == "nuplan" else f"{scene.map_location}@{scene.log_name}"
        context = self._maps.get(name)
        if context is None:
            vector_map = source.map_for(scene)
            if len(self._maps) >= MAX_MAPS:
                self._maps.pop(next(iter(self._maps)))
            table = store_map_table(self.settings.output_dir, name, vector_map)
            context = self._maps[name] = MapContext(name, vector_map, table)
        return context
