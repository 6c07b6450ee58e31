"""The tree planner in the ego's seat, and asked once for any horizon.

Legend: B worlds, J = 5 poses of 0.1 s, A templates.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.frames import NUM_FUTURE_POSES
from sim_agents.ego.checkpoint import fill, read_planner
from sim_agents.ego.encoder import EncoderSettings
from sim_agents.ego.motion import play
from sim_agents.ego.observation import Sight
from sim_agents.ego.policy import EgoPolicy, ego_state
from sim_agents.ego.tree.network import Imagination, TreeNetwork, TreeSettings
from sim_agents.ego.tree.search import SearchSettings, Tree, search
from sim_agents.ego.tree.templates import require_drivable

KIND = "tree"


class TreePolicy(EgoPolicy):
    """Drives the template that the search takes; ``search`` None: the most probable one of the prior."""

    def __init__(
        self, network: TreeNetwork, *, search: SearchSettings | None = None, goal: str = "log",
        generator: torch.Generator | None = None, name: str = KIND,
    ) -> None:  # fmt: skip
        super().__init__(name, sight=network.settings.sight, goal=goal)
        require_drivable(network.templates)
        self.network, self.search, self.generator = network.eval(), search, generator

    def drive(self, state: WorldState) -> tuple[Tensor, Tensor | None]:
        action, _, model = self.decide(state)
        pose, speed, length = ego_state(state)
        poses = play(pose, speed, length, self.network.templates[action])[0]
        return torch.where(_finite(model)[:, None, None], poses, torch.nan), None

    def decide(self, state: WorldState) -> tuple[Tensor, Tree | None, Imagination]:
        """(template [B], the tree, the model that was searched)."""
        model = Imagination(self.network, self.observe(state))
        if self.search is None:
            return model.root.logits.argmax(dim=-1), None, model
        tree = search(model.root, model, self.search, self.generator)
        return tree.action, tree, model

    @torch.no_grad()
    def plan(self, state: WorldState, poses: int = NUM_FUTURE_POSES) -> Tensor:
        """[B,poses,3]: the tree's principal line, and beyond its end the prior's templates, for any horizon."""
        if poses < 1:
            raise DataError(f"a plan of {poses} poses: at least 1 was expected")
        first, tree, model = self.decide(state)
        line = [(first, torch.ones_like(first, dtype=torch.bool))] if tree is None else tree.principal()
        node, states = model.root.state, []
        logits = model.root.logits
        for k in range(poses):
            action = logits.argmax(dim=-1)
            if k < len(line):
                action = torch.where(line[k][1], line[k][0], action)
            _, found = model.step(node, action)
            node, logits = found.state, found.logits
            states.append(node[:, -4:-1])
        return torch.where(_finite(model)[:, None, None], torch.stack(states, dim=1), torch.nan)


def _finite(model: Imagination) -> Tensor:
    """[B] bool: the network gave the scene a value and a prior; an argmax over what is no number is no decision."""
    return torch.isfinite(model.root.value) & torch.isfinite(model.root.logits.amax(dim=-1))


def tree_settings(values: dict[str, Any]) -> TreeSettings:
    """Settings from the JSON of a record."""
    return TreeSettings(Sight(**values["sight"]), EncoderSettings(**values["encoder"]))


def load_tree_planner(
    checkpoint: str | os.PathLike[str], *, search: SearchSettings | None = None, name: str = KIND, goal: str = "log",
    ema: bool | None = None, device: str = "cpu", seed: int = 0,
) -> TreePolicy:  # fmt: skip
    """The planner of a checkpoint of ``sim_agents.ego.train experiment=tree``; ``seed`` is of Gumbel noise."""
    record, weights, fingerprint = read_planner(checkpoint, KIND, ema=ema)
    network = TreeNetwork(tree_settings(record["settings"]), torch.tensor(record["templates"]))
    fill(network, weights, checkpoint)
    generator = torch.Generator().manual_seed(seed)
    policy = TreePolicy(network.to(device), search=search, goal=goal, generator=generator, name=name)
    policy.fingerprint = fingerprint
    return policy
