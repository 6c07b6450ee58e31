"""The moving world without policy: agent-steps a second (one road user x 0.1 s), memory, and a naive twin.

    python benchmarks/bench_closed_loop.py --output benchmarks/results/closed_loop.json

Worlds of 128 road users on six two-way roads, 8 s of random tokens; contact and off-road at every 0.1 s. Events are
asked after every token, and once after the whole rollout, as a rollout does whose policy does not look at them. The
baseline is the same kinematics with an exact test of all pairs at every 0.1 s, and nothing else. Each figure is the
best of its repeats; ``environment`` tells the load of the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from environment import report, row

from navsim_ext.closed_loop.contact import boxes_touch
from navsim_ext.closed_loop.kinematics import TOKEN_STEPS, compose
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.world import World
from navsim_ext.traffic.codes import PieceKind, Role
from navsim_ext.traffic.scene import TrafficScene

AGENTS, TOKENS, REPEATS = 128, 16, 7


def busy(seed: int) -> TrafficScene:
    """128 cars and pedestrians on six parallel two-way roads of 150 m."""
    random = np.random.default_rng(seed)
    road, side = random.integers(0, 6, AGENTS), random.integers(0, 2, AGENTS)
    x, y = random.uniform(-75, 75, AGENTS), 25.0 * road + np.where(side, 1.75, -1.75) - 60.0
    heading = np.where(side, np.pi, 0.0)
    size = np.tile(np.float32([4.6, 1.9, 1.6]), (AGENTS, 1))
    along = np.linspace(-80, 80, 161)
    edges = [np.stack([along, np.full(161, 25.0 * k - 63.5)], -1) for k in range(6)]
    edges += [np.stack([along[::-1], np.full(161, 25.0 * k - 56.5)], -1) for k in range(6)]
    role = np.zeros(AGENTS, np.uint8)
    role[0] = Role.EGO
    count = len(edges)
    return TrafficScene.make(
        id=f"busy-{seed}", source="benchmark", licence="ours", dt=0.1, now=10, origin=np.zeros(3),
        xy=np.repeat(np.stack([x, y], -1)[:, None], 91, axis=1), heading=np.repeat(heading[:, None], 91, axis=1),
        valid=np.ones((AGENTS, 91), bool), size=size, kind=np.zeros(AGENTS, np.uint8), role=role,
        agent_id=np.arange(AGENTS), points=np.concatenate(edges).astype(np.float32),
        piece_start=(161 * np.arange(count + 1)).astype(np.int32),
        piece_kind=np.full(count, PieceKind.ROAD_EDGE, np.uint8), piece_subtype=np.zeros(count, np.uint8),
        piece_closed=np.zeros(count, bool), piece_id=np.arange(count), speed_limit=np.full(count, np.nan, np.float32),
        edges=np.empty((0, 2), np.int32), edge_kind=np.empty(0, np.uint8), has_lights=False,
        light_piece=np.empty(0, np.int32), light_stop=np.empty((0, 2)), light_state=np.empty((0, 91), np.uint8),
    )  # fmt: skip


def tokens(worlds: int, agents: int, seed: int = 0) -> list[torch.Tensor]:
    """Random tokens [B,N,K,3]: 0 to 8 m/s, gentle turns."""
    random = torch.Generator().manual_seed(seed)
    share = torch.arange(1, TOKEN_STEPS + 1) / TOKEN_STEPS
    found = []
    for _ in range(TOKENS):
        token = torch.zeros(worlds, agents, TOKEN_STEPS, 3)
        token[..., 0] = 4.0 * torch.rand(worlds, agents, 1, generator=random) * share
        token[..., 2] = 0.05 * torch.randn(worlds, agents, 1, generator=random) * share
        found.append(token)
    return found


def best(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some runs after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def rollout(scenes: WorldScenes, moves: list[torch.Tensor], at_end: bool) -> None:
    world = World(horizon_s=0.5 * TOKENS, events=("contact", "off_road"), device=scenes.device)
    state = world.reset(scenes)
    for token in moves:
        world.step(state, Moves.tokens(token))
        if not at_end:
            world.events(state)
    if at_end:
        world.events(state, 0, state.step)


def naive(scenes: WorldScenes, moves: list[torch.Tensor]) -> None:
    """All pairs, exactly, at every 0.1 s: no off-road, no bookkeeping."""
    pose, size = scenes.log_pose[:, :, scenes.now], scenes.size
    for token in moves:
        poses = compose(pose, token)
        for k in range(TOKEN_STEPS):
            boxes_touch(poses[:, :, None, k], size[:, :, None], poses[:, None, :, k], size[:, None])
        pose = poses[:, :, -1]


def peak_mb() -> float:
    """Peak resident memory [MB] of this process since it was started (Linux; getrusage's also counts its parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) / 1024


def peak_memory() -> tuple[float, float]:
    """(MB of the whole process, MB above what its imports took) of 64 worlds x 128 x 9 s; in its own process."""
    before = peak_mb()
    scenes = WorldScenes.build([busy(0)])
    world = World(rollouts=64, horizon_s=9.0, events=("contact", "off_road"))
    state = world.reset(scenes)
    for token in (tokens(64, scenes.num_agents) * 2)[:18]:
        world.step(state, Moves.tokens(token))
        world.events(state)
    after = peak_mb()
    return after, after - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output")
    parser.add_argument("--memory", action="store_true", help="print the peak memory [MB] and end")
    arguments = parser.parse_args()
    if arguments.memory:
        print(*peak_memory())
        return
    rows = []
    built = {count: WorldScenes.build([busy(k) for k in range(count)]) for count in (1, 8)}
    targets = {(8, 1): 2.5, (8, 2): 4.0, (1, 1): 1.5}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for count, scenes in built.items():
            moves = tokens(count, scenes.num_agents)
            steps = count * scenes.num_agents * TOKENS * TOKEN_STEPS
            slow = steps / best(lambda scenes=scenes, moves=moves: naive(scenes, moves), 2) / 1e6
            for at_end, when in ((False, "after every token"), (True, "at the end of the rollout")):
                rate = steps / best(lambda s=scenes, m=moves, e=at_end: rollout(s, m, e)) / 1e6
                target = targets.get((count, threads)) if at_end else None
                what = f"{count} x {AGENTS}, {threads} thread(s), events {when}"
                rows.append(row(what, round(rate, 2), "million agent-steps/s", f">= {target}" if target else None))
                rows.append(row(f"{what}: times the naive twin", round(rate / slow, 1), "", None))
    own = subprocess.run(
        [sys.executable, __file__, "--memory"], check=True, capture_output=True, text=True
    ).stdout.split()
    rows.append(row("peak memory of 64 x 128 x 9 s, whole process", round(float(own[0])), "MB", None))
    rows.append(row("of which above Python, torch and the project's code", round(float(own[1])), "MB", "< 300"))
    report("closed_loop", rows, baseline="all pairs exactly at every 0.1 s, without off-road", output=arguments.output)


if __name__ == "__main__":
    main()
