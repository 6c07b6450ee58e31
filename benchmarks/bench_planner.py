"""Speed of the diffusion planner against the published arithmetic, paired in one run on one core.

python benchmarks/bench_planner.py --output benchmarks/results/planner.json
python benchmarks/bench_planner.py --device cuda --output benchmarks/results/planner_gpu.json

The small planner (34 million parameters) on 2,800 tokens of a 1,536-wide VLM, float32 on the CPU. Both sides do the
same work on the same weights and inputs; times and their ratio are medians of ``--repeats`` paired rounds. A GPU's
time is the least of its repetitions.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row
from benchmarks.twins.paired import paired
from benchmarks.twins.published_planner import PublishedPlanner
from stage2_dit import DiffusionPlanner, Exploration, PlannerConfig, sample_chain
from stage2_dit.inference import PlannerRunner
from stage2_dit.noise import ChainNoise

TOKENS, WIDTH = 2800, 1536
FLOPS_PER_SAMPLE = 48e9  # one training step (forward and backward) of the published arithmetic at 2,800 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="training batch on the GPU")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.device == "cuda":
        rows = gpu_rows(arguments.repeats, arguments.batch)
        report("Planner on a GPU", rows, baseline="the rooflines named in each row", output=arguments.output)
        return
    torch.set_num_threads(1)
    baseline = "benchmarks/twins/published_planner.py: the published arithmetic on the same weights, paired"
    report("Planner", cpu_rows(arguments.repeats), baseline=baseline, output=arguments.output)


def build(device: str = "cpu") -> DiffusionPlanner:
    planner = DiffusionPlanner(PlannerConfig.small(WIDTH, padding="upstream"))
    for name, parameter in planner.named_parameters():
        if "adaLN" in name or "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return planner.to(device)


def inputs(scenes: int, device: str = "cpu", tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(scenes, tokens, WIDTH, generator=generator)
    history, status = torch.randn(scenes, 4, 3, generator=generator), torch.randn(scenes, 8, generator=generator)
    return hidden.to(device), history.to(device), status.to(device)


def cpu_rows(repeats: int) -> list[dict]:
    planner = build()
    twin = PublishedPlanner(planner)
    rows = []
    hidden, history, status = inputs(1)
    target, noise, step = torch.randn(1, 8, 3), torch.randn(1, 8, 3), torch.tensor([37])

    def train_ours() -> torch.Tensor:
        planner.zero_grad(set_to_none=True)
        loss = planner.training_loss(
            planner.condition(hidden, None, history, status, queries_per_scene=8), target, noise, step
        )
        loss.backward()
        return loss.detach()

    def train_theirs() -> torch.Tensor:
        planner.zero_grad(set_to_none=True)
        loss = twin.training_loss(hidden, history, status, target, noise, step)
        loss.backward()
        return loss.detach()

    rows.append(
        row("training step, difference of the loss", float((train_ours() - train_theirs()).abs()), "", "<= 1e-6")
    )
    rows += compare("training step (forward and backward)", train_ours, train_theirs, repeats, ">= 1.15")
    planner.zero_grad(set_to_none=True)
    for name, scenes, group, bound in (
        ("DDIM-5, one scene", 1, 1, ">= 2"),
        ("DDIM-5, 8 scenes", 8, 1, ">= 3"),
        ("DDIM-5, 8 samples of one scene", 1, 8, ">= 10"),
    ):
        data = inputs(scenes)
        start = torch.randn(scenes * group, 8, 3)
        chain_noise = ChainNoise(start, torch.zeros(scenes * group, 5, 8, 3))
        deterministic = Exploration.preset("deterministic")

        def ours(data=data, chain_noise=chain_noise, group=group, deterministic=deterministic) -> torch.Tensor:
            with torch.inference_mode():
                conditioning = planner.condition(data[0], None, data[1], data[2])
                return sample_chain(planner, conditioning, noise=chain_noise, group_size=group,
                                    exploration=deterministic).states  # fmt: skip

        def theirs(data=data, start=start, group=group) -> torch.Tensor:
            with torch.inference_mode():
                return twin.sample(*data, start, group_size=group)

        rows.append(row(f"{name}, largest difference", float((ours() - theirs()).abs().max()), "", "<= 1e-4"))
        rows += compare(name, ours, theirs, max(3, repeats // (2 if scenes * group > 1 else 1)), bound)
    return rows


def compare(name: str, ours: Callable, theirs: Callable, rounds: int, bound: str) -> list[dict]:
    """Rows of both times and their ratio; both have been called once."""
    times = paired(ours, theirs, rounds)
    return [
        row(f"{name}, ours", 1e3 * times.ours, "ms"),
        row(f"{name}, published arithmetic", 1e3 * times.theirs, "ms"),
        row(f"{name}, faster by", times.faster_by, "x", bound),
    ]


def gpu_rows(repeats: int, batch: int) -> list[dict]:
    """Training against the rooflines of compute and transfer, and the latency of one scene."""
    planner = build("cuda")
    optimizer = torch.optim.AdamW(planner.parameters(), lr=1e-4, fused=True)
    hidden, history, status = inputs(batch, "cuda")
    hidden = hidden.to(torch.bfloat16)
    target = torch.randn(batch, 8, 3, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            noise = torch.randn(batch, 8, 3, device="cuda")
            time_R = torch.randint(0, 100, (batch,), device="cuda")
            conditioning = planner.condition(hidden, None, history, status, queries_per_scene=8)
            loss = planner.training_loss(conditioning, target, noise, time_R)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = cuda_seconds(step, repeats=max(repeats, 10))
    side = 8192
    square = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    peak = 2 * side**3 / cuda_seconds(lambda: square @ square, repeats=20)
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    device_copy = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    transfer = 2**30 / cuda_seconds(lambda: device_copy.copy_(host, non_blocking=True), repeats=5)
    compute_limit, transfer_limit = peak / FLOPS_PER_SAMPLE, transfer / (TOKENS * WIDTH * 2)
    limit = min(compute_limit, transfer_limit)
    rows = [
        row("bf16 matrix multiplication 8192, measured", peak / 1e12, "TFLOP/s"),
        row("host to device, pinned, measured", transfer / 1e9, "GB/s"),
        row("compute roofline of training (48 GFLOP a sample)", compute_limit, "samples/s"),
        row("transfer roofline of training (8.6 MB a sample in bf16)", transfer_limit, "samples/s"),
        row(f"training, batch {batch}, hidden states resident", batch / seconds, "samples/s"),
        row("training, share of the lower roofline", batch / seconds / limit, "", ">= 0.8"),
    ]
    for name, compiled in (("eager", False), ("compiled, CUDA graph", True)):
        runner = PlannerRunner(planner.eval(), compile=compiled, cuda_graphs=compiled, autocast="bf16")
        one = (hidden[:1], None, history[:1], status[:1], torch.randn(1, 8, 3, device="cuda"))
        latency = cuda_seconds(lambda runner=runner, one=one: runner.sample(*one), repeats=50)
        bound = "<= 5" if compiled else None
        rows.append(row(f"planning one scene, hidden states resident, {name}", 1e3 * latency, "ms", bound))
    return rows


def cuda_seconds(work: Callable[[], object], repeats: int) -> float:
    """Least seconds of one call over ``repeats``, after warm-up."""
    for _ in range(3):
        work()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
