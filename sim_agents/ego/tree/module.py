"""Training of the tree planner: unrolled along drives whose templates are known, by a teacher or by its own search.

Legend: B examples, K tokens that are unrolled, A templates, g discount of a token.

    z_0 = h(scene), z_{k+1} = g(z_k, template_k)
    L = mean_k CE(f(z_k), target_k) + w_r |reward_k - r_k|^2 + w_v |value_k - G_k|^2 + w_p |pose_k - p_k|_huber
    G_k = sum_{i=k}^{K-1} g^{i-k} r_i + g^{K-k} v(h(scene reached)),   0 from a failure on

Where the templates come from:
  teacher   the template that leads nearest to the record from where the car is (a rolling match, so errors do not add
            up), also from beside the record (``Disturbance``); it is the target of the prior
  explorer  the same with a persistent error of acceleration and curvature, for ``explore`` of the examples: what goes
            wrong beside the record is nowhere in it. Rewards and values are learned from it, the prior is not
  search    the planner's own search drives the world among the recorded others (``searched``); the prior learns what
            the search found (``improved``): reinforcement by searched drives

The others do what was recorded. Rewards are ``reward.py``'s product.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS, relative
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.errors import DataError, NotFiniteLoss
from navsim_ext.runtime.learning_rate import total_steps
from navsim_ext.runtime.optimizer import OptimizerSettings, adamw
from sim_agents.ego.checkpoint import RECORD, fill, planner_record, read_planner, read_record
from sim_agents.ego.motion import play
from sim_agents.ego.observation import EgoObservation, observe
from sim_agents.ego.policy import ego_state
from sim_agents.ego.recorded import Disturbance, EgoExample, assemble, begin
from sim_agents.ego.reward import EVENTS, outcome
from sim_agents.ego.tree.network import Imagination, TreeNetwork, TreeSettings, pose_numbers
from sim_agents.ego.tree.policy import KIND, tree_settings
from sim_agents.ego.tree.search import SearchSettings, improved, search
from sim_agents.ego.tree.templates import coverage, ego_segments, make_templates, require_drivable
from sim_agents.vocabulary.motion import MATCHING_BOX_M, corner_distance

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TemplateSettings:
    """At most ``count`` templates, which cover ``share`` of the training egos' half seconds."""

    count: int = 48
    share: float = 0.99
    mirror: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Explorer:
    """``share`` of examples with a persistent error; its standard deviations."""

    share: float = 0.4
    acceleration: float = 1.5  # m/s^2
    curvature: float = 0.02  # 1/m


@dataclass(frozen=True)
class LossWeights:
    reward: float = 1.0
    value: float = 0.25
    pose: float = 1.0


@dataclass(frozen=True)
class Unrolled:
    """What a batch is learned from: ``seen`` at the start, ``actions`` [B,K], targets of the prior [B,K,A] and which
    count [B,K], ``rewards`` [B,K], ``returns`` [B,K] (of the scenes before the tokens), ``poses`` [B,K,3] after them in
    the frame of the start, ``alive`` [B,K]: nothing had failed before the token."""

    seen: EgoObservation
    actions: Tensor
    prior: Tensor
    taught: Tensor
    rewards: Tensor
    returns: Tensor
    poses: Tensor
    alive: Tensor


