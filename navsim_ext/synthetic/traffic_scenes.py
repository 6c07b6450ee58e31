"""The synthetic world as a source of traffic scenes: its drives at 10 Hz, with the law that made them.

Scene i follows from (seed, i) alone, like log i of ``synthetic.build``: same towns, same split into training towns and
the unseen one, same mix of situations; its dice are its own. Local frame = the town's frame.

``TrafficScene.law`` holds everything the law of :mod:`navsim_ext.synthetic.traffic` reads, so that the same drive can
be run again, or go on from any state, without this package. N road users in the order of the scene, X junctions of a
path, C connectors and K conflicts of the town, J nodes:

    path_pose [Q,3], path_speed [Q], path_start [N+1]   what everybody follows, every 0.5 m of the rear axle's way
    crossings [N,X,2], crossing_connector [N,X]         junctions on it: m along the path (1e9: none), connector (-1)
    connector_node, connector_phase [C]                 of the town; phase -1: no signal
    connector_piece [C]                                 row in the scene's map, -1: out of reach
    signal_offset, signal_green [J]                     s; phases of the signals
    conflict_start [C+1], conflict_other [K], conflict_zone [K,4], conflict_gives_way [K]   right of way
    user_<field> [N,...]                                the fields of ``traffic.Population``
    clock [2]                                           s of the law at step 0 and at the present step
    state_s, state_speed, state_acceleration [2,N]      at these two steps: m along the path, m/s, m/s^2
    state_waiting [2,N] bool                            held at its stop line in the step before
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.maps.nuplan_gpkg import read_gpkg
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.rendering.camera import camera_rig
from navsim_ext.scene import COMMANDS
from navsim_ext.synthetic.cast import EGO_AXLE_TO_CENTRE
from navsim_ext.synthetic.drive import NoDrive, Run, run
from navsim_ext.synthetic.fids import Fids
from navsim_ext.synthetic.gpkg_writer import map_path, write_maps
from navsim_ext.synthetic.log_writer import command_at, route_blocks
from navsim_ext.synthetic.paths import SPACING
from navsim_ext.synthetic.recipe import PARTS, WARM_UP_S, Recipe
from navsim_ext.synthetic.scenarios import Plan
from navsim_ext.synthetic.town import Town, make_town
from navsim_ext.synthetic.traffic import STEP_S, is_green, pack, pack_crossings
from navsim_ext.traffic.codes import AgentKind, LightState, Role
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.source import Reading
from navsim_ext.traffic.vector_pieces import connector_rows, route_rows, vector_pieces

VERSION = 2  # raised whenever the same settings give other scenes
MAPS_FOLDER = "maps"
PREDICTED = 8  # moving road users nearest to the ego that are to be predicted, as many as in WOMD
PREDICTED_WITHIN_M = 75.0
MOVED_M = 2.0
KIND_OF_NAME = {"vehicle": AgentKind.VEHICLE, "pedestrian": AgentKind.PEDESTRIAN, "bicycle": AgentKind.CYCLIST}


@dataclass(frozen=True)
class SyntheticTraffic:
    """``scenes`` drives of ``history_s`` before and ``horizon_s`` after the present step.

    ``part`` is train, val, test (the unseen town) or all; ``maps_root`` holds the towns' maps (the build command writes
    them into its output folder). ``reach_m`` limits the map to what lies around the ego's way: by default it is the
    whole town, because others drive far.
    """

    scenes: int
    maps_root: str
    seed: int = 0
    part: str = "all"
    history_s: float = 1.5
    horizon_s: float = 15.0
    reach_m: float = 600.0
    image_size: tuple[int, int] = (960, 540)
    val_share: float = 0.1
    test_share: float = 0.2
    test_location: str = "us-pa-pittsburgh-hazelwood"
    mix: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part not in (*PARTS, "all"):
            raise DataError(f"part is {self.part!r}; one of {(*PARTS, 'all')} was expected")
        for name, least in (("history_s", STEP_S), ("horizon_s", STEP_S), ("reach_m", 20.0)):
            if not getattr(self, name) >= least - 1e-9:
                raise DataError(f"{name} is {getattr(self, name)!r}; at least {least} was expected")
        self.recipe()

    def recipe(self) -> Recipe:
        """The recipe that splits, places and kinds follow from."""
        return Recipe(
            scenes=max(self.scenes, 1), seed=self.seed, scenes_per_log=1, cameras=(),
            image_size=tuple(self.image_size), camera_frames="now", jpeg_quality=90, val_share=self.val_share,
            test_share=self.test_share, test_location=self.test_location, mix=dict(self.mix), qa=False, template=None,
        ).validate()  # fmt: skip

    def identity(self) -> dict[str, Any]:
        settings = asdict(self)
        del settings["maps_root"]
        return {"source": "synthetic", "version": VERSION, **settings, "image_size": list(self.image_size)}

    def units(self) -> list[str]:
        """The first ``scenes`` indices whose split is ``part``."""
        if self.scenes < 1:
            raise DataError(f"scenes is {self.scenes}; at least 1 was expected")
        recipe, units, index = self.recipe(), [], 0
        if self.part != "all" and {"train": 1.0, "val": self.val_share, "test": self.test_share}[self.part] <= 0.0:
            raise DataError(f"part={self.part} has the share 0")
        while len(units) < self.scenes:
            if self.part in ("all", recipe.part_of(index)):
                units.append(f"{index:08d}")
            index += 1
        return units

    def prepare(self, output_dir: Path) -> None:
        """Writes the towns' maps, which cameras are rendered from."""
        del output_dir
        write_maps(Path(self.maps_root), self.seed)

    def read(self, unit: str) -> Iterator[Reading]:
        try:
            yield unit, self.scene(int(unit))
        except TriviumError as error:
            yield unit, error

    def scene(self, index: int) -> TrafficScene:
        """Scene ``index``; raises NoDrive when its town offers none of the situations of the mix."""
        return scene_of(self, index, self.run(index))

    def run(self, index: int) -> Run:
        """The simulated drive behind a scene."""
        recipe = self.recipe()
        town = make_town(recipe.location_of(index), self.seed)
        problems = []
        for kind in recipe.kinds_of(index):
            plan = Plan(town, kind, WARM_UP_S, self.history_s + self.horizon_s, WARM_UP_S + self.history_s)
            try:
                return run(plan, "traffic", self.seed, index, kind)
            except NoDrive as problem:
                problems.append(str(problem))
        raise NoDrive("; ".join(problems))


