"""Speed of reactive traffic and of the two-stage evaluation, on the committed golden groups.

python benchmarks/bench_two_stage.py --output benchmarks/results/two_stage.json

Stage 3's step is that of bench_grpo.py (34 million parameters, 700 tokens, 2 scenes x 8 samples and the reference's) on
the two recorded scenes of the golden group with 18 vehicles, its reward in reactive traffic and on log replay in turn.

"Resident": the prepared scene is in the cache's store. Figures are CPU time on one core, the least of --repeats rounds.
Baseline: NAVSIM itself on one nearly idle core, as the golden set's README reports it: 0.19 to 0.48 s a scene with
about 2 vehicles, 1.4 to 3.1 s with 16 to 18.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "navsim_ext"))

from two_stage_golden import golden_groups, predictions, split_of

from benchmarks.bench_grpo import SHORT, Setup
from benchmarks.environment import report, row
from navsim_ext.evaluation.two_stage import Trajectories, evaluate
from navsim_ext.metric_cache.scorer import PdmScorer
from navsim_ext.pdm import score
from navsim_ext.pdm.memory import MemoryMetricCache
from stage3_grpo.rewards import PdmTerm, Reward

NAVHARD_GROUPS = 370  # of 8 + 8 scenes: as many scenes as navhard's 450 + 5,462


def least_ms(token: str, poses: np.ndarray, cache: MemoryMetricCache, traffic: str, repeats: int) -> float:
    """CPU time [ms] of one resident trajectory."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        score([token] * 8, np.repeat(poses[None], 8, axis=0), cache, versions=("v2",), traffic=traffic, threads=1)
        best = min(best, (time.process_time() - started) / 8 * 1e3)
    return best


class GoldenScorer(PdmScorer):
    """Stage 3's scorer on records in memory; counts the CPU time of its thread."""

    cpu_s = 0.0

    def __init__(self, cache: MemoryMetricCache) -> None:
        self.cache, self.folder, self.known = cache, "golden groups", frozenset(cache.tokens)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pdm")

    def score(self, *arguments, **options):
        started = time.thread_time()
        result = super().score(*arguments, **options)
        self.cpu_s += time.thread_time() - started
        return result


def reward_rows(cache: MemoryMetricCache, tokens: list[str], rounds: int) -> list[dict]:
    """Stage 3's step with the reward in reactive traffic against the same on log replay, in turn."""
    torch.set_num_threads(1)
    scorer, setup = GoldenScorer(cache), Setup(SHORT, tokens)
    rewards = {name: Reward(PdmTerm(version="v2", standard=True), traffic=name) for name in ("log_replay", "reactive")}
    for reward in rewards.values():
        setup.ours(scorer, reward)
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rewards}
    for number in range(rounds):
        for name in list(rewards)[:: 1 if number % 2 == 0 else -1]:
            scorer.cpu_s, started, cpu = 0.0, time.perf_counter(), time.process_time()
            setup.ours(scorer, rewards[name])
            waited = setup.seconds["score_wait"] / (time.perf_counter() - started)
            taken[name].append((time.process_time() - cpu, scorer.cpu_s, waited))
    rows = []
    for name, figures in taken.items():
        total, scoring, _ = (statistics.median(column) for column in zip(*figures))
        rows += [
            row(f"stage 3, 18 vehicles: step, reward {name}, CPU time", 1e3 * total, "ms"),
            row(f"stage 3, 18 vehicles: scoring 18 trajectories, {name}, CPU time", 1e3 * scoring, "ms"),
        ]
    share = statistics.median(scoring / total for total, scoring, _ in taken["reactive"])
    waiting = statistics.median(waited for _, _, waited in taken["reactive"])
    slower = statistics.median(ours[0] / theirs[0] for ours, theirs in zip(taken["reactive"], taken["log_replay"]))
    return [
        *rows,
        row("stage 3, 18 vehicles: reactive reward, share of the step", share, "", "<= 0.1"),
        row("stage 3, 18 vehicles: reactive reward, share of the step that waits for it", waiting, ""),
        row("stage 3, 18 vehicles: step, reactive over log replay", slower, "x", "<= 1.1"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5, help="of stage 3's step")
    parser.add_argument("--groups", type=int, default=NAVHARD_GROUPS)
    arguments = parser.parse_args()
    cache, extra, split = golden_groups()
    tokens, poses = extra["tokens"].tolist(), extra["poses/slow"]
    rows = []
    for number, (kind, target) in enumerate((("2 vehicles", "<= 1.0"), ("18 vehicles, all reacting", "<= 2.5"))):
        members = [tokens.index(token) for token in split.groups[number].tokens]
        for traffic in ("reactive", "log_replay"):
            figures = [least_ms(tokens[i], poses[i], cache, traffic, arguments.repeats) for i in members]
            promised = target if traffic == "reactive" else None
            rows.append(row(f"{kind}: one trajectory, {traffic}, resident", float(np.median(figures)), "ms", promised))
    whole, many = repeated(cache, extra, arguments.groups)
    started, cpu = time.perf_counter(), time.process_time()
    result = evaluate(many, whole[1], whole[0], threads=2)
    count = len(many.tokens)
    rows.append(row("scenes of the evaluation", count, "scenes"))
    rows.append(row("two-stage evaluation from caches, 2 threads", time.perf_counter() - started, "s", "<= 60"))
    rows.append(row("the same, CPU time", time.process_time() - cpu, "s"))
    rows += reward_rows(cache, [split.groups[1].now, split.groups[1].prev], arguments.rounds)
    if not result.complete:
        raise SystemExit("the evaluation is incomplete: nothing was measured")
    report("Two-stage evaluation", rows, baseline="NAVSIM 2.2 on one nearly idle core", output=arguments.output)


def repeated(cache: MemoryMetricCache, extra: dict, count: int) -> tuple[tuple, Trajectories]:
    """((cache, split), trajectories) of ``count`` groups that repeat the golden ones under other tokens."""
    _, _, split = golden_groups()
    one = predictions(extra, "slow")
    where = {token: i for i, token in enumerate(one.tokens)}
    records, mapping, tokens, poses = {}, [], [], []
    for k in range(count):
        group = split.groups[k % len(split.groups)]
        name = {token: f"{k:04x}{token[4:]}" for token in group.tokens}
        for token in group.tokens:
            records[name[token]] = dataclasses.replace(cache.load(token), token=name[token])
            tokens.append(name[token])
            poses.append(one.poses[where[token]])
        mapping.append([name[group.now], name[group.prev], [[name[a], name[b]] for a, b in group.pairs]])
    tables = {record.map_location: cache.polygons(record.map_location) for record in records.values()}
    return (MemoryMetricCache(records, tables), split_of(mapping)), Trajectories(tokens, poses, [0.5] * len(tokens))


if __name__ == "__main__":
    main()
