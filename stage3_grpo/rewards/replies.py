"""The replies of a rollout as rewards see them: texts, who is compared with whom, what was right, and how each is read.

Legend: N replies (rows), groups of G replies to one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.prompts import ParsedTrajectory, parse_trajectory
from navsim_ext.questions.answers import Reply, StatedActions, read_reply, stated_actions
from navsim_ext.questions.meta_actions import Decision, LaneAhead

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Prompted:
    """What is known about the scene that a prompt asks about; None: not known.

    ``decision``: what was driven. ``speed_mps`` and ``road``: with them the decision of a trajectory can be told.
    """

    token: str
    decision: Decision | None = None
    speed_mps: float | None = None
    road: LaneAhead | None = None


@dataclass(frozen=True)
class Replies:
    """``texts`` [N]; ``prompts`` [N] of each row; ``group`` [N]; ``truncated`` [N]: cut at the limit of tokens."""

    texts: Sequence[str]
    prompts: Sequence[Prompted]
    group: NDArray[np.int64]
    truncated: NDArray[np.bool_]

    def __post_init__(self) -> None:
        lengths = {len(self.texts), len(self.prompts), len(self.group), len(self.truncated)}
        if len(lengths) != 1:
            raise DataError(f"replies, prompts, groups and truncations of unequal numbers {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def read(self) -> list[Reply]:
        """A reply that was cut off is read like any other: without its end it has no answer."""
        return [read_reply(text) for text in self.texts]

    @cached_property
    def stated(self) -> list[StatedActions]:
        return [stated_actions(reply.answer) for reply in self.read]

    @cached_property
    def planned(self) -> list[ParsedTrajectory]:
        """Trajectories in words; one that was cut off does not go on by itself."""
        plans = []
        for reply, cut in zip(self.read, self.truncated, strict=True):
            if reply.answer is None:
                plans.append(ParsedTrajectory(None, f"no answer: {reply.fault}"))
            elif cut:
                plans.append(ParsedTrajectory(None, "cut at the limit of tokens"))
            else:
                plans.append(parse_trajectory(reply.answer))
        return plans

    def labels(self, asked_by: str) -> list[Decision]:
        """[N] what was driven; raises DataError naming the first prompt without it."""
        missing = [prompt.token for prompt in self.prompts if prompt.decision is None]
        if missing:
            raise DataError(
                f"{asked_by} compares with the driven decision, which scene {missing[0]} lacks: take questions of type "
                "decision or decision_trajectory (navsim_ext.questions.write with types=[decision]), or another "
                "reward"
            )
        return [prompt.decision for prompt in self.prompts]

    def roads(self, asked_by: str) -> list[tuple[float, LaneAhead]]:
        """[N] speed and road; raises DataError naming the first prompt without them."""
        missing = [prompt.token for prompt in self.prompts if prompt.road is None or prompt.speed_mps is None]
        if missing:
            raise DataError(
                f"{asked_by} tells the decision of a trajectory, for which scene {missing[0]} lacks speed_mps and "
                "road: take questions of type decision_trajectory, or another reward"
            )
        return [(prompt.speed_mps, prompt.road) for prompt in self.prompts]
