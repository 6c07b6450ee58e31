"""ScenarioNet tracks (10 or 20 Hz) -> frames at 2 Hz, as an OpenScene log would hold them.

What "position" of the ego track means depends on the converter: nuScenes gives the rear axle (checked: no lateral slip
there), the others the middle of the box. NAVSIM's longer car is then put so that the middles agree.
Velocities are central differences over +-0.5 s (one-sided at the ends of a track), accelerations of the ego car the
same difference of its velocity: (x[k+2] - 2 x[k] + x[k-2]) / (1 s)^2. Stored velocities are not used: converters fill
them in different frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.frames import POSE_INTERVAL_S, rotate, wrap_angle
from navsim_ext.scene import COMMANDS, Annotations

REAR_AXLE_TO_CENTRE_M = 1.461  # of NAVSIM's car
OBJECT_RANGE_M = 100.0
COMMAND_AHEAD_M = 20.0
COMMAND_LATERAL_M = 2.0
REAR_AXLE_DATASETS = frozenset({"nuscenes"})
DROPPED_S = {"nuscenes": 0.8}  # ScenarioNet's last keyframe interval is distorted
NEVER_MOVES_M = 1.0
OBJECT_NAMES = {
    "VEHICLE": "vehicle",
    "PEDESTRIAN": "pedestrian",
    "CYCLIST": "bicycle",
    "BICYCLE": "bicycle",
    "MOTORCYCLIST": "bicycle",
    "TRAFFIC_CONE": "traffic_cone",
    "TRAFFIC_BARRIER": "barrier",
}
_STATIC = frozenset({"traffic_cone", "barrier", "generic_object"})
_RED = ("STOP", "RED")
_NOT_RED = ("GO", "GREEN", "CAUTION", "YELLOW", "AMBER")


@dataclass(frozen=True)
class Track:
    """One object at the source's rate: arrays over all samples."""

    name: str  # of OBJECT_TYPES
    xy: NDArray[np.float64]  # [S,2] middle of the box, m
    heading: NDArray[np.float64]  # [S]
    size: NDArray[np.float64]  # [S,3] length, width, height
    valid: NDArray[np.bool_]  # [S]

    def until(self, count: int) -> Track:
        """The first ``count`` samples."""
        arrays = (self.xy, self.heading, self.size, self.valid)
        return Track(self.name, *(array[:count] for array in arrays))


@dataclass(frozen=True)
class RecordedDrive:
    """A scenario sampled at 2 Hz. F frames; global = the scenario's own frame in metres."""

    name: str
    dataset: str
    place: str  # map name that the source states, or ""
    samples: NDArray[np.int64]  # [F] sample of each frame
    ego: NDArray[np.float64]  # [F,3] rear axle x, y, heading
    ego_fine: NDArray[np.float64]  # [S,3] at the source's rate, S samples that are used
    velocity: NDArray[np.float64]  # [F,2] in the ego frame
    acceleration: NDArray[np.float64]  # [F,2] in the ego frame
    tracks: dict[str, Track]
    lights: dict[str, list[Any]]  # state per sample by lane

    @property
    def step(self) -> int:
        """Samples between frames."""
        return int(self.samples[1] - self.samples[0])


