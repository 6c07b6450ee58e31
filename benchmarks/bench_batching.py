"""What batching leaves undone: padding, and processes that wait for the busiest, on a synthetic mixture of questions.

    python benchmarks/bench_batching.py --output benchmarks/results/batching.json

The mixture: 40 % texts alone, 45 % one picture of 1 to 12 tiles (and a thumbnail), 15 % three pictures of 4 tiles;
256 tokens a tile, 40 to 900 tokens of text. Eight processes; four conversations a process and step where rows are not
packed, else one row of up to 12,288 tokens. Waiting: mean over the steps of one epoch of 1 - mean / largest over the
processes, of tokens (padding among them: it is computed too) and of tiles. Counts only: the machine does not matter.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row
from navsim_ext.runtime.sampler import LengthGrouped, PositionSampler
from stage1_vlm.data.packing import balanced_plan, length_classes, packing_plan, waiting_share

CAPACITY, TOKENS_PER_TILE, RANKS, BATCH = 12_288, 256, 8, 4


def mixture(count: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(tokens, tiles) of conversations."""
    rng = np.random.default_rng(seed)
    kind = rng.random(count)
    one = rng.integers(1, 13, count)
    tiles = np.select([kind < 0.4, kind < 0.85], [0, one + (one > 1)], default=3 * 5)
    return TOKENS_PER_TILE * tiles + rng.integers(40, 901, count), tiles


def padded(lengths: NDArray, tiles: NDArray, grouping) -> tuple[float, float, float]:
    """(padding share, waiting for tokens, for tiles) of batches of BATCH conversations."""
    order = PositionSampler(len(lengths), BATCH, seed=0, grouping=grouping, rank=0, world_size=RANKS).order(0)
    batches = order.reshape(-1, BATCH)
    computed = lengths[batches].max(axis=1) * BATCH
    costs, places = (computed, tiles[batches].sum(axis=1)), np.arange(len(batches))
    return 1.0 - lengths[batches].sum() / computed.sum(), *(waiting_share(cost, places, 1, RANKS) for cost in costs)


def packed(
    lengths: NDArray, tiles: NDArray, rows: list[list[int]], *, grouped: bool = False
) -> tuple[float, float, float]:
    """The same of rows, one a process and step; a row alone in its batch pads nothing."""
    sums = [np.array([values[row].sum() for row in rows]) for values in (lengths, tiles)]
    grouping = LengthGrouped(sums[1]) if grouped else None
    order = PositionSampler(len(rows), 1, seed=0, grouping=grouping, rank=0, world_size=RANKS).order(0)
    return 0.0, *(waiting_share(cost, order, 1, RANKS) for cost in sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--conversations", type=int, default=40_000)
    arguments = parser.parse_args()
    lengths, tiles = mixture(arguments.conversations)
    start = time.process_time()
    balanced = balanced_plan(lengths, tiles, CAPACITY)
    seconds = time.process_time() - start
    plain = packing_plan(lengths, CAPACITY)
    found = {
        "random": padded(lengths, tiles, None),
        "grouped": padded(lengths, tiles, LengthGrouped(length_classes(lengths))),
        "packed": packed(lengths, tiles, plain),
        "balanced": packed(lengths, tiles, balanced, grouped=True),
    }
    rows = []
    for name, (padding, *waiting) in found.items():
        rows.append(row(f"{name}: padding among computed tokens", round(100 * padding, 2), "%"))
        for what, share in zip(("tokens", "tiles"), waiting, strict=True):
            target = {"tokens": "<= 1", "tiles": "<= 1"}[what] if name == "balanced" else None
            rows.append(row(f"{name}: waiting for the process with most {what}", round(100 * share, 2), "%", target))
    rows.append(row("rows of balanced packing over those of plain packing", round(len(balanced) / len(plain), 4), "x"))
    rows.append(row("planning balanced rows", round(1e6 * seconds / len(lengths), 1), "us/conversation of CPU time"))
    report("Batching of stage 1", rows, baseline="random, grouped and packed batches of the same mixture",
           output=arguments.output)  # fmt: skip


if __name__ == "__main__":
    main()
