"""Loggers of other systems, by configuration alone: a run writes to them offline, beside its own tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from runtime_toy import config

from navsim_ext.runtime.csv_log import CsvLog
from navsim_ext.runtime.run import ConfigError, run

SHARED = Path(__file__).resolve().parents[2] / "configs" / "shared" / "logger"


def trained(folder: Path, name: str):
    """A run of a few steps whose loggers are the default ones and ``name``."""
    cfg = config(folder, ["trainer.max_epochs=1"])
    cfg.logger = OmegaConf.merge(cfg.logger, OmegaConf.load(SHARED / f"{name}.yaml"))
    run(cfg)
    rows = [row for row in CsvLog(folder / "version_0" / "metrics.csv").read() if row.get("loss")]
    return [float(row["loss"]) for row in rows]


def test_weights_and_biases_gets_the_rows_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    expected = trained(tmp_path, "wandb")
    import wandb

    wandb.finish()
    wandb.teardown()  # its own process has written everything
    (file,) = (tmp_path / "version_0" / "wandb").glob("offline-run-*/run-*.wandb")
    # its records keep numbers as text
    numbers = [float(text) for text in re.findall(rb"-?\d+\.\d+(?:e-?\d+)?", file.read_bytes())]
    for loss in expected:
        assert min(abs(loss - number) for number in numbers) < 1e-6 * abs(loss)


def test_mlflow_gets_the_rows_in_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    expected = trained(tmp_path, "mlflow")
    client = MlflowClient(f"file:{tmp_path}/version_0/mlflow")
    (experiment,) = (each for each in client.search_experiments() if each.name == "trivium")
    (done,) = client.search_runs([experiment.experiment_id])
    found = [each.value for each in client.get_metric_history(done.info.run_id, "loss")]
    assert found == pytest.approx(expected)


def test_a_logger_that_cannot_be_made_is_told_with_its_name(tmp_path):
    cfg = config(tmp_path, ["trainer.max_epochs=1"])
    cfg.logger = {"elsewhere": {"_target_": "lightning.pytorch.loggers.WandbLogger", "save_dir": 3}}
    with pytest.raises(ConfigError, match=r"logger\.elsewhere cannot be made"):
        run(cfg)