def read_drive(scenario: Mapping[str, Any], where: str) -> RecordedDrive:
    """Checks a ScenarioNet dictionary and samples it at 2 Hz; DataError names file, key and what was expected."""
    for key in ("tracks", "map_features", "metadata", "length", "id"):
        if key not in scenario:
            raise DataError(f"{where}: {key} is absent (keys {sorted(map(str, scenario))}): not a ScenarioNet scenario")
    metadata = scenario["metadata"]
    for key in ("tracks", "map_features", "metadata"):
        if not isinstance(scenario[key], Mapping):
            raise DataError(f"{where}: {key} is a {type(scenario[key]).__name__}; a dictionary was expected")
    dataset = str(metadata.get("dataset", "")).lower()
    tracks = {str(name): _track(track, f"{where}, track {name}") for name, track in scenario["tracks"].items()}
    ego_name = str(metadata.get("sdc_id"))
    if ego_name not in tracks:
        raise DataError(f"{where}: metadata.sdc_id is {ego_name!r}, which is not among {len(tracks)} tracks")
    ego = tracks.pop(ego_name)
    for name, other in tracks.items():
        if len(other.xy) != len(ego.xy):
            raise DataError(f"{where}, track {name:.60}: {len(other.xy)} samples, the ego track has {len(ego.xy)}")
    times = np.asarray(metadata.get("ts", ()), dtype=np.float64)
    count = len(ego.xy)
    if len(times) != count or count < 2:
        raise DataError(f"{where}: metadata.ts has {len(times)} times, the ego track {count} samples")
    interval = float(np.median(np.diff(times)))
    step = round(POSE_INTERVAL_S / interval) if interval > 0 else 0
    if step < 1 or abs(step * interval - POSE_INTERVAL_S) > 0.02:
        raise DataError(f"{where}: samples are {interval:.3f} s apart; a divisor of {POSE_INTERVAL_S} s was expected")
    count -= round(DROPPED_S.get(dataset, 0.0) / interval)
    apart = np.flatnonzero(np.abs(np.diff(times[:count]) - interval) > interval / 2)
    if len(apart):
        k = int(apart[0])
        raise DataError(
            f"{where}: metadata.ts has {times[k + 1] - times[k]:.3f} s between samples {k} and {k + 1}, elsewhere "
            f"{interval:.3f} s: samples are missing or not in order"
        )
    if not ego.valid[:count].all():
        missing = int(np.flatnonzero(~ego.valid[:count])[0])
        raise DataError(f"{where}: the ego car is not valid at sample {missing} of {count}")
    samples = np.arange(0, count, step)
    if len(samples) < 3:
        raise DataError(f"{where}: {count} samples give {len(samples)} frames at 2 Hz; 3 or more are needed")
    pose = np.column_stack([ego.xy, ego.heading])[:count]
    if dataset not in REAR_AXLE_DATASETS:
        pose[:, :2] -= REAR_AXLE_TO_CENTRE_M * np.column_stack([np.cos(pose[:, 2]), np.sin(pose[:, 2])])
    frames = pose[samples]
    frames[:, 2] = wrap_angle(frames[:, 2])
    velocity = np.gradient(frames[:, :2], POSE_INTERVAL_S, axis=0)
    acceleration = np.gradient(velocity, POSE_INTERVAL_S, axis=0)
    return RecordedDrive(
        name=str(scenario["id"]),
        dataset=dataset,
        place=str(metadata.get("map", "") or ""),
        samples=samples,
        ego=frames,
        ego_fine=pose,
        velocity=rotate(velocity, -frames[:, 2]),
        acceleration=rotate(acceleration, -frames[:, 2]),
        tracks={name: track.until(count) for name, track in tracks.items()},
        lights={str(light.get("lane", name)): list(light["state"]["object_state"])
                for name, light in scenario.get("dynamic_map_states", {}).items()},
    )  # fmt: skip


def _track(track: Mapping[str, Any], where: str) -> Track:
    state = track.get("state", {}) if isinstance(track, Mapping) else None
    if not isinstance(state, Mapping):
        raise DataError(f"{where}: its state is no dictionary")
    missing = [key for key in ("position", "heading", "valid", "length", "width", "height") if key not in state]
    if missing:
        raise DataError(f"{where}: state.{missing[0]} is absent")
    position = np.asarray(state["position"], dtype=np.float64)
    count = len(position)
    flat = {
        key: np.asarray(state[key], dtype=np.float64).reshape(-1) for key in ("heading", "length", "width", "height")
    }
    valid = np.asarray(state["valid"]).reshape(-1).astype(bool)
    lengths = {"position": count, "valid": len(valid), **{key: len(values) for key, values in flat.items()}}
    if len(set(lengths.values())) != 1 or position.ndim != 2 or position.shape[1] < 2:
        raise DataError(f"{where}: arrays of unequal length {lengths}")
    values = np.column_stack([position[:, :2], *flat.values()])
    bad = np.flatnonzero(valid & ~np.isfinite(values).all(axis=1))
    if len(bad):
        raise DataError(f"{where}: sample {bad[0]} is {values[bad[0]].tolist()}; finite values were expected")
    return Track(
        name=OBJECT_NAMES.get(str(track.get("type")), "generic_object"),
        xy=position[:, :2],
        heading=flat["heading"],
        size=np.column_stack([flat["length"], flat["width"], flat["height"]]),
        valid=valid,
    )


