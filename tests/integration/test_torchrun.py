"""The launch scripts for real: two processes by torchrun, and two rendezvous members that stand in for two nodes."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from navsim_ext.hidden_cache import CachedHiddenStates
from stage2_dit import load_planner

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["~callbacks.progress", "+trainer.enable_progress_bar=false"]
TINY = [
    "trainer=ddp_cpu",
    "trainer.max_epochs=1",
    "trainer.num_sanity_val_steps=0",
    "trainer.log_every_n_steps=1",
    *QUIET,
]
SMALL_PLANNER = [
    "planner.num_heads=2", "planner.head_width=8", "planner.num_layers=2", "planner.output_width=12",
    "planner.encoder_width=16",
]  # fmt: skip


def start(script: str, *overrides: str, **variables: str) -> subprocess.Popen:
    """A launch script, started as a user starts it."""
    environment = {**os.environ, "PYTHON_BIN": sys.executable, "EXPERIMENT": "demo", **variables}
    command = ["bash", str(ROOT / "scripts" / script), *map(str, overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(*processes: subprocess.Popen) -> list[str]:
    """What they printed, once all have ended well."""
    printed = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, printed):
        assert process.returncode == 0, text[-4000:]
    return printed


def losses(output: Path, column: str = "train/loss") -> list[str]:
    with open(output / "version_0" / "metrics.csv", newline="") as stream:
        return [row[column] for row in csv.DictReader(stream) if row.get(column)]


def planner_data(artefacts) -> list[str]:
    return [f"data.train={artefacts.index}", f"data.hidden_cache={artefacts.hidden}"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_train_what_two_processes_of_one_node_train(artefacts, tmp_path):
    """Stage 2: the same losses and weights to the bit, wherever the two processes are."""
    data = [*planner_data(artefacts), "datamodule.batch_size=3", "callbacks.best=null", *TINY, *SMALL_PLANNER]
    finish(start("train_stage2.sh", *data, f"output_dir={tmp_path}/one", NPROC_PER_NODE="2"))
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = [
        start(
            "train_stage2.sh", *data, "trainer.devices=1", "+trainer.num_nodes=2", f"output_dir={tmp_path}/two",
            NNODES="2", NODE_RANK=str(rank), NPROC_PER_NODE="1", RDZV_ENDPOINT=endpoint, RDZV_ID="loopback",
        )
        for rank in range(2)
    ]  # fmt: skip
    finish(*nodes)
    assert len(losses(tmp_path / "one")) == 2  # 12 scenes, 2 processes of 3
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    one, two = (
        load_planner(tmp_path / name / "version_0/checkpoints/last.ckpt").planner.state_dict()
        for name in ("one", "two")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stage_3_in_two_processes(world, artefacts, tmp_path):
    data = [*planner_data(artefacts), f"data.metric_cache={world.metric_cache}", f"init={artefacts.planner}"]
    data += ["datamodule.batch_size=3", "callbacks.best=null", "algorithm.group_size=2", *TINY]
    finish(start("train_stage3.sh", *data, f"output_dir={tmp_path}", NPROC_PER_NODE="2"))
    before = load_planner(artefacts.planner).planner.state_dict()
    after = load_planner(tmp_path / "version_0/checkpoints/last.ckpt").planner.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with open(tmp_path / "version_0" / "rewards.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2
    assert {float(row["invalid_rate"]) for row in rows} == {0.0}


@pytest.mark.slow
def test_stage_1_and_export_in_two_processes(artefacts, tmp_path):
    """Two processes fine-tune the tiny VLM and then export; each wrote its share and the cache holds every scene."""
    vlm = ["tiny.width=32", "tiny.layers=1", "tiny.heads=2", "tiny.vision_width=32", "tiny.vision_layers=1"]
    vlm += [
        "init=random",
        "data.repeat=null",
        "tiny.vision_heads=2",
        "tiny.vocabulary=400",
        "global_batch_size=4",
        "data.batch_size=2",
        "trainer.max_epochs=1",
    ]
    finish(start("train_stage1.sh", *vlm, *QUIET, f"data.mixture={artefacts.mixture}", f"output_dir={tmp_path}/vlm",
                 NPROC_PER_NODE="2"))  # fmt: skip
    assert json.loads((tmp_path / "vlm" / "metrics.json").read_text())["global_step"] == 3
    export = [f"model_path={tmp_path}/vlm", f"data.index={artefacts.index}", "device=cpu", "batch_size=1"]
    finish(start("export_hidden.sh", *export, f"output_dir={tmp_path}/two", NPROC_PER_NODE="2"))
    finish(start("export_hidden.sh", *export, f"output_dir={tmp_path}/one", NPROC_PER_NODE="1"))
    both = CachedHiddenStates(tmp_path / "two")
    alone = CachedHiddenStates(tmp_path / "one")
    assert sorted(both.tokens) == sorted(alone.tokens)
    assert len(both) == 12
    assert torch.equal(both.fetch(alone.tokens).hidden, alone.fetch(alone.tokens).hidden)
