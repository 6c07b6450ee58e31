"""One decision of the ego's planners, scene by scene on one core: milliseconds and simulations.

    python benchmarks/bench_ego_planners.py --output benchmarks/results/ego_planners.json

One scene of 33 road users on a two-way road; networks of the demo's sizes with random weights (time does not depend on
them). What is timed is ``act`` after ``start``: observation, network, search, the car's motion. The baseline of the
search is the same network's prior without one. Each figure is the median of its repeats, in thread CPU time, which
other processes on the machine do not count into; ``environment`` tells the load.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from environment import report, row

from navsim_ext.closed_loop.world import World
from navsim_ext.traffic.codes import PieceKind, Role
from navsim_ext.traffic.scene import TrafficScene
from sim_agents import NetworkSettings
from sim_agents.ego.path.network import PathNetwork, PathSettings
from sim_agents.ego.path.policy import PathPolicy
from sim_agents.ego.token.network import GoalNetwork, GoalSettings
from sim_agents.ego.token.policy import TokenPlanner
from sim_agents.ego.tree.network import TreeNetwork, TreeSettings
from sim_agents.ego.tree.policy import TreePolicy
from sim_agents.ego.tree.search import SearchSettings
from sim_agents.vocabulary import VerletVocabulary

REPEATS, AGENTS, TEMPLATES = 15, 33, 48
TARGETS = {"tree, 32 simulations": "<= 150"}


def street() -> TrafficScene:
    """A two-way road of 400 m, the ego in the middle of traffic."""
    random = np.random.default_rng(0)
    t = np.arange(26) * 0.1
    side = random.integers(0, 2, AGENTS)
    x, y, speed = random.uniform(-90, 90, AGENTS), np.where(side, 1.75, -1.75), random.uniform(0, 12, AGENTS)
    x[0], y[0], speed[0], side[0] = 0.0, -1.75, 8.0, 0
    heading = np.where(side, np.pi, 0.0)
    xy = np.stack([x[:, None] + np.cos(heading)[:, None] * speed[:, None] * t, np.repeat(y[:, None], 26, 1)], -1)
    along = np.linspace(-200, 200, 81)
    line = lambda at, back: np.stack([along[::-1] if back else along, np.full(81, at)], -1)  # noqa: E731
    pieces = [line(-1.75, False), line(1.75, True), line(-3.5, False), line(3.5, True)]
    kinds = [PieceKind.LANE, PieceKind.LANE, PieceKind.ROAD_EDGE, PieceKind.ROAD_EDGE]
    role = np.zeros(AGENTS, np.uint8)
    role[0] = Role.EGO
    return TrafficScene.make(
        id="street", source="benchmark", licence="ours", dt=0.1, now=15, origin=np.zeros(3), xy=xy,
        heading=np.repeat(heading[:, None], 26, 1), valid=np.ones((AGENTS, 26), bool),
        size=np.tile(np.float32([4.6, 1.9, 1.6]), (AGENTS, 1)), kind=np.zeros(AGENTS, np.uint8), role=role,
        agent_id=np.arange(AGENTS), points=np.concatenate(pieces).astype(np.float32),
        piece_start=(81 * np.arange(5)).astype(np.int32), piece_kind=np.array([int(kind) for kind in kinds], np.uint8),
        piece_subtype=np.zeros(4, np.uint8), piece_closed=np.zeros(4, bool), piece_id=np.arange(4),
        speed_limit=np.full(4, np.nan, np.float32), edges=np.empty((0, 2), np.int32), edge_kind=np.empty(0, np.uint8),
        has_lights=False, light_piece=np.empty(0, np.int32), light_stop=np.empty((0, 2)),
        light_state=np.empty((0, 26), np.uint8),
    )  # fmt: skip


def planners() -> dict[str, object]:
    """By the names of the table."""
    torch.manual_seed(0)
    templates = torch.stack([torch.randn(TEMPLATES) * 2.0, torch.randn(TEMPLATES) * 0.03], dim=-1)
    templates[:2] = torch.tensor([[0.0, 0.0], [-5.0, 0.0]])
    tree = TreeNetwork(TreeSettings(), templates)
    vocabulary = VerletVocabulary()
    token = GoalNetwork(NetworkSettings(vocabulary.size), vocabulary, GoalSettings())
    found: dict[str, object] = {"path": PathPolicy(PathNetwork(PathSettings())), "tree, prior alone": TreePolicy(tree)}
    for simulations in (8, 32, 128):
        found[f"tree, {simulations} simulations"] = TreePolicy(tree, search=SearchSettings(simulations))
    found["tree, 32 simulations, gumbel"] = TreePolicy(tree, search=SearchSettings(32, "gumbel"))
    found["token, whole"] = TokenPlanner(token, vocabulary, goal="none")
    found["token, first poses"] = TokenPlanner(token, vocabulary, goal="none", execute="first")
    return found


def milliseconds(policy, scene: TrafficScene) -> float:
    state = World(horizon_s=1.0).reset([scene])
    policy.start(state, [scene])
    times = []
    for number in range(REPEATS + 2):
        begun = time.thread_time()
        policy.act(state.fork())
        if number > 1:  # the first ones warm up
            times.append(time.thread_time() - begun)
    return 1000.0 * float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scene = street()
    rows = [
        row(f"one decision, {name}", round(milliseconds(policy, scene), 2), "ms", TARGETS.get(name))
        for name, policy in planners().items()
    ]
    report("ego_planners", rows, baseline="the tree planner's prior, without a search", output=arguments.output)


if __name__ == "__main__":
    main()
