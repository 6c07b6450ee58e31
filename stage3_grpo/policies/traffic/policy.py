"""A traffic model as a policy: its decisions are motion tokens, all road users of a scene choose jointly.

Legend: S scenes, G rollouts of each, B = S G worlds (scene by scene), N road users, rows = B N (world by world), K
decisions of half a second, V tokens.

    roll     drives G rollouts of each scene in the moving world; every road user is a row with a reward of each
             decision; rows of the same road user of the same scene are a group
    decide   scores the same tokens in one pass over all moments, teacher-forced on the driven states
    teacher  the recorded drive told in tokens (its rolling match): cloning holds to the log

Deviation: what is scored is the softmax at the sampling temperature; ``top_k`` and ``top_p`` bound what is drawn and do
not change what it is scored with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.not_finite import loss_not_finite
from navsim_ext.runtime.rng import derive_seed
from navsim_ext.traffic.codes import Role
from navsim_ext.traffic.scene import TrafficScene
from sim_agents import AGENT_RECORD, LoadedAgents, NextTokenNetwork, Sampling, agent_record, class_of, load_agents
from stage3_grpo.algorithm import Algorithm
from stage3_grpo.policies.traffic.driver import RememberingDriver, Seen
from stage3_grpo.policies.traffic.held_out import TrafficHeldOut
from stage3_grpo.policies.traffic.reference import Drift, TrafficReference
from stage3_grpo.policies.traffic.statistics import drive_statistics, realism_figures
from stage3_grpo.policies.traffic.teacher import Recorded, recorded_tokens
from stage3_grpo.policies.traffic.value_head import DrivingValueHead
from stage3_grpo.policy import DecisionScores, Key, Needs, PolicyRollout
from stage3_grpo.rewards.realism import rolled_scenes
from stage3_grpo.rewards.traffic_reward import DrivenReward, TrafficReward
from stage3_grpo.rewards.traffic_terms import Driven, happened
from stage3_grpo.update import taught_by

CREDITED = ("driven", "scored")
RECORDED_EVENTS = ("contact", "off_road", "red_light")  # of the record, whatever the reward
PROBED_SCENES = 16
MAX_LISTED = 8


@dataclass
class Drives:
    """What a rollout of traffic leaves besides its trace."""

    scenes: Sequence[TrafficScene]
    seen: Seen
    recorded: Recorded | None  # where a teacher is cloned
    driven: Driven
    reward: DrivenReward
    made: Tensor  # [B,N,K] decisions of credited road users, of which a reward is known then or later
    reference_table: Tensor | None  # [D,V] ln p of the reference at the decisions made, for an exact KL
    realism: dict[str, float]
    seconds: dict[str, float]
    updated: dict[str, float] = field(default_factory=dict)  # what the first update told

    def note_entropy(self, table: Tensor) -> None:
        """Keeps the mean entropy of a table ln p [D,V], in nats per decision; the first one counts."""
        if "entropy" not in self.updated and len(table):
            with torch.no_grad():
                each = -(table.exp() * table.masked_fill(table == -torch.inf, 0.0)).sum(dim=-1)
                self.updated["entropy"] = float(each.mean())


class TrafficPolicy:
    """Trains the traffic model in ``init``; ``reference`` None: the model that training starts from.

    ``horizon_s``: how long scenes are driven. ``credited``: road users that are rewarded: all that are driven, or those
    that the source asks to be predicted and the ego ("scored"). ``end_at_contact``: decisions after a road user's
    first contact do not count. ``freeze_map``: the map encoder is not trained. ``realism_every``: rollouts between
    judgements of realism where the reward is not made of it (0: never). ``reference_drift`` None: the reference stays.
    """

    name = "traffic"
    rows_at_once = None

    def __init__(
        self,
        init: str,
        reward: TrafficReward,
        *,
        reference: str | None = None,
        reference_drift: Drift | None = None,
        sampling: Sampling | None = None,
        horizon_s: float = 8.0,
        credited: str = "driven",
        end_at_contact: bool = False,
        freeze_map: bool = False,
        realism_every: int = 10,
        validation_rollouts: int = 8,
        validation_seed: int = 0,
    ) -> None:
        if credited not in CREDITED:
            raise DataError(f"credited={credited}: one of {', '.join(CREDITED)} was expected")
        self.init, self.reference_path, self.reference_drift = init, reference or init, reference_drift
        self.reward, self.sampling = reward, sampling or Sampling()
        if self.sampling.temperature == 0.0:
            raise DataError(
                "temperature 0 always takes the most probable token: there is no log-probability to learn from"
            )
        self.horizon_s, self.credited, self.end_at_contact = horizon_s, credited, end_at_contact
        self.freeze_map, self.realism_every = freeze_map, realism_every
        self.validation_rollouts, self.validation_seed = validation_rollouts, validation_seed
        self.loaded: LoadedAgents | None = None
        self.network: NextTokenNetwork | None = None
        self.value_head: DrivingValueHead | None = None
        self.reference: TrafficReference | None = None
        self.exact_kl = False
        self._device = torch.device("cpu")

    # ---- before the first step

    def build(self, datamodule: Any, algorithm: Algorithm, seed: int) -> dict[str, nn.Module]:
        """Loads policy and reference; raises where they do not fit together."""
        loaded = load_agents(self.init)
        self.group_size = algorithm.group_size
        self.scenes_fingerprint = datamodule.dataset("train").fingerprint
        return self.adopt(loaded, TrafficReference.load(self.reference_path, loaded, self.reference_drift), algorithm)

    def adopt(self, loaded: LoadedAgents, reference: TrafficReference, algorithm: Algorithm) -> dict[str, nn.Module]:
        """Takes a model and a reference that are in memory already."""
        self.loaded, self.network, self.reference = loaded, loaded.network, reference
        self.exact_kl = algorithm.kl is not None and algorithm.kl.form == "exact"
        modules: dict[str, nn.Module] = {"network": self.network}
        for name, weight in self.network.named_parameters():
            weight.requires_grad = not (self.freeze_map and name.startswith("map_encoder."))
        if algorithm.needs_value:
            self.value_head = modules["value_head"] = DrivingValueHead(self.network.settings.width)
        return modules

    def parameters(self) -> dict[str, Sequence[nn.Parameter]]:
        learned: dict[str, Sequence[nn.Parameter]] = {
            "policy": [weight for weight in self.network.parameters() if weight.requires_grad]
        }
        if self.value_head is not None:
            learned["value"] = list(self.value_head.parameters())
        return learned

    def begin(self, datamodule: Any, device: torch.device) -> None:
        """Checks that the scenes tell what the reward reads."""
        self._device = torch.device(device)
        self.reference.network.to(device)
        dataset = datamodule.dataset("train")
        probed = [dataset[i] for i in range(0, len(dataset), max(len(dataset) // PROBED_SCENES, 1))][:PROBED_SCENES]
        self.reward.require(probed, self.group_size)
        if self.credited == "scored" and not any((scene.role & Role.PREDICT).any() for scene in probed):
            raise DataError(
                f"credited=scored, but none of {len(probed)} scenes asks for anybody to be predicted (first "
                f"{probed[0].id}): take credited=driven"
            )

    # ---- a rollout and its decisions

    def drive(
        self, scenes: Sequence[TrafficScene], rollouts: int, seed: int, network: NextTokenNetwork
    ) -> tuple[RememberingDriver, Driven]:
        """Drives the scenes to the horizon; events of everybody at every step."""
        wanted = tuple(sorted({*self.reward.events, *RECORDED_EVENTS}))
        world = World(rollouts=rollouts, horizon_s=self.horizon_s, enter="never", events=wanted, device=self._device)
        state = world.reset(scenes)
        driver = RememberingDriver(
            network,
            self.loaded.vocabulary.to(self._device),
            sampling=self.sampling,
            seed=seed,
            bounds=self.loaded.bounds,
        )
        driver.start(state, scenes)
        while state.steps_left > 0:
            state = world.step(state, driver.act(state))
        return driver, Driven(state, world.events(state, 0, state.step))

    def roll(self, batch: Sequence[TrafficScene], group_size: int, key: Key, needs: Needs) -> PolicyRollout:
        scenes = list(batch)
        self.network.eval()
        start = time.perf_counter()
        driver, driven = self.drive(scenes, group_size, derive_seed(*key), self.network)
        driven_at = time.perf_counter()
        seen = driver.remembered(driven.state)
        made = self.made(driven)
        judged = self.realism_every > 0 and key.rollout % self.realism_every == 0
        rolled = rolled_scenes(driven.state, scenes) if judged or self.reward.realism is not None else None
        reward = self.reward.of(driven, made, rolled)
        made = made & reward.known.flip(-1).cummax(dim=-1).values.flip(-1)  # something is known then or later
        rewarded_at = time.perf_counter()
        users = seen.tokens.shape[1]
        counts = made[:, :users]
        logp_old = logp_ref = value = table = None
        with torch.no_grad():
            if needs.old or needs.value:
                logp_old, features, _ = self._scored(self.network, seen, counts)
                value = self.value_head(features).flatten(0, 1) if needs.value else None
            if needs.reference:
                logp_ref, _, table = self._scored(self.reference.network, seen, counts)
                logp_ref = logp_ref.flatten(0, 1)
        recorded = None
        if needs.teach:
            recorded = recorded_tokens(scenes, self.loaded, self.loaded.bounds, seen.decisions, self._device)
        end = time.perf_counter()
        own = Drives(
            scenes, seen, recorded, driven, reward, made, table if self.exact_kl else None,
            realism_figures(rolled or []),
            {"drive": driven_at - start, "reward": rewarded_at - driven_at, "reference": end - rewarded_at},
        )  # fmt: skip
        place = torch.arange(len(counts), device=counts.device).div(group_size, rounding_mode="floor")[:, None]
        group = place * users + torch.arange(users, device=counts.device)
        mask = counts.flatten(0, 1)
        return PolicyRollout(
            names=[scene.id for scene in scenes], start=place.expand_as(group).flatten(), group=group.flatten(),
            mask=mask, reward=reward.reward[:, :users].flatten(0, 1).masked_fill(~mask, 0.0), valid=mask.any(dim=1),
            own=own, logp_old=logp_old.flatten(0, 1) if needs.old else None, logp_ref=logp_ref, value_old=value,
            taught=None if recorded is None else recorded.counts.flatten(0, 1),
            teaches=None if recorded is None else recorded.of_scene,
            reasons=["no term of the reward is known for anybody"],
        )  # fmt: skip

    def decide(self, rollout: PolicyRollout, rows: Tensor, *, teach: bool) -> DecisionScores:
        own: Drives = rollout.own
        scenes = torch.unique(rollout.start[rows])
        users, group = own.seen.tokens.shape[1], own.seen.rollouts
        worlds = (scenes[:, None] * group + torch.arange(group, device=scenes.device)).flatten()
        every = own.made[:, :users]
        counts = every[worlds]
        logp, features, table = self._scored(self.network, own.seen.of(scenes), counts)
        place = torch.zeros(len(every), dtype=torch.int64, device=rows.device)
        place[worlds] = torch.arange(len(worlds), device=rows.device)
        chosen = place[rows // users] * users + rows % users  # the rows, among those of these worlds
        own.note_entropy(table)
        exact = None
        if own.reference_table is not None:
            number = torch.cumsum(every.flatten(), 0).view_as(every) - 1  # of each decision in the table
            reference = own.reference_table[number[worlds][counts]]
            each = (table.exp() * (table - reference).masked_fill(table == -torch.inf, 0.0)).sum(dim=-1)
            exact = scattered(counts, each).flatten(0, 1)[chosen]
        value = None if self.value_head is None else self.value_head(features).flatten(0, 1)[chosen]
        teacher = None
        if teach:
            teacher = own.recorded.logp(self.network, taught_by(rollout, rows), self._present())
        return DecisionScores(logp.flatten(0, 1)[chosen], value, teacher, exact)

    def _scored(self, network: NextTokenNetwork, seen: Seen, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens that were chosen: ln p [b,N,K] (0 where ``counts`` is False), features [b,N,K,d], and the table
        ln p [D,V] of all tokens where it is True."""
        side = network.roadside(seen.maps, 0).repeat(seen.rollouts)
        features = network.features(side, seen.agents)[:, :, -seen.decisions :]
        classes = class_of(seen.agents.kind)[..., None].expand_as(counts)[counts]
        logits = network.logits(features[counts], classes) / self.sampling.temperature
        table = logits.masked_fill(~self._present()[classes], -torch.inf).log_softmax(dim=-1)
        chosen = table.gather(-1, seen.tokens[counts][:, None])[:, 0]
        return scattered(counts, chosen), features, table

    def _present(self) -> Tensor:
        """[C,V] tokens that each class has."""
        counts = self.loaded.vocabulary.counts[:, None]
        return (torch.arange(self.loaded.vocabulary.size) < counts.cpu()).to(self._device)

    def made(self, driven: Driven) -> Tensor:
        """[B,N,K] decisions of credited road users: those in the world, until their first contact if it ends them."""
        state = driven.state
        made = state.there[:, :, state.scenes.now + 1 : state.column + 1 : TOKEN_STEPS].clone()
        if self.credited == "scored":
            role = state.scenes.role[state.scene]
            made &= ((role & (int(Role.EGO) | int(Role.PREDICT))) != 0)[..., None]
        if self.end_at_contact:
            hit, _ = happened(driven.events.contact)
            made &= torch.cat([torch.zeros_like(hit[..., :1]), hit[..., :-1]], dim=-1).cummax(dim=-1).values == 0
        return made

    # ---- records

    def statistics(self, rollout: PolicyRollout) -> dict[str, float]:
        return drive_statistics(rollout.own)

    def after_update(self, updates: int) -> None:
        self.reference.follow(self.network, updates)

    def held_out(self) -> TrafficHeldOut:
        return TrafficHeldOut(self)

    def not_finite(self, what: str, value: float, trainer: pl.Trainer, rollout: PolicyRollout) -> TriviumError:
        return loss_not_finite(what, value, trainer, {"scenes": list(rollout.names)})

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        record = agent_record(
            self.network.settings, self.loaded.vocabulary, self.loaded.fingerprint.parents["vocabulary"],
            self.scenes_fingerprint, self.loaded.bounds,
        )  # fmt: skip
        state: dict[str, Any] = {"reference": self.reference.fingerprint.to_json()}
        if self.reference.drift is not None:
            state["reference_weights"] = {
                name: value.detach().cpu().clone() for name, value in self.reference.network.state_dict().items()
            }
        return {AGENT_RECORD: record}, state

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Continues only against the reference that the run began with; a drifted one goes on from where it was."""
        Fingerprint.from_json(state["reference"]).require_equal(
            self.reference.fingerprint, mine="the reference of the checkpoint", theirs="the reference now",
            remedy="take the reference that the run began with, or start afresh with resume=never",
        )  # fmt: skip
        if self.reference.drift is not None:
            self.reference.network.load_state_dict(state["reference_weights"], strict=True)


def scattered(mask: Tensor, values: Tensor) -> Tensor:
    """Zeros of the mask's shape with ``values`` where it is True, in order."""
    return torch.zeros(mask.shape, device=values.device, dtype=values.dtype).masked_scatter(mask, values)
