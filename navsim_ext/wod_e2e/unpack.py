"""TFRecord files of WOD-E2E -> a folder that every command reads: a store of frames, and their pictures as files.

    python -m navsim_ext.wod_e2e.unpack source=FOLDER output_dir=ROOT/val [cameras=[CAM_F0]] [every=5]

Then ``data.root=ROOT data.split=val`` is a data set like any other. The files hold a sequence's frames in no order that
could be relied on, and the pictures inside records; so they are read once, each record's checksum compared. Can be
killed at any moment and run again; ``report.json`` says what was stored, and what was skipped and why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.files import write_atomic
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.readers.wod_e2e import CAMERA_NAMES, KIND, VERSION, E2EFrame, name_parts
from navsim_ext.runtime.config import job
from navsim_ext.traffic.build import build
from navsim_ext.traffic.source import FileSource
from navsim_ext.traffic.tfrecord import CorruptRecord, read_records
from navsim_ext.wod_e2e.messages import frame_of

logger = logging.getLogger(__name__)


class FrameFiles(FileSource):
    """All TFRecord files of ``E2EDFrame`` messages below ``root``; the unit of work is a file.

    ``cameras`` are unpacked, ``every``-th frames of a sequence are kept, and all that people rated. Pictures are
    written to the folder that is being built before the frame that names them is stored.
    """

    described = "TFRecord files of E2EDFrame messages"
    suffixes = ("*tfrecord*",)

    def __init__(self, root: str, cameras: Sequence[str], every: int) -> None:
        super().__init__(root)
        unknown = [name for name in cameras if name not in CAMERA_NAMES.values()]
        if unknown or not cameras:
            raise DataError(
                f"cameras={list(cameras)}: some of {', '.join(sorted(CAMERA_NAMES.values()))} were expected"
            )
        self.cameras, self.every = tuple(cameras), every
        self._output = Path()

    def holds(self, path: Path) -> bool:
        return "tfrecord" in path.name and not path.name.startswith(".")

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"cameras": sorted(self.cameras), "every": self.every}

    def prepare(self, output_dir: Path) -> None:
        self._output = output_dir

    def read(self, unit: str) -> Iterator[tuple[str, E2EFrame | TriviumError]]:
        path = self.path_of(unit)
        for offset, data in read_records(path):
            where = f"{path}, record at byte {offset}"
            try:
                if isinstance(data, CorruptRecord):
                    raise data
                frame, pictures = frame_of(data, where)
                if frame.rated or name_parts(frame.id)[1] % self.every == 0:
                    yield where, self._with_pictures(frame, pictures, where)
            except TriviumError as error:
                yield where, error

    def _with_pictures(self, frame: E2EFrame, pictures: dict[str, bytes], where: str) -> E2EFrame:
        missing = [name for name in self.cameras if name not in frame.cameras]
        if missing:
            raise DataError(f"{where}, frame {frame.id} has cameras {sorted(frame.cameras)}, not {missing[0]}")
        kept = replace(frame, cameras={name: frame.cameras[name] for name in self.cameras})
        for name, camera in kept.cameras.items():
            target = self._output / camera.path
            if not target.is_file() or target.stat().st_size != len(pictures[name]):
                write_atomic(target, pictures[name], durable=False)
        return kept


def fingerprint_of(data: dict[str, object]) -> Fingerprint:
    """Fingerprint of a store of frames that follow from ``data``."""
    return Fingerprint(KIND, {"record": VERSION, "data": data})


@job("wod_e2e")
def main(cfg: DictConfig) -> None:
    started = time.perf_counter()
    report = build(
        FrameFiles(str(cfg.source), list(cfg.cameras), cfg.every), cfg.output_dir, workers=cfg.workers,
        num_workers=cfg.num_workers, ray_address=cfg.ray_address, skip_bad=cfg.skip_bad, encode=E2EFrame.to_arrays,
        fingerprint=fingerprint_of, what="frames",
    )  # fmt: skip
    logger.info(
        "%s: %d frames of %d files %s, %d skipped %s, %.1f s", cfg.output_dir, report["stored"], report["units"],
        report["notes"], report["skipped"], report["counts"] or "", time.perf_counter() - started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
