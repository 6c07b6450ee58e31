"""Shared test set-up: one torch thread, reference data found through TRIVIUM_REFERENCE_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads on a loaded machine can be 100 times slower

REFERENCE_VARIABLE = "TRIVIUM_REFERENCE_DATA"


def reference_path(relative: str) -> Path:
    """Path of a reference file or folder; skips the calling test, saying what is missing, when it is absent."""
    root = os.environ.get(REFERENCE_VARIABLE)
    if not root:
        pytest.skip(f"REFERENCE DATA ABSENT: set {REFERENCE_VARIABLE} to run this test ({relative})")
    path = Path(root) / relative
    if not path.exists():
        pytest.skip(f"REFERENCE DATA ABSENT: {relative} is not in {REFERENCE_VARIABLE}")
    return path


@pytest.fixture(scope="session")
def reference():
    """The function ``reference("golden/navsim")``."""
    return reference_path


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "REFERENCE DATA ABSENT" in str(r.longrepr)]
    if skipped:
        terminalreporter.section("reference data", sep="!")
        terminalreporter.write_line(
            f"{len(skipped)} tests against reference data DID NOT RUN: set {REFERENCE_VARIABLE} to its folder."
        )
