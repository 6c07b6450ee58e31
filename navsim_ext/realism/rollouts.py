"""Rollouts of a scene: R possible futures of all its simulated objects, and where they are kept.

Legend: R rollouts, S objects, H = 80 future steps of 0.1 s. Frame: the scene's local one (world = local + origin).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from navsim_ext.errors import MissingError
from navsim_ext.files import reading
from navsim_ext.fingerprint import digest_file, digest_json
from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.features import Scenario
from navsim_ext.realism.rules import FUTURE_STEPS, PRESENT
from navsim_ext.realism.scenario import world_origin
from navsim_ext.shards import ShardStore
from navsim_ext.traffic.scene import TrafficScene

KIND = "rollouts"
"""Fingerprint kind of a store of rollouts."""
SUFFIX = ".rollouts.npz"


@dataclass(frozen=True)
class Rollouts:
    """``ids`` [S] int64 in any order; ``pose`` [R, S, H, 3] float32 (box centre x, y in m, heading in rad); ``z`` [R,
    S, H] float32 height of the box centre, or None: each object keeps the height that it has at the present step."""

    ids: np.ndarray
    pose: np.ndarray
    z: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The record of a store, by array name."""
        arrays = {"ids": self.ids, "pose": self.pose}
        return arrays if self.z is None else arrays | {"z": self.z}

    def of(self, agent_id: np.ndarray) -> Rollouts:
        """The same rollouts with the objects in the order of ``agent_id`` (every one of them must be there)."""
        place = {int(one): row for row, one in enumerate(self.ids)}
        rows = [place[int(one)] for one in agent_id]
        return Rollouts(agent_id, self.pose[:, rows], None if self.z is None else self.z[:, rows])


def world_states(scenario: Scenario, scene: TrafficScene, rollouts: Rollouts, expected: int | None) -> np.ndarray:
    """States [R, S, H, 4] float32 in world coordinates, objects in the scenario's order.

    Raises RealismError, naming scene, object and rule, unless the rollouts hold exactly the simulated objects, 80
    steps, ``expected`` rollouts (None: any number) and finite numbers.
    """
    where = f"scene {scenario.identifier}: rollouts"
    ids, pose = rollouts.ids, rollouts.pose
    if ids.ndim != 1 or pose.ndim != 4 or pose.shape[1] != len(ids) or pose.shape[3] != 3:
        raise RealismError(f"{where}: poses [R, S, {FUTURE_STEPS}, 3] with ids [S] expected; {pose.shape}, {ids.shape}")
    if pose.shape[2] != FUTURE_STEPS:
        raise RealismError(f"{where} have {pose.shape[2]} steps: the rules ask {FUTURE_STEPS} of 0.1 s")
    if len(pose) == 0 or (expected is not None and len(pose) != expected):
        asked = expected if expected is not None else "at least 1"
        raise RealismError(f"{where}: there are {len(pose)}, the rules ask {asked}; rollouts=null takes any number")
    if len(np.unique(ids)) != len(ids):
        raise RealismError(f"{where}: object {_first_twice(ids)} appears twice")
    missing, foreign = np.setdiff1d(scenario.ids, ids), np.setdiff1d(ids, scenario.ids)
    if len(missing):
        raise RealismError(
            f"{where}: objects {missing.tolist()} are missing: all that are valid at step {PRESENT} are simulated"
        )
    if len(foreign):
        raise RealismError(
            f"{where}: objects {foreign.tolist()} are foreign: only those valid at step {PRESENT} are simulated"
        )
    ordered = rollouts.of(scenario.ids)
    parts = [ordered.pose] if ordered.z is None else [ordered.pose, ordered.z[..., None]]
    for part in parts:
        if not np.isfinite(part).all():
            rollout, row, step, _ = (int(one) for one in np.argwhere(~np.isfinite(part))[0])
            raise RealismError(
                f"{where}: object {int(scenario.ids[row])} has a value that is not finite in rollout {rollout}, "
                f"step {step}"
            )
    states, origin = np.empty((*ordered.pose.shape[:3], 4), np.float32), world_origin(scene)
    states[..., :2] = ordered.pose[..., :2].astype(np.float64) + origin[:2]
    if ordered.z is None:
        states[..., 2] = scenario.log[None, :, PRESENT, None, 2]
    else:
        states[..., 2] = ordered.z.astype(np.float64) + origin[2]
    states[..., 3] = ordered.pose[..., 2]
    return states


