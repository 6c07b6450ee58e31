"""TrafficScene -> ``Scenario`` message -> TFRecord: for tests, and for handing a small sample on in WOMD's own format.

    python -m navsim_ext.traffic.womd_writer scenes=STORE output=FILE.tfrecord [count=N]

What the format has no place for (route, goals, cameras, the law) is left out; velocities are those that follow from
the positions. Mind the licence of the scenes: it does not change with their format.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from itertools import islice

import numpy as np
from google.protobuf.message import Message
from omegaconf import DictConfig

from navsim_ext.errors import DataError
from navsim_ext.runtime.config import job
from navsim_ext.traffic.codes import LINES, AgentKind, EdgeKind, LightState, PieceKind, Role
from navsim_ext.traffic.messages import fill
from navsim_ext.traffic.road_edges import CLOSED_GAP_M
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore
from navsim_ext.traffic.tfrecord import write_records
from navsim_ext.traffic.womd import MPS_PER_MPH
from navsim_ext.traffic.womd_messages import FULL

logger = logging.getLogger(__name__)

TYPE_OF_KIND = {AgentKind.VEHICLE: 1, AgentKind.PEDESTRIAN: 2, AgentKind.CYCLIST: 3, AgentKind.OTHER: 4}
LINE_OF_KIND = {PieceKind.LINE_BROKEN: 1, PieceKind.LINE_SOLID: 2, PieceKind.LINE_DOUBLE: 3, PieceKind.UNKNOWN: 0}
FIELD_OF_AREA = {PieceKind.CROSSWALK: "crosswalk", PieceKind.SPEED_BUMP: "speed_bump", PieceKind.DRIVEWAY: "driveway"}


def write_womd(path: str | os.PathLike[str], scenes: Iterable[TrafficScene]) -> int:
    """Writes scenes as one TFRecord file, atomically; returns how many."""
    return write_records(path, (scenario_of(scene).SerializeToString(deterministic=True) for scene in scenes))


def scenario_of(scene: TrafficScene) -> Message:
    """The message of a scene; raises DataError for map pieces that WOMD has no message for."""
    message = fill(FULL["Scenario"](), scenario_id=scene.id, current_time_index=scene.now, sdc_track_index=scene.ego)
    message.timestamps_seconds.extend((np.arange(scene.num_steps) * scene.dt).tolist())
    _tracks(message, scene)
    _map(message, scene)
    _lights(message, scene)
    return message


def _tracks(message: Message, scene: TrafficScene) -> None:
    xy = scene.pose[..., :2].astype(np.float64) + scene.origin[:2]
    z = (np.zeros(scene.valid.shape) if scene.z is None else scene.z.astype(np.float64)) + scene.origin[2]
    heading, velocity = scene.heading_as_recorded, scene.velocity()
    for n in range(scene.num_agents):
        track = fill(
            message.tracks.add(), id=int(scene.agent_id[n]), object_type=TYPE_OF_KIND[AgentKind(scene.kind[n])]
        )
        length, width, height = scene.size[n].tolist()
        for t in range(scene.num_steps):
            state = track.states.add(valid=bool(scene.valid[n, t]))
            if scene.valid[n, t]:
                fill(state, center_x=xy[n, t, 0], center_y=xy[n, t, 1], center_z=z[n, t], length=length, width=width,
                     height=height, heading=heading[n, t], velocity_x=velocity[n, t, 0],
                     velocity_y=velocity[n, t, 1])  # fmt: skip
        if scene.role[n] & Role.PREDICT:
            message.tracks_to_predict.add(track_index=n)
        if scene.role[n] & Role.INTEREST:
            message.objects_of_interest.append(int(scene.agent_id[n]))


def _map(message: Message, scene: TrafficScene) -> None:
    z = np.zeros(len(scene.points)) if scene.point_z is None else scene.point_z
    xyz = np.column_stack([scene.points, z]).astype(np.float64) + scene.origin
    out: dict[tuple[int, int], list[int]] = {}
    for (i, j), kind in zip(scene.edges.tolist(), scene.edge_kind.tolist()):
        out.setdefault((i, kind), []).append(int(scene.piece_id[j]))
    for m in range(len(scene.piece_kind)):
        feature = fill(message.map_features.add(), id=int(scene.piece_id[m]))
        kind, subtype = PieceKind(scene.piece_kind[m]), int(scene.piece_subtype[m])
        points = xyz[scene.piece_start[m] : scene.piece_start[m + 1]].tolist()
        if kind in (PieceKind.LANE, PieceKind.BIKE_LANE):
            line = fill(feature.lane, type=subtype)
            if np.isfinite(scene.speed_limit[m]):
                line.speed_limit_mph = float(scene.speed_limit[m]) / MPS_PER_MPH
            line.entry_lanes.extend(out.get((m, EdgeKind.PREDECESSOR), ()))
            line.exit_lanes.extend(out.get((m, EdgeKind.SUCCESSOR), ()))
            for field, edge in ((line.left_neighbors, EdgeKind.LEFT), (line.right_neighbors, EdgeKind.RIGHT)):
                for other in out.get((m, edge), ()):
                    field.add(feature_id=other)
            polyline = line.polyline
        elif kind in (*LINES, PieceKind.UNKNOWN):
            polyline = fill(feature.road_line, type=subtype or LINE_OF_KIND[kind]).polyline
        elif kind == PieceKind.ROAD_EDGE:
            polyline = fill(feature.road_edge, type=subtype).polyline
            open_m = float(np.hypot(points[0][0] - points[-1][0], points[0][1] - points[-1][1]))
            points = points + points[:1] if scene.piece_closed[m] and open_m > CLOSED_GAP_M else points
        elif kind == PieceKind.STOP_SIGN:
            feature.stop_sign.lane.extend(out.get((m, EdgeKind.STOPS), ()))
            fill(feature.stop_sign.position, x=points[0][0], y=points[0][1], z=points[0][2])
            continue
        elif kind in FIELD_OF_AREA:
            polyline = getattr(feature, FIELD_OF_AREA[kind]).polygon
        else:
            raise DataError(f"scene {scene.id}: WOMD has no message for a map piece of kind {kind.name.lower()}")
        for x, y, height in points:
            polyline.add(x=x, y=y, z=height)


def _lights(message: Message, scene: TrafficScene) -> None:
    if not scene.has_lights:
        return
    stop = scene.light_stop + scene.origin[:2]
    lane = [int(scene.piece_id[row]) if row >= 0 else -1 - k for k, row in enumerate(scene.light_piece.tolist())]
    for t in range(scene.num_steps):
        state = message.dynamic_map_states.add()
        for k in np.flatnonzero(scene.light_state[:, t] != LightState.NOT_REPORTED).tolist():
            one = state.lane_states.add(lane=lane[k], state=int(scene.light_state[k, t]))
            fill(one.stop_point, x=stop[k, 0], y=stop[k, 1], z=scene.origin[2])


@job("womd_writer")
def main(cfg: DictConfig) -> None:
    store = TrafficStore(cfg.scenes)
    count = write_womd(cfg.output, islice(store, cfg.count))
    logger.info("%s: %d scenes of %s", cfg.output, count, cfg.scenes)


if __name__ == "__main__":
    main()
