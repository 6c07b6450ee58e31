"""The on-disk scene index: what a planner needs of every sample, as memory-mapped arrays, without the logs.

Legend: S samples, H history poses, F future poses, C cameras, U bytes of text. Files of an index folder:

    index.json        counts, cameras, logs, sensor root, checksums of the other files and of itself; written last: a
                      folder without it is unfinished
    fingerprint.json  what it was made from
    tokens.npy        [S] bytes; log.npy [S] int32 position in index.json's "logs"; timestamp_us.npy [S] int64
    history.npy       [S,H,3] float32 poses in the ego frame of now, oldest first (metres, radians)
    status.npy        [S,8] float32; target.npy [S,F,3] float32
    camera_text.npy   [U] uint8 and camera_offsets.npy [S*C+1] int64: picture paths relative to the sensor root

Building reads one log at a time and leaves one part file per log, so that it can be killed at any moment and goes on
where it stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.files import atomic_stream, disk_errors, read_json, reading, write_json_atomic
from navsim_ext.fingerprint import FILE_NAME, Fingerprint, digest_json, digest_tokens
from navsim_ext.readers import SceneSource
from navsim_ext.readers.log_files import LogFiles
from navsim_ext.runtime.checksums import (
    CheckedArray,
    CheckedFiles,
    file_checksums,
    read_checked_json,
    write_checked_json,
)
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.preflight import CostEstimate, measure_slice, preflight
from navsim_ext.runtime.workers import map_items
from navsim_ext.scene import CAMERAS, Scene

log = logging.getLogger(__name__)

FORMAT = "trivium-scene-index-3"  # raised with every change of the files; 2 had no checksums
REMEDY = "delete the folder and build the index again with python -m navsim_ext.dataset"
KEYS = (
    "num_samples", "num_history", "num_future", "cameras", "sensor_root", "sensor_root_from_here", "logs", "files",
)  # fmt: skip
ARRAYS = ("tokens", "log", "timestamp_us", "history", "status", "target", "camera_text", "camera_offsets")
MEASURED_S = 2.0  # of reading logs for the estimate
SAMPLE_BYTES = 60  # token, log, time stamp and status of one sample; poses have 12 each
COPIES = 2  # parts and joined arrays are there together, on disk as in memory
WORKER_BYTES = 300_000_000  # a process with one log
_PART_ARRAYS = ("tokens", "timestamp_us", "history", "status", "target", "paths")


@dataclass(frozen=True)
class SceneIndex:
    """An opened index: arrays are memory-mapped, nothing is read, or compared with its checksum, until it is used."""

    folder: Path
    arrays: Mapping[str, CheckedArray]
    logs: tuple[str, ...]
    cameras: tuple[str, ...]
    sensor_root: Path
    fingerprint: Fingerprint

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> SceneIndex:
        """Raises MissingError for an unfinished folder, DataError for one of another format, CorruptFile for damage."""
        folder = Path(folder)
        path = folder / "index.json"
        if not path.is_file():
            raise MissingError(f"{folder} is not a finished scene index: build it with python -m navsim_ext.dataset")
        content = _read_content(path)
        files = CheckedFiles(folder, content["files"], REMEDY)
        files.check(FILE_NAME)
        arrays = {name: files.array(f"{name}.npy") for name in ARRAYS}
        count = content["num_samples"]
        wanted = {name: count for name in ("tokens", "log", "timestamp_us", "history", "status", "target")}
        wanted["camera_offsets"] = count * len(content["cameras"]) + 1
        for name, length in wanted.items():
            if len(arrays[name]) != length:
                raise DataError(
                    f"{folder / name}.npy has {len(arrays[name])} rows; {length} were expected: build it again"
                )
        return cls(
            folder,
            arrays,
            tuple(content["logs"]),
            tuple(content["cameras"]),
            _sensor_root(folder, content),
            Fingerprint.load(folder),
        )

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    def camera_path(self, sample: int, camera: int) -> str:
        """Picture path of camera number ``camera``, relative to the sensor root; empty where the log has none."""
        offsets = self.arrays["camera_offsets"]
        row = sample * len(self.cameras) + camera
        return self.arrays["camera_text"][offsets[row] : offsets[row + 1]].tobytes().decode()


def _read_content(path: Path) -> dict[str, Any]:
    """What ``index.json`` says, after the format: one of another version is told from a damaged one."""
    try:
        content = read_checked_json(path, REMEDY)
    except CorruptFile:
        found = read_json(path, REMEDY)
        stored = found.get("format") if isinstance(found, dict) else None
        if stored == FORMAT:
            raise
        raise DataError(f"{path} has format {stored!r}, this version reads {FORMAT!r}: {REMEDY}") from None
    lacking = [key for key in KEYS if key not in content]
    if content.get("format") != FORMAT or lacking:
        raise DataError(f"{path} has format {content.get('format')!r} and lacks {lacking}: {REMEDY}")
    return content


def _sensor_root(folder: Path, content: Mapping[str, Any]) -> Path:
    """Where the pictures lie: as stored, or, after index and data were moved together, as seen from the index."""
    stored = Path(content["sensor_root"])
    moved = folder / content["sensor_root_from_here"]
    return moved.resolve() if not stored.is_dir() and moved.is_dir() else stored


def tell_cost(
    source: LogFiles,
    folder: str | os.PathLike[str],
    *,
    cameras: Sequence[str] = ("CAM_F0",),
    check_pictures: bool = False,
    workers: int = 1,
) -> CostEstimate | None:
    """Says what the index of ``source`` in ``folder`` will cost, from the first logs that are not in it yet.

    None where nothing is left to read. Raises PreflightError naming too little disk or memory, and, unless bad input is
    skipped, the logs of the filter and (``check_pictures``) the pictures of those first logs that are missing.
    """
    folder, names = Path(folder), source.log_names
    todo = [name for name in names if not (folder / "parts" / f"{name}.npz").is_file()]
    if not todo or (folder / "index.json").is_file():
        return None
    read: dict[str, list[list[str]]] = {}  # picture paths of the scenes of each log

    def look_at(name: str) -> None:
        read[name] = [[_path(scene, camera) for camera in cameras] for scene in source.scenes_of(name)]

    seconds = measure_slice(look_at, todo, budget_s=MEASURED_S)
    scenes = [paths for found in read.values() for paths in found]
    paths = [path for found in scenes for path in found]
    per_log = len(scenes) / len(read)
    if source.scene_filter.max_scenes is not None and per_log:
        todo = todo[: math.ceil(source.scene_filter.max_scenes / per_log)]
    frames = source.scene_filter.num_frames
    sample = SAMPLE_BYTES + 12 * frames + 8 * len(cameras) + sum(map(len, paths)) / max(len(scenes), 1)
    files = list(source.files)
    if check_pictures:
        files += [source.sensor_root / path for path in paths]
    return preflight(
        output_dir=folder,
        items=len(todo),
        bytes_per_item=COPIES * per_log * sample,
        memory_bytes=COPIES * per_log * sample * len(names) + WORKER_BYTES * workers,
        seconds_per_item=seconds,
        workers=workers,
        files=() if source.report.skip_bad else files,
        title=f"scene index: {len(todo):,} of {len(names):,} logs to read, about {per_log * len(todo):,.0f} samples",
    )


def build_index(
    source: SceneSource,
    folder: str | os.PathLike[str],
    *,
    cameras: Sequence[str] = ("CAM_F0",),
    workers: int = 1,
) -> SceneIndex:
    """Builds, or finishes, the index of all scenes of ``source`` in ``folder`` and opens it.

    A complete index of the same source and options is opened as it is. Raises DataError when ``folder`` holds an
    index of something else, when a token occurs twice (unless the source skips what is bad), or when writing fails.
    """
    folder = Path(folder)
    unknown = [name for name in cameras if name not in CAMERAS]
    if unknown:
        raise DataError(f"camera {unknown[0]!r} does not exist; there are {', '.join(CAMERAS)}")
    plan = _plan(source, cameras)
    with FolderLock(folder), disk_errors(folder):
        _require_same_plan(folder, plan)
        if (folder / "index.json").is_file():
            log.info("%s is complete", folder)
            return SceneIndex.open(folder)
        parts = folder / "parts"
        parts.mkdir(exist_ok=True)
        _build_parts(source, parts, tuple(cameras), workers)
        _merge(source, folder, parts, tuple(cameras), plan)
        shutil.rmtree(parts)
    return SceneIndex.open(folder)


def _plan(source: SceneSource, cameras: Sequence[str]) -> Fingerprint:
    fields = {
        "format": FORMAT,
        "source": type(source).__name__,
        "sensor_root": str(Path(source.sensor_root).absolute()),
        "filter": digest_json(source.scene_filter.describe()),
        "logs": digest_json(source.log_names),
        "cameras": list(cameras),
        "required_cameras": list(source.required_cameras),
        "skip_bad": source.report.skip_bad,
    }
    return Fingerprint("scene_index_plan", fields)


def _require_same_plan(folder: Path, plan: Fingerprint) -> None:
    path = folder / "plan.json"
    if path.is_file():
        stored = Fingerprint.read(path)
        remedy = "choose another output_dir, or delete this one to build it anew"
        plan.require_equal(stored, mine="the index asked for", theirs=str(folder), remedy=remedy)
    else:
        write_json_atomic(path, plan.to_json())


def _build_parts(source: SceneSource, parts: Path, cameras: tuple[str, ...], workers: int) -> None:
    from navsim_ext.runtime.progress import track

    names = source.log_names
    todo = [name for name in names if not (parts / f"{name}.npz").is_file()]
    done = len(names) - len(todo)
    limit = source.scene_filter.max_scenes
    log.info("scene index: %d logs, %d of them done, %d processes", len(names), done, workers)
    if workers > 1 and limit is None and len(todo) > 1:
        build = partial(_build_part, source, parts=parts, cameras=cameras)
        for _ in track(map_items(build, todo, num_workers=workers), "logs", total=len(names), done=done):
            pass
        return
    found = sum(len(_read_part(parts / f"{name}.npz")["tokens"]) for name in names if name not in set(todo))
    for name in track(todo, "logs", total=len(names), done=done):
        if limit is not None and found >= limit:
            break
        found += _build_part(source, name, parts, cameras)


def _read_part(path: Path) -> dict[str, NDArray]:
    """The arrays of one log's part; its zip format compares their checksums. Raises CorruptFile."""
    with reading(path, "delete it and run the same command again"), np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in (*_PART_ARRAYS, "skipped")}


