"""The planners that can be reinforced: a path in continuous actions, and tokens with a goal.

An actor drives with drawn choices and remembers what it saw and chose; afterwards it scores the same choices from what
it remembers, in one pass. Random numbers belong to (seed, scene, rollout, step).

Legend: B worlds, K decisions of half a second, n rows (worlds) that are scored, d width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.ego.checkpoint import RECORD, fill, planner_record, read_planner
from sim_agents.ego.encoder import mlp
from sim_agents.ego.motion import play
from sim_agents.ego.observation import EgoObservation
from sim_agents.ego.path.network import PathNetwork
from sim_agents.ego.path.policy import PathPolicy, path_settings
from sim_agents.ego.policy import ego_state
from sim_agents.ego.token.network import GoalNetwork
from sim_agents.ego.token.policy import TokenPlanner, load_token_planner
from sim_agents.model.sampling import Sampling, keyed_uniform, text_key
from sim_agents.policy import TokenPolicy
from sim_agents.training.checkpoint import load_agents


class Scored(NamedTuple):
    """``logp`` [n,K] of the choices, ``value`` [n,K] or None."""

    logp: Tensor
    value: Tensor | None


class EgoActor(Protocol):
    """One kind of ego in training."""

    kind: str  # of planner, as checkpoints say

    def load(self, init: str, *, critic: bool) -> dict[str, nn.Module]:
        """Reads the checkpoint; modules by the names of their weights in checkpoints."""
        ...

    def parameters(self) -> dict[str, list[nn.Parameter]]: ...

    def driver(self, seed: int, *, best: bool, goal: str) -> Any:
        """An AgentPolicy that drives (``best``: without drawing) and keeps ``remembered``."""
        ...

    def remember(self, driver: Any) -> Any:
        """What a finished drive leaves."""
        ...

    def score(self, memory: Any, rows: Tensor, *, reference: bool = False) -> Scored: ...

    def records(self, scenes: Fingerprint) -> dict[str, str]:
        """What a checkpoint carries by which other commands know the planner."""
        ...


def keyed_normal(seed: int, state: WorldState, numbers: int) -> Tensor:
    """[B,numbers] standard normal numbers of (seed, scene, rollout, step)."""
    names = torch.tensor([text_key(scene.id) for scene in state.scenes.sources])
    rollout = torch.arange(len(state.scene)) % state.rollouts
    place = torch.arange(numbers)
    uniform = keyed_uniform(seed, names[state.scene.cpu()][:, None], rollout[:, None], state.step, place)
    return (math.sqrt(2.0) * torch.erfinv(2.0 * uniform.clamp(1e-12, 1.0 - 1e-12) - 1.0)).float()


class DrivenPath(PathPolicy):
    """A path planner that draws its actions and keeps what it saw and did."""

    def __init__(self, network: PathNetwork, seed: int, *, best: bool, goal: str) -> None:
        super().__init__(network, goal=goal)
        self.seed, self.best = seed, best

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        super().start(state, scenes)
        self.seen: list[EgoObservation] = []
        self.actions: list[Tensor] = []

    def drive(self, state: WorldState) -> tuple[Tensor, Tensor | None]:
        seen = self.observe(state)
        policy = self.network.distribution(seen)
        noise = 0.0 if self.best else keyed_normal(self.seed, state, 2).to(policy.mean.device)
        action = policy.mean + policy.stddev * noise
        self.seen.append(seen)
        self.actions.append(action)
        pose, speed, length = ego_state(state)
        return play(pose, speed, length, action)[0], policy.log_prob(action).sum(dim=-1)


class PathActor:
    """``fresh``: begins from random weights of the checkpoint's sizes; what the first version found better."""

    kind = "path"

    def __init__(self, *, fresh: bool = False) -> None:
        self.fresh = fresh

    def load(self, init: str, *, critic: bool) -> dict[str, nn.Module]:
        self.settings, weights, self.fingerprint = read_planner(init, self.kind)
        self.network = PathNetwork(path_settings(self.settings["settings"]))
        if not self.fresh:
            fill(self.network, weights, init)
        self.critic = critic
        self.reference = copy.deepcopy(self.network).eval().requires_grad_(False)
        return {"network": self.network}

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        named = list(self.network.named_parameters())
        learned = {"policy": [weight for name, weight in named if not name.startswith("critic")]}
        if self.critic:
            learned["value"] = [weight for name, weight in named if name.startswith("critic")]
        return learned

    def driver(self, seed: int, *, best: bool, goal: str) -> DrivenPath:
        return DrivenPath(self.network, seed, best=best, goal=goal)

    def remember(self, driver: DrivenPath) -> tuple[EgoObservation, Tensor]:
        """(observations [B K], world by world, actions [B,K,2])."""
        B, K = len(driver.actions[0]), len(driver.actions)
        order = torch.arange(K * B, device=driver.actions[0].device).view(K, B).T.flatten()
        return EgoObservation.cat(driver.seen)[order], torch.stack(driver.actions, dim=1)

    def score(self, memory: tuple[EgoObservation, Tensor], rows: Tensor, *, reference: bool = False) -> Scored:
        seen, actions = memory
        K = actions.shape[1]
        chosen = seen[(rows[:, None] * K + torch.arange(K, device=rows.device)).flatten()]
        network = self.reference if reference else self.network
        logp = network.distribution(chosen).log_prob(actions[rows].flatten(0, 1)).sum(dim=-1).view(-1, K)
        value = network.value(chosen).view(-1, K) if self.critic and not reference else None
        return Scored(logp, value)

    def records(self, scenes: Fingerprint) -> dict[str, str]:
        return {RECORD: planner_record(self.kind, self.settings["settings"], scenes)}


