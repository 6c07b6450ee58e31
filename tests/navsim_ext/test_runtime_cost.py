"""What a run says about its cost, and when it refuses to start."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runtime_toy import config

from navsim_ext.runtime import preflight
from navsim_ext.runtime.preflight import PreflightError
from navsim_ext.runtime.run import run


def test_hours_follow_from_the_first_batches(tmp_path, caplog):
    cfg = config(tmp_path, [])
    cfg.trainer.max_epochs = 2
    with caplog.at_level(logging.INFO, "navsim_ext.runtime.cost"):
        run(cfg)
    lines = [record.getMessage() for record in caplog.records if record.name == "navsim_ext.runtime.cost"]
    assert "48 batches" in lines[0]  # 48 items, 2 a batch, 2 epochs
    assert lines[1].endswith("for the 41 batches to go")


def test_checkpoints_that_cannot_fit_are_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(PreflightError, match="GiB are free: make room"):
        run(config(tmp_path, []))
    assert not list((tmp_path / "version_0").rglob("*.ckpt"))
