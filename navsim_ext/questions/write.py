"""Driving questions and answers from any scene that has a map, in InternVL's conversation format.

    python -m navsim_ext.questions.write data.root=... data.split=... data.scene_filter=train.yaml output_dir=...

Files of ``output_dir``: ``<name>_qa.jsonl`` and ``<name>_trajectory.jsonl`` (``image``, ``conversations``,
``image_size``, ``scene_id``, and ``type``, ``image_dependent``, ``answer`` for checking), and the meta file
``<name>.json`` that a data-set mixture reads. Questions with choices are balanced: no answer of a type keeps more than
``max_share`` of it, so that a model cannot do well by always saying the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.errors import CorruptFile, DataError, MissingError, TriviumError
from navsim_ext.files import atomic_file, plain_name, read_json, write_atomic, write_json_atomic
from navsim_ext.fingerprint import Fingerprint, digest_json
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.pictures import picture_size
from navsim_ext.prompts import IMAGE_PLACEHOLDER, prompt_digest, trajectory_prompt
from navsim_ext.questions.catalogue import QUESTIONS, STANDARD_TYPES
from navsim_ext.questions.dialogues import with_dialogues
from navsim_ext.questions.facts import facts_of
from navsim_ext.questions.meta_actions import Decision, DecisionRules, action_weights, frequencies
from navsim_ext.questions.reasoning import SOURCE
from navsim_ext.readers import SceneSource, open_configured
from navsim_ext.runtime.checksums import CHECKSUM_KEY, checked_line, checked_lines, file_checksums
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.rng import derive_seed
from navsim_ext.scene import Scene

log = logging.getLogger(__name__)

Record = dict[str, Any]
REPEAT_TIMES = {"trajectory": 2, "qa": 1, "dialogues": 1}  # the first two as the published mixture weighs them
FORMAT = "trivium-qa-1"


def scene_records(
    scene: Scene,
    vector_map: VectorMap,
    image_size: tuple[int, int],
    *,
    camera: str = "CAM_F0",
    types: Sequence[str] = STANDARD_TYPES,
    template: str | None = None,
    rules: DecisionRules | None = None,
    seed: int = 0,
) -> list[Record]:
    """One record for each question type that the scene answers; wording by (seed, token, type).

    ``image_size`` (width, height) is that of the stored picture; ``template`` words the trajectory task, ``rules``
    are those of decisions. A record of a decision with reasoning says where its reasons are from
    (``reasoning_source``) and carries what its reward needs (``speed_mps``, ``road``). Raises DataError for an unknown
    type, for a scene without that camera or with fewer than 8 future frames.
    """
    unknown = [name for name in types if name not in QUESTIONS]
    if unknown:
        raise DataError(f"question type {unknown[0]!r} does not exist; there are {', '.join(QUESTIONS)}")
    if camera not in scene.cameras:
        raise DataError(f"scene {scene.token} of {scene.log_name} has cameras {sorted(scene.cameras)}, not {camera}")
    facts = facts_of(scene, vector_map, camera, rules)
    records = []
    for name in types:
        question = QUESTIONS[name]
        made = question.make(scene, facts)
        if made is None:
            continue
        fields, text, answer = made
        if name == "trajectory":
            command = int(scene.commands[scene.now].argmax())
            prompt = trajectory_prompt(scene.history_poses(), command, (camera,), template)
            turns = [{"from": "system", "value": prompt.system}, {"from": "human", "value": prompt.user}]
        else:
            choice = derive_seed(seed, "wording", scene.token, name) % len(question.wordings)
            asked = question.wordings[choice].format(**fields)
            turns = [{"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{asked}"}]
        records.append(
            {
                "image": scene.cameras[camera].path,
                "conversations": [*turns, {"from": "gpt", "value": text}],
                "image_size": list(image_size),
                "scene_id": scene.token,
                "type": name,
                "image_dependent": question.image_dependent,
                "answer": answer,
            }
        )
        if question.decides and not question.standard:
            records[-1] |= {"reasoning_source": SOURCE, "speed_mps": round(facts.ego_speed, 3)}
            records[-1]["road"] = facts.road.to_json()
    return records


def balanced(records: Sequence[Record], max_share: float, seed: int = 0) -> list[Record]:
    """The records without those of over-represented answers; see :class:`Balance`. The order stays."""
    balance = Balance(max_share, seed)
    for record in records:
        balance.add(record)
    keep = balance.keep()
    return [record for record, kept in zip(records, keep, strict=True) if kept]


class Balance:
    """Which records to keep so that no answer of a type with choices exceeds ``max_share`` of it.

    Of answer a with n_a records min(n_a, c) stay, c the largest cap with c <= share * sum_a min(n_a, c), where share is
    ``max_share`` or, with k answers, 1 / k if that is more. Decisions and types without choices are left alone.
    Which ones go depends on (seed, token, type) only. Holds 16 bytes a record, so that data sets of any size can be
    balanced in two passes.
    """

    def __init__(self, max_share: float, seed: int = 0) -> None:
        if not 0.0 < max_share <= 1.0:
            raise DataError(f"max_share is {max_share}; a share in (0, 1] was expected")
        self.max_share, self.seed, self._count = max_share, seed, 0
        self._groups: dict[str, dict[str, tuple[array, array]]] = {}  # type -> answer -> (keys, positions)

    def add(self, record: Record) -> None:
        kind = record["type"]
        if QUESTIONS[kind].choices and not QUESTIONS[kind].decides:
            answers = self._groups.setdefault(kind, {})
            keys, positions = answers.setdefault(record["answer"], (array("Q"), array("Q")))
            keys.append(derive_seed(self.seed, "keep", record["scene_id"], kind) & (2**64 - 1))
            positions.append(self._count)
        self._count += 1

    def keep(self) -> NDArray[np.bool_]:
        """[records] in the order in which they were added."""
        kept = np.ones(self._count, dtype=bool)
        for answers in self._groups.values():
            counts = np.array([len(keys) for keys, _ in answers.values()])
            share = max(self.max_share, 1.0 / len(counts))
            cap = int(counts.max())
            while cap > (allowed := int(share * np.minimum(counts, cap).sum() + 1e-9)):
                cap = allowed
            for stored in answers.values():
                keys, positions = (np.array(values, dtype=np.uint64) for values in stored)
                kept[positions[np.argsort(keys, kind="stable")[cap:]].astype(np.int64)] = False
        return kept


def write_qa(
    source: SceneSource,
    folder: str | os.PathLike[str],
    *,
    name: str,
    camera: str = "CAM_F0",
    types: Sequence[str] = STANDARD_TYPES,
    template: str | None = None,
    rules: DecisionRules | None = None,
    max_share: float = 0.5,
    together: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the questions of all scenes of ``source`` into ``folder``; returns counts by type and answer.

    ``together``: those that only the picture answers become turns of one conversation each (``dialogues.py``), in
    ``<name>_dialogues.jsonl``. Goes on where an interrupted run stopped (one part per log); a finished data set is
    left as it is. Raises DataError when ``name`` is a path, when the folder holds it made in another way, or when no
    question could be asked.
    """
    folder, name, rules = Path(folder), plain_name(name, "name="), rules or DecisionRules()
    fields = {
        "format": FORMAT,
        "name": name,
        "root": os.path.relpath(source.sensor_root, folder),
        "filter": digest_json(source.scene_filter.describe()),
        "logs": digest_json(source.log_names),
        "camera": camera,
        "types": list(types),
        "max_share": max_share,
        "seed": seed,
        "prompt": prompt_digest(template, (camera,)),
        "decision": asdict(rules),
        "wording": digest_json({key: list(question.wordings) for key, question in QUESTIONS.items()}),
        **({"together": True} if together else {}),
    }
    plan = Fingerprint("qa_plan", fields)
    with FolderLock(folder):
        plan_path, parts = folder / f"{name}.plan.json", folder / f"{name}.parts"
        if plan_path.is_file():
            stored = Fingerprint.read(plan_path)
            remedy = "choose another name or output_dir, or delete this one"
            plan.require_equal(stored, mine="the questions asked for", theirs=str(plan_path), remedy=remedy)
        else:
            write_json_atomic(plan_path, plan.to_json())
        if not (folder / f"{name}.json").is_file():
            parts.mkdir(exist_ok=True)
            _write_parts(source, parts, camera=camera, types=types, template=template, rules=rules, seed=seed)
            _merge(source, folder, parts, name, max_share, together, seed)
            shutil.rmtree(parts)
    return read_json(folder / f"{name}.counts.json", f"delete {name}.json, the same command makes both again")


