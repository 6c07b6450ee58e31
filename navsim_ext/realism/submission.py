"""Submissions to the sim-agents challenge: written, checked as a whole, and read back.

    python -m navsim_ext.realism.submission rollouts=DIR scenes=DIR file=OUT.tar.gz method.account_name=ME ...
    python -m navsim_ext.realism.submission scenes=DIR file=OUT.tar.gz        # only checks a file that is there

A file is a .tar.gz of shards, each a ``SimAgentsChallengeSubmission`` with a part of the scenarios. The server
names little of what is wrong with a file; the check here looks at every shard, scenario, object, length and value
first. Where the scenes hold their future (the validation split), the rollouts of a checked file can be scored by
``realism.score``: a dry run.
"""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from google.protobuf.message import Message
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import atomic_file, reading
from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.rollouts import RolloutFolder, Rollouts, world_states
from navsim_ext.realism.rules import CHALLENGE_ROLLOUTS, FUTURE_STEPS
from navsim_ext.realism.scenario import scenario_of, world_origin
from navsim_ext.realism.scene_folder import SceneFolder
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from navsim_ext.traffic.messages import message_types, parse
from navsim_ext.traffic.scene import TrafficScene

logger = logging.getLogger(__name__)

SIM_AGENTS = 1
"""Number of the submission type."""
TABLE = {
    "SimAgentsChallengeSubmission": "1 scenario_rollouts*:ScenarioRollouts, 2 submission_type:int32, "
    "3 account_name:string, 4 unique_method_name:string, 5 authors*:string, 6 affiliation:string, "
    "7 description:string, 8 method_link:string, 9 uses_lidar_data:bool, 10 uses_camera_data:bool, "
    "11 uses_public_model_pretraining:bool, 13 public_model_names*:string, 12 num_model_parameters:string, "
    "14 acknowledge_complies_with_closed_loop_requirement:bool",
    "ScenarioRollouts": "1 scenario_id:string, 2 joint_scenes*:JointScene",
    "JointScene": "1 simulated_trajectories*:SimulatedTrajectory",
    "SimulatedTrajectory": "2 center_x**:float, 3 center_y**:float, 4 center_z**:float, 5 heading**:float, "
    "7 width**:float, 8 length**:float, 9 height**:float, 11 valid**:bool, 6 object_id:int32, 10 object_type:int32",
}
MESSAGES = message_types("trivium.sim_agents", TABLE)
Submission = MESSAGES["SimAgentsChallengeSubmission"]


@dataclass(frozen=True)
class ServerMethod:
    """What each of Waymo's servers asks of whoever submits; the fields of the message, in words."""

    account_name: str = ""
    unique_method_name: str = ""
    authors: tuple[str, ...] = ()
    affiliation: str = ""
    description: str = ""
    method_link: str = ""
    uses_public_model_pretraining: bool = False
    public_model_names: tuple[str, ...] = ()
    num_model_parameters: str = ""

    def faults(self) -> list[str]:
        """What the server would refuse, one line each."""
        found = [
            f"{name} is empty: the server refuses a submission without it"
            for name in ("account_name", "unique_method_name", "num_model_parameters")
            if not getattr(self, name).strip()
        ]
        if self.uses_public_model_pretraining and not self.public_model_names:
            found.append("uses_public_model_pretraining is true but public_model_names is empty: name the models")
        return found


@dataclass(frozen=True)
class Method(ServerMethod):
    """That, and what the sim-agents challenge asks besides."""

    uses_lidar_data: bool = False
    uses_camera_data: bool = False
    acknowledge_complies_with_closed_loop_requirement: bool = False

    def faults(self) -> list[str]:
        found = super().faults()
        if not self.acknowledge_complies_with_closed_loop_requirement:
            found.append(
                "acknowledge_complies_with_closed_loop_requirement is false: the challenge takes closed-loop rollouts "
                "only; set it to true if they are"
            )
        return found

    def check(self) -> None:
        """Raises RealismError for what the server refuses."""
        if faults := self.faults():
            raise RealismError(faults[0])