class DrivenTokens(TokenPlanner):
    """A token planner that draws its tokens and keeps what its head saw and chose."""

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        super().start(state, scenes)
        self.inputs: list[Tensor] = []
        self.chosen: list[Tensor] = []

    def act(self, state: WorldState) -> Moves:
        moves = super().act(state)
        worlds, ego = state.ego_index()
        self.inputs.append(self.network.last_told)
        self.chosen.append(self.last_tokens[worlds, ego])
        return moves


class TokenActor:
    """Trains the goal's weights alone: the base model is what people do, and stays. ``temperature`` of drawing."""

    kind = "token"

    def __init__(self, *, temperature: float = 1.0, top_k: int = 0, critic_width: int = 64) -> None:
        if not temperature > 0.0:
            raise DataError(f"temperature={temperature}: above 0 is needed, else nothing is drawn")
        self.sampling = Sampling(top_k=top_k, temperature=temperature)
        self.critic_width = critic_width

    def load(self, init: str, *, critic: bool) -> dict[str, nn.Module]:
        self.settings, _, self.fingerprint = read_planner(init, self.kind)
        planner = load_token_planner(init)
        self.network, self.vocabulary, self.bounds = planner.network, planner.vocabulary, planner.bounds
        self.reference = copy.deepcopy(self.network).eval().requires_grad_(False)
        for name, weight in self.network.named_parameters():
            weight.requires_grad = name.startswith("goal_")
        modules: dict[str, nn.Module] = {"network": self.network}
        self.value_head = None
        if critic:
            self.value_head = modules["value_head"] = mlp(self.network.told_width, self.critic_width, 1)
        return modules

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        learned = {"policy": [weight for weight in self.network.parameters() if weight.requires_grad]}
        if self.value_head is not None:
            learned["value"] = list(self.value_head.parameters())
        return learned

    def driver(self, seed: int, *, best: bool, goal: str) -> DrivenTokens:
        sampling = Sampling(temperature=0.0) if best else self.sampling
        device = next(self.network.parameters()).device
        vocabulary = self.vocabulary.to(device)
        return DrivenTokens(
            self.network, vocabulary, goal=goal, sampling=sampling, seed=seed, bounds=self.bounds
        )

    def remember(self, driver: DrivenTokens) -> tuple[Tensor, Tensor]:
        """(what the head saw [B,K,...], tokens [B,K])."""
        return torch.stack(driver.inputs, dim=1), torch.stack(driver.chosen, dim=1)

    def score(self, memory: tuple[Tensor, Tensor], rows: Tensor, *, reference: bool = False) -> Scored:
        inputs, tokens = memory
        network: GoalNetwork = self.reference if reference else self.network
        told = inputs[rows]
        vehicle = torch.zeros(told.shape[:-1], dtype=torch.int64, device=rows.device)  # the ego's row of the classes
        logits = network.logits_told(told, vehicle) / self.sampling.temperature
        vehicles = torch.arange(logits.shape[-1], device=rows.device) < int(self.vocabulary.counts[0])
        logp = logits.masked_fill(~vehicles, -torch.inf).log_softmax(dim=-1)
        value = None
        if self.value_head is not None and not reference:
            value = self.value_head(inputs[rows])[..., 0]
        return Scored(logp.gather(-1, tokens[rows][..., None])[..., 0], value)

    def records(self, scenes: Fingerprint) -> dict[str, str]:
        more = {name: self.settings[name] for name in ("tables", "vocabulary", "bounds", "base")}
        return {RECORD: planner_record(self.kind, self.settings["settings"], scenes, **more)}


def traffic(checkpoint: str, **options: Any) -> TokenPolicy:
    """A traffic model as the others: cloned, fine-tuned or reinforced; ``options`` are TokenPolicy's."""
    return load_agents(checkpoint).policy(**options)
