"""Log replay: everybody does what was recorded, whatever happens around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene

AT_END = ("remove", "stay")


class Replay:
    """The recorded poses; across gaps those that ``tracks.upsample`` put there.

    ``at_end`` says what becomes of a road user whose record ends: "remove" declares it removed at the end of that token
    (the recording does not know it any more), "stay" leaves it standing where it was last seen. The ego stays.
    """

    def __init__(self, at_end: str = "remove") -> None:
        if at_end not in AT_END:
            raise DataError(f"replay: at_end is {at_end!r}; one of {', '.join(AT_END)} was expected")
        self.at_end = at_end
        self.name = "replay"

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        """Nothing to prepare."""

    def act(self, state: WorldState) -> Moves:
        scenes, column = state.scenes, state.column
        wanted = torch.arange(column + 1, column + 1 + TOKEN_STEPS, device=scenes.device)
        last = scenes.last_seen[..., None]
        at = torch.minimum(wanted, last).clamp_min(0)  # [S,N,K]: the last recorded pose is held
        poses = scenes.log_pose.gather(2, at[..., None].expand(*at.shape, 3))[state.scene]
        ended = (scenes.last_seen < column + TOKEN_STEPS)[state.scene]
        ended &= (scenes.last_seen < scenes.last[:, None])[state.scene]  # the end of the recording is no one's end
        leaves = ended if self.at_end == "remove" else None
        return Moves.poses(poses, leaves=leaves)