def annotations(drive: RecordedDrive, frame: int) -> Annotations:
    """Objects within OBJECT_RANGE_M of a frame, in its ego frame, all standing on its ground plane z = 0."""
    sample, ego = int(drive.samples[frame]), drive.ego[frame]
    boxes, velocities, names, tokens = [], [], [], []
    for token, track in drive.tracks.items():
        if not track.valid[sample] or np.hypot(*(track.xy[sample] - ego[:2])) > OBJECT_RANGE_M:
            continue
        xy = rotate(track.xy[sample] - ego[:2], -ego[2])
        yaw = float(wrap_angle(track.heading[sample] - ego[2]))
        boxes.append([*xy, 0.5 * track.size[sample, 2], *track.size[sample], yaw])
        velocities.append([*rotate(_velocity(track, sample, drive.step), -ego[2]), 0.0])
        names.append(track.name)
        tokens.append(token)
    return Annotations(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 7),
        velocities=np.array(velocities, dtype=np.float64).reshape(-1, 3),
        names=tuple(names),
        track_tokens=tuple(tokens),
    )


def _velocity(track: Track, sample: int, step: int) -> NDArray[np.float64]:
    """[2] m/s by central difference over +-0.5 s, one-sided where the object is not seen; 0 for static things."""
    seen = [k for k in (sample - step, sample, sample + step) if 0 <= k < len(track.valid) and track.valid[k]]
    if track.name in _STATIC or len(seen) < 2:
        return np.zeros(2)
    return (track.xy[seen[-1]] - track.xy[seen[0]]) / ((seen[-1] - seen[0]) / step * POSE_INTERVAL_S)


def command(drive: RecordedDrive, frame: int) -> NDArray[np.float32]:
    """[4] one-hot of a frame, from the driven path at the source's rate."""
    return command_of(drive.ego_fine[drive.samples[frame] :, :2], drive.ego[frame])


def command_of(path: NDArray[np.float64], pose: NDArray[np.float64]) -> NDArray[np.float32]:
    """[4] one-hot: where the driven path is COMMAND_AHEAD_M ahead (or at its end): more than 2 m to a side or not.

    ``path`` [n,2] from the present on, ``pose`` [3] of the present.
    """
    arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    ahead = np.array([np.interp(COMMAND_AHEAD_M, arc, path[:, axis]) for axis in (0, 1)])
    lateral = rotate(ahead - pose[:2], -pose[2])[1]
    word = "left" if lateral > COMMAND_LATERAL_M else "right" if lateral < -COMMAND_LATERAL_M else "straight"
    return np.eye(len(COMMANDS), dtype=np.float32)[COMMANDS.index(word)]


def traffic_lights(drive: RecordedDrive, frame: int) -> tuple[tuple[str, bool], ...]:
    """(lane, is red) of the lights whose state is known; amber counts as not red, as in NAVSIM."""
    sample, states = int(drive.samples[frame]), []
    for lane, history in drive.lights.items():
        state = str(history[sample]).upper() if sample < len(history) else ""
        if any(word in state for word in _RED) and "FLASHING" not in state:
            states.append((lane, True))
        elif any(word in state for word in _NOT_RED) and "FLASHING" not in state:
            states.append((lane, False))
    return tuple(states)


def parked(drive: RecordedDrive) -> list[shapely.Polygon]:
    """Footprints of the vehicles that never move."""
    footprints = []
    for track in drive.tracks.values():
        if track.name != "vehicle" or not track.valid.any():
            continue
        xy = track.xy[track.valid]
        if np.ptp(xy, axis=0).max() > NEVER_MOVES_M:
            continue
        sample = int(np.flatnonzero(track.valid)[0])
        half = 0.5 * track.size[sample, :2]
        corners = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * half
        footprints.append(shapely.Polygon(rotate(corners, track.heading[sample]) + track.xy[sample]))
    return footprints
