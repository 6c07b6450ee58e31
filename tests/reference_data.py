"""Where reference data is: golden and real sets that are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
