"""The synthetic world's own drivers as a policy of the moving world: they go on from any state and react.

This is the truth that no recorded data set has: what the same people would have done, had the ego driven otherwise.
Every road user that the law drives keeps its path, its temper and its plans (``TrafficScene.law``); the ego, and
whoever else another policy drives, is seen, followed, waited for and given way to where it really is.

Legend: B worlds, N road users of a scene.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import from_frame, to_frame
from navsim_ext.errors import DataError
from navsim_ext.synthetic import traffic
from navsim_ext.traffic.scene import TrafficScene

DRIVES = ("others", "all")
MOVED_M = 0.02  # farther than this from where the law left it: somebody else has moved a road user
RETURN_M = 8.0  # over which an offset from the path dies out (to 1/e)


class SyntheticLaw:
    """``drives`` "others": the ego is another policy's; "all": the law drives it too (then the recording comes out).

    Raises DataError at the start for scenes without the law's state (any source but ``synthetic``), and where the world
    did not start at the scene's present step.
    """

    def __init__(self, drives: str = "others") -> None:
        if drives not in DRIVES:
            raise DataError(f"law: drives is {drives!r}; one of {', '.join(DRIVES)} was expected")
        self.drives, self.name = drives, "law"

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        for scene in scenes:
            if "state_s" not in scene.law:
                raise DataError(
                    f"scene {scene.id} of source {scene.source!r} has no law: agents=law drives synthetic traffic "
                    "scenes only (data.source=synthetic); take agents=idm or agents=replay for recordings"
                )
        if state.step:
            raise DataError("the law starts at the present step of a scene: start it right after reset")
        self._worlds = [_LawWorld(scenes[s], self.drives == "all") for s in state.scene.tolist()]

    def act(self, state: WorldState) -> Moves:
        """Poses of everybody in each world; the ego's (drives="others") go straight on and are not meant to be used."""
        pose = state.pose.double().cpu().numpy()
        speed = state.speed.double().cpu().numpy()
        moves = np.zeros((*pose.shape[:2], TOKEN_STEPS, 3), np.float32)
        moves[:] = pose[:, :, None]
        for b, world in enumerate(self._worlds):
            frame = state.scenes.frame[int(state.scene[b])]
            n = world.count
            went = world.advance(from_frame(pose[b, :n], frame), speed[b, :n])
            moves[b, :n] = to_frame(went, frame)
        return Moves.poses(torch.from_numpy(moves).to(state.poses.device))


class _LawWorld:
    """The law in one world: its state between two tokens, in the frame of the scene."""

    def __init__(self, scene: TrafficScene, drives_ego: bool) -> None:
        self.law, self.count, self.ego = scene.law, scene.num_agents, scene.ego
        self.drives_ego = drives_ego
        self.begin = round(float(scene.law["clock"][1]) / STEP_S)
        self.s = scene.law["state_s"][1].copy()
        self.speed = scene.law["state_speed"][1].copy()
        self.acceleration = scene.law["state_acceleration"][1].copy()
        self.waiting = scene.law["state_waiting"][1].copy()
        self.expected: NDArray[np.float64] | None = None  # [N,3] where the law left everybody
        self.static = scene.law["user_kind"] == traffic.STATIC

    def advance(self, pose: NDArray[np.float64], speed: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N,K,3] the next poses from where everybody is (centre poses [N,3], m/s [N])."""
        external = np.zeros(self.count, np.bool_)
        if not self.drives_ego:
            external[self.ego] = True
        moved = np.zeros(self.count, np.bool_)
        if self.expected is not None:
            moved = np.hypot(*(pose[:, :2] - self.expected[:, :2]).T) > MOVED_M
        for row in np.flatnonzero((moved | external) & ~self.static):
            self.s[row] = traffic.project(self.law, int(row), pose[row], float(self.s[row]))
            self.speed[row] = max(float(speed[row]), 0.0)
            if moved[row] and not external[row]:
                self.acceleration[row] = 0.0
        given = traffic.Resumed(
            self.begin, self.s, self.speed, self.acceleration, self.waiting, external, np.ascontiguousarray(pose)
        )
        motion = traffic.resume(self.law, given, TOKEN_STEPS)
        went = motion.pose[1:].transpose(1, 0, 2).copy()
        offset = pose - motion.pose[0]  # of those whom somebody else has moved off their path
        offset[:, 2] = (offset[:, 2] + np.pi) % (2.0 * np.pi) - np.pi
        fade = np.exp(-(motion.s[1:] - motion.s[0]) / RETURN_M).T  # [N,K]
        shift = offset[:, None] * fade[..., None]
        turns = 2.0 * np.pi * np.rint((pose[:, 2] - motion.pose[0, :, 2]) / (2.0 * np.pi))  # keep headings continuous
        went = went + shift
        went[..., 2] += turns[:, None]
        self.begin += TOKEN_STEPS
        self.s, self.speed = motion.s[-1].copy(), motion.speed[-1].copy()
        self.acceleration, self.waiting = motion.acceleration[-1].copy(), motion.waiting[-1].copy()
        self.expected = went[:, -1]
        return went