def _write_parts(source: SceneSource, parts: Path, *, camera: str, **options: Any) -> None:
    names = source.log_names
    todo = [log_name for log_name in names if not (parts / f"{log_name}.jsonl").is_file()]
    for log_name in track(todo, "questions", total=len(names), done=len(names) - len(todo)):
        lines = []
        for scene in source.scenes_of(log_name):
            try:
                size = _picture_size(source.sensor_root, scene, camera)
                records = scene_records(scene, source.map_for(scene), size, camera=camera, **options)
            except TriviumError as error:
                source.report.add(error, log_name=log_name, token=scene.token)
                continue
            lines += [checked_line(record) for record in records]
        write_atomic(parts / f"{log_name}.jsonl", "".join(lines))
    source.report.write()


def _picture_size(sensor_root: Path, scene: Scene, camera: str) -> tuple[int, int]:
    if camera not in scene.cameras:
        raise DataError(f"scene {scene.token} of {scene.log_name} has cameras {sorted(scene.cameras)}, not {camera}")
    where = f"log {scene.log_name}, frame {scene.token}: cams.{camera}"
    path = sensor_root / scene.cameras[camera].path
    if not path.is_file():
        raise MissingError(f"{where} {path} does not exist: download the sensor blobs or build the pictures")
    try:
        return picture_size(path)
    except DataError as error:
        raise DataError(f"{where} {path} is not a picture: {error}") from error