class TreeModule(pl.LightningModule):
    """``searched`` None: teacher and explorer; else the planner's own search (with ``init_from``: from a trained one).
    Templates are made from the training scenes, or are those of ``init_from``."""

    def __init__(
        self, network: TreeSettings | None = None, optimizer: OptimizerSettings | None = None, *,
        templates: TemplateSettings | None = None, disturbance: Disturbance | None = None,
        explorer: Explorer | None = None, weights: LossWeights | None = None, unroll: int = 8, discount: float = 0.9,
        searched: SearchSettings | None = None, init_from: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if unroll < 1 or not 0.0 < discount < 1.0:
            raise DataError(f"unroll={unroll}, discount={discount}: at least 1 token and 0 < discount < 1 expected")
        if searched is not None and searched.discount != discount:
            raise DataError(f"searched.discount={searched.discount} is not the discount={discount} of the values")
        self.settings = network or TreeSettings()
        self.optimizer_settings = optimizer or OptimizerSettings(1e-3, 5e-5, 0.01, warmup_share=0.03)
        self.template_settings = templates or TemplateSettings()
        self.disturbance, self.explorer = disturbance or Disturbance(), explorer or Explorer()
        self.weights, self.unroll, self.discount, self.searched = weights or LossWeights(), unroll, discount, searched
        self.covered: dict[str, float] = {}
        self.network: TreeNetwork | None = None
        if init_from is not None:
            record, found, _ = read_planner(init_from, KIND)
            if tree_settings(record["settings"]) != self.settings:
                raise DataError(f"{init_from} has the sizes {record['settings']}, the configured are {self.settings}")
            self.network = TreeNetwork(self.settings, torch.tensor(record["templates"]))
            self.covered = record["coverage"]
            fill(self.network, found, init_from)

    def configure_model(self) -> None:
        """Makes the templates from the training scenes, once these are known, and says how well they cover them."""
        if self.network is not None:
            return
        store, made = self.trainer.datamodule.dataset("train").store, self.template_settings
        segments = ego_segments(store, mirror=made.mirror, seed=made.seed)
        actions, radius = make_templates(segments, made.count, share=made.share, seed=made.seed)
        self.build(actions, coverage(segments, require_drivable(actions)))
        told = ", ".join(f"{name} {value:.3g}" for name, value in self.covered.items())
        logger.info("%d action templates, radius %.2f m, of %s: %s", len(actions), radius, store.folder, told)

    def build(self, actions: Tensor, covered: dict[str, float]) -> None:
        """The network over given templates."""
        self.covered = covered
        # As fresh as if it had been made first: the templates drew no random numbers of the global stream.
        self.network = TreeNetwork(self.settings, actions).to(self.device)

    # -- drives to learn from

    @torch.no_grad()
    def drives(
        self, batch: list[EgoExample], *, disturbance: Disturbance | None, explorer: Explorer | None,
        searched: SearchSettings | None = None, generator: torch.Generator | None = None,
    ) -> Unrolled:  # fmt: skip
        """Drives K tokens from every example and remembers what happened."""
        K, templates = self.unroll, self.network.templates
        horizon = K * TOKEN_STEPS * STEP_S
        world, state, around = assemble(batch, self.device, horizon_s=horizon, events=EVENTS)
        targets = begin(state, K, disturbance, generator)
        others = Replay()
        others.start(state, state.scenes.sources)
        worlds, ego = state.ego_index()
        B = len(worlds)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(self.device)  # noqa: E731
        astray, error = torch.zeros(B, dtype=torch.bool, device=self.device), torch.zeros(B, 2, device=self.device)
        if explorer is not None and searched is None:
            astray = (torch.rand(B, generator=generator) < explorer.share).to(self.device)
            error = draw(B, 2) * torch.tensor([explorer.acceleration, explorer.curvature], device=self.device)
        seen = observe(state, around, self.settings.sight)
        start = ego_state(state)[0]
        alive = torch.ones(B, dtype=torch.bool, device=self.device)
        names = ("actions", "prior", "taught", "rewards", "pose", "alive")
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        for k in range(K):
            pose, speed, length = ego_state(state)
            if searched is None:
                action = self._nearest(pose, speed, length, targets.pose[:, k])
                prior = torch.nn.functional.one_hot(action, len(templates)).float()
                taught = ~astray & targets.valid[:, k]
                wanted = templates[action] + error
                apart = ((wanted[:, None] - templates) / templates.new_tensor([1.0, 0.02])).square().sum(dim=-1)
                action = torch.where(astray, apart.argmin(dim=-1), action)
            else:
                model = Imagination(self.network, observe(state, around, self.settings.sight))
                tree = search(model.root, model, searched, generator)
                action, prior, taught = tree.action, improved(tree, searched), torch.ones_like(alive)
            moves = others.act(state).resolve(state)
            values = moves.values.clone()
            values[worlds, ego] = play(pose, speed, length, templates[action])[0]
            world.step(state, Moves.poses(values, leaves=moves.leaves))
            happened = outcome(world, state, around, "product")
            kept["actions"].append(action)
            kept["prior"].append(prior)
            kept["taught"].append(taught & alive)
            kept["rewards"].append(torch.where(alive, happened.reward, 0.0))
            kept["alive"].append(alive)
            kept["pose"].append(ego_state(state)[0])
            alive = alive & ~happened.failed
        z, _, car = self.network.represent(observe(state, around, self.settings.sight))
        after = torch.where(alive, self.network.predict(z, car.speed)[1], 0.0)
        rewards = torch.stack(kept["rewards"], dim=1)
        poses = torch.stack([_seen(start, pose) for pose in kept["pose"]], dim=1)
        stack = lambda name: torch.stack(kept[name], dim=1)  # noqa: E731
        return Unrolled(
            seen, stack("actions"), stack("prior"), stack("taught"), rewards,
            discounted(rewards, after, self.discount), poses, stack("alive"),
        )  # fmt: skip

    def _nearest(self, pose: Tensor, speed: Tensor, length: Tensor, target: Tensor) -> Tensor:
        """[B] template that leads nearest to the poses ``target`` [B,3]; of those that can be done."""
        A = len(self.network.templates)
        spread = lambda values: values[:, None].expand(-1, A, *values.shape[1:])  # noqa: E731
        ends, _ = play(spread(pose), spread(speed), spread(length), self.network.templates.expand(len(pose), A, 2))
        apart = corner_distance(ends[:, :, -1], target[:, None], pose.new_tensor(MATCHING_BOX_M[0]))
        return apart.masked_fill(~self.network.possible(speed), torch.inf).argmin(dim=-1)

    # -- losses

    def losses(self, drive: Unrolled) -> dict[str, Tensor]:
        """The four terms of L, unweighted, and ``accuracy`` of the prior."""
        network, K = self.network, drive.actions.shape[1]
        z, memory, car = network.represent(drive.seen)
        terms: dict[str, list[Tensor]] = {name: [] for name in ("prior", "reward", "value", "pose", "right")}
        for k in range(K):
            logits, value = network.predict(z, car.speed)
            logp = logits.log_softmax(dim=-1).masked_fill(logits == -torch.inf, 0.0)
            terms["prior"].append(-(drive.prior[:, k] * logp).sum(dim=-1))
            terms["right"].append((logits.argmax(dim=-1) == drive.prior[:, k].argmax(dim=-1)).float())
            terms["value"].append((value - drive.returns[:, k]).square())
            z, car = network.dynamics(z, memory, car, network.templates[drive.actions[:, k]])
            terms["reward"].append((network.rewards(z) - drive.rewards[:, k]).square())
            wanted = pose_numbers(drive.poses[:, k])
            terms["pose"].append(torch.nn.functional.smooth_l1_loss(network.pose(z), wanted, reduction="none").sum(-1))
        masks = {"prior": drive.taught, "right": drive.taught}
        mean = {}
        for name, values in terms.items():
            mask = masks.get(name, drive.alive).float()
            mean[name] = (torch.stack(values, dim=1) * mask).sum() / mask.sum().clamp_min(1.0)
        return mean

    def training_step(self, batch: list[EgoExample], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        drive = self.drives(
            batch, disturbance=self.disturbance, explorer=self.explorer, searched=self.searched, generator=generator
        )
        terms = self.losses(drive)
        weights = {"prior": 1.0, **asdict(self.weights)}
        loss = sum(weights[name] * terms[name] for name in weights)
        if not torch.isfinite(loss):
            raise NotFiniteLoss(f"the loss is {loss.item()} at step {self.global_step}: lower the rate")
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        told = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(told | {"train/return": drive.rewards.sum(dim=1).mean()}, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._validated: list[Tensor] = []

    def validation_step(self, batch: list[EgoExample], batch_idx: int) -> None:
        terms = self.losses(self.drives(batch, disturbance=None, explorer=None))
        count = float(len(batch))
        self._validated.append(torch.stack([*(terms[n] * count for n in _TOLD), terms["prior"].new_tensor(count)]))

    def on_validation_epoch_end(self) -> None:
        sums = self.all_gather(torch.stack(self._validated).sum(dim=0)).reshape(-1, len(_TOLD) + 1).sum(dim=0)
        for name, value in zip(_TOLD, sums[:-1], strict=True):
            self.log(f"val/{name}", value / sums[-1], prog_bar=name == "prior", rank_zero_only=False)

    # -- optimizer and checkpoints

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw([{"params": list(self.network.parameters())}], self.optimizer_settings,
                     total=total_steps(self.trainer))  # fmt: skip

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        scenes = self.trainer.datamodule.dataset("train").fingerprint
        checkpoint[RECORD] = planner_record(
            KIND, asdict(self.settings), scenes, templates=self.network.templates.tolist(), coverage=self.covered,
            discount=self.discount,
        )  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other sizes than the checkpoint's."""
        record = read_record(checkpoint, "the checkpoint", "templates", "coverage")
        if tree_settings(record["settings"]) != self.settings:
            raise DataError(f"the checkpoint's sizes are {record['settings']}, the configured ones {self.settings}")
        if self.network is None:
            self.build(torch.tensor(record["templates"]), record["coverage"])


_TOLD = ("prior", "right", "reward", "value", "pose")


def discounted(rewards: Tensor, after: Tensor, discount: float) -> Tensor:
    """Returns [B,K]: G_k = r_k + g G_{k+1} of rewards [B,K], G_K = ``after`` [B]."""
    returns, total = [], after
    for k in range(rewards.shape[1] - 1, -1, -1):
        total = rewards[:, k] + discount * total
        returns.append(total)
    return torch.stack(returns[::-1], dim=1)


def _seen(start: Tensor, pose: Tensor) -> Tensor:
    """Poses [B,3] seen from poses [B,3]."""
    return relative(start, pose[:, None])[:, 0]
