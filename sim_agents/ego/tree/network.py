"""The tree planner's network: h(scene) -> z, g(z, template) -> z', reward, pose; f(z) -> prior over templates, value.

Legend: B scenes, Q vectors of a scene, A templates, d width, h heads.

    h   the encoder of ``ego/encoder.py``: z is the ego's vector, the others are kept as the scene's memory
    g   z' = LayerNorm(y + attend(y, memory) + ...), y = z + MLP([z, how the template moves the car]); from z': the
        reward of the token, and where the car is now
    f   from z: logits of the templates, value (discounted rewards from here on)

What a template does to the car (its pose and speed after it) is known exactly, by the bicycle that will drive it, and
is told to g; that the car's pose can be read from z' again is a loss of its own, so that z' knows where it is. The
memory is the world of the present: what the others will do is for g to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sim_agents.ego.encoder import EgoEncoder, EncoderSettings, mlp
from sim_agents.ego.motion import LATERAL_BOUND, SHARPEST, play
from sim_agents.ego.observation import LENGTH_M, PLACE_M, SPEED, EgoObservation, Sight
from sim_agents.ego.tree.search import TreeNode

CAR = 8  # numbers that say how a template moved the car
POSE = 4
BOUND_SLACK = 1.2  # a template that bends more than this times what the speed allows cannot be done


@dataclass(frozen=True)
class TreeSettings:
    """``encoder`` gives the width of z."""

    sight: Sight = field(default_factory=Sight)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)


@dataclass(frozen=True)
class Memory:
    """The scene as g sees it: keys and values [B,h,Q,d/h] and which rows there are [B,1,1,Q]."""

    key: Tensor
    value: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Car:
    """The ego as the search moves it: ``pose`` [B,3] in the frame of the present one, ``speed`` [B], ``length`` [B]."""

    pose: Tensor
    speed: Tensor
    length: Tensor

    def after(self, action: Tensor) -> Car:
        """The car after actions [B,2]."""
        poses, speed = play(self.pose, self.speed, self.length, action)
        return Car(poses[:, -1], speed, self.length)


class TreeNetwork(nn.Module):
    """``templates`` [A,2] travel with the weights."""

    def __init__(self, settings: TreeSettings, templates: Tensor) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("templates", templates.clone())
        d, heads = settings.encoder.width, settings.encoder.heads
        self.heads = heads
        self.encoder = EgoEncoder(settings.encoder, settings.sight)
        self.to_memory = nn.Linear(d, 2 * d)
        self.move = mlp(d + CAR, 2 * d, d)
        self.ask, self.answer = nn.Linear(d, d), nn.Linear(d, d)
        self.settle = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.norm, self.norm_ask = nn.LayerNorm(d), nn.LayerNorm(d)
        self.reward, self.pose = mlp(d, d, 1), mlp(d, d, POSE)
        self.prior, self.value = mlp(d, d, len(templates)), mlp(d, d, 1)

    def represent(self, seen: EgoObservation) -> tuple[Tensor, Memory, Car]:
        """h: (z [B,d], the scene's memory, the car where it is)."""
        x, valid = self.encoder.vectors(seen)
        key, value = self.to_memory(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        nothing = torch.zeros(len(x), 3, device=x.device)
        car = Car(nothing, (seen.ego[:, 0] * SPEED).clamp_min(0.0), seen.ego[:, 4] * LENGTH_M)
        return x[:, 0], Memory(key, value, valid[:, None, None]), car

    def dynamics(self, z: Tensor, memory: Memory, car: Car, action: Tensor) -> tuple[Tensor, Car]:
        """g: (z' [B,d], the car after the actions [B,2])."""
        after = car.after(action)
        y = z + self.move(torch.cat([z, _moved(car, after, action)], dim=-1))
        query = self.ask(self.norm_ask(y)).unflatten(-1, (self.heads, 1, -1))  # [B,h,1,d/h]
        found = nn.functional.scaled_dot_product_attention(query, memory.key, memory.value, attn_mask=memory.valid)
        y = y + self.answer(found.flatten(1))
        return self.norm(y + self.settle(y)), after

    def rewards(self, z: Tensor) -> Tensor:
        """[B] of the token that led to z."""
        return self.reward(z)[..., 0]

    def predict(self, z: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
        """f: (logits [B,A], -inf for templates that cannot be done at the speed [B]; value [B])."""
        return self.prior(z).masked_fill(~self.possible(speed), -torch.inf), self.value(z)[..., 0]

    def possible(self, speed: Tensor) -> Tensor:
        """[B,A] bool: the template bends no more than the car may at its speed. One straight template always is."""
        bend = self.templates[:, 1].abs()
        sharpest = (BOUND_SLACK * LATERAL_BOUND / speed.clamp_min(1.0).square()).clamp_max(SHARPEST)
        return (bend <= sharpest[:, None]) | (bend == bend.min())


def _moved(before: Car, after: Car, action: Tensor) -> Tensor:
    """[B,CAR] numbers of a move."""
    heading = after.pose[:, 2]
    return torch.stack(
        [
            after.pose[:, 0] / PLACE_M, after.pose[:, 1] / PLACE_M, torch.cos(heading), torch.sin(heading),
            before.speed / SPEED, after.speed / SPEED, action[:, 0] / 4.0, action[:, 1] * 10.0,
        ],
        dim=-1,
    )  # fmt: skip


def pose_numbers(pose: Tensor) -> Tensor:
    """What the pose head is to tell of poses [...,3]: [...,POSE]."""
    heading = pose[..., 2:]
    return torch.cat([pose[..., :2] / PLACE_M, torch.cos(heading), torch.sin(heading)], dim=-1)


class Imagination:
    """The network as the model of a search from B scenes; a state is [z, pose, speed]."""

    def __init__(self, network: TreeNetwork, seen: EgoObservation) -> None:
        self.network = network
        z, self.memory, self.car = network.represent(seen)
        self.root = self._node(z, self.car)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, TreeNode]:
        z, pose, speed = state.split([state.shape[1] - 4, 3, 1], dim=-1)
        car = Car(pose, speed[:, 0], self.car.length)
        z, car = self.network.dynamics(z, self.memory, car, self.network.templates[action])
        return self.network.rewards(z), self._node(z, car)

    def _node(self, z: Tensor, car: Car) -> TreeNode:
        logits, value = self.network.predict(z, car.speed)
        return TreeNode(torch.cat([z, car.pose, car.speed[:, None]], dim=-1), logits, value)
