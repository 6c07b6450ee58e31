"""Takes over NAVSIM's own metric caches, without the devkit, the data set or the maps.

    python -m navsim_ext.devkit.metric_cache_import v1=NAVSIM_1_1_CACHE v2=NAVSIM_2_2_CACHE output_dir=DIR

One of the two is enough, for the folder as for a token: such a scene has scores of that version only. Every record is
replayed and compared with the boxes of its pickles before it is stored; a difference makes it invalid.
Note that NAVSIM's PDM-Closed depends on which scenes its worker had built before; it is taken over as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from omegaconf import DictConfig

from navsim_ext.devkit.cache_content import PAST_FRAMES, CacheContent, read_content
from navsim_ext.devkit.cache_pickle import read_cache
from navsim_ext.devkit.cache_tracks import STEPS_PER_FRAME, joint_tracks
from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.fingerprint import Fingerprint, digest_tokens
from navsim_ext.metric_cache import journal
from navsim_ext.metric_cache.journal import Invalid, LogResult
from navsim_ext.metric_cache.scene_record import HUMAN_POSES, with_closed_scores
from navsim_ext.metric_cache.schema import KIND, cache_fields, map_folder
from navsim_ext.pdm.closed.forecast import box_corners
from navsim_ext.pdm.ego import STATE_SIZE
from navsim_ext.pdm.log_replay import replayed_boxes
from navsim_ext.pdm.polygon_table import LANE_CONNECTOR, PolygonTable
from navsim_ext.pdm.record import NUM_FRAMES_V2, SceneMetricCache, encode_text
from navsim_ext.pdm.resident import UnscorableScene, prepare
from navsim_ext.pdm.version import VERSIONS
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.progress import track
from navsim_ext.shards import ShardWriter, merge

logger = logging.getLogger(__name__)

FILE = "metric_cache.pkl"
BOX_TOLERANCE_M = 1e-6  # centres and headings are read back from polygons in UTM coordinates


class NothingImported(TriviumError):
    """Not one cache could be taken over."""


def import_caches(v1: str | Path | None, v2: str | Path | None, output_dir: str | Path) -> dict[str, object]:
    """Converts all tokens of the folders; returns the content of ``report.json``. May be killed and run again.

    Raises MissingError for no folder or one without caches, NothingImported, FolderBusy, FingerprintMismatch.
    """
    folders = {version: folder for version, folder in zip(VERSIONS, (v1, v2)) if folder is not None}
    if not folders:
        raise MissingError("v1 and v2 are both null: give the folder of NAVSIM 1.1's caches, of 2.2's, or both")
    files = {version: find_caches(folder) for version, folder in folders.items()}
    cache = Path(output_dir)
    logs: dict[str, list[str]] = {}
    for token in sorted(set().union(*files.values())):
        path = next(found[token] for found in files.values() if token in found)
        logs.setdefault(path.parents[2].name, []).append(token)
    tokens = {version: digest_tokens(found) for version, found in files.items()}
    fingerprint = Fingerprint(kind=KIND, fields=cache_fields() | {"imported": {"from": "navsim", "tokens": tokens}})
    with FolderLock(cache), ShardWriter(cache, fingerprint, writer="import") as writer:
        finished = journal.finished_logs(cache, set(writer.done))
        remaining = [log for log in sorted(logs) if log not in finished]
        results = [finished[log] for log in sorted(logs) if log in finished]
        for log in track(remaining, "import, logs", total=len(logs), done=len(finished)):
            result = import_log(cache, writer, log, logs[log], files)
            journal.append(cache, "import", result)
            results.append(result)
    with FolderLock(cache):
        merge(cache)
        report = journal.write_report(cache, results)
    if not report["cached"]:
        raise NothingImported(f"{cache}: 0 of {report['invalid']} caches were taken over: {report['counts']}")
    return report


def find_caches(folder: str | Path) -> dict[str, Path]:
    """Cache file by token below ``<folder>/<log>/<type>/<token>``; NAVSIM's metadata is not used (absolute paths)."""
    found = {path.parent.name: path for path in sorted(Path(folder).glob(f"*/*/*/{FILE}"))}
    if not found:
        raise MissingError(f"{folder} holds no <log>/<type>/<token>/{FILE}: give the folder that NAVSIM cached into")
    return found


