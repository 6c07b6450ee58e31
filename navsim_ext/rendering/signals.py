"""Traffic lights: where they stand, what they show.

Maps and logs name the state of lane connectors, not the place of a lamp. The rule here: a head hangs over each
approach lane on the far side of the junction, and one stands on a post beside the stop line of the rightmost lane.
A head shows red when every listed connector of its lane is red; lanes whose connectors disagree get one head each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.frames import wrap_angle
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.rendering.ground import ground_of, lane_width
from navsim_ext.rendering.objects import Model

FAR_SIDE_M = (14.0, 34.0)  # least and greatest distance from the stop line to the far head
OVERHEAD_M, POST_M = 5.3, 3.4  # heights of the middle of the heads
HEAD_SIZE_M = (0.5, 0.75, 1.9)  # deeper, wider and taller than real ones, to be seen in small pictures
LAMPS = ("red", "amber", "green")  # top to bottom; logs know red and not red only, so amber is never lit


@dataclass(frozen=True)
class Signal:
    """A signal head: ``pose`` [3] is where it stands and the direction of the traffic that it faces."""

    pose: NDArray[np.float64]  # x, y [m global], heading [rad] of the approach
    height: float  # m, middle of the head
    is_red: bool
    on_post: bool
    connectors: tuple[str, ...]

    @property
    def box(self) -> NDArray[np.float64]:
        """[7] global x, y, z, length, width, height, yaw of the head."""
        return np.array([*self.pose[:2], self.height, *HEAD_SIZE_M, self.pose[2]])


def signals_near(
    vector_map: VectorMap, traffic_lights: Iterable[tuple[str, bool]], centre: NDArray[np.float64], reach_m: float
) -> list[Signal]:
    """Heads for the listed connectors whose stop line is within ``reach_m`` of ``centre`` (global)."""
    states = {
        vector_map.lane_connectors.index[fid]: is_red
        for fid, is_red in ((str(fid), is_red) for fid, is_red in traffic_lights)
        if fid in vector_map.lane_connectors.index
    }
    approaches: dict[int, list[int]] = {}
    for connector in sorted(states):
        start = vector_map.lane_connectors.baseline_of(connector)[0]
        if np.abs(start[:2] - centre).max() > reach_m:
            continue
        for lane in _predecessors(vector_map, connector):
            approaches.setdefault(lane, []).append(connector)
    known = ground_of(vector_map).heads
    signals = []
    for lane, connectors in approaches.items():
        key = (lane, *((connector, states[connector]) for connector in connectors))
        if key not in known:
            known[key] = _heads(vector_map, lane, connectors, states)
        signals += known[key]
    return signals


def _predecessors(vector_map: VectorMap, connector: int) -> list[int]:
    node = connector + len(vector_map.lanes)
    sources = vector_map.lane_edges[vector_map.lane_edges[:, 1] == node, 0]
    return [int(source) for source in sources if source < len(vector_map.lanes)]


def _heads(vector_map: VectorMap, lane: int, connectors: Sequence[int], states: dict[int, bool]) -> list[Signal]:
    lanes, ways = vector_map.lanes, vector_map.lane_connectors
    x, y, heading = lanes.baseline_of(lane)[-1]
    unit = np.array([np.cos(heading), np.sin(heading)])
    left = np.array([-unit[1], unit[0]])
    ends = {connector: ways.baseline_of(connector)[-1] for connector in connectors}
    reach = max(float((end[:2] - (x, y)) @ unit) for end in ends.values())
    far = np.array([x, y]) + unit * np.clip(reach + 1.0, *FAR_SIDE_M)
    groups: dict[bool, list[int]] = {}
    for connector in connectors:
        groups.setdefault(states[connector], []).append(connector)
    # Left-turn heads to the left of straight ones, where one lane has both states.
    turn = {state: np.mean([wrap_angle(ends[c][2] - heading) for c in group]) for state, group in groups.items()}
    ordered = sorted(groups, key=lambda state: -turn[state])
    width = lane_width(vector_map, lane)
    signals = []
    for rank, is_red in enumerate(ordered):
        shift = (0.5 * (len(ordered) - 1) - rank) * 1.1
        names = tuple(str(ways.fids[c]) for c in groups[is_red])
        place = far + shift * left
        signals.append(Signal(np.array([*place, heading]), OVERHEAD_M, is_red, False, names))
    border = lanes.right_boundary[lane]
    rightmost = border < 0 or border not in lanes.left_boundary
    if rightmost and len(groups) == 1:
        post = np.array([x, y]) - (0.5 * width + 1.0) * left + 0.5 * unit
        names = tuple(str(ways.fids[c]) for c in connectors)
        signals.append(Signal(np.array([*post, heading]), POST_M, states[connectors[0]], True, names))
    return signals


def signal_model(is_red: bool) -> Model:
    """The head in fractions of its box; its back (-x) faces the approaching traffic and carries the lamps."""
    head = Model().prism((-0.4, 0.5), (-0.5, 0.5), (-0.5, 0.5), {"all": "dark"})
    angle = np.arange(12) * np.pi / 6
    radius_y, radius_z = 0.40, 0.40 * HEAD_SIZE_M[1] / HEAD_SIZE_M[2]
    lit = "red" if is_red else "green"
    for rank, lamp in enumerate(LAMPS):
        z = 0.32 - 0.32 * rank
        ring = [(-0.4, -radius_y * np.cos(a), z + radius_z * np.sin(a)) for a in angle]
        head.patch(ring[::-1] if _faces_forward(ring) else ring, f"lamp_{lamp}" if lamp == lit else "lamp_off")
    return head


def _faces_forward(ring: Sequence[tuple[float, float, float]]) -> bool:
    a, b, c = (np.array(ring[k]) for k in (0, 1, 2))
    return float(np.cross(b - a, c - b)[0]) > 0.0
