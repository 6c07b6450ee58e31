"""Every launch script: what it would start exists, and its configuration composes with what the script adds."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from navsim_ext.runtime.config import compose, configured

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "train_stage1.sh": {},
    "train_stage2.sh": {},
    "train_stage3.sh": {},
    "export_hidden.sh": {},
    "build_metric_cache.sh": {},
    "eval_pdm.sh": {},
    "generate_qa.sh": {},
}
EXPERIMENTED = {"train_stage1.sh", "train_stage2.sh", "train_stage3.sh", "export_hidden.sh"}


def dry_run(script: str, *arguments: str, **variables: str) -> list[str]:
    environment = {**os.environ, "DRY_RUN": "1", **variables}
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return shlex.split(result.stdout)


def started(command: list[str]) -> tuple[str, list[str]]:
    """(module, overrides) of a command; the last -m names the Trivium module."""
    at = len(command) - 1 - command[::-1].index("-m")
    return command[at + 1], command[at + 2 :]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_script_starts_a_module_whose_configuration_composes(script):
    module, overrides = started(dry_run(script, "output_dir=runs/x"))
    entry = importlib.import_module(module).main
    cfg = compose(entry.job, overrides)
    assert cfg.output_dir == "runs/x"


@pytest.mark.parametrize("experiment", ["demo", "demo_gpu", "recogdrive_2b", "recogdrive_8b"])
@pytest.mark.parametrize("script", sorted(EXPERIMENTED))
def test_experiments_by_environment(script, experiment):
    module, overrides = started(dry_run(script, "output_dir=runs/x", EXPERIMENT=experiment))
    assert f"experiment={experiment}" in overrides
    assert compose(importlib.import_module(module).main.job, overrides)


def test_ema_is_an_option_of_stage_2():
    module, without = started(dry_run("train_stage2.sh", "output_dir=x"))
    _, with_ema = started(dry_run("train_stage2.sh", "output_dir=x", EMA="1"))
    targets = [
        [
            node._target_
            for node in compose(importlib.import_module(module).main.job, overrides).callbacks.values()
            if node
        ]
        for overrides in (without, with_ema)
    ]
    assert [any(target.endswith("EMA") for target in each) for each in targets] == [False, True]


def test_torchrun_passes_nodes_ranks_and_rendezvous():
    command = dry_run(
        "torchrun.sh", "stage2_dit.train", "a=1",
        NNODES="8", NODE_RANK="3", NPROC_PER_NODE="8", RDZV_ENDPOINT="node0:29500", RDZV_ID="7",
    )  # fmt: skip
    for part in ("--nnodes=8", "--node-rank=3", "--nproc-per-node=8", "--rdzv-endpoint=node0:29500", "--rdzv-id=7"):
        assert part in command
    assert started(command) == ("stage2_dit.train", ["a=1"])


@pytest.mark.parametrize("script", ["run.sh", "torchrun.sh"])
def test_a_job_runs_in_the_folder_where_it_is_called(script, tmp_path):
    """Relative paths are the caller's, and arrive as they were typed."""
    here = tmp_path / "a b=c"
    here.mkdir()
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\npwd -P\nprintf "%s\\n" "${@: -1}"\n')
    python.chmod(0o755)
    given = "data.index=runs/epoch=1 [x]/#路"
    environment = {**os.environ, "PYTHON_BIN": str(python)}
    command = ["bash", str(ROOT / "scripts" / script), "navsim_ext.dataset", given]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(here.resolve()), given]


def test_slurm_job_sends_each_node_its_rank(tmp_path):
    """Run with stand-ins for srun (two nodes, one after the other) and scontrol."""
    stand_ins = {
        "scontrol": 'printf "node-a\\nnode-b\\n"',
        "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    }
    for name, body in stand_ins.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DRY_RUN": "1", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node-[a-b]", "NPROC_PER_NODE": "8",
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts/slurm.sbatch"), "train_stage2.sh", "output_dir=x"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        for part in (
            "--nnodes=2",
            f"--node-rank={rank}",
            "--rdzv-endpoint=node-a:29500",
            "--rdzv-id=42",
            "output_dir=x",
        ):
            assert part in shlex.split(line)


def whole_jobs() -> list[str]:
    """The scripts that run steps in a folder."""
    texts = {path.name: path.read_text() for path in (ROOT / "scripts").glob("*.sh")}
    sourced = re.compile(r"^source .*(steps|begin)\.sh", re.MULTILINE)
    return sorted(name for name, text in texts.items() if text.startswith("#!") and sourced.search(text))


@pytest.mark.parametrize("script", whole_jobs())
def test_every_step_of_a_whole_job_composes_and_stays_in_its_folder(script, tmp_path):
    """Called from elsewhere, into a folder whose name has everything that a grammar could part."""
    text = (ROOT / "scripts" / script).read_text()
    folder = tmp_path / "job=[1] #2 (路)"
    said = re.search(r"^(?:for name in|source .*begin\.sh\"?) ([A-Z_ ]+)(?:; do|$)", text, re.MULTILINE)
    names = said[1].split()
    environment = {**os.environ, "DRY_RUN": "1", **{name: f"{folder.name}/{name}" for name in names}}
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / script)],
        capture_output=True, text=True, env=environment, check=True, cwd=tmp_path,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert len(lines) >= 6
    assert not list(tmp_path.iterdir())
    kinds = {}
    for line in lines:
        module, overrides = started(shlex.split(line))
        given = dict(each.partition("=")[::2] for each in overrides)
        assert given.get("output_dir", f"{folder}/").startswith(f"{folder}/"), line
        kinds.setdefault((module, *given), overrides)  # seeds and settings apart, the same step
    for (module, *keys), overrides in kinds.items():
        cfg = configured(importlib.import_module(module).main.job, overrides)
        assert "output_dir" not in keys or cfg.output_dir.startswith(f"{folder}/")
