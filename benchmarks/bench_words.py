"""Sampling 8 answers of one prompt: the prompt encoded once and all answers together, against generate calls.

    OMP_NUM_THREADS=1 python benchmarks/bench_words.py --output benchmarks/results/words.json

Baselines in the same run, alternating with ours: eight calls of transformers' ``generate`` (as a reward loop that asks
one answer at a time does), and one call with ``num_return_sequences=8``, which encodes the picture eight times. Prompt
of 900 tokens with a picture, 64 new tokens each, the tiny InternVL of the demo; nothing may end early. Times are of the
processor: a loaded machine does not change them much, but repeat on a quiet one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from environment import report, row
from PIL import Image

from stage1_vlm.collate import pad
from stage1_vlm.loading import load_backbone
from stage1_vlm.processor import Turn
from stage1_vlm.sampling import AnswerSampling, encode_prompt, forbidden_tokens, sample_answers
from stage1_vlm.tiny import build_tiny_internvl

PROMPT_TOKENS, NEW_TOKENS, ANSWERS = 900, 64, 8


def seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"width": 128, "layers": 3, "vision_width": 128, "vision_layers": 3, "tile": 224, "patch": 28}
        build_tiny_internvl(folder, ["Look at the road and the light. "] * 50, max_tiles=1, vocabulary=2048, **sizes)
        backbone = load_backbone(folder, max_image_tokens=16)
    backbone.model.eval()
    words = "<image>\n" + "Look at the road and the light. " * 400
    picture = Image.new("RGB", (480, 270), (90, 120, 150))
    example = backbone.processor.encode([Turn("user", words)], [picture], generation_prompt=True)
    # the end of the turn must stay; the middle of the text gives way
    kept = torch.cat([example.input_ids[: PROMPT_TOKENS - 8], example.input_ids[-8:]])
    example.input_ids, example.labels = kept, torch.full_like(kept, -100)
    batch = pad([example], backbone.processor.pad_token_id)
    never = forbidden_tokens(backbone)
    never[backbone.processor.end_of_turn_id] = True
    suppressed = never.nonzero()[:, 0].tolist()

    def generate(count: int) -> None:
        backbone.model.generate(
            **backbone.model_inputs(batch), max_new_tokens=NEW_TOKENS, do_sample=True, num_return_sequences=count,
            eos_token_id=None, pad_token_id=backbone.processor.pad_token_id, suppress_tokens=suppressed,
        )  # fmt: skip

    def eight_calls() -> None:
        for _ in range(ANSWERS):
            generate(1)

    def ours() -> None:
        with torch.no_grad():
            prompts = [encode_prompt(backbone, example)]
        drawn = sample_answers(backbone, prompts, [range(ANSWERS)], AnswerSampling(max_new_tokens=NEW_TOKENS))
        assert sum(len(answer.tokens) for answer in drawn[0]) == ANSWERS * NEW_TOKENS

    backbone.processor.end_of_turn_id = -1  # no answer ends early: it stays forbidden like the other special tokens
    ways = {"ours": ours, "eight": eight_calls, "one": lambda: generate(ANSWERS)}
    for way in ways.values():
        way()
    rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(arguments.rounds)]
    median = {name: statistics.median(each[name] for each in rounds) for name in ways}
    eight = statistics.median(each["eight"] / each["ours"] for each in rounds)
    one = statistics.median(each["one"] / each["ours"] for each in rounds)
    rows = [
        row("8 answers, prompt encoded once, ours", 1e3 * median["ours"], "ms"),
        row("8 answers, eight generate calls", 1e3 * median["eight"], "ms"),
        row("8 answers, one generate call", 1e3 * median["one"], "ms"),
        row("faster than eight calls by", eight, "x", ">= 3"),
        row("faster than one call by", one, "x"),
    ]
    baseline = f"transformers' generate, {PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens, in the same run"
    report("words", rows, baseline=baseline, output=arguments.output)


if __name__ == "__main__":
    main()