def import_log(
    cache: Path, writer: ShardWriter, log: str, tokens: list[str], files: Mapping[str, Mapping[str, Path]]
) -> LogResult:
    """Converts the caches of one log. They share one polygon table, because NAVSIM 1.1 does not say which map it is."""
    name = f"navsim@{log}"
    scenes: dict[str, dict[str, CacheContent]] = {}
    invalid: list[Invalid] = []
    for token in tokens:
        try:
            scenes[token] = read_versions(token, files)
        except DataError as error:
            invalid.append(Invalid(token, type(error).__name__, str(error)))
    polygons = SharedPolygons()
    for contents in scenes.values():
        polygons.add(*contents.values())
    table = polygons.table()
    table.save(map_folder(cache, name))
    cached: list[str] = []
    for token, contents in scenes.items():
        try:
            if token not in writer.done:
                record = convert(token, log, name, contents, polygons)
                record = with_closed_scores(record, prepare(record, table)).validate()
                writer.put(token, record.to_arrays())
            cached.append(token)
        except (DataError, UnscorableScene) as error:
            invalid.append(Invalid(token, type(error).__name__, str(error)))
    return LogResult(log, tuple(cached), tuple(invalid), (name,))


def read_versions(token: str, files: Mapping[str, Mapping[str, Path]]) -> dict[str, CacheContent]:
    """The caches of a token by version, in the order of ``VERSIONS``; raises DataError when one is of another version
    than its folder's, or they are of different scenes."""
    contents = {}
    for version, found in files.items():
        if token not in found:
            continue
        content = read_content(read_cache(found[token]), found[token])
        if content.version != version:
            raise DataError(f"{found[token]} is a cache of {content.version}, not of {version}")
        contents[version] = content
    if len(contents) < len(VERSIONS):
        return contents
    v1, v2 = contents.values()
    if v1.time_us != v2.time_us or not np.array_equal(v1.ego_state, v2.ego_state):
        raise DataError(f"the caches of token {token} are of different scenes: {v1.time_us} us and {v2.time_us} us")
    return contents


