"""A tiny synthetic world with index and metric cache, built once by the same commands that a user runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import run_module


@dataclass(frozen=True)
class World:
    root: Path
    index: Path
    metric_cache: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """16 scenes without pictures in four logs, indexed and cached."""
    root = tmp_path_factory.mktemp("world")
    run_module(
        "navsim_ext.synthetic.build", f"output_dir={root}", "scenes=16", "seed=5",
        "recipe.cameras=[]", "recipe.qa=false",
        "recipe.val_share=0", "recipe.test_share=0.25",
    )  # fmt: skip
    index, metric_cache = root / "index", root / "metric_cache"
    data = [f"data.root={root}", "data.split=trainval"]
    run_module("navsim_ext.dataset", *data, "data.cameras=[]", "check_pictures=false", f"output_dir={index}")
    run_module("navsim_ext.metric_cache.build", *data, "workers=sequential", f"output_dir={metric_cache}")
    return World(root, index, metric_cache)