def as_scene(scene: TrafficScene, rollouts: Rollouts, number: int) -> TrafficScene:
    """The scene as rollout ``number`` says that it went on: those who are simulated as driven, nobody else after the
    present. Raises RealismError for a rollout that is not there, another length, or objects that the scene has not."""
    steps = scene.num_steps - scene.now - 1
    if not 0 <= number < len(rollouts.pose):
        raise RealismError(f"scene {scene.id}: rollout {number} was asked for, there are {len(rollouts.pose)}")
    if rollouts.pose.shape[2] != steps:
        raise RealismError(f"scene {scene.id}: rollouts of {rollouts.pose.shape[2]} steps, the scene has {steps}")
    place = {int(agent): row for row, agent in enumerate(scene.agent_id)}
    foreign = [int(one) for one in rollouts.ids if int(one) not in place]
    if foreign:
        raise RealismError(f"scene {scene.id}: objects {foreign[:5]} of the rollouts are not in it")
    rows = [place[int(one)] for one in rollouts.ids]
    pose, valid = scene.pose.copy(), scene.valid.copy()
    pose[..., 2] = scene.heading_as_recorded
    valid[:, scene.now + 1 :] = False
    valid[rows, scene.now + 1 :] = True
    pose[rows, scene.now + 1 :] = rollouts.pose[number]
    kept = {one.name: getattr(scene, one.name) for one in fields(scene)}
    for name in ("pose", "speed", "valid", "dt", "source_heading", "z", "command", "ego_dynamics"):
        del kept[name]
    return TrafficScene.make(heading=pose[..., 2], xy=pose[..., :2], valid=valid, dt=scene.dt, **kept)


def _first_twice(ids: np.ndarray) -> int:
    values, counts = np.unique(ids, return_counts=True)
    return int(values[counts > 1][0])


class RolloutFolder:
    """Rollouts by scene: a store (``ids``, ``pose``, optionally ``z`` by scene id), or files ``NAME.rollouts.npz``.

    A file holds ``ids`` [S] and ``xyzh`` [R, S, 80, 4] (x, y local; z; heading), or the arrays of a store's record.
    Raises MissingError where ``folder`` is neither.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._store: ShardStore | None = None
        self._files: dict[str, Path] = {}
        if (self.folder / "fingerprint.json").is_file():
            self._store = ShardStore(self.folder)
            if self._store.fingerprint.kind != KIND:
                raise RealismError(
                    f"{self.folder} is a store of kind {self._store.fingerprint.kind!r}, not of {KIND!r}"
                )
        else:
            self._files = {path.name.removesuffix(SUFFIX): path for path in sorted(self.folder.glob(f"*{SUFFIX}"))}
        if not len(self):
            raise MissingError(f"{self.folder} is neither a store of rollouts nor a folder of NAME{SUFFIX} files")

    @property
    def names(self) -> list[str]:
        return list(self._files) if self._store is None else sorted(self._store.tokens)

    def identity(self) -> str:
        """Digest of what the rollouts are."""
        if self._store is not None:
            return self._store.fingerprint.digest
        return digest_json({name: digest_file(path) for name, path in self._files.items()})

    def __len__(self) -> int:
        return len(self._files) if self._store is None else len(self._store)

    def __contains__(self, name: object) -> bool:
        return name in (self._files if self._store is None else self._store)

    def get(self, name: str) -> Rollouts:
        """The rollouts of one scene; raises RealismError naming the file where it is damaged or lacks an array."""
        if self._store is not None:
            arrays: Mapping[str, Any] = self._store.get(name)
            return _rollouts(arrays, f"{self.folder}, scene {name}")
        path = self._files[name]
        with reading(path, "write it again", RealismError), np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if key != "modes"}
        return _rollouts(arrays, str(path))


def _rollouts(arrays: Mapping[str, Any], where: str) -> Rollouts:
    wanted = {"ids", "xyzh"} if "xyzh" in arrays else {"ids", "pose"}
    missing = sorted(wanted - set(arrays))
    if missing:
        raise RealismError(f"{where}: array {', '.join(missing)} is missing; it has {', '.join(sorted(arrays))}")
    for name in set(arrays) & {"ids", "xyzh", "pose", "z"}:
        kinds = "iu" if name == "ids" else "f"
        if arrays[name].dtype.kind not in kinds:
            raise RealismError(f"{where}: array {name} is of type {arrays[name].dtype}; numbers were expected")
    ids = arrays["ids"].astype(np.int64)
    if "xyzh" not in arrays:
        z = arrays["z"].astype(np.float32) if "z" in arrays else None
        if z is not None and z.shape != arrays["pose"].shape[:3]:
            raise RealismError(f"{where}: z {z.shape} does not fit the poses {arrays['pose'].shape}")
        return Rollouts(ids, arrays["pose"].astype(np.float32), z)
    states = arrays["xyzh"].astype(np.float32)
    if states.ndim != 4 or states.shape[-1] != 4:
        raise RealismError(f"{where}: xyzh has the shape {states.shape}; [R, S, {FUTURE_STEPS}, 4] was expected")
    return Rollouts(ids, states[..., [0, 1, 3]], states[..., 2])
