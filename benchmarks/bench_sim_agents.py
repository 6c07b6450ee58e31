"""Traffic models: agent-steps a second (one road user x 0.1 s) of rollouts, the network at work, and a naive twin.

python benchmarks/bench_sim_agents.py --output benchmarks/results/sim_agents.json

8 synthetic scenes x 32 road users x 32 rollouts x 8 s by an untrained network of 0.3 million weights over 512 k-disks:
what it chooses does not change what it costs. Two cores are two processes of one thread, four scenes each, that start
together. Baseline: the same policy without a memory, which encodes map and past again at every half second, by torch
alone; it drives fewer worlds, both are measured in turn, and it must choose the same tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from dataclasses import fields, replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row
from benchmarks.twins.forgetful_policy import ForgetfulPolicy
from benchmarks.twins.paired import paired
from navsim_ext.closed_loop.world import World
from navsim_ext.runtime.config import compose
from navsim_ext.synthetic.traffic_scenes import SyntheticTraffic
from navsim_ext.traffic.scene import TrafficScene
from sim_agents import NetworkSettings, NextTokenNetwork, TokenPolicy
from sim_agents.vocabulary.build import VocabularySettings, make_vocabulary, reconstruction

AGENTS, SCENES, SECONDS, TOKENS = 32, 8, 8.0, 512
WIDTH = 48  # 0.3 million weights
PER_AGENT = ("pose", "speed", "valid", "size", "kind", "role", "agent_id", "z", "source_heading", "goal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scenes = made_scenes()
    started = time.perf_counter()
    vocabulary, _ = make_vocabulary(VocabularySettings("k_disks", TOKENS), scenes)
    building = time.perf_counter() - started
    error = reconstruction(vocabulary, scenes)["vehicle"]["mean_error_m"]
    torch.manual_seed(0)
    network = NextTokenNetwork(NetworkSettings(vocabulary.size, width=WIDTH), vocabulary)
    weights = sum(one.numel() for one in network.parameters())
    rows = [
        row("weights of the network", weights, ""),
        row(f"{TOKENS} k-disks of the 8 scenes: building", round(building, 2), "s"),
        row("mean centre error of vehicles on the same scenes", round(100 * error, 2), "cm"),
    ]
    small = scenes[:2]
    ours = lambda: drive(TokenPolicy(network, vocabulary), small, 4)  # noqa: E731
    theirs = lambda: drive(ForgetfulPolicy(network, vocabulary), small, 4)  # noqa: E731
    one, other = ours()[0], theirs()[0]  # of equal states: one token that rounding decides changes all that follow
    same = float((one == other).float().mean())
    if same < 0.98:
        raise SystemExit(f"only {same:.1%} of the twin's first tokens are the same: it is no twin")
    found = paired(ours, theirs, arguments.rounds)
    steps = 2 * AGENTS * 4 * round(SECONDS * 10)
    rows += [
        row("share of first tokens that the twin chooses as well", round(same, 4), ""),
        row("2 scenes x 4 rollouts, one thread", round(steps / found.ours), "agent-steps/s"),
        row("the same, without memory (baseline)", round(steps / found.theirs), "agent-steps/s"),
        row("faster by", round(found.faster_by, 1), "x"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.pt"
        torch.save({"network": network.state_dict(), "tokens": vocabulary.size, "vocabulary": vocabulary,
                    "scenes": scenes}, path)  # fmt: skip
        for processes, target in ((1, None), (2, ">= 100000")):
            best = min(together(path, processes, arguments.rollouts) for _ in range(arguments.rounds))
            rate = SCENES * AGENTS * arguments.rollouts * round(SECONDS * 10) / best
            what = f"{SCENES} scenes x {AGENTS} road users x {arguments.rollouts} rollouts x {SECONDS:.0f} s, "
            rows.append(row(what + f"{processes} process(es)", round(rate), "agent-steps/s", target))
    report("Traffic models", rows, baseline="the same policy without a memory, torch alone", output=arguments.output)


def made_scenes() -> list[TrafficScene]:
    """The first 8 synthetic scenes with at least 32 road users, with the 32 that are nearest to the ego."""
    mix = compose("traffic", ["data.source=synthetic", "output_dir=unused"]).sources.synthetic.mix
    with tempfile.TemporaryDirectory() as folder:
        source = SyntheticTraffic(scenes=1, maps_root=folder, history_s=1.0, horizon_s=SECONDS, reach_m=200.0, mix=mix)
        source.prepare(Path(folder))
        everything = map(source.scene, count())
        return list(islice((nearest(scene) for scene in everything if scene.num_agents >= AGENTS), SCENES))


def nearest(scene: TrafficScene) -> TrafficScene:
    apart = np.hypot(*(scene.pose[:, scene.now, :2] - scene.pose[scene.ego, scene.now, :2]).T)
    rows = np.sort(np.argsort(apart, kind="stable")[:AGENTS])
    present = {one.name: getattr(scene, one.name) for one in fields(scene)}
    return replace(scene, law={}, **{name: present[name][rows] for name in PER_AGENT if present[name] is not None})


def drive(policy: TokenPolicy, scenes: list[TrafficScene], rollouts: int) -> torch.Tensor:
    """Tokens [steps, B, N] of whole drives."""
    world = World(rollouts=rollouts, horizon_s=SECONDS, enter="never", events=())
    state = world.reset(scenes)
    policy.start(state, scenes)
    tokens = []
    while state.steps_left > 0:
        state = world.step(state, policy.act(state))
        tokens.append(policy.last_tokens)
    return torch.stack(tokens)[..., :AGENTS]


def together(path: Path, processes: int, rollouts: int) -> float:
    """Seconds from the common start to the last one's end."""
    context = multiprocessing.get_context("spawn")
    gate, times = context.Barrier(processes + 1), context.Queue()
    workers = [context.Process(target=work, args=(path, number, processes, rollouts, gate, times))
               for number in range(processes)]  # fmt: skip
    for one in workers:
        one.start()
    gate.wait()
    seconds = max(times.get() for _ in workers)
    for one in workers:
        one.join()
    return seconds


def work(path: Path, number: int, processes: int, rollouts: int, gate, times) -> None:
    torch.set_num_threads(1)
    job = torch.load(path, weights_only=False)  # written by this very script a moment ago
    network = NextTokenNetwork(NetworkSettings(job["tokens"], width=WIDTH), job["vocabulary"])
    network.load_state_dict(job["network"])
    scenes = job["scenes"][number::processes]
    drive(TokenPolicy(network, job["vocabulary"]), scenes[:1], 2)  # compiles
    gate.wait()
    start = time.perf_counter()
    for scene in scenes:  # as the rollout command does
        drive(TokenPolicy(network, job["vocabulary"]), [scene], rollouts)
    times.put(time.perf_counter() - start)


if __name__ == "__main__":
    main()
