"""Scenes of the golden sets with what the real NAVSIM made of them, for parity tests."""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from navsim_ext.maps.nuplan_gpkg import load_map
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.readers import SceneFilter, open_source
from navsim_ext.scene import Scene

SMALL = "small"  # committed: two logs of golden/navsim, so that parity is tested without reference data too
SETS = (SMALL, "golden/navsim", "golden/navsim_real")
POSITION_M, REST = 1e-8, 1e-9  # tolerances: x and y in UTM metres; everything else


def unpack_small(folder: Path) -> Path:
    """The committed set, unpacked into ``folder``."""
    with zipfile.ZipFile(Path(__file__).parents[1] / "golden" / "metric_cache" / "small.zip") as archive:
        archive.extractall(folder)
    return folder


def golden_folder(name: str, reference, temporary: Path) -> Path:
    """Folder of a set of SETS; ``reference`` is the fixture, which skips the test where the set is absent."""
    return unpack_small(temporary / "small") if name == SMALL else reference(name)


class GoldenSet:
    """One golden folder: ``dataset/`` in NAVSIM's layout and ``metric_cache/<token>_<v11|v22>.npz``."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder, self._cache_dir = folder, cache_dir
        self.split = os.listdir(folder / "dataset" / "navsim_logs")[0]
        self.tokens = sorted({file.name[:16] for file in (folder / "metric_cache").glob("*.npz")})

    def scenes(self) -> Iterator[Scene]:
        source = open_source(self.folder / "dataset", self.split, scene_filter=SceneFilter(tokens=self.tokens))
        for _, scenes in source.logs():
            yield from scenes

    def expected(self, token: str, version: str = "v11"):
        return np.load(self.folder / "metric_cache" / f"{token}_{version}.npz")

    @functools.cached_property
    def maps(self) -> dict[str, VectorMap]:
        root = self.folder / "dataset" / "maps"
        locations = json.loads((root / "nuplan-maps-v1.0.json").read_text())
        return {location: load_map(root, location, self._cache_dir) for location in locations}
