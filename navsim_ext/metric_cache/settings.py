"""What is to be cached: which data, which windows, and the identity that the cache's fingerprint carries."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import read_json
from navsim_ext.fingerprint import digest_file, digest_json, digest_tokens
from navsim_ext.maps.nuplan_gpkg import MAPS_INDEX, map_file
from navsim_ext.pdm.version import VERSIONS
from navsim_ext.readers import (
    NavsimLogs,
    SceneFilter,
    SceneSource,
    SecondStageScenes,
    open_source,
    read_split,
    second_stage_folder,
)
from navsim_ext.readers.second_stage import PICKLES_FOLDER, scan, stage_files

SOURCES = ("navsim", "scenarionet")
SCENARIO_INDICES = ("dataset_summary", "dataset_mapping")  # ScenarioNet's own tables beside the scenarios
NUM_HISTORY = 4
NUM_FUTURE = 10  # 5 s: the horizon of NAVSIM 1.1's observation


@dataclass(frozen=True)
class BuildSettings:
    """Plain values only, so that it travels to other processes and machines."""

    root: str
    split: str
    output_dir: str
    source: str = "navsim"
    maps_root: str | None = None
    frame_interval: int = 1
    tokens: tuple[str, ...] | None = None
    log_names: tuple[str, ...] | None = None
    num_future: int = NUM_FUTURE
    second_stage: str | None = None  # folder of a two-stage split's second stage

    @classmethod
    def from_filter(
        cls, root: str, split: str, output_dir: str, *, maps_root: str | None, scene_filter: SceneFilter
    ) -> BuildSettings:
        """The windows of a scene filter, the one that the scene index is made with; ``source`` is what the root holds.

        Raises DataError for a filter whose windows the scorer cannot use, or that cannot be dealt out log by log.
        """
        if scene_filter.num_history != NUM_HISTORY or scene_filter.num_future < NUM_FUTURE - 2:
            raise DataError(
                f"the scene filter's windows have {scene_filter.num_history} + {scene_filter.num_future} frames; the "
                f"scorer needs {NUM_HISTORY} + {NUM_FUTURE} ({NUM_FUTURE - 2} for v2 alone): set num_history_frames "
                "and num_future_frames to these"
            )
        if scene_filter.max_scenes is not None:
            raise DataError(
                f"the scene filter has max_scenes={scene_filter.max_scenes}, which depends on the order of logs: list "
                "its tokens or log_names instead"
            )
        return cls(
            root,
            split,
            output_dir,
            source="navsim" if (Path(root) / "navsim_logs").is_dir() else "scenarionet",
            maps_root=maps_root,
            frame_interval=scene_filter.stride,
            tokens=None if scene_filter.tokens is None else tuple(scene_filter.tokens),
            log_names=None if scene_filter.log_names is None else tuple(scene_filter.log_names),
            num_future=min(scene_filter.num_future, NUM_FUTURE),
        )

    @classmethod
    def two_stage(
        cls,
        root: str,
        split_config: str,
        output_dir: str,
        *,
        maps_root: str | None = None,
        second_stage: str | None = None,
    ) -> BuildSettings:
        """Both stages of NAVSIM 2's split ``split_config`` (its YAML file)."""
        split = read_split(split_config)
        folder = second_stage_folder(root, split.name, second_stage)
        if stage_files(folder).name != PICKLES_FOLDER:
            raise DataError(
                f"{folder} is a test server's second stage: its frames hide objects and future, so only the server can "
                "score them and a metric cache would hold nothing. Plan them for a submission "
                "(python -m navsim_ext.evaluation.score protocol=plan)"
            )
        return cls(
            root=root,
            split=split.data_split,
            output_dir=output_dir,
            maps_root=maps_root,
            frame_interval=split.scene_filter.stride,
            tokens=(*split.first_stage_tokens, *split.second_stage_tokens),
            log_names=None if split.scene_filter.log_names is None else tuple(split.scene_filter.log_names),
            num_future=split.scene_filter.num_future,
            second_stage=str(folder),
        )

    @property
    def versions(self) -> tuple[str, ...]:
        """Scorer versions that the windows are long enough for: NAVSIM 2's 4 s, NAVSIM 1's 5 s."""
        return VERSIONS if self.num_future >= NUM_FUTURE else ("v2",)

    def sources(self, log_name: str) -> list[SceneSource]:
        """What a log gives: its recorded windows, and the second-stage scenes that continue them."""
        first = self.open_logs(log_name)
        if self.second_stage is None:
            return [first]
        entries, _ = scan(str(Path(self.second_stage) / PICKLES_FOLDER))
        wanted = set(self.tokens or ())
        if not isinstance(first, NavsimLogs) or not any(
            entry.log_name == log_name and entry.token in wanted for entry in entries
        ):
            return [first]
        chosen = SceneFilter(log_names=(log_name,), tokens=self.tokens, num_future=self.num_future)
        return [first, SecondStageScenes(self.second_stage, first, scene_filter=chosen, skip_bad=True)]

    def unreadable(self) -> list[tuple[str, Exception]]:
        """Second-stage files that tell neither token nor log, with their errors."""
        return [] if self.second_stage is None else list(scan(str(Path(self.second_stage) / PICKLES_FOLDER))[1])

    def open_logs(self, *log_names: str) -> SceneSource:
        """The source of the selected windows, of all logs or only some. Bad windows are skipped and reported.

        Raises DataError when what lies under the root is not what ``source`` says.
        """
        source = open_source(
            self.root,
            self.split,
            maps_root=self.maps_root,
            scene_filter=SceneFilter(
                log_names=log_names or None,
                tokens=self.tokens,
                frame_interval=self.frame_interval,
                num_history=NUM_HISTORY,
                num_future=self.num_future,
                has_route=False,  # windows without a route are invalid and counted, not silently absent
            ),
            skip_bad=True,
        )
        found = "navsim" if isinstance(source, NavsimLogs) else "scenarionet"
        if found != self.source:
            raise DataError(f"source={self.source}, but {self.root} holds {found} data: leave the source out")
        return source

    def log_files(self) -> dict[str, Path]:
        """File of each log of the split by log name, in alphabetical order. Raises MissingError for an empty split."""
        if self.source not in SOURCES:
            raise DataError(f"source={self.source}: one of {', '.join(SOURCES)} was expected")
        root = Path(self.root)
        if self.source == "navsim":
            folder = root / "navsim_logs" / self.split
            files = {path.stem: path for path in sorted(folder.glob("*.pkl"))}
        else:
            folder = root / self.split if (root / self.split).is_dir() else root
            found = sorted(folder.rglob("*.pkl"), key=lambda path: path.stem)
            files = {path.stem: path for path in found if path.stem not in SCENARIO_INDICES}
        if not files:
            raise MissingError(f"{folder} holds no *.pkl: check data.root={self.root} and data.split={self.split}")
        if self.log_names is not None:
            files = {name: path for name, path in files.items() if name in set(self.log_names)}
            if not files:
                raise MissingError(f"{folder} holds none of the {len(self.log_names)} logs that the scene filter names")
        return files

    def identity(self) -> dict[str, Any]:
        """Fields of the fingerprint: the data by names and sizes of its logs and digests of its maps, the windows."""
        files = self.log_files()
        listing = {name: path.stat().st_size for name, path in files.items()}
        second = {}
        if self.second_stage is not None:
            second = {"second_stage": second_stage_identity(self.second_stage)}
        if self.second_stage is not None or self.num_future != NUM_FUTURE:
            second |= {"num_future": self.num_future}
        return second | {
            "source": self.source,
            "split": self.split,
            "frame_interval": self.frame_interval,
            "tokens": None if self.tokens is None else digest_tokens(self.tokens),
            "logs": {"count": len(files), "digest": digest_json(listing)},
            "maps": self._map_digests(),
        }

    def _map_digests(self) -> dict[str, str]:
        """SHA-256 of each nuPlan map; scenario files carry their own maps, which their sizes stand for."""
        if self.source != "navsim":
            return {}
        root = Path(self.maps_root) if self.maps_root is not None else Path(self.root) / "maps"
        index = root / MAPS_INDEX
        if not index.is_file():
            raise MissingError(f"{index} is missing: set data.maps_root or NUPLAN_MAPS_ROOT to the folder of the maps")
        digests = {}
        for location in sorted(read_json(index)):
            try:
                digests[location] = digest_file(map_file(root, location))
            except MissingError:  # a location that no log of the split needs may be absent
                digests[location] = "absent"
        return digests


def second_stage_identity(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What tells one snapshot of a second stage from another: number, names and sizes of its files."""
    found = sorted((Path(folder) / PICKLES_FOLDER).glob("*.pkl"))
    return {"count": len(found), "digest": digest_json({path.name: path.stat().st_size for path in found})}
