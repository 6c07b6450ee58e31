"""The parts of scripts/gpu_check.sh: each measures one thing on one device and writes one JSON.

    python benchmarks/gpu_check.py planner --device cuda --size full --output FOLDER/planner.json
    python benchmarks/gpu_check.py results FOLDER          # rows of all parts, and what fell short, as results.md

``--size tiny`` runs the same code with sizes for one CPU core: what the tests run. A part that has no meaning on a CPU
(CUDA graphs, rooflines) is left out there, and its rows are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row

ROOT = Path(__file__).resolve().parents[1]

LIMIT_NOTE = "rows of a part that did not end are missing; its log says why"


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the parts are."""

    tokens: int  # context tokens of a scene
    width: int  # of a hidden state
    planner: dict[str, Any]  # of PlannerConfig
    batch: int  # scenes of a training step
    repeats: int
    agents: int  # traffic scenes at once
    rollouts: int
    network: dict[str, Any]  # of the next-token network
    answers: int  # conversations at once
    new_tokens: int  # of an answer


FULL = Size(
    tokens=2800, width=1536, planner={}, batch=64, repeats=20, agents=8, rollouts=32, network={}, answers=8,
    new_tokens=64,
)  # fmt: skip
TINY = Size(
    tokens=12, width=128, batch=2, repeats=2, agents=1, rollouts=2, network={"width": 16, "heads": 2, "blocks": 1},
    planner={"num_heads": 2, "head_width": 8, "num_layers": 2, "output_width": 12, "encoder_width": 16},
    answers=1, new_tokens=8,
)  # fmt: skip


