"""What several files of tests read and none writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_scenes import unpack_small

from navsim_ext.metric_cache.build import build
from navsim_ext.metric_cache.settings import BuildSettings


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory) -> Path:
    """The metric cache of the committed set of four scenes."""
    folder = tmp_path_factory.mktemp("small_cache")
    build(BuildSettings(str(unpack_small(folder / "small") / "dataset"), "trainval", str(folder / "cache")))
    return folder / "cache"