class SharedPolygons:
    """The polygons of several caches, each once: by kind, id and vertices."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, str, bytes], int] = {}
        self._polygons: list[tuple[int, str, shapely.Polygon]] = []

    def add(self, *contents: CacheContent) -> None:
        for content in contents:
            for kind, token, polygon in zip(content.map_types.tolist(), content.map_tokens, content.map_polygons):
                self.row(kind, token, polygon)
            for fid, (polygon, _) in content.red_lights.items():
                self.row(LANE_CONNECTOR, fid, polygon)

    def row(self, kind: int, token: str, polygon: shapely.Polygon) -> int:
        """Row of a polygon; a new one gets the next."""
        key = (kind, token, shapely.to_wkb(polygon))
        if key not in self._rows:
            self._rows[key] = len(self._polygons)
            self._polygons.append((kind, token, polygon))
        return self._rows[key]

    def table(self) -> PolygonTable:
        return PolygonTable.from_rings(
            [_rings(polygon) for _, _, polygon in self._polygons],
            [kind for kind, _, _ in self._polygons],
            [token for _, token, _ in self._polygons],
        )


def _rings(polygon: shapely.Polygon) -> list[NDArray[np.float64]]:
    rings = []
    for part in shapely.get_parts(polygon):
        rings += [shapely.get_coordinates(ring) for ring in (part.exterior, *part.interiors)]
    return rings


def convert(
    token: str, log: str, map_name: str, contents: Mapping[str, CacheContent], polygons: SharedPolygons
) -> SceneMetricCache:
    """The record of the caches of one or both versions, without reference scores. Raises DataError when its replay is
    not theirs."""
    v2 = contents.get("v2")
    if v2 is not None and (v2.human_poses is None or v2.past_states is None or v2.past_time_us is None):
        raise DataError(f"the v2 cache of token {token} has no human or past trajectory")
    any_version = next(iter(contents.values()))  # v1's where it is there: what both hold is equal, and v1 sees 5 s
    tokens, poses = joint_tracks(contents.get("v1"), v2)
    row = {track_token: i for i, track_token in enumerate(any_version.track_tokens)}
    order = [row[track_token] for track_token in tokens]
    lanes = set(any_version.route_lane_ids)
    map_types = any_version.map_types.tolist()
    patch = [
        polygons.row(kind, fid, polygon)
        for kind, fid, polygon in zip(map_types, any_version.map_tokens, any_version.map_polygons)
    ]
    red_lights = {} if v2 is None else v2.red_lights
    no_closed = np.full_like(any_version.pdm_closed, np.nan)
    record = SceneMetricCache(
        token=token,
        log_name=log,
        map_location=map_name,
        map_label="nuplan",
        time_us=any_version.time_us,
        ego_state=any_version.ego_state,
        past_time_us=np.full(PAST_FRAMES, any_version.time_us, dtype=np.int64) if v2 is None else v2.past_time_us,
        past_states=np.full((PAST_FRAMES, STATE_SIZE), np.nan) if v2 is None else v2.past_states,
        human_poses=np.full((HUMAN_POSES, 3), np.nan) if v2 is None else v2.human_poses,
        centerline=any_version.centerline,
        map_polygons=np.array(patch, dtype=np.int32),
        map_on_route=np.array(
            [kind in (0, LANE_CONNECTOR) and fid in lanes for kind, fid in zip(map_types, any_version.map_tokens)],
            dtype=bool,
        ),
        track_poses=poses,
        track_velocities=any_version.track_velocities[order],
        track_sizes=any_version.track_sizes[order],
        track_types=any_version.track_types[order].astype(np.int8),
        red_polygons=np.array(
            [polygons.row(LANE_CONNECTOR, fid, polygon) for fid, (polygon, _) in red_lights.items()], dtype=np.int32
        ),
        red_frames=np.array([red[::STEPS_PER_FRAME] for _, red in red_lights.values()], dtype=bool).reshape(
            -1, NUM_FRAMES_V2
        ),
        pdm_closed=np.stack([contents[v].pdm_closed if v in contents else no_closed for v in VERSIONS]),
        pdm_closed_index=np.full(len(VERSIONS), -1, dtype=np.int8),  # not in NAVSIM's caches
        pdm_progress=np.full(len(VERSIONS), np.nan),
        pdm_multiplier=np.full(len(VERSIONS), np.nan),
        human_sub_scores=np.full(HUMAN_POSES, np.nan),
        text=encode_text(route_lane_ids=any_version.route_lane_ids, route_roadblock_ids=[], track_tokens=tokens),
    )
    for version, content in contents.items():
        require_replayed(record, version, content)
    return record


def require_replayed(record: SceneMetricCache, version: str, content: CacheContent) -> None:
    """Raises DataError when the record's replay in a version is not the observation of the cache."""
    replayed = dict(zip(record.track_tokens, np.moveaxis(replayed_boxes(record, version), 1, 0)))
    sizes = dict(zip(content.track_tokens, content.track_sizes))
    seen = dict(zip(content.track_tokens, np.moveaxis(content.track_poses, 1, 0)))
    for token, boxes in replayed.items():
        poses = seen.get(token)
        if poses is None:
            same = bool(np.isnan(boxes).all())
        else:
            expected = box_corners(poses, sizes[token][0] / 2.0, sizes[token][1] / 2.0)
            same = np.allclose(boxes, expected, rtol=0.0, atol=BOX_TOLERANCE_M, equal_nan=True)
        if not same:
            raise DataError(
                f"token {record.token}: track {token} of the {version} cache cannot be told by sightings at 2 Hz"
            )
    unknown = seen.keys() - replayed.keys()
    if unknown:
        raise DataError(f"token {record.token}: the {version} cache has tracks {sorted(unknown)[:3]} that v1's has not")


@job("metric_cache_import")
def main(cfg: DictConfig) -> None:
    report = import_caches(cfg.v1, cfg.v2, cfg.output_dir)
    logger.info("%s: %d caches imported, %d invalid %s", cfg.output_dir, report["cached"], report["invalid"],
                report["counts"])  # fmt: skip


if __name__ == "__main__":
    main()
