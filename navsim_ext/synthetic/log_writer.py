"""A drive as an OpenScene log: the list of frame dictionaries that NAVSIM reads, with all keys it carries.

Frames: annotations are in the ego frame of their own frame (rear axle on the ground, x forward, y left, z up);
poses are UTM metres. The lidar frame equals the ego frame.
"""

from __future__ import annotations

import datetime
import hashlib
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.frames import POSE_INTERVAL_S, rotate, wrap_angle
from navsim_ext.rendering.renderer import camera_rig
from navsim_ext.scene import COMMANDS, Annotations
from navsim_ext.synthetic.drive import Drive
from navsim_ext.synthetic.fids import Fids
from navsim_ext.synthetic.paths import Path
from navsim_ext.synthetic.town import Town

PICKLE_PROTOCOL = 4
COMMAND_REACH_M = 28.0  # a turn that begins within this distance, or is being driven, is the command
SIGNAL_REACH_M = 150.0  # signals farther away than this are not reported
_EPOCH = datetime.datetime(2021, 6, 1, tzinfo=datetime.UTC)
_UNMOVING = ("traffic_cone", "barrier", "czone_sign", "generic_object")


def token(*key: int | str) -> str:
    """16 hexadecimal characters, as NAVSIM's tokens."""
    return hashlib.sha256("|".join(str(part) for part in key).encode()).hexdigest()[:16]


def log_name(seed: int, index: int) -> str:
    """Name in nuPlan's style; unique for each index of a seed."""
    began = _EPOCH + datetime.timedelta(minutes=7 * index)
    span = 1000 + 10 * (index % 500)
    return f"{began:%Y.%m.%d.%H.%M.%S}_veh-{35 + seed % 50:02d}_{span:05d}_{span + 200:05d}"