def best_seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Least time of a call, after one that is not counted; waits for the device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def autocast(device: str) -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def tests(device: str, size: Size) -> list[dict[str, Any]]:
    """The tests that need a GPU; on a CPU they skip."""
    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text())
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={results}", *files]
        subprocess.run(command, cwd=ROOT, check=False)
        suite = next(xml.etree.ElementTree.parse(results).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return [
        row("gpu tests passed", passed, "", "> 0" if device == "cuda" else None),
        row("gpu tests failed", counts["failures"] + counts["errors"], "", "<= 0"),
        row("gpu tests skipped", counts["skipped"], ""),
    ]


def decode(device: str, size: Size) -> list[dict[str, Any]]:
    """Hidden states decoded on the device, compared with the CPU bit for bit."""
    from navsim_ext.hidden_cache.codecs import CODECS, states_to_bits
    from navsim_ext.hidden_cache.schema import PackedHiddenBatch

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(size.tokens, size.width, generator=generator)
    states[:, :: max(size.width // 16, 1)] *= 20.0  # channels far larger than the others, as real ones have
    rows = []
    for name, codec in CODECS.items():
        stored = {key: torch.from_numpy(part)[None] for key, part in codec.encode(states_to_bits(states)).items()}
        packed = PackedHiddenBatch(name, stored, torch.ones(1, size.tokens, dtype=torch.bool))
        found = packed.to(device).hidden.cpu()
        different = int((found.view(torch.int16) != packed.decode().hidden.view(torch.int16)).sum())
        rows.append(row(f"{name}: values that differ from the CPU's", different, "", "<= 0"))
        elapsed = best_seconds(lambda packed=packed: packed.to(device), size.repeats, device)
        rows.append(row(f"{name}: to the device and decoded", states.numel() * 2 / elapsed / 1e9, "GB/s of bf16"))
    return rows


def built_planner(device: str, size: Size) -> Any:
    from stage2_dit import DiffusionPlanner, PlannerConfig

    torch.manual_seed(0)
    return DiffusionPlanner(PlannerConfig(hidden_width=size.width, **size.planner)).to(device)


def scenes(count: int, device: str, size: Size) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(count, size.tokens, size.width, device=device, dtype=dtype)
    return hidden, None, torch.randn(count, 4, 3, device=device), torch.randn(count, 8, device=device)


def planner(device: str, size: Size) -> list[dict[str, Any]]:
    """A training step against its roofline, and five DDIM steps for 1, 8 and 64 scenes."""
    from stage2_dit.inference import PlannerRunner

    model = built_planner(device, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    inputs, target = scenes(size.batch, device, size), torch.randn(size.batch, 8, 3, device=device)

    def step() -> None:
        with autocast(device):
            conditioning = model.condition(*inputs, queries_per_scene=8)
            times = torch.randint(0, 100, (size.batch,), device=device)
            loss = model.training_loss(conditioning, target, torch.randn_like(target), times)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rate = size.batch / best_seconds(step, size.repeats, device)
    rows = [row(f"training, batch {size.batch}, {size.tokens} tokens", rate, "scenes/s")]
    if device == "cuda":
        side = 8192
        square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
        peak = 2 * side**3 / best_seconds(lambda: square @ square, 20, device)
        flops = 48e9 * size.tokens / 2800  # forward and backward of a scene, nearly all of it on the context
        rows += [
            row("bf16 matrix multiplication 8192, measured", peak / 1e12, "TFLOP/s"),
            row("training, share of the compute roofline", rate * flops / peak, "", ">= 0.8"),
        ]
    precision = "bf16" if device == "cuda" else "fp32"
    kinds = [("eager", {}), ("compiled", {"compile": True}), ("CUDA graph", {"cuda_graphs": True})]
    one = (*scenes(1, device, size), torch.randn(1, 8, 3, device=device))
    plans = {}
    for name, options in kinds if device == "cuda" else kinds[:1]:
        runner = PlannerRunner(model.eval(), autocast=precision, **options)
        plans[name] = runner.sample(*one)
        difference = float((plans[name] - plans["eager"]).abs().max())
        if name != "eager":
            rows.append(row(f"DDIM-5, {name}: differs from eager by at most", difference, "m or rad", "<= 0.05"))
        for count in (1,) if name == "compiled" else (1, 8, 64):  # each number of scenes is compiled anew
            drawn = (*scenes(count, device, size), torch.randn(count, 8, 3, device=device))
            elapsed = best_seconds(lambda runner=runner, drawn=drawn: runner.sample(*drawn), size.repeats, device)
            target_ms = "< 5" if count == 1 and name == "CUDA graph" else None
            rows.append(row(f"DDIM-5, {count} scene(s), {name}", 1e3 * elapsed, "ms", target_ms))
    return rows


def synthetic_metric_cache(folder: str) -> str:
    """Metric cache of a few synthetic scenes without pictures."""
    world = [
        "navsim_ext.synthetic.build",
        "scenes=8",
        "recipe.cameras=[]",
        "recipe.qa=false",
        f"output_dir={folder}/world",
    ]
    cache = ["navsim_ext.metric_cache.build", f"data.root={folder}/world", "data.split=trainval", "workers=sequential",
             f"output_dir={folder}/cache"]  # fmt: skip
    for module, *options in (world, cache):
        subprocess.run([sys.executable, "-m", module, *options], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return f"{folder}/cache"


def grpo(device: str, size: Size) -> list[dict[str, Any]]:
    """A step of reinforcement; its scores are computed on the CPU while the device draws the reference."""
    from benchmarks.bench_grpo import Setup
    from navsim_ext.metric_cache.scorer import PdmScorer
    from stage2_dit import PlannerConfig

    config = PlannerConfig(hidden_width=size.width, **size.planner)
    with tempfile.TemporaryDirectory() as folder:
        scorer = PdmScorer(synthetic_metric_cache(folder))
        known = list(scorer.cache.tokens)
        setup = Setup(size.tokens, [known[0], known[-1]], config=config, device=device)

        def step() -> None:
            with autocast(device):
                setup.ours(scorer)

        elapsed = best_seconds(step, max(size.repeats // 2, 2), device)
        return [
            row(
                f"GRPO step, 2 scenes x 8, {size.tokens} tokens, {'bf16' if device == 'cuda' else 'fp32'}",
                1e3 * elapsed,
                "ms",
            ),
            row("scores of both versions, computing", 1e3 * setup.seconds["score"], "ms"),
            row("share of the step that waits for scores", setup.seconds["score_wait"] / elapsed, "", "<= 0.1"),
        ]


def stage1(device: str, size: Size) -> list[dict[str, Any]]:
    """Fine-tuning and export of a random InternVL: bench_stage1_sft.py, its rows."""
    script, rows = str(ROOT / "benchmarks" / "bench_stage1_sft.py"), []
    ways = [["--tiny"]] if size is TINY else [["--per-row", "2"], ["--checkpointing"], ["--per-row", "2", "--compile"]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stage1.json"
        for options in ways:
            command = [sys.executable, script, "--repeats", "2", "--device", device, *options, "--output", str(file)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            rows += json.loads(file.read_text())["rows"]
    return rows


def world(device: str, size: Size) -> list[dict[str, Any]]:
    """The moving world without and with a next-token network that drives everybody."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from bench_closed_loop import TOKENS, busy, rollout, tokens

    from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
    from navsim_ext.closed_loop.scenes import WorldScenes
    from navsim_ext.closed_loop.world import World
    from sim_agents.model.network import NextTokenNetwork
    from sim_agents.model.settings import NetworkSettings
    from sim_agents.policy import TokenPolicy
    from sim_agents.vocabulary import VerletVocabulary

    sources = [busy(k) for k in range(size.agents)]
    recorded = WorldScenes.build(sources, device)
    moves = [token.to(device) for token in tokens(size.agents, recorded.num_agents)]
    steps = size.agents * recorded.num_agents * TOKENS * TOKEN_STEPS
    elapsed = best_seconds(lambda: rollout(recorded, moves, True), 2, device)
    rows = [row(f"world alone, {size.agents} x 128", steps / elapsed / 1e6, "million agent-steps/s")]
    vocabulary = VerletVocabulary()
    network = NextTokenNetwork(NetworkSettings(vocabulary.size, **size.network), vocabulary).to(device)

    def drive() -> None:
        policy = TokenPolicy(network, vocabulary)
        moving = World(rollouts=size.rollouts, horizon_s=2.0, events=(), device=device)
        state = moving.reset(recorded)
        policy.start(state, sources)
        while state.steps_left >= TOKEN_STEPS:
            moving.step(state, policy.act(state))

    steps = size.agents * size.rollouts * recorded.num_agents * 20
    rate = steps / best_seconds(drive, 1, device) / 1e6
    rows.append(row(f"traffic rollout, {size.agents} x {size.rollouts} x 128", rate, "million agent-steps/s"))
    return rows


def language(device: str, size: Size) -> list[dict[str, Any]]:
    """Answers of a random InternVL: greedy ones by ``generate``, and several of one prompt by our own sampler."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from bench_stage1_sft import conversations
    from random_internvl import random_internvl

    from stage1_vlm.sampling import AnswerSampling, encode_prompt, sample_answers

    backbone = random_internvl(device, tiny=size is TINY)
    backbone.model.eval()
    backbone.model.generation_config.min_new_tokens = size.new_tokens  # a random model may end at once
    examples = conversations(backbone, size.answers)
    elapsed = best_seconds(lambda: backbone.answer(examples, size.new_tokens), 1, device)
    made = size.answers * size.new_tokens
    rows = [row(f"greedy, {size.answers} prompts, {size.new_tokens} tokens each", made / elapsed, "tokens/s")]
    backbone.processor.end_of_turn_id = -1  # no sampled answer ends early
    group = 8

    def sampled() -> None:
        with torch.no_grad():
            prompts = [encode_prompt(backbone, examples[0])]
        sample_answers(backbone, prompts, [range(group)], AnswerSampling(max_new_tokens=size.new_tokens))

    rate = group * size.new_tokens / best_seconds(sampled, 1, device)
    return [*rows, row(f"sampled, {group} answers of one prompt, {size.new_tokens} tokens each", rate, "tokens/s")]


PARTS: dict[str, Callable[[str, Size], list[dict[str, Any]]]] = {
    "tests": tests, "decode": decode, "planner": planner, "grpo": grpo, "stage1": stage1, "world": world,
    "language": language,
}  # fmt: skip


def results(folder: Path) -> str:
    """All rows as Markdown tables, then what fell short and which parts did not end."""
    lines, short = ["# GPU check", ""], []
    for name in PARTS:
        file = folder / f"{name}.json"
        content = json.loads(file.read_text()) if file.is_file() else {"failed": "it was not run"}
        lines += [f"## {name}", ""]
        if "failed" in content:
            lines += [f"Did not end: {content['failed']}", ""]
            short.append(f"{name}: {content['failed']}")
            continue
        lines += ["| what | measured | unit | target | met |", "|---|---:|---|---|---|"]
        for one in content["rows"]:
            met = {None: "", True: "yes", False: "**no**"}[one["met"]]
            lines.append(f"| {one['what']} | {one['value']:.4g} | {one['unit']} | {one['target'] or ''} | {met} |")
            if one["met"] is False:
                short.append(f"{name}: {one['what']} is {one['value']:.4g} {one['unit']}, target {one['target']}")
        machine = content["environment"]
        lines += ["", f"<sub>{machine['date']}, {machine['gpu'] or machine['cpu']}, "
                  f"torch {machine['packages']['torch']}, commit {machine['commit']}</sub>", ""]  # fmt: skip
    return "\n".join([*lines, "## What fell short", "", *(f"- {each}" for each in short or ["nothing"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "failed", "results"])
    parser.add_argument("folder", nargs="?", type=Path, help="of the JSONs (results)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--why", help="why a part did not end (failed)")
    arguments = parser.parse_args()
    if arguments.part == "results":
        print(results(arguments.folder))
    elif arguments.part == "failed":
        arguments.output.write_text(json.dumps({"failed": arguments.why}) + "\n")
    else:
        if arguments.device == "cpu":
            torch.set_num_threads(1)
        rows = PARTS[arguments.part](arguments.device, TINY if arguments.size == "tiny" else FULL)
        report(f"GPU check: {arguments.part}", rows, baseline=LIMIT_NOTE, output=arguments.output)


if __name__ == "__main__":
    main()