def _build_part(source: SceneSource, name: str, parts: Path, cameras: tuple[str, ...]) -> int:
    """Writes the samples of one log, and what was skipped in it, as one file; returns the number of samples."""
    already_skipped = len(source.report.entries)
    scenes = source.scenes_of(name)
    skipped = json.dumps(source.report.entries[already_skipped:])
    history, future = source.scene_filter.num_history, source.scene_filter.num_future
    rows = {
        "tokens": np.array([scene.token.encode() for scene in scenes], dtype=np.bytes_),
        "timestamp_us": np.array([scene.timestamps_us[scene.now] for scene in scenes], dtype=np.int64),
        "history": _stack([scene.history_poses() for scene in scenes], (history, 3)),
        "status": _stack([scene.status() for scene in scenes], (8,)),
        "target": _stack([scene.future_poses(future) for scene in scenes], (future, 3)),
        "paths": np.array([[_path(scene, camera).encode() for camera in cameras] for scene in scenes], np.bytes_),
        "skipped": np.frombuffer(skipped.encode(), dtype=np.uint8),
    }
    with atomic_stream(parts / f"{name}.npz") as stream:
        np.savez(stream, **rows)
    return len(scenes)


def _path(scene: Scene, camera: str) -> str:
    return scene.cameras[camera].path if camera in scene.cameras else ""


