"""One step of reinforced traffic: rollouts of 8 scenes x 32 road users x 4 samples x 8 s, rewards, and the update.

python benchmarks/bench_traffic_reinforcement.py --scenes DIR --output benchmarks/results/traffic_reinforcement.json

The tiny model (width 64, 2 blocks; untrained, which costs the same) with the reward of position and contact, REINFORCE
with a KL to the reference, on all cores. ``--scenes`` is a store of navsim_ext.traffic.build; scenes with more road
users than 32 keep the nearest, with fewer they have what they have (the rows say how many). Medians of --rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore
from sim_agents.data.scene_tokens import Bounds
from sim_agents.model.network import NextTokenNetwork
from sim_agents.model.settings import NetworkSettings
from sim_agents.training.checkpoint import LoadedAgents
from sim_agents.vocabulary import VerletVocabulary
from stage3_grpo.algorithm import Algorithm, KlPenalty, Returns, Schedule
from stage3_grpo.credit import assign_credit
from stage3_grpo.policies.traffic import TrafficPolicy, TrafficReference
from stage3_grpo.policy import Key
from stage3_grpo.rewards.traffic_reward import TrafficReward
from stage3_grpo.rewards.traffic_terms import Contact, LogDistance
from stage3_grpo.update import Updater

SCENES, USERS, SAMPLES, HORIZON_S = 8, 32, 4, 8.0


def nearest(scene: TrafficScene, most: int) -> TrafficScene:
    """The scene with the ``most`` road users that are nearest to the ego at the present."""
    away = np.hypot(*(scene.pose[:, scene.now, :2] - scene.pose[scene.ego, scene.now, :2]).T)
    away[~scene.valid[:, scene.now]] = np.inf
    keep = np.sort(np.argsort(away, kind="stable")[:most])

    per_user = ("pose", "speed", "valid", "size", "kind", "role", "agent_id", "z", "source_heading", "goal")
    cut = {name: value[keep] for name in per_user if (value := getattr(scene, name)) is not None}
    return dataclasses.replace(scene, agent_tokens=(), **cut)


def agents() -> LoadedAgents:
    torch.manual_seed(0)
    vocabulary = VerletVocabulary()
    network = NextTokenNetwork(NetworkSettings(vocabulary.size), vocabulary).eval()
    made_from = {"vocabulary": Fingerprint("vocabulary", {})}
    return LoadedAgents(network, vocabulary, Bounds(), Fingerprint("sim_agents", {}, made_from))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", required=True, help="store of navsim_ext.traffic.build")
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    store = TrafficStore(arguments.scenes)
    scenes = [nearest(store.load(name), USERS) for name in store.ids[:SCENES]]
    policy = TrafficPolicy("", TrafficReward({"log": LogDistance(), "contact": Contact()}), horizon_s=HORIZON_S,
                           realism_every=0)  # fmt: skip
    algorithm = Algorithm("bench", SAMPLES, Returns(), kl=KlPenalty("k3", Schedule(0.05)), bc_weight=Schedule(0.0))
    loaded = agents()
    frozen = agents()
    reference = TrafficReference(frozen.network.requires_grad_(False), frozen.fingerprint, None)
    modules = policy.adopt(loaded, reference, algorithm)
    optimizer = torch.optim.AdamW(policy.network.parameters(), lr=1e-6)
    parts: dict[str, list[float]] = {"drive": [], "reward": [], "reference": [], "update": [], "step": [], "cpu": []}
    for number in range(arguments.rounds + 1):
        begin, cpu = time.perf_counter(), time.process_time()
        rollout = policy.roll(scenes, SAMPLES, Key(0, number), algorithm.needs(drift=False, teach=False))
        rolled = time.perf_counter()
        credit = assign_credit(algorithm, rollout)
        losses = Updater(algorithm).losses(policy, modules, rollout, credit, None, beta=0.05, bc_weight=0.0)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        end = time.perf_counter()
        if number:  # the first one warms up
            for name, seconds in rollout.own.seconds.items():
                parts[name].append(seconds)
            parts["update"].append(end - rolled)
            parts["step"].append(end - begin)
            parts["cpu"].append(time.process_time() - cpu)
    users = float(np.mean([scene.valid[:, scene.now].sum() for scene in scenes]))
    what = f"{SCENES} scenes x {users:.0f} road users x {SAMPLES} samples x {HORIZON_S:.0f} s"
    rows = [row(f"traffic, rollout and update of {what}", statistics.median(parts["step"]), "s", "<= 3"),
            row("traffic, the same, processor time of all threads", statistics.median(parts["cpu"]), "s")]  # fmt: skip
    rows += [row(f"traffic, of it: {name}", statistics.median(parts[name]), "s")
             for name in ("drive", "reward", "reference", "update")]  # fmt: skip
    report("reinforced traffic", rows, baseline="none: a budget", output=arguments.output)


if __name__ == "__main__":
    main()
