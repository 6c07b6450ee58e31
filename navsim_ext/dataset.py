"""Samples by number from a scene index, and the command that builds one.

    python -m navsim_ext.dataset data.root=... data.split=trainval data.scene_filter=navtrain.yaml output_dir=...

A dataset holds no log: it maps the arrays of the index into memory, so that any number of worker processes share
the same pages. See :mod:`navsim_ext.scene_index` for the files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch.utils.data import Dataset

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.frames import NUM_FUTURE_POSES, NUM_HISTORY_POSES
from navsim_ext.readers import SceneFilter, open_configured, open_source
from navsim_ext.runtime.config import job
from navsim_ext.scene import SceneBatch, collate_scenes
from navsim_ext.scene_index import SceneIndex, build_index, tell_cost

if TYPE_CHECKING:
    from navsim_ext.hidden_cache.schema import HiddenBatch
    from navsim_ext.hidden_cache.source import HiddenStateSource

__all__ = ["JoinHidden", "SceneDataset", "build_index", "part_indices"]


class SceneDataset(Dataset[SceneBatch]):
    """``dataset[i]`` is a SceneBatch of one sample.

    ``num_history`` poses up to now; ``horizon`` future poses as target (None or 0: no target, as at inference).
    ``cameras`` chooses views of the index, in the order given; ``sensor_root`` overrides where pictures lie.
    ``tokens`` restricts and orders the samples. Raises DataError when the index holds fewer poses or other views
    than asked for, MissingError for a token that it does not hold.
    """

    def __init__(
        self,
        index_folder: str | os.PathLike[str],
        *,
        num_history: int = NUM_HISTORY_POSES,
        horizon: int | None = NUM_FUTURE_POSES,
        cameras: Sequence[str] = ("CAM_F0",),
        tokens: Sequence[str] | None = None,
        sensor_root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.index = SceneIndex.open(index_folder)
        self.num_history, self.horizon = num_history, horizon or 0
        self.cameras = tuple(cameras)
        self.sensor_root = self.index.sensor_root if sensor_root is None else Path(sensor_root)
        stored_history, stored_future = self.index.arrays["history"].shape[1], self.index.arrays["target"].shape[1]
        if not 1 <= num_history <= stored_history or not 0 <= self.horizon <= stored_future:
            raise DataError(
                f"{self.index.folder} holds {stored_history} history and {stored_future} future poses; {num_history} "
                f"and {self.horizon} were asked for: build it with a scene filter of more frames"
            )
        missing = [camera for camera in self.cameras if camera not in self.index.cameras]
        if missing:
            raise DataError(
                f"{self.index.folder} has no camera {missing[0]}; it was built with {', '.join(self.index.cameras)}: "
                "build it again with data.cameras"
            )
        self._camera_numbers = [self.index.cameras.index(camera) for camera in self.cameras]
        self._positions = None if tokens is None else self._find(tokens)

    def _find(self, tokens: Sequence[str]) -> np.ndarray:
        stored = self.index.arrays["tokens"][:]
        order = np.argsort(stored)
        wanted = np.array([token.encode() for token in tokens], dtype=np.bytes_)
        places = order[np.minimum(np.searchsorted(stored, wanted, sorter=order), len(stored) - 1)]
        absent = np.flatnonzero(stored[places] != wanted)
        if len(absent) or not len(wanted):
            first = f" (first: {tokens[absent[0]]})" if len(absent) else ""
            raise MissingError(
                f"{len(absent)} of {len(wanted)} tokens are not among the {len(stored)} of {self.index.folder}{first}"
            )
        return places

    def __len__(self) -> int:
        return len(self.index) if self._positions is None else len(self._positions)

    @property
    def tokens(self) -> list[str]:
        """Tokens of all samples, in order."""
        stored = self.index.arrays["tokens"][:]
        chosen = stored if self._positions is None else stored[self._positions]
        return [token.decode() for token in chosen.tolist()]

    @property
    def fingerprint(self) -> Fingerprint:
        return self.index.fingerprint

    def __getitem__(self, item: int) -> SceneBatch:
        count = len(self)
        if not -count <= item < count:
            raise IndexError(f"sample {item} of {count}")
        item = item % count
        sample = item if self._positions is None else int(self._positions[item])
        arrays = self.index.arrays
        paths = {
            camera: self.index.camera_path(sample, number) for camera, number in zip(self.cameras, self._camera_numbers)
        }
        return SceneBatch(
            token=[arrays["tokens"][sample].decode()],
            log_name=[self.index.logs[arrays["log"][sample]]],
            history=torch.from_numpy(arrays["history"][sample : sample + 1, -self.num_history :].copy()),
            status=torch.from_numpy(arrays["status"][sample : sample + 1].copy()),
            target=torch.from_numpy(arrays["target"][sample : sample + 1, : self.horizon].copy())
            if self.horizon
            else None,
            cameras=[paths],
        )

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the files itself; arrays are never pickled."""
        return {
            "index_folder": self.index.folder,
            "num_history": self.num_history,
            "horizon": self.horizon,
            "cameras": self.cameras,
            "tokens": None if self._positions is None else self.tokens,
            "sensor_root": self.sensor_root,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("index_folder"), **state)


Batch = tuple[SceneBatch, "HiddenBatch | None"]


class JoinHidden:
    """Collates samples and fetches their hidden states, if there is a source of them. Runs inside the workers."""

    def __init__(self, hidden: HiddenStateSource | None) -> None:
        self.hidden = hidden

    def __call__(self, samples: Sequence[SceneBatch]) -> Batch:
        scenes = collate_scenes(samples)
        return scenes, None if self.hidden is None else self.hidden.fetch(scenes.token)


def part_indices(data: DictConfig, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Index folders of ``train``, ``val`` and ``test``, without cameras: ``data.<part>.index``, or built where null.

    Those are built from ``data.root`` with the part's ``split`` and ``scene_filter`` in ``folder/<part>``. Raises
    MissingError for an index that is not there, before any is built.
    """
    parts = ("train", "val", "test")
    folders = {part: Path(folder) / part if data[part].index is None else Path(data[part].index) for part in parts}
    for part in parts:
        if data[part].index is not None:
            SceneIndex.open(folders[part])
    for part in parts:
        if data[part].index is None:
            scene_filter = SceneFilter.from_yaml(data[part].scene_filter)
            source = open_source(data.root, data[part].split, scene_filter=scene_filter)
            build_index(source, folders[part], cameras=())
    return folders


@job("dataset")
def main(cfg: DictConfig) -> None:
    """Builds the index of one split; says first what it will cost, then how many samples, and what was skipped."""
    cameras, folder = tuple(cfg.data.cameras), Path(cfg.output_dir)
    source = open_configured(
        cfg.data,
        required_cameras=cameras if cfg.check_pictures else (),
        skip_bad=cfg.skip_bad,
        report_path=folder / "skipped.json" if cfg.skip_bad else None,
    )
    trial = open_configured(cfg.data, skip_bad=cfg.skip_bad)  # its own: what it skips is not in the report
    tell_cost(trial, folder, cameras=cameras, check_pictures=cfg.check_pictures, workers=cfg.workers)
    index = build_index(source, folder, cameras=cameras, workers=cfg.workers)
    skipped = f", skipped {source.report.counts} (skipped.json)" if source.report.entries else ""
    Console(stderr=True, soft_wrap=True).print(
        f"{index.folder}: {len(index)} samples of {len(index.logs)} logs{skipped}"
    )


if __name__ == "__main__":
    main()