def scene_of(source: SyntheticTraffic, index: int, drive: Run) -> TrafficScene:
    """A simulated drive as a traffic scene."""
    plan, cast, first = drive.plan, drive.cast, drive.first
    town = plan.town
    pose = drive.motion.pose[first:].transpose(1, 0, 2)  # [N,T,3]
    speed, acceleration = drive.motion.speed[first:], drive.motion.acceleration[first:]
    now = round(source.history_s / STEP_S)
    ego = pose[0]
    axle = ego[:, :2] - EGO_AXLE_TO_CENTRE * np.column_stack([np.cos(ego[:, 2]), np.sin(ego[:, 2])])
    origin = np.append(town.origin, 0.0)
    vector_map = _town_map(source.maps_root, town.location, source.seed)
    pieces, rows = vector_pieces(vector_map, axle + town.origin, source.reach_m, origin)
    fids = Fids(town)
    ways = connector_rows(vector_map, rows)
    connector_piece = np.array([ways.get(str(fids.connector(c.index)), -1) for c in town.connectors], np.int64)
    signalled = [c for c in town.connectors if c.phase >= 0 and connector_piece[c.index] >= 0]
    path = cast.paths[0]
    s = drive.motion.s[first:, 0]
    curvature = path.curvature[np.clip((s / SPACING).astype(int), 0, len(path.curvature) - 1)]
    nothing = np.zeros_like(s)
    dynamics = np.column_stack([speed[:, 0], nothing, acceleration[:, 0], speed[:, 0] ** 2 * curvature])
    size = np.array([row["size"] for row in cast.rows], np.float32)
    kind = np.array([KIND_OF_NAME.get(name, AgentKind.OTHER) for name in cast.names], np.uint8)
    return TrafficScene.make(
        id=f"synthetic-{source.seed}-{index:06d}-{source.recipe().part_of(index)}-{plan.kind}",
        source="synthetic",
        licence="ours",
        dt=STEP_S,
        now=now,
        origin=origin,
        xy=pose[..., :2],
        heading=pose[..., 2],
        valid=np.ones(pose.shape[:2], np.bool_),
        z=np.broadcast_to(0.5 * size[:, 2:], pose.shape[:2]),
        size=size,
        kind=kind,
        role=_roles(pose, now),
        agent_id=np.arange(len(pose), dtype=np.int64),
        agent_names=tuple(cast.names),
        **pieces.arrays(),
        has_lights=True,
        light_piece=connector_piece[[c.index for c in signalled]].astype(np.int32),
        light_stop=np.array([c.baseline[0] for c in signalled], np.float64).reshape(-1, 2),
        light_state=_lights(signalled, drive, len(s)),
        route=route_rows(vector_map, rows, route_blocks(town, fids, path, float(s[0])), len(pieces.kinds))[0],
        goal=np.array([[np.nan] * 2 if way is None else way.xy[-1] for way in cast.paths], np.float32),
        command=np.array([COMMANDS.index(command_at(town, path, float(at))) for at in s], np.uint8),
        ego_dynamics=dynamics.astype(np.float32),
        rear_axle=EGO_AXLE_TO_CENTRE,
        map_location=town.location,
        cameras=camera_rig(tuple(source.image_size)),
        law=law_tables(drive, now, connector_piece),
        recipe={"town": town.location, "seed": source.seed, "index": index, "kind": plan.kind,
                "part": source.recipe().part_of(index), "attempts": drive.attempts},
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def _town_map(maps_root: str, location: str, seed: int) -> VectorMap:
    path = map_path(Path(maps_root), location)
    if not path.is_file():
        write_maps(Path(maps_root), seed)
    return read_gpkg(path, location)


def _roles(pose: NDArray[np.float64], now: int) -> NDArray[np.uint8]:
    """Ego first; to predict are the nearest that move after now; static are those that never do."""
    travelled = np.hypot(*np.diff(pose[..., :2], axis=1).transpose(2, 0, 1))
    role = np.where(travelled.sum(axis=1) == 0.0, Role.STATIC, 0).astype(np.uint8)
    distance = np.hypot(*(pose[:, now, :2] - pose[0, now, :2]).T)
    moves = (travelled[:, now:].sum(axis=1) > MOVED_M) & (distance < PREDICTED_WITHIN_M)
    moves[0] = False
    chosen = np.flatnonzero(moves)[np.argsort(distance[moves], kind="stable")][:PREDICTED]
    role[chosen] |= np.uint8(Role.PREDICT)
    role[0] = Role.EGO
    return role


def _lights(signalled: list, drive: Run, steps: int) -> NDArray[np.uint8]:
    signals = drive.cast.signals
    states = np.full((len(signalled), steps), LightState.STOP, np.uint8)
    for row, c in enumerate(signalled):
        for step in range(steps):
            if is_green((drive.first + step) * STEP_S, c.node, c.phase, signals.offset, signals.green):
                states[row, step] = LightState.GO
    return states


def law_tables(drive: Run, now: int, connector_piece: NDArray[np.int64]) -> dict[str, NDArray]:
    """What the law reads, and its state at the first step of a run and ``now`` steps later."""
    town: Town = drive.plan.town
    cast, motion = drive.cast, drive.motion
    users = cast.pack()
    poses, speeds, start = pack(cast.paths)
    crossings, connectors = pack_crossings(cast.paths)
    at = [drive.first, drive.first + now]
    return {
        "path_pose": poses,
        "path_speed": speeds,
        "path_start": start,
        "crossings": crossings,
        "crossing_connector": connectors,
        "connector_node": np.array([c.node for c in town.connectors], np.int64),
        "connector_phase": np.array([c.phase for c in town.connectors], np.int64),
        "connector_piece": connector_piece,
        "signal_offset": cast.signals.offset,
        "signal_green": cast.signals.green,
        "conflict_start": town.conflicts.pointer,
        "conflict_other": town.conflicts.other,
        "conflict_zone": town.conflicts.zone,
        "conflict_gives_way": town.conflicts.gives_way,
        **{f"user_{one.name}": getattr(users, one.name) for one in fields(users)},
        "clock": np.array(at) * STEP_S,
        "state_s": motion.s[at],
        "state_speed": motion.speed[at],
        "state_acceleration": motion.acceleration[at],
        "state_waiting": motion.waiting[at],
    }
