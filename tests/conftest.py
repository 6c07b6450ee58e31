"""Shared test set-up: one torch thread, shapes checked, reference data found through TRIVIUM_REFERENCE_DATA."""

from __future__ import annotations

import logging
import os

import forked
import pytest
import shape_checks
import torch
from reference_data import REFERENCE_VARIABLE, reference_path

if os.environ.get("TRIVIUM_SHAPE_CHECKS") != "off":  # to measure what they cost
    shape_checks.install()

torch.set_num_threads(1)  # two threads on a loaded machine can be 100 times slower


def pytest_collection_finish() -> None:
    """What the tests import is imported, and no test has run."""
    forked.the_server()


@pytest.fixture(autouse=True)
def enabled_loggers() -> None:
    """Commands run in this process configure logging as for a process of their own, which silences other loggers."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
    logging.root.setLevel(logging.WARNING)


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
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "NAVSIM ABSENT" in str(r.longrepr)]
    if skipped:
        terminalreporter.section("NAVSIM", sep="!")
        terminalreporter.write_line(
            f"{len(skipped)} tests in NAVSIM DID NOT RUN: bash scripts/setup_devkit.sh, then TRIVIUM_DEVKIT=.devkit."
        )