def frames_of(drive: Drive, name: str, image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """The log as frame dictionaries. ``cams`` matrices belong to pictures of ``image_size`` (width, height)."""
    town, fids = drive.plan.town, Fids(drive.plan.town)
    path = drive.cast.paths[0]
    route = route_blocks(town, fids, path, float(drive.ego_s[0]))
    tracks = [token(name, "track", int(member)) for member in drive.members]
    instances = [token(name, "instance", int(member)) for member in drive.members]
    tokens = [token(name, "frame", k) for k in range(len(drive.ego))]
    began_us = int((_EPOCH.timestamp() + 420.0 * _number(name)) * 1e6)
    rig = camera_rig(image_size)
    frames = []
    for k, frame_token in enumerate(tokens):
        pose, dynamics = drive.ego[k], drive.ego_dynamics[k]
        objects = annotations(drive, k, tracks)
        position = np.array([*(pose[:2] + town.origin), 0.0])
        half = 0.5 * pose[2]
        quaternion = np.array([np.cos(half), 0.0, 0.0, np.sin(half)])
        ego2global = np.eye(4)
        ego2global[:2, :2] = rotate(np.eye(2), pose[2]).T
        ego2global[:3, 3] = position
        acceleration = np.array([dynamics[2], dynamics[3], 9.81])
        can_bus = np.concatenate(
            [
                position,
                quaternion,
                acceleration,
                np.zeros(3),
                [dynamics[0], dynamics[1], 0.0],
                [0.0],
                [np.rad2deg(pose[2])],
            ]
        )
        frames.append(
            {
                "token": frame_token,
                "frame_idx": k,
                "timestamp": began_us + int(round(k * POSE_INTERVAL_S * 1e6)),
                "log_name": name,
                "log_token": token(name, "log"),
                "scene_name": f"{name}-{drive.plan.kind}",
                "scene_token": token(name, "scene"),
                "map_location": town.location,
                "roadblock_ids": list(route),
                "vehicle_name": name.split("_")[1],
                "can_bus": can_bus,
                "lidar_path": f"{name}/MergedPointCloud/{token(name, 'lidar', k)}.pcd",
                "lidar2ego_translation": np.zeros(3),
                "lidar2ego_rotation": np.array([1.0, 0.0, 0.0, 0.0]),
                "ego2global_translation": position,
                "ego2global_rotation": quaternion,
                "ego_dynamic_state": [float(value) for value in dynamics],
                "traffic_lights": _traffic_lights(drive, fids, k),
                "driving_command": command(drive, k),
                "cams": {
                    view: {
                        "data_path": f"{name}/{view}/{token(name, view, k)}.jpg",
                        "sensor2lidar_rotation": camera.sensor2lidar_rotation,
                        "sensor2lidar_translation": camera.sensor2lidar_translation,
                        "cam_intrinsic": camera.intrinsics,
                        "distortion": camera.distortion,
                    }
                    for view, camera in rig.items()
                },
                "sample_prev": tokens[k - 1] if k else None,
                "sample_next": tokens[k + 1] if k + 1 < len(tokens) else None,
                "ego2global": ego2global,
                "lidar2ego": np.eye(4),
                "lidar2global": ego2global.copy(),
                "anns": {
                    "gt_boxes": objects.boxes.astype(np.float32),
                    "gt_names": np.array(objects.names, dtype="<U14"),
                    "gt_velocity_3d": objects.velocities.astype(np.float32),
                    "instance_tokens": list(instances),
                    "track_tokens": list(tracks),
                },
                "occ_gt_final_path": None,
                "flow_gt_final_path": None,
            }
        )
    return frames


def encode(frames: list[dict[str, Any]]) -> bytes:
    """The log's pickle; equal frames give equal bytes."""
    return pickle.dumps(frames, protocol=PICKLE_PROTOCOL)


def _number(name: str) -> float:
    """Minutes since the epoch of a log's name, in units of its 7-minute slots."""
    began = datetime.datetime.strptime(name.split("_")[0], "%Y.%m.%d.%H.%M.%S").replace(tzinfo=datetime.UTC)
    return (began - _EPOCH).total_seconds() / 420.0


def annotations(drive: Drive, frame: int, tracks: list[str]) -> Annotations:
    """Objects of a frame in the ego frame; only vehicles, pedestrians and bicycles have a velocity."""
    pose = drive.ego[frame]
    objects = drive.objects[frame]
    sizes = np.array([drive.cast.rows[member]["size"] for member in drive.members]).reshape(-1, 3)
    names = tuple(drive.cast.names[member] for member in drive.members)
    local = rotate(objects[:, :2] - pose[:2], -pose[2])
    yaw = wrap_angle(objects[:, 2] - pose[2])
    speed = np.where([name in _UNMOVING for name in names], 0.0, drive.speeds[frame])
    velocity = np.column_stack([speed * np.cos(yaw), speed * np.sin(yaw), np.zeros(len(yaw))])
    boxes = np.column_stack([local, 0.5 * sizes[:, 2], sizes, yaw])
    return Annotations(boxes, velocity, names, tuple(tracks))


def route_blocks(town: Town, fids: Fids, path: Path, s: float) -> list[str]:
    """Roadblocks and roadblock connectors of the ego's way in driving order, from where it is to its path's end."""
    steps = [(start, str(fids.group(town.lanes[lane].group))) for lane, start in path.lanes]
    steps += [(crossing.start, str(fids.group_connector(crossing.connector))) for crossing in path.crossings]
    steps.sort(key=lambda step: step[0])
    begin = max(k for k, (start, _) in enumerate(steps) if start <= s or k == 0)
    blocks = [block for _, block in steps[begin:]]
    return [block for k, block in enumerate(blocks) if k == 0 or block != blocks[k - 1]]


def command(drive: Drive, frame: int) -> NDArray[np.int64]:
    """[4] one-hot of COMMANDS: :func:`command_at` where the ego is."""
    said = command_at(drive.plan.town, drive.cast.paths[0], float(drive.ego_s[frame]))
    return (np.array(COMMANDS) == said).astype(np.int64)


def command_at(town: Town, path: Path, s: float) -> str:
    """One of COMMANDS: a turn being driven or within COMMAND_REACH_M, a lane change, else straight."""
    said = "straight"
    for crossing in path.crossings:
        if crossing.end > s + 1.0 and crossing.start < s + COMMAND_REACH_M:
            said = town.connectors[crossing.connector].turn
            break
    if said == "straight":
        for (before, _), (after, start) in zip(path.lanes, path.lanes[1:]):
            before_lane, after_lane = town.lanes[before], town.lanes[after]
            if before_lane.group == after_lane.group and start - COMMAND_REACH_M < s < start + 10.0:
                said = "left" if after_lane.lane_index < before_lane.lane_index else "right"
    return said


def _traffic_lights(drive: Drive, fids: Fids, frame: int) -> list[tuple[int, bool]]:
    town, here = drive.plan.town, drive.ego[frame, :2]
    near = {node.index for node in town.nodes if np.hypot(*(node.position - here)) < SIGNAL_REACH_M}
    return [
        (fids.connector(c.index), not bool(drive.green[frame, c.index]))
        for c in town.connectors
        if c.phase >= 0 and c.node in near
    ]
