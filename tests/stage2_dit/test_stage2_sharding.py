"""FSDP2: weights cut among processes learn what whole ones learn; checkpoints are those of any run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from planner_world import build_world, config, interrupt_in
from test_stage2_training import equal_checkpoints

from navsim_ext.errors import DataError
from navsim_ext.runtime.checkpoint_file import load_checkpoint
from navsim_ext.runtime.ema import EMA
from navsim_ext.runtime.run import run
from navsim_ext.runtime.sharding import is_sharded, shard_whole, whole
from stage2_dit import SHARDED_METHODS, DiffusionPlanner, PlannerConfig, load_planner

STEPS, ROWS = 3, 4
CONFIG = PlannerConfig(hidden_width=6, num_heads=2, head_width=8, num_layers=2, output_width=16, encoder_width=16)


def train(planner: DiffusionPlanner, rows: slice) -> dict:
    """Some steps on these rows of a fixed batch, with clipping and an average; everything whole, as plain tensors."""
    draw = torch.Generator().manual_seed(1)
    hidden, history, status, target, noise = (
        torch.randn(ROWS, *shape, generator=draw) for shape in ((5, 6), (4, 3), (8,), (8, 3), (8, 3))
    )
    time = torch.tensor([3, 40, 70, 99])
    optimizer = torch.optim.AdamW(planner.parameters(), lr=1e-2)
    ema, losses, norms = EMA(decay=0.5), [], []
    ema._ready(planner)
    for _ in range(STEPS):
        planner.train()
        conditioning = planner.condition(hidden[rows], None, history[rows], status[rows], queries_per_scene=8)
        loss = planner.training_loss(conditioning, target[rows], noise[rows], time[rows])
        loss.backward()
        norms.append(float(whole(torch.nn.utils.clip_grad_norm_(planner.parameters(), 0.1))))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(planner)
        losses.append(float(loss.detach()))
    ema.swap_in(planner)
    averaged = {name: whole(weight.detach()).clone() for name, weight in planner.named_parameters()}
    ema.swap_out(planner)
    weights = {name: whole(weight.detach()).clone() for name, weight in planner.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights, "averaged": averaged, "ema": ema.state_dict()}


def make(seed: int) -> DiffusionPlanner:
    torch.manual_seed(seed)
    planner = DiffusionPlanner(CONFIG)
    for weight in planner.parameters():  # nothing is zero at the start: all of the network decides the loss
        torch.nn.init.normal_(weight, std=0.2)
    return planner


def sharded_process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    planner = make(rank)  # the second process begins with other weights, and is given the first's
    shard_whole(planner, init_device_mesh("cpu", (2,)), SHARDED_METHODS)
    assert is_sharded(planner)
    held = sum(weight.to_local().numel() for weight in planner.parameters())
    made = train(planner, slice(2 * rank, 2 * rank + 2))
    assert all(isinstance(weight, DTensor) for weight in planner.parameters())
    again = EMA(decay=0.5)  # an average that comes back from a checkpoint is cut as before
    again.load_state_dict(made["ema"])
    again.update(planner)
    made |= {"held": held, "again": again.state_dict()["shadow"]}
    torch.save(made, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_sharded_processes_learn_what_one_learns_from_their_batch(tmp_path):
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [context.Process(target=sharded_process, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    one = train(make(0), slice(0, ROWS))
    total = sum(weight.numel() for weight in make(0).parameters())
    assert 0.4 < first["held"] / total < 0.6
    assert first["held"] + second["held"] == total
    mean = [sum(pair) / 2 for pair in zip(first["losses"], second["losses"])]
    torch.testing.assert_close(mean, one["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["norms"], one["norms"], rtol=1e-4, atol=1e-5)
    for kind in ("weights", "averaged"):
        for name, weight in one[kind].items():
            torch.testing.assert_close(first[kind][name], weight, rtol=1e-3, atol=2e-4)
            assert torch.equal(first[kind][name], second[kind][name])
            assert torch.equal(first["averaged"][name], first["ema"]["shadow"][name])
    for name, average in first["again"].items():
        expected = torch.lerp(first["averaged"][name], first["weights"][name], 0.5)
        torch.testing.assert_close(average, expected)


def test_what_needs_whole_weights_is_refused(tmp_path):
    world = build_world(tmp_path / "world", logs=1, frames=16)
    overrides = ("strategy=fsdp2", "module.optimizer.matrices=muon", "trainer.max_steps=1")
    with pytest.raises(DataError, match="Muon"):
        run(config(world, tmp_path / "run", *overrides))


def run_of_two(world: Path, output: Path, *overrides: str, trouble: dict | None = None) -> list[int]:
    """Exit codes of the two processes of a run, forked from this one, which has everything imported."""
    context, port = multiprocessing.get_context("fork"), free_port()
    given = (world, output, port, trouble or {}, ("trainer=ddp_cpu", "datamodule.batch_size=4", *overrides))
    processes = [context.Process(target=run_process, args=(rank, *given)) for rank in (0, 1)]
    for process in processes:
        process.start()
    processes[1].join(600)
    if trouble:
        processes[0].kill()
    for process in processes:
        process.join(600)
        process.kill()
    return [process.exitcode for process in processes]


def run_process(rank: int, world: Path, output: Path, port: int, trouble: dict, overrides: tuple[str, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    if trouble and rank == 1:
        interrupt_in(trouble["epoch"], trouble["batch"], "SIGKILL")
    run(config(world, output, *overrides))


@pytest.mark.slow
def test_a_sharded_run_is_that_of_ddp_and_resumes_bit_for_bit(tmp_path):
    world = build_world(tmp_path / "world")
    assert run_of_two(world, tmp_path / "whole", "strategy=fsdp2") == [0, 0]
    killed = run_of_two(world, tmp_path / "killed", "strategy=fsdp2", trouble={"epoch": 1, "batch": 2})
    assert killed[1] == -9
    assert run_of_two(world, tmp_path / "killed", "strategy=fsdp2") == [0, 0]
    assert run_of_two(world, tmp_path / "ddp") == [0, 0]
    last = {name: tmp_path / name / "version_0/checkpoints/last.ckpt" for name in ("killed", "whole", "ddp")}
    equal_checkpoints(last["killed"], last["whole"])
    for ema in (True, False):  # the file that scoring reads
        sharded, plain = (load_planner(last[name], ema=ema).planner.state_dict() for name in ("whole", "ddp"))
        for name, weight in plain.items():
            torch.testing.assert_close(sharded[name], weight, rtol=1e-2, atol=1e-3)
    states = [load_checkpoint(last[name])["optimizer_states"][0]["state"] for name in ("whole", "ddp")]
    assert {key: value["exp_avg"].shape for key, value in states[0].items()} == {
        key: value["exp_avg"].shape for key, value in states[1].items()
    }