def _merge(
    source: SceneSource, folder: Path, parts: Path, name: str, max_share: float, together: bool, seed: int
) -> None:
    """Two passes over the parts: what to keep, then the files. Holds the records of one scene at a time."""
    paths = [parts / f"{log_name}.jsonl" for log_name in source.log_names]
    balance = Balance(max_share, seed)
    for record in _records(paths):
        balance.add(record)
    keep = balance.keep()
    source.report.require_some(len(keep), f"questions {name} in {folder}")
    counts = Counts()
    lengths = dict.fromkeys(REPEAT_TIMES, 0)
    with contextlib.ExitStack() as stack:
        files = {part: stack.enter_context(atomic_file(folder / f"{name}_{part}.jsonl")) for part in REPEAT_TIMES}
        streams = {part: stack.enter_context(open(file, "w", encoding="utf-8")) for part, file in files.items()}
        chosen = (record for record, kept in zip(_records(paths), keep, strict=True) if kept)
        counted = map(counts.added, chosen)
        for record in with_dialogues(counted, seed) if together else counted:
            part = "dialogues" if "types" in record else "trajectory" if record["type"] == "trajectory" else "qa"
            streams[part].write(json.dumps(record) + "\n")
            lengths[part] += 1
    meta = {
        f"{name}_{part}": {
            "root": os.path.relpath(source.sensor_root, folder),
            "annotation": f"{name}_{part}.jsonl",
            "repeat_time": REPEAT_TIMES[part],
            "data_augment": False,
            "length": length,
        }
        for part, length in lengths.items()
        if length
    }
    for part, length in lengths.items():
        if not length:
            (folder / f"{name}_{part}.jsonl").unlink()
    checksums = file_checksums(folder, [entry["annotation"] for entry in meta.values()])
    meta = {key: entry | {CHECKSUM_KEY: checksums[entry["annotation"]]} for key, entry in meta.items()}
    write_json_atomic(folder / f"{name}.counts.json", counts.table())
    write_json_atomic(folder / f"{name}.json", meta)


def _records(paths: Sequence[Path]) -> Iterator[Record]:
    for path in paths:
        for number, record in checked_lines(path.read_bytes()):
            if record is None:
                raise CorruptFile(f"{path}, line {number} is damaged: delete the file and run the same command again")
            yield record


class Counts:
    """How many records of each type, and for types with choices how often each answer."""

    def __init__(self) -> None:
        self._records: Counter[str] = Counter()
        self._answers: dict[str, Counter[str]] = {}

    def added(self, record: Record) -> Record:
        """The record, counted."""
        kind = record["type"]
        self._records[kind] += 1
        if QUESTIONS[kind].choices:
            self._answers.setdefault(kind, Counter())[record["answer"]] += 1
        return record

    def table(self) -> dict[str, dict[str, Any]]:
        """By type: image_dependent, records, answers; of decisions the frequencies and weights of the 9 actions."""
        return {kind: self._row(kind, count) for kind, count in sorted(self._records.items())}

    def _row(self, kind: str, count: int) -> dict[str, Any]:
        answers = dict(self._answers.get(kind, {}))
        row = {"image_dependent": QUESTIONS[kind].image_dependent, "records": count, "answers": answers}
        if QUESTIONS[kind].decides:
            actions = frequencies([Decision.parse(pair) for pair, times in answers.items() for _ in range(times)])
            row |= {"actions": actions, "weights": action_weights(actions)}
        return row


@job("questions")
def main(cfg: DictConfig) -> None:
    """Writes the questions of one split and prints how many of each type."""
    source = open_configured(
        cfg.data,
        skip_bad=cfg.skip_bad,
        report_path=Path(cfg.output_dir) / f"{cfg.name}.skipped.json" if cfg.skip_bad else None,
    )
    counts = write_qa(
        source,
        cfg.output_dir,
        name=cfg.name,
        camera=cfg.data.cameras[0],
        types=tuple(cfg.types or STANDARD_TYPES),
        template=cfg.template,
        rules=DecisionRules(**cfg.decision),
        max_share=cfg.max_share,
        together=cfg.together,
        seed=cfg.seed,
    )
    console = Console(stderr=True, soft_wrap=True)
    for kind, entry in counts.items():
        console.print(f"{kind}: {entry['records']} {entry['answers'] or ''}", markup=False)


if __name__ == "__main__":
    main()
