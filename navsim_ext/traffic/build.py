"""Builds a store of traffic scenes:

    python -m navsim_ext.traffic.build data.root=FOLDER data.source=womd output_dir=DIR

Can be killed at any moment and run again; the finished folder is byte-identical whatever the workers. It holds the
scenes (:class:`navsim_ext.traffic.store.TrafficStore`), ``report.json`` (what was stored, what was skipped and why) and
``units/``, a store of what became of each unit of work (a file, a log, a drive), from which a restart goes on.
A source is any class with the methods of :class:`navsim_ext.traffic.source.TrafficSource`; configurations name it by
``_target_``, so that sources above this package (the synthetic world) are not imported by it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import remove_temporaries, write_json_atomic
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.preflight import preflight
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import KINDS, spread
from navsim_ext.shards import ShardStore, ShardWriter, merge
from navsim_ext.traffic import record
from navsim_ext.traffic.source import TrafficSource
from navsim_ext.traffic.store import fingerprint_of

logger = logging.getLogger(__name__)

UNITS_FOLDER = "units"
UNITS_KIND = "traffic-units"
REPORT_FILE = "report.json"
WORKER_BYTES = 400_000_000
Encode = Callable[[Any], dict[str, np.ndarray]]
MERGE_COPIES = 2  # merging writes a second copy before it removes the first


class NothingStored(TriviumError):
    """Not one scene could be stored."""


@dataclass(frozen=True)
class Skipped:
    """A scene that could not be read."""

    name: str
    kind: str  # class of the error
    reason: str


@dataclass(frozen=True)
class UnitResult:
    """What became of a unit of work."""

    unit: str
    stored: tuple[str, ...]  # ids of its scenes, in its order
    skipped: tuple[Skipped, ...]
    notes: dict[str, int]  # counts of the scenes' notes together

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {"result": np.frombuffer(json.dumps(asdict(self), sort_keys=True).encode(), np.uint8)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> UnitResult:
        content = json.loads(arrays["result"].tobytes())
        skipped = tuple(Skipped(**entry) for entry in content["skipped"])
        return cls(content["unit"], tuple(content["stored"]), skipped, content["notes"])


class UnitWorker:
    """Reads units and stores their scenes; one per process. What it has returned survives kill -9."""

    def __init__(
        self, source: Any, folder: Path, fingerprint: Fingerprint, skip_bad: bool, encode: Encode, name: str
    ) -> None:
        self._source, self._skip_bad, self._encode = source, skip_bad, encode
        self._scenes = ShardWriter(folder, fingerprint, writer=name)
        self._units = ShardWriter(folder / UNITS_FOLDER, _units_fingerprint(fingerprint), writer=name)

    def process(self, unit: str) -> UnitResult:
        """Stores the scenes of a unit; raises the error of the first bad one unless bad ones are skipped."""
        stored: list[str] = []
        skipped: list[Skipped] = []
        notes: Counter[str] = Counter()
        try:
            for name, scene in self._source.read(unit):
                if isinstance(scene, TriviumError):
                    self._skip(name, scene, skipped)
                    continue
                if scene.id not in self._scenes.done:  # else a run that was killed inside this unit stored it
                    self._scenes.put(scene.id, self._encode(scene))
                stored.append(scene.id)
                notes.update(scene.notes)
        except TriviumError as error:
            self._skip(unit, error, skipped)
        result = UnitResult(unit, tuple(stored), tuple(skipped), dict(sorted(notes.items())))
        self._units.put(unit, result.to_arrays())
        return result

    def _skip(self, name: str, error: TriviumError, skipped: list[Skipped]) -> None:
        if not self._skip_bad or not isinstance(error, (DataError, MissingError)):
            raise error
        logger.warning("skipped: %s", error)
        skipped.append(Skipped(name, type(error).__name__, str(error)))

    def close(self) -> None:
        self._scenes.close()
        self._units.close()


def build(
    source: TrafficSource,
    output_dir: str | os.PathLike[str],
    *,
    workers: str = "sequential",
    num_workers: int | None = None,
    ray_address: str | None = None,
    skip_bad: bool = False,
    encode: Encode = record.encode,
    fingerprint: Callable[[dict[str, object]], Fingerprint] = fingerprint_of,
    what: str = "traffic scenes",
) -> dict[str, Any]:
    """Builds (or goes on building) the store of a source; returns the content of ``report.json``.

    ``encode``, ``fingerprint`` and ``what`` belong together: how the source's scenes are stored, what the store is, and
    its name in messages. A scene has ``id`` and ``notes``.

    Raises the error of the first bad scene unless ``skip_bad``; DataError when two scenes have one id; NothingStored;
    FingerprintMismatch when the folder holds other scenes; FolderBusy when another build is at work in it.
    """
    if workers not in KINDS:
        raise DataError(f"workers={workers}: one of {', '.join(KINDS)} was expected")
    count = 1 if workers == "sequential" else num_workers if num_workers is not None else os.cpu_count() or 1
    folder = Path(output_dir)
    with FolderLock(folder):
        units = source.units()
        identity = fingerprint(source.identity())
        finished = _finished(folder, identity, set(units))
        source.prepare(folder)
        remaining = [unit for unit in units if unit not in finished]
        results = list(finished.values())
        make = partial(UnitWorker, source, folder, identity, skip_bad, encode)
        results += track(
            _work(make, folder, remaining, workers, count, ray_address, what), f"{what}, units", total=len(units),
            done=len(finished),
        )  # fmt: skip
        require_unique(results)
        merge(folder)
        merge(folder / UNITS_FOLDER)
        remove_temporaries(folder)
        report = write_report(folder, results)
    if not report["stored"]:
        raise NothingStored(
            f"{folder}: 0 {what} were stored of {len(units)} units; {report['skipped']} were skipped "
            f"{report['counts']}, listed in {folder / REPORT_FILE}"
        )
    return report


def _finished(folder: Path, fingerprint: Fingerprint, units: set[str]) -> dict[str, UnitResult]:
    """What earlier runs finished, by unit. After a power cut a unit may be known whose scenes are not all there: then
    all units are read again, and only the missing scenes written."""
    with ShardWriter(folder, fingerprint, writer="start") as writer:  # checks the folder, finishes open shards
        stored = set(writer.done)
    with ShardWriter(folder / UNITS_FOLDER, _units_fingerprint(fingerprint), writer="start"):
        pass
    store = ShardStore(folder / UNITS_FOLDER)
    results = {unit: UnitResult.from_arrays(store.get(unit)) for unit in store.tokens if unit in units}
    lost = [result.unit for result in results.values() if not stored.issuperset(result.stored)]
    if lost:
        logger.warning("%s: scenes of %d units are lost (power cut?), they are read again", folder, len(lost))
        shutil.rmtree(folder / UNITS_FOLDER)
        return {}
    return results


def _units_fingerprint(fingerprint: Fingerprint) -> Fingerprint:
    return Fingerprint(UNITS_KIND, {}, parents={"scenes": fingerprint})


def _work(
    make: Any, folder: Path, units: Sequence[str], workers: str, count: int, ray_address: str | None, what: str
) -> Iterator[UnitResult]:
    """Results as units are finished. The first unit is worked on in this process and tells what the others cost."""
    if not units:
        return
    before = _bytes(folder)
    worker = make("first")
    try:
        began = time.perf_counter()
        first = worker.process(units[0])
        seconds = time.perf_counter() - began
    finally:
        worker.close()
    size = _bytes(folder)
    preflight(
        output_dir=folder,
        items=len(units),
        bytes_per_item=MERGE_COPIES * (size - before),
        memory_bytes=WORKER_BYTES * count,
        seconds_per_item=seconds,
        workers=count,
        title=f"{what}, {len(units)} units of work",
    )
    yield first
    rest = units[1:]
    if rest:
        made = spread(make, rest, kind=workers, num_workers=min(count, len(rest)), ray_address=ray_address)
        yield from (result for _, result in made)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def require_unique(results: Sequence[UnitResult]) -> None:
    """Raises DataError naming a scene id that occurs twice and the units that hold it."""
    unit_of: dict[str, str] = {}
    for result in sorted(results, key=lambda result: result.unit):
        for scene_id in result.stored:
            if scene_id in unit_of:
                raise DataError(
                    f"id {scene_id!r} occurs twice, in {unit_of[scene_id]} and in {result.unit}: remove one of "
                    "them and build into another output_dir"
                )
            unit_of[scene_id] = result.unit


def write_report(folder: Path, results: Sequence[UnitResult]) -> dict[str, Any]:
    """Writes ``report.json`` and returns its content; equal results in any order give equal bytes."""
    entries = [
        {"unit": result.unit, **asdict(entry)}
        for result in sorted(results, key=lambda result: result.unit)
        for entry in result.skipped
    ]
    notes: Counter[str] = Counter()
    for result in results:
        notes.update(result.notes)
    content = {
        "stored": sum(len(result.stored) for result in results),
        "units": len(results),
        "skipped": len(entries),
        "counts": dict(sorted(Counter(entry["kind"] for entry in entries).items())),
        "notes": dict(sorted(notes.items())),
        "entries": entries,
    }
    write_json_atomic(folder / REPORT_FILE, content)
    return content


def source_of(cfg: DictConfig) -> TrafficSource:
    """The source that a composed configuration names; raises DataError for a name that does not exist, MissingError
    for a source of files without ``data.root``."""
    name = cfg.data.source
    if name not in cfg.sources:
        raise DataError(f"data.source={name}: one of {', '.join(cfg.sources)} was expected")
    if "root" in cfg.sources[name] and cfg.sources[name].root is None:
        raise MissingError(f"data.source={name} reads files: set data.root=FOLDER")
    return hydra.utils.instantiate(cfg.sources[name], _convert_="all")


@job("traffic")
def main(cfg: DictConfig) -> None:
    started = time.perf_counter()
    report = build(
        source_of(cfg), cfg.output_dir, workers=cfg.workers, num_workers=cfg.num_workers, ray_address=cfg.ray_address,
        skip_bad=cfg.skip_bad,
    )  # fmt: skip
    logger.info(
        "%s: %d scenes of %d units, %d skipped %s, %.1f s", cfg.output_dir, report["stored"], report["units"],
        report["skipped"], report["counts"] or "", time.perf_counter() - started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