def write_submission(
    path: str | Path, scenes: SceneFolder, rollouts: RolloutFolder, method: Method, *, shards: int = 10
) -> int:
    """Writes the .tar.gz atomically, scenarios in the order of their names; returns how many.

    Raises RealismError for a method or rollouts that the rules do not admit; no file is left then.
    """
    method.check()
    if shards < 1:
        raise DataError(f"shards={shards}: at least 1 is needed")
    names = scenes.names
    absent = [name for name in names if name not in rollouts]
    if absent:
        raise RealismError(f"{len(absent)} scenarios have no rollouts ({', '.join(absent[:5])}): a submission has all")
    parts = [part for part in np.array_split(np.array(names, dtype=object), min(shards, len(names))) if len(part)]
    done = iter(track(names, "submission, scenarios"))

    def messages() -> Iterator[Message]:
        for part in parts:
            message = Submission(submission_type=SIM_AGENTS, **asdict(method))
            for name in part:
                next(done)
                scene = scenes.get(name)
                message.scenario_rollouts.append(_scenario(scene, rollouts.get(name)))
            yield message

    write_shards(path, messages(), len(parts))
    return len(names)


def write_shards(path: str | Path, messages: Iterable[Message], count: int) -> None:
    """Writes ``count`` messages as the .tar.gz of shards that Waymo's servers take, atomically."""
    with atomic_file(path) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for number, message in enumerate(messages):
            content = message.SerializeToString(deterministic=True)
            member = tarfile.TarInfo(f"submission.binproto-{number:05d}-of-{count:05d}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _scenario(scene: TrafficScene, rollouts: Rollouts) -> Message:
    scenario = scenario_of(scene)
    states = world_states(scenario, scene, rollouts, CHALLENGE_ROLLOUTS)  # checks everything
    message = MESSAGES["ScenarioRollouts"](scenario_id=scene.id)
    for world in states:
        joint = message.joint_scenes.add()
        for row, object_id in enumerate(scenario.ids.tolist()):
            track_ = joint.simulated_trajectories.add(object_id=object_id, object_type=int(scenario.kind[row]))
            for axis, name in enumerate(("center_x", "center_y", "center_z", "heading")):
                getattr(track_, name).extend(world[row, :, axis].tolist())
    return message


def read_submission(path: str | Path) -> Iterator[tuple[str, Message]]:
    """(name of the shard, its message) of each shard; raises MissingError, DataError for what is no such file."""
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"file={path} does not exist")
    for name, content in archive_members(path):
        yield name, parse(Submission, content, f"{path}, {name}")


