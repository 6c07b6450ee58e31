"""Recorded drives on disk -> Scene: NAVSIM / OpenScene logs, nuScenes, WOD-E2E and ScenarioNet files, one file per
source."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from navsim_ext.errors import DataError, MissingError
from navsim_ext.readers.navsim_logs import NavsimLogs
from navsim_ext.readers.nuscenes import NuScenes, is_nuscenes
from navsim_ext.readers.scenarionet import ScenarioNetScenes
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.second_stage import SecondStageScenes
from navsim_ext.readers.source import NothingSelected, SceneSource, SkipReport
from navsim_ext.readers.split_config import SplitConfig, read_split, second_stage_folder, second_stage_tokens
from navsim_ext.readers.wod_e2e import WodE2E, is_wod_e2e

__all__ = [
    "NavsimLogs",
    "NothingSelected",
    "NuScenes",
    "ScenarioNetScenes",
    "SceneFilter",
    "SceneSource",
    "SecondStageScenes",
    "SkipReport",
    "SplitConfig",
    "WodE2E",
    "configured_filter",
    "open_configured",
    "open_second_stage",
    "open_source",
    "read_split",
    "second_stage_folder",
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
) -> NavsimLogs | NuScenes | WodE2E | ScenarioNetScenes:
    """The reader for what lies under ``root``: ``navsim_logs/<split>``, nuScenes' tables, WOD-E2E's unpacked frames,
    or ScenarioNet's ``*.pkl``.

    See :class:`NavsimLogs` for the arguments. Raises MissingError when ``root`` holds none of them.
    """
    options = {"scene_filter": scene_filter, "skip_bad": skip_bad, "report_path": report_path}
    if (Path(root) / "navsim_logs").is_dir():
        return NavsimLogs(root, split, maps_root=maps_root, required_cameras=required_cameras, **options)
    if is_nuscenes(root, split):
        return NuScenes(root, split, required_cameras=required_cameras, **options)
    if is_wod_e2e(root, split):
        return WodE2E(root, split, required_cameras=required_cameras, **options)
    if any((Path(root) / split).rglob("*.pkl")) or any(Path(root).glob("*.pkl")):
        if required_cameras:
            raise DataError(f"{root} holds ScenarioNet files, which have no pictures: {required_cameras} cannot exist")
        return ScenarioNetScenes(root, split, **options)
    raise MissingError(
        f"{root} holds neither navsim_logs/{split} nor nuScenes' tables or WOD-E2E's unpacked frames in {split} nor "
        "ScenarioNet files (*.pkl): check the data root and the split"
    )


def configured_filter(data: DictConfig) -> SceneFilter:
    """The scene filter of a ``data`` node; without one, every window of 4 + 10 frames. Of a two-stage filter, the part
    that chooses recorded windows (``data.second_stage`` reads the rest)."""
    return SceneFilter() if data.scene_filter is None else SceneFilter.from_yaml(data.scene_filter, two_stage=True)


def open_configured(
    data: DictConfig,
    *,
    required_cameras: Sequence[str] = (),
    skip_bad: bool = False,
    report_path: str | os.PathLike[str] | None = None,
    tokens: Sequence[str] | None = None,
) -> NavsimLogs | NuScenes | WodE2E | ScenarioNetScenes | SecondStageScenes:
    """The source of a command's ``data`` node (``configs/shared/data``); no filter is every window of 4 + 10 frames.

    ``tokens`` in place of the filter's own.

    Raises MissingError when ``data.root`` has no value, and what :func:`open_source` raises.
    """
    if data.root is None:
        raise MissingError("data.root is not set: give data.root=... or the variable OPENSCENE_DATA_ROOT")
    if data.get("second_stage") is not None:
        return open_second_stage(data, required_cameras=required_cameras, skip_bad=skip_bad, report_path=report_path)
    scene_filter = configured_filter(data)
    if data.scene_filter is not None and second_stage_tokens(data.scene_filter):
        logs = open_source(data.root, data.split)
        if isinstance(logs, NavsimLogs) and logs.hides_future():  # a test server's: its scenes end now
            scene_filter = dataclasses.replace(scene_filter, num_future=0)
    return open_source(
        data.root,
        data.split,
        maps_root=data.maps_root,
        scene_filter=scene_filter if tokens is None else dataclasses.replace(scene_filter, tokens=tuple(tokens)),
        required_cameras=required_cameras,
        skip_bad=skip_bad,
        report_path=report_path,
    )


def open_second_stage(
    data: DictConfig,
    *,
    required_cameras: Sequence[str] = (),
    skip_bad: bool = False,
    report_path: str | os.PathLike[str] | None = None,
) -> SecondStageScenes:
    """The scenes of ``data.second_stage``: all, or those that ``data.scene_filter`` (a two-stage filter) lists."""
    logs = NavsimLogs(data.root, data.split, maps_root=data.maps_root)
    tokens = None
    if data.scene_filter is not None:
        tokens = second_stage_tokens(data.scene_filter)
    return SecondStageScenes(
        data.second_stage,
        logs,
        scene_filter=SceneFilter(tokens=tokens, num_future=0),
        required_cameras=required_cameras,
        skip_bad=skip_bad,
        report_path=report_path,
    )
