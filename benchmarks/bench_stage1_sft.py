"""Speed of fine-tuning and of export: tokens/s and MFU of an InternVL3-2B with random weights (or --tiny).

    python benchmarks/bench_stage1_sft.py --output benchmarks/results/stage1_sft.json

SFT: forward and backward over packed rows of NAVSIM-like conversations (9 tiles of 448, prompt and answer), bf16,
gradient checkpointing on or off. Export: forward without LM head in batches. Baseline of the same run: SFT with padded
rows and full logits, as the plain transformers call does it.
MFU = model FLOP/s / peak FLOP/s; model FLOPs are 2 per weight and token forward plus attention, times 3 for training
(recomputation by checkpointing does not count). The peak is the GPU's dense bf16 figure, or --peak-tflops.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from environment import report, row
from PIL import Image
from random_internvl import random_internvl
from torch.nn import functional

from navsim_ext.prompts import format_trajectory, trajectory_prompt
from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.collate import VisionLanguageBatch, pack, pad
from stage1_vlm.module import answer_loss, compile_blocks
from stage1_vlm.processor import Example, Turn

PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}


def conversations(backbone: VisionLanguageBackbone, count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        picture = Image.fromarray(rng.integers(0, 255, (135, 240, 3), dtype=np.uint8)).resize((1920, 1080))
        prompt = trajectory_prompt(rng.normal(0, 5, (4, 3)), "straight")
        answer = format_trajectory(rng.normal(0, 5, (8, 3)))
        turns = [Turn("system", prompt.system), Turn("user", prompt.user), Turn("assistant", answer)]
        examples.append(backbone.processor.encode(turns, [picture]))
    return examples


def model_flops(backbone: VisionLanguageBackbone, batch: VisionLanguageBatch, answers: int) -> float:
    """Of one forward pass."""
    lengths = [n for row in batch.documents for n in row] if batch.documents else batch.attention_mask.sum(1).tolist()
    text = backbone.model.config.get_text_config()
    head = 2.0 * answers * text.hidden_size * text.vocab_size
    return backbone.language_flops(sum(lengths), lengths) + backbone.vision_flops(batch.pixels) + head


def seconds(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Least time of ``repeats`` calls after one warm-up."""
    step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: what a CPU can do")
    parser.add_argument("--rows", type=int, default=1, help="packed rows a step")
    parser.add_argument("--per-row", type=int, default=4, help="conversations a row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="norms and feed-forward layers by torch.compile")
    parser.add_argument("--peak-tflops", type=float, default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    peak = arguments.peak_tflops
    if peak is None and device.type == "cuda":
        peak = next((v for k, v in PEAK_BF16_TFLOPS.items() if k in torch.cuda.get_device_name()), None)
    backbone = random_internvl(device, tiny=arguments.tiny)
    model = backbone.model.train()
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if arguments.compile:
        compile_blocks(model)
    examples = conversations(backbone, arguments.rows * arguments.per_row)
    rows = [examples[i :: arguments.rows] for i in range(arguments.rows)]
    packed = pack(rows, backbone.processor.pad_token_id).to(device)
    padded = pad(examples, backbone.processor.pad_token_id).to(device)
    answers = sum(int((example.labels != -100).sum()) for example in examples)

    def ours() -> None:
        answer_loss(backbone, packed)[0].backward()
        model.zero_grad(set_to_none=True)

    def step_of_padded() -> None:
        output = model(**backbone.model_inputs(padded), use_cache=False)
        logits, labels = output.logits[:, :-1].float(), padded.labels[:, 1:]
        functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def exported() -> None:
        backbone.last_hidden_states(padded)

    flops = model_flops(backbone, packed, answers)
    tokens = packed.valid_tokens
    what = "tiny InternVL" if arguments.tiny else "InternVL3-2B, random weights"
    what += f" ({', '.join(name for name in ('checkpointing', 'compile') if getattr(arguments, name)) or 'plain'})"
    rows_of_report = []
    for name, step, factor in (
        ("SFT, packed rows, head on answers", ours, 3),
        ("SFT, padded, full logits", step_of_padded, 3),
        ("export", exported, 1),
    ):
        model.train(name != "export")
        elapsed = seconds(step, arguments.repeats, device)
        rate = factor * flops / elapsed / 1e12
        rows_of_report.append(row(f"{what}: {name}", tokens / elapsed, "tokens/s"))
        rows_of_report.append(row(f"{what}: {name}, model arithmetic", rate, "TFLOP/s"))
        if peak:
            target = ">= 45" if device.type == "cuda" and not arguments.tiny and factor == 3 and step is ours else None
            rows_of_report.append(row(f"{what}: {name}, MFU", 100.0 * rate / peak, "%", target))
    baseline = "padded rows with full logits, as the plain transformers call does it, in the same run"
    report("stage1_sft", baseline=baseline, rows=rows_of_report, output=arguments.output)


if __name__ == "__main__":
    main()
