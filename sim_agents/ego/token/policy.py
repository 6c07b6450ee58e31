"""The token planner in the ego's seat, and asked once.

Legend: B worlds, N road users, J = 5 poses of a token, W window of tokens.

A token is half a second of motion and is carried out whole (``execute="token"``): five poses, then the next question.
``execute="first"`` carries out the first pose of each token and asks again every 0.1 s, as the first version of this
planner did; it is kept for the comparison. Within a half second the others have not moved yet in the world: they are
then taken to go straight on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_S, TOKEN_STEPS, relative
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.frames import NUM_FUTURE_POSES
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.data.scene_tokens import Bounds
from sim_agents.ego.checkpoint import fill, read_planner
from sim_agents.ego.observation import goal_reached
from sim_agents.ego.surroundings import GOALS, BadGoal, EgoSurroundings
from sim_agents.ego.token.module import KIND
from sim_agents.ego.token.network import GoalNetwork, GoalSettings, told
from sim_agents.model.sampling import Sampling, keyed_uniform
from sim_agents.model.settings import NetworkSettings
from sim_agents.policy import TokenPolicy
from sim_agents.training.checkpoint import vocabulary_of
from sim_agents.vocabulary import MotionState, MotionVocabulary, class_of

EXECUTE = ("token", "first")
MARGIN = 1.25  # a goal that needs this many times the fastest token's speed is out of reach


class TokenPlanner(TokenPolicy):
    """``goal`` as in ``EgoPolicy``, and the ``way`` unless False: told neither, it is the base model. Without
    ``sampling`` the most probable token is taken. Everybody's moves are returned (the others' by the base model); mix
    it in as ``ego=``."""

    fingerprint: Fingerprint

    def __init__(
        self, network: GoalNetwork, vocabulary: MotionVocabulary, *, goal: str = "log", way: bool = True,
        execute: str = "token", sampling: Sampling | None = None, seed: int = 0, bounds: Bounds | None = None,
        name: str = KIND,
    ) -> None:  # fmt: skip
        if goal not in GOALS or execute not in EXECUTE:
            raise DataError(f"goal={goal} ({', '.join(GOALS)}), execute={execute} ({', '.join(EXECUTE)})")
        sampling = sampling or Sampling(temperature=0.0)
        super().__init__(network, vocabulary, sampling=sampling, seed=seed, bounds=bounds, name=name)
        self.goal, self.way, self.execute = goal, way, execute
        self.failures: dict[int, str] = {}

    @torch.no_grad()
    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        """Raises BadGoal for a recorded goal that no token is fast enough for."""
        super().start(state, scenes)
        self.failures = {}
        self.around = EgoSurroundings.build(state.scenes, self.goal)
        if self.goal == "log":
            self._require_reach(state)
        self._tell(state)

    @torch.no_grad()
    def act(self, state: WorldState) -> Moves:
        if self._side is None:
            raise DataError(f"planner {self.name} was asked before it was started")
        self._tell(state)
        moves = super().act(state) if self.execute == "token" else self._first_poses(state)
        return self._finite(state, moves)

    @torch.no_grad()
    def plan(self, state: WorldState) -> Tensor:
        """[B,8,3] poses of the box centre in the ego's present frame: eight tokens; the others by the base model."""
        imagined, past = state.fork(), self._past
        world = World(enter="never", events=())
        worlds, ego = state.ego_index()
        places = []
        for _ in range(NUM_FUTURE_POSES):
            world.step(imagined, self.act(imagined))
            places.append(imagined.pose[worlds, ego])
        self._past = past
        plan = relative(state.pose[worlds, ego], torch.stack(places, dim=1))
        plan[list(self.failures)] = torch.nan
        return plan

    def _tell(self, state: WorldState) -> None:
        goal = self.around.goal[state.scene]
        goal = torch.where(goal_reached(state, goal)[:, None], torch.nan, goal)
        way, count = self.around.way[state.scene], self.around.way_count[state.scene]
        self._side = told(self._side, goal, way, count if self.way else torch.zeros_like(count))

    def _require_reach(self, state: WorldState) -> None:
        worlds, ego = state.ego_index()
        classes = class_of(state.scenes.kind[state.scene, ego])
        here = state.pose[worlds, ego]
        now = MotionState(here, state.displacement()[worlds, ego])
        fastest = (self.vocabulary.ends(now, classes)[..., :2] - here[:, None, :2]).norm(dim=-1).amax(dim=1) / TOKEN_S
        scenes = state.scenes
        left = STEP_S * (scenes.last_seen[state.scene, ego] - scenes.now).clamp_min(TOKEN_STEPS)
        needed = (self.around.goal[state.scene] - here[:, :2]).norm(dim=-1) / left
        bad = (needed > MARGIN * fastest).nonzero().flatten().tolist()
        if bad and not hasattr(self.vocabulary, "changes"):  # tokens of acceleration have no top speed
            b = bad[0]
            raise BadGoal(
                f"scene {scenes.sources[int(state.scene[b])].id}: its goal needs {float(needed[b]):.1f} m/s, the "
                f"fastest token of the vocabulary goes {float(fastest[b]):.1f} m/s: build a vocabulary from scenes "
                "that are as fast"
            )

    def _first_poses(self, state: WorldState) -> Moves:
        """The first pose of each of five tokens, asked for 0.1 s apart."""
        worlds, ego = state.ego_index()
        ahead, column = state.fork(), state.column
        steps = STEP_S * torch.arange(1, TOKEN_STEPS + 1, device=state.pose.device)
        moved = state.velocity()[:, :, None] * steps[:, None]
        span = slice(column + 1, column + 1 + TOKEN_STEPS)
        ahead.poses[:, :, span] = state.pose[:, :, None]
        ahead.poses[:, :, span, :2] += moved
        ahead.there[:, :, span] = state.present[..., None]
        users = slice(self._users)
        keys = [key.expand(len(worlds), self._users)[worlds, ego] for key in self._key]
        classes = class_of(self._fixed["kind"][worlds, ego])
        logp = torch.zeros_like(state.speed)
        for j in range(TOKEN_STEPS):
            at = column + j
            past = self.network.no_past(ahead.poses[:, users], ahead.there[:, users])
            reach = at - TOKEN_STEPS * (self.network.settings.window - 1)
            for before in range(max(at % TOKEN_STEPS, reach), at, TOKEN_STEPS):
                _, past = self.network.advance(self._side, past, self._moment(ahead, before))
            features, _ = self.network.advance(self._side, past, self._moment(ahead, at))
            logits = self.network.logits(features[worlds, ego], classes).masked_fill(~self.present[classes], -torch.inf)
            tokens, chosen = self.sampling.sample(logits, keyed_uniform(self.seed, *keys, state.step + j))
            pose = ahead.poses[worlds, ego, at]
            back = ahead.poses[worlds, ego, max(at - TOKEN_STEPS, 0), :2]
            poses, _ = self.vocabulary.play(MotionState(pose, pose[:, :2] - back), classes, tokens)
            ahead.poses[worlds, ego, at + 1] = poses[:, 0]
            logp[worlds, ego] += chosen.to(logp.dtype)
        return Moves.poses(ahead.poses[:, :, span].clone(), logp)

    def _finite(self, state: WorldState, moves: Moves) -> Moves:
        """Worlds whose ego's tokens had no probabilities (weights that are not finite) fail; that ego stands still."""
        worlds, ego = state.ego_index()
        classes = class_of(self._fixed["kind"][worlds, ego])
        good = torch.isfinite(self.network.logits_told(self.network.last_told, classes)).all(dim=-1)
        good &= torch.isfinite(moves.values[worlds, ego]).flatten(1).all(dim=1)
        if bool(good.all()):
            return moves
        for b in (~good).nonzero().flatten().tolist():
            self.failures.setdefault(b, f"{self.name}: token without a probability at {state.step * STEP_S:.1f} s")
        held = state.pose[:, :, None].expand_as(moves.values)
        return replace(
            moves,
            values=torch.where(good[:, None, None, None], moves.values, held),
            log_probability=torch.where(good[:, None], moves.log_probability, 0.0),
        )


def load_token_planner(
    checkpoint: str | os.PathLike[str], *, name: str = KIND, goal: str = "log", way: bool = True,
    execute: str = "token", temperature: float = 0.0, top_k: int = 0, seed: int = 0, ema: bool | None = None,
    device: str = "cpu",
) -> TokenPlanner:  # fmt: skip
    """The planner of a checkpoint of ``sim_agents.ego.train experiment=token``; temperature 0 takes the most probable
    token."""
    record, weights, fingerprint = read_planner(checkpoint, KIND, ema=ema)
    settings = record["settings"]
    vocabulary, sampling = vocabulary_of(record["tables"]), Sampling(top_k=top_k, temperature=temperature)
    network = GoalNetwork(NetworkSettings(**settings["network"]), vocabulary, GoalSettings(**settings["goal"]))
    fill(network, weights, checkpoint)
    planner = TokenPlanner(
        network.to(device), vocabulary.to(device), goal=goal, way=way, execute=execute, seed=seed, name=name,
        sampling=sampling, bounds=Bounds(**record["bounds"]),
    )  # fmt: skip
    planner.fingerprint = fingerprint
    return planner