def archive_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each file of an archive."""
    with reading(path, "it is no .tar.gz archive, or is cut short: write it again", DataError):
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is None:
                    raise DataError(f"{path}: {member.name} is no file; a submission holds shards alone")
                yield member.name, stream.read()


def check_submission(path: str | Path, scenes: SceneFolder) -> list[str]:
    """Everything that is wrong with a file, one line each; an empty list means that it is whole.

    Looked at: every shard's type and method, that each scenario is there once and no other is, that each has 32
    rollouts of exactly its simulated objects, 80 finite values in every field.
    """
    wanted = {scenes.get(name).id: name for name in scenes.names}
    faults: list[str] = []
    seen: dict[str, str] = {}
    first: Method | None = None
    count = 0
    for shard, message in read_submission(path):
        count += 1
        if message.submission_type != SIM_AGENTS:
            faults.append(f"{shard}: submission_type is {message.submission_type}, {SIM_AGENTS} is needed")
        method = Method(**{one.name: _plain(getattr(message, one.name)) for one in fields(Method)})
        try:
            method.check()
        except RealismError as error:
            faults.append(f"{shard}: {error}")
        if first is not None and method != first:
            faults.append(f"{shard}: says another method than the first shard")
        first = first or method
        for rollouts in message.scenario_rollouts:
            name = rollouts.scenario_id
            if name in seen:
                faults.append(f"{shard}: scenario {name} is there already, in {seen[name]}")
            seen[name] = shard
            if name not in wanted:
                faults.append(f"{shard}: scenario {name} is none of the split's")
            else:
                faults += [f"{shard}: {fault}" for fault in _faults(rollouts, scenes.get(wanted[name]))]
    if count == 0:
        faults.append(f"{path}: 0 shards")
    faults += [f"scenario {name} is missing" for name in sorted(set(wanted) - set(seen))]
    return faults


def _plain(value: object) -> object:
    return value if isinstance(value, str | bool) else tuple(value)


def _faults(rollouts: Message, scene: TrafficScene) -> list[str]:
    """What is wrong with one scenario's rollouts."""
    scenario = scenario_of(scene)
    wanted = set(scenario.ids.tolist())
    where = f"scenario {rollouts.scenario_id}"
    faults = []
    if len(rollouts.joint_scenes) != CHALLENGE_ROLLOUTS:
        faults.append(f"{where}: {len(rollouts.joint_scenes)} rollouts, {CHALLENGE_ROLLOUTS} are needed")
    for number, joint in enumerate(rollouts.joint_scenes):
        ids = [one.object_id for one in joint.simulated_trajectories]
        missing, foreign = sorted(wanted - set(ids)), sorted(set(ids) - wanted)
        if missing or foreign or len(ids) != len(set(ids)):
            twice = sorted({one for one in ids if ids.count(one) > 1})
            faults.append(f"{where}, rollout {number}: missing {missing}, foreign {foreign}, twice {twice}")
        for one in joint.simulated_trajectories:
            for name in ("center_x", "center_y", "center_z", "heading"):
                values = np.array(getattr(one, name))
                if len(values) != FUTURE_STEPS or not np.isfinite(values).all():
                    what = f"{len(values)} values" if len(values) != FUTURE_STEPS else "a value that is not finite"
                    faults.append(f"{where}, rollout {number}, object {one.object_id}: {name} has {what}")
    return faults


def rollouts_of(message: Message, scene: TrafficScene) -> Rollouts:
    """Rollouts of one scenario of a checked file, back in the scene's frame (world float32 was stored, so far from
    the origin the last digits differ from what was written)."""
    joint = message.joint_scenes
    ids = np.array([one.object_id for one in joint[0].simulated_trajectories], np.int64)
    states = np.empty((len(joint), len(ids), FUTURE_STEPS, 4))
    for number, world in enumerate(joint):
        place = {one.object_id: one for one in world.simulated_trajectories}
        for row, object_id in enumerate(ids.tolist()):
            for axis, name in enumerate(("center_x", "center_y", "center_z", "heading")):
                states[number, row, :, axis] = getattr(place[object_id], name)
    states[..., :3] -= world_origin(scene)
    return Rollouts(ids, states[..., [0, 1, 3]].astype(np.float32), states[..., 2].astype(np.float32))


def report(faults: Sequence[str], path: str, console: Console) -> None:
    """Prints the verdict; raises RealismError where there are faults."""
    for fault in faults[:50]:
        console.print(fault, markup=False, highlight=False, soft_wrap=True)
    if faults:
        raise RealismError(f"{path}: {len(faults)} faults (at most 50 are listed): not to be sent")
    console.print(f"{path}: whole, ready to be sent", markup=False, highlight=False)


@job("sim_agents_submission")
def main(cfg: DictConfig) -> None:
    scenes = SceneFolder(str(cfg.scenes))
    if cfg.rollouts is not None:
        values = OmegaConf.to_container(cfg.method)
        method = Method(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        count = write_submission(cfg.file, scenes, RolloutFolder(str(cfg.rollouts)), method, shards=cfg.shards)
        logger.info("%s: %d scenarios", cfg.file, count)
    report(check_submission(cfg.file, scenes), str(cfg.file), Console())


if __name__ == "__main__":
    main()
