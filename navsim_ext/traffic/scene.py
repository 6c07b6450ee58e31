"""TrafficScene: all road users of a scene over time, its map and its lights, as plain arrays.

Legend: N road users, T steps of ``dt`` seconds, M map pieces, P points of all pieces together, E lane edges, K lights.
Frame: local, metres, axes parallel to the source's world frame: world = local + ``origin``. Headings are
counter-clockwise from +x, radians. Arrays are never written to after construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.scene import Camera
from navsim_ext.traffic.checks import check
from navsim_ext.traffic.codes import EdgeKind, PieceKind, Role
from navsim_ext.traffic.motion import speed_known, speeds, unwrap_headings, velocities


@dataclass(frozen=True, eq=False)
class TrafficScene:
    """One scene. Make it with :meth:`make`, which derives what follows from the rest and checks everything."""

    id: str  # unique in its source
    source: str  # where it comes from: womd, gpudrive, scenarionet, navsim, synthetic, or what an npz says
    licence: str  # under which terms the source gives it
    dt: float  # s between two steps
    now: int  # index of the present step: steps 0 ... now are history, now + 1 ... T - 1 are future
    origin: NDArray[np.float64]  # [3] world position of the local (0, 0, 0); m

    # road users
    pose: NDArray[np.float32]  # [N,T,3] box centre x, y, heading (unwrapped per track); 0 where not valid
    speed: NDArray[np.float32]  # [N,T] m/s, from positions alone; 0 where ``speed_known`` is False
    valid: NDArray[np.bool_]  # [N,T] observed at that step; nothing is interpolated
    size: NDArray[np.float32]  # [N,3] length, width, height; m, > 0
    kind: NDArray[np.uint8]  # [N] AgentKind
    role: NDArray[np.uint8]  # [N] bits of Role; exactly one road user is the ego
    agent_id: NDArray[np.int64]  # [N] unique

    # map: piece m has the points piece_start[m] : piece_start[m + 1]
    points: NDArray[np.float32]  # [P,2] m
    piece_start: NDArray[np.int32]  # [M+1]
    piece_kind: NDArray[np.uint8]  # [M] PieceKind
    piece_subtype: NDArray[np.uint8]  # [M] LaneType, EdgeType or LineType of lanes, road edges, lines; else 0
    piece_closed: NDArray[np.bool_]  # [M] the last point is joined to the first (it may be repeated at the end)
    piece_id: NDArray[np.int64]  # [M] unique
    speed_limit: NDArray[np.float32]  # [M] m/s of lanes; NaN: not known
    edges: NDArray[np.int32]  # [E,2] lane graph: rows of pieces (i, j)
    edge_kind: NDArray[np.uint8]  # [E] EdgeKind: what j is, seen from i

    # lights
    has_lights: bool  # False: the source does not tell lights at all, so K = 0 says nothing
    light_piece: NDArray[np.int32]  # [K] row of the controlled lane; -1: a lane that is not in the map
    light_stop: NDArray[np.float64]  # [K,2] stop point; m, local
    light_state: NDArray[np.uint8]  # [K,T] LightState

    # optional: None, empty or NaN where the source does not tell
    z: NDArray[np.float32] | None = None  # [N,T] height of the box centre over ``origin``; m, 0 where not valid
    point_z: NDArray[np.float32] | None = None  # [P] m
    source_heading: NDArray[np.float32] | None = None  # [N,T] as the source gave it; None: equal to pose[..., 2]
    route: NDArray[np.bool_] | None = None  # [M] the piece is on the ego's route
    goal: NDArray[np.float32] | None = None  # [N,2] m; NaN: no goal known
    command: NDArray[np.uint8] | None = None  # [T] index into navsim_ext.scene.COMMANDS, of the ego
    ego_dynamics: NDArray[np.float32] | None = None  # [T,4] vx, vy, ax, ay of the ego in its own frame
    rear_axle: float = float("nan")  # m from the ego's rear axle forward to its box centre
    map_location: str = ""  # name of the map, e.g. of NAVSIM's four cities
    agent_tokens: tuple[str, ...] = ()  # N names of the road users, where the source names instead of numbers
    agent_names: tuple[str, ...] = ()  # N class names of the source, where it tells more than ``kind`` (traffic_cone)
    piece_tokens: tuple[str, ...] = ()  # M names of the map pieces, likewise
    frame_tokens: tuple[str, ...] = ()  # T NAVSIM tokens of the steps
    cameras: Mapping[str, Camera] = field(default_factory=dict)  # rig, by camera name; path of the picture at ``now``
    images: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # T relative paths, by camera name
    law: Mapping[str, NDArray] = field(default_factory=dict)  # state of the law that made the scene, if one did
    recipe: Mapping[str, Any] = field(default_factory=dict)  # JSON from which the source makes the same scene again
    notes: Mapping[str, int] = field(default_factory=dict)  # what the reader dropped or mended: reason -> count

    @classmethod
    def make(cls, *, heading: NDArray, xy: NDArray, valid: NDArray[np.bool_], dt: float, **values: Any) -> TrafficScene:
        """A validated scene from centre positions [N,T,2] and headings [N,T] as recorded.

        Unwraps the headings, derives the speeds, zeroes what is not valid. All other fields by their names; the
        optional ones may be left out. Raises DataError at the first broken promise.
        """
        valid = np.asarray(valid, np.bool_)
        with np.errstate(over="ignore"):  # what does not fit into float32 becomes infinite, and is named by validate
            xy = np.where(valid[..., None], xy, 0.0).astype(np.float32)
            heading = np.where(valid, heading, 0.0).astype(np.float32)
            if values.get("z") is not None:
                values["z"] = np.where(valid, values["z"], 0.0).astype(np.float32)
            speed = speeds(xy, valid, dt)
        unwrapped = unwrap_headings(heading, valid)
        return cls(
            pose=np.concatenate([xy, unwrapped[..., None]], axis=-1),
            speed=speed,
            valid=valid,
            dt=float(dt),
            source_heading=None if np.array_equal(heading, unwrapped) else heading,
            **values,
        ).validate()

    @property
    def num_agents(self) -> int:
        return self.pose.shape[0]

    @property
    def num_steps(self) -> int:
        return self.pose.shape[1]

    @property
    def ego(self) -> int:
        """Row of the ego."""
        return int(np.flatnonzero(self.role & Role.EGO)[0])

    @property
    def heading_as_recorded(self) -> NDArray[np.float32]:
        """[N,T] headings of the source, before they were unwrapped."""
        return self.pose[..., 2] if self.source_heading is None else self.source_heading

    @property
    def speed_known(self) -> NDArray[np.bool_]:
        """[N,T] whether positions tell a speed: the step and a neighbour of it were observed."""
        return speed_known(self.valid)

    def velocity(self) -> NDArray[np.float32]:
        """[N,T,2] m/s, from positions; its length is ``speed``."""
        return velocities(self.pose[..., :2], self.valid, self.dt)

    def piece(self, row: int) -> NDArray[np.float32]:
        """[n,2] points of a map piece."""
        return self.points[self.piece_start[row] : self.piece_start[row + 1]]

    def pieces(self, *kinds: PieceKind) -> NDArray[np.int64]:
        """Rows of the map pieces of these kinds, in file order."""
        return np.flatnonzero(np.isin(self.piece_kind, [int(kind) for kind in kinds]))

    def successors(self, row: int) -> NDArray[np.int32]:
        """Rows of the lanes that a lane leads into."""
        return self.edges[(self.edges[:, 0] == row) & (self.edge_kind == EdgeKind.SUCCESSOR), 1]

    def equals(self, other: TrafficScene) -> list[str]:
        """Names of the fields that differ in content, shape or dtype; an empty list means equal."""
        return [name for name in FIELDS if not _same(getattr(self, name), getattr(other, name))]

    def validate(self) -> TrafficScene:
        """Returns self; raises DataError naming scene, field and both values at the first broken promise."""
        check(self)
        return self


FIELDS = tuple(one.name for one in fields(TrafficScene))


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, np.ndarray) and isinstance(theirs, np.ndarray):
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and _same_values(mine, theirs)
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        return mine.keys() == theirs.keys() and all(_same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, Camera) and isinstance(theirs, Camera):
        return _same(vars(mine), vars(theirs))
    if isinstance(mine, float) and isinstance(theirs, float):
        return mine == theirs or (mine != mine and theirs != theirs)
    return type(mine) is type(theirs) and bool(mine == theirs)


def _same_values(mine: NDArray, theirs: NDArray) -> bool:
    return np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f")
