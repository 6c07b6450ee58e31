"""Recorded drives on disk -> Scene: NAVSIM / OpenScene logs and ScenarioNet scene files, one file per source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from navsim_ext.errors import DataError, MissingError
from navsim_ext.readers.navsim_logs import NavsimLogs
from navsim_ext.readers.scenarionet import ScenarioNetScenes
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import NothingSelected, SceneSource, SkipReport

__all__ = [
    "NavsimLogs",
    "NothingSelected",
    "ScenarioNetScenes",
    "SceneFilter",
    "SceneSource",
    "SkipReport",
    "open_source",
]


def open_source(
    root: str | os.PathLike[str],
    split: str,
    *,
    maps_root: str | os.PathLike[str] | None = None,
    scene_filter: SceneFilter | None = None,
    required_cameras: Sequence[str] = (),
    skip_bad: bool = False,
    report_path: str | os.PathLike[str] | None = None,
) -> SceneSource:
    """The reader for what lies under ``root``: ``navsim_logs/<split>``, or ScenarioNet files (``*.pkl``).

    See :class:`NavsimLogs` for the arguments. Raises MissingError when ``root`` holds neither.
    """
    options = {"scene_filter": scene_filter, "skip_bad": skip_bad, "report_path": report_path}
    if (Path(root) / "navsim_logs").is_dir():
        return NavsimLogs(root, split, maps_root=maps_root, required_cameras=required_cameras, **options)
    if any((Path(root) / split).rglob("*.pkl")) or any(Path(root).glob("*.pkl")):
        if required_cameras:
            raise DataError(f"{root} holds ScenarioNet files, which have no pictures: {required_cameras} cannot exist")
        return ScenarioNetScenes(root, split, **options)
    raise MissingError(f"{root} holds neither navsim_logs/{split} nor ScenarioNet files (*.pkl): check the data root")