def _stack(rows: Sequence[NDArray], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.stack(rows).astype(np.float32) if rows else np.empty((0, *shape), np.float32)


def _merge(source: SceneSource, folder: Path, parts: Path, cameras: tuple[str, ...], plan: Fingerprint) -> None:
    limit = source.scene_filter.max_scenes
    columns: dict[str, list[NDArray]] = {name: [] for name in (*_PART_ARRAYS, "log")}
    logs: list[str] = []
    seen: dict[bytes, str] = {}
    source.report.entries.clear()  # the parts have it all, those of an interrupted run too
    for name, part in _parts_in_order(source, parts):
        source.report.entries.extend(json.loads(part["skipped"].tobytes()))
        kept = []
        for row, token in enumerate(part["tokens"].tolist()):
            if limit is not None and len(seen) >= limit:
                break
            if token in seen:
                error = DataError(
                    f"token {token.decode()} of log {name} is in log {seen[token]} as well. Tokens must be unique: "
                    "remove one of the logs"
                )
                source.report.add(error, log_name=name, token=token.decode())
                continue
            seen[token] = name
            kept.append(row)
        if kept:
            for key in _PART_ARRAYS:
                columns[key].append(part[key][kept])
            columns["log"].append(np.full(len(kept), len(logs), np.int32))
            logs.append(name)
    source.report.write()
    source.report.require_some(len(seen), f"{folder}")
    found = {token.decode() for token in seen}
    source.require_listed(found)
    joined = {key: np.concatenate(values) for key, values in columns.items()}
    paths = joined.pop("paths").reshape(-1)
    joined["camera_offsets"] = np.concatenate([[0], np.cumsum([len(path) for path in paths.tolist()])]).astype(np.int64)
    joined["camera_text"] = np.frombuffer(b"".join(paths.tolist()), dtype=np.uint8)
    for name in ARRAYS:
        with atomic_stream(folder / f"{name}.npy") as stream:
            np.save(stream, joined[name], allow_pickle=False)
    fields = {**plan.fields, "tokens": digest_tokens(found), "num_samples": len(found)}
    info = {"skipped": source.report.counts}
    Fingerprint("scene_index", fields, info=info).save(folder)
    content: dict[str, Any] = {
        "format": FORMAT,
        "num_samples": len(found),
        "num_history": source.scene_filter.num_history,
        "num_future": source.scene_filter.num_future,
        "cameras": list(cameras),
        "sensor_root": str(Path(source.sensor_root).absolute()),
        "sensor_root_from_here": os.path.relpath(source.sensor_root, folder),
        "logs": logs,
        "files": file_checksums(folder, [FILE_NAME, *(f"{name}.npy" for name in ARRAYS)]),
    }
    write_checked_json(folder / "index.json", content)


def _parts_in_order(source: SceneSource, parts: Path) -> Iterator[tuple[str, dict[str, NDArray]]]:
    for name in source.log_names:
        path = parts / f"{name}.npz"
        if path.is_file():  # absent only where max_scenes ended the reading
            yield name, _read_part(path)
