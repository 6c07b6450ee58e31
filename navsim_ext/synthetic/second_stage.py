"""A second stage of the synthetic world, in the formats of NAVSIM 2's navhard split.

    python -m navsim_ext.synthetic.second_stage data.root=WORLD groups=20 pairs=5

WORLD is a folder of ``navsim_ext.synthetic.build``. The command writes

    WORLD/<name>/synthetic_scene_pickles/  one pickle per scene, as NAVSIM's own Scene.save_to_disk makes them
    WORLD/<name>/sensor_blobs/             its camera pictures
    WORLD/train_test_split/<name>.yaml     the groups, and scene_filter/<name>.yaml the scenes of both stages

A group is a recorded scene, the one 0.5 s before it, and ``pairs`` pairs of scenes 4 s later: drives of the same
people in which the ego, from the earlier of the two on, was another driver (:mod:`navsim_ext.synthetic.rollouts`). The
traffic of the 4 s after that follows from the law as well. Everything follows from the world and the options. A killed
run goes on with the first group that is not finished.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import cannot_write, write_atomic
from navsim_ext.fingerprint import FILE_NAME, Fingerprint
from navsim_ext.runtime.checksums import read_checked_json, write_checked_json
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.preflight import preflight
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import FunctionWorker, spread
from navsim_ext.synthetic.build import check_same
from navsim_ext.synthetic.drive import FRAME_STEPS, Run, recorded
from navsim_ext.synthetic.log_writer import frames_of, token
from navsim_ext.synthetic.manifest import LogRecord, Manifest
from navsim_ext.synthetic.produce import WORK_FOLDER, jpeg, picture_of
from navsim_ext.synthetic.recipe import FOLDER_OF_PART, HISTORY_FRAMES, PARTS, Recipe
from navsim_ext.synthetic.rollouts import Temper, go_on, on_their_way, usable
from navsim_ext.synthetic.second_stage_scene import (
    NUM_EXTENDED,
    frame_of,
    lights_at,
    objects_at,
    scene_of,
    second_stage_token,
)
from navsim_ext.synthetic.splits import FOLDER as SPLIT_FOLDER
from navsim_ext.synthetic.town import stream

log = logging.getLogger(__name__)

KIND = "synthetic-second-stage"
VERSION = 1  # raised whenever the same world and options give other scenes
STAGE_FRAMES = 8  # 4 s: from a scene of the first stage to the one that continues it
FIRST_FUTURE_FRAMES = 8  # of navhard's windows
ROLLOUT_FRAMES = HISTORY_FRAMES + 1 + NUM_EXTENDED  # both histories and what follows
DRAWS = 25  # of a pair
PICKLES, SENSORS, GROUPS = "synthetic_scene_pickles", "sensor_blobs", "groups"
WORKER_BYTES = 300_000_000


@job("second_stage")
def main(cfg: DictConfig) -> None:
    if cfg.data.root is None:
        raise MissingError("data.root is not set: give data.root=WORLD, a folder of navsim_ext.synthetic.build")
    build(
        Path(cfg.data.root), cfg.name, part=cfg.part, groups=cfg.groups, pairs=cfg.pairs, seed=cfg.seed,
        pictures=cfg.pictures, workers=cfg.workers,
    )  # fmt: skip


def read_world(root: Path) -> tuple[Recipe, Manifest]:
    """Recipe and finished logs of a synthetic world. Raises MissingError or FingerprintMismatch."""
    if not (root / FILE_NAME).is_file() or not (root / "manifest.jsonl").is_file():
        raise MissingError(f"{root} is no synthetic world: make one with python -m navsim_ext.synthetic.build")
    fields = dict(Fingerprint.load(root).fields.get("recipe") or {})
    try:
        for name in ("cameras", "image_size"):
            fields[name] = tuple(fields[name])
        recipe = Recipe(scenes=1, **fields).validate()
    except (KeyError, TypeError) as error:
        raise DataError(f"{root / FILE_NAME} holds no recipe of a synthetic world ({error}): build it again") from None
    check_same(root, recipe)
    return recipe, Manifest(root)


def build(
    root: Path, name: str, *, part: str = "test", groups: int = 20, pairs: int = 5, seed: int = 0,
    pictures: bool = True, workers: int = 1,
) -> int:  # fmt: skip
    """Makes, or finishes, the second stage ``name`` of a world; returns the number of its groups.

    Raises DataError when the world has no two neighbouring windows in ``part``.
    """
    started = time.perf_counter()
    recipe, manifest = read_world(root)
    if part not in PARTS:
        raise DataError(f"part is {part!r}; one of {', '.join(PARTS)} was expected")
    places = list(_places(manifest, part))
    if not places:
        raise DataError(
            f"{root} has no two neighbouring windows in {part}: build the world with recipe.scenes_per_log=2 or more, "
            f"and with enough scenes that some are of {part}"
        )
    if len(places) < groups:
        log.warning("%s: %d groups of %s instead of %d: the world has no more", root, len(places), part, groups)
    places = places[:groups]
    folder = root / name
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(error, folder) from error
    with FolderLock(folder):
        options = {"version": VERSION, "part": part, "pairs": pairs, "seed": seed, "pictures": pictures}
        _require_same(folder, Fingerprint(KIND, options, {"world": Fingerprint.load(root)}))
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
        make = partial(make_group, recipe, root, name, pairs, seed, pictures)
        todo = [place for place in places if not _group_file(folder, place).is_file()]
        kept = {f"{record.name}-{frame}" for record, frame in places}
        for stray in (folder / GROUPS).glob("*.json"):  # of more groups than are asked for now
            if stray.stem not in kept:
                _remove_group(folder, stray)
        if todo:
            made = _measured(make, todo, folder, workers)
            for _ in track(made, "groups", total=len(places), done=len(places) - len(todo)):
                pass
        found = [read_checked_json(_group_file(folder, place), _remedy(folder)) for place in places]
        _write_split(root, name, part, found)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    scenes = sum(2 * len(group["pairs"]) for group in found)
    log.info(
        "%s: %d groups, %d second-stage scenes in %.1f s", folder, len(found), scenes, time.perf_counter() - started
    )
    return len(found)


def _places(manifest: Manifest, part: str) -> Iterator[tuple[LogRecord, int]]:
    """(log, frame of its "now"), first one of every log, then further ones; the frame before is the "prev"."""
    records = [record for record in manifest.ordered() if record.part == part]
    first = HISTORY_FRAMES - 1
    for second in range(1, max((len(record.tokens) for record in records), default=0), 2):
        for record in records:
            if second < len(record.tokens):
                yield record, first + second


def _require_same(folder: Path, mine: Fingerprint) -> None:
    if (folder / FILE_NAME).is_file():
        remedy = "use the options that it was begun with, or another name"
        mine.require_equal(
            Fingerprint.load(folder), mine="this command", theirs=f"the second stage in {folder}", remedy=remedy
        )
    else:
        mine.save(folder)


def _group_file(folder: Path, place: tuple[LogRecord, int]) -> Path:
    return folder / GROUPS / f"{place[0].name}-{place[1]}.json"


def _remedy(folder: Path) -> str:
    return f"delete the file and run the same command again: its group is made again ({folder})"


def _remove_group(folder: Path, file: Path) -> None:
    group = read_checked_json(file, _remedy(folder))
    file.unlink()
    for pair in group["pairs"]:
        for one in pair:
            (folder / PICKLES / f"{one}.pkl").unlink(missing_ok=True)


def _measured(make: Any, todo: list[tuple[LogRecord, int]], folder: Path, workers: int) -> Iterator[Any]:
    """Makes one group, says from it what the rest costs, and makes the rest."""
    make(todo[0])  # compiles and loads everything
    began = time.perf_counter()
    size = make(todo[0])
    yield size
    if len(todo) == 1:
        return
    preflight(
        output_dir=folder, items=len(todo) - 1, bytes_per_item=size, memory_bytes=WORKER_BYTES * max(workers, 1),
        seconds_per_item=time.perf_counter() - began, workers=workers,
        title=f"second stage: {len(todo) - 1} more groups", console=Console(stderr=True),
    )  # fmt: skip
    kind = "sequential" if workers <= 1 or len(todo) < 3 else "processes"
    made = spread(partial(FunctionWorker, make), todo[1:], kind=kind, num_workers=max(workers, 1))
    yield from (size for _, size in made)


def make_group(
    recipe: Recipe, root: Path, name: str, pairs: int, seed: int, pictures: bool, place: tuple[LogRecord, int]
) -> int:
    """Writes the scenes of one group, then its entry; returns their bytes. Raises DataError when no rollout comes out.

    Frames of the log: ``now`` is frame f, ``prev`` f - 1; rollouts part from the recording at f - 1 and the scenes'
    "now" are frames f + 8 and f + 7.
    """
    record, now = place
    recipe = replace(recipe, scenes=record.index * recipe.scenes_per_log + len(record.tokens))
    run = recipe.run(record.index)
    begin = run.first + (now - 1) * FRAME_STEPS
    first = now + STAGE_FRAMES - HISTORY_FRAMES  # frame of the log at which the scenes' histories begin
    size, made, drawn = 0, [], 0
    while len(made) < pairs and drawn < DRAWS * pairs:
        temper = Temper.draw(stream("second_stage", seed, recipe.seed, record.index, now, drawn))
        key = (record.name, now, "rollout", seed, drawn)
        drawn += 1
        motion = go_on(run, begin, (first - now + 1 + ROLLOUT_FRAMES - 1) * FRAME_STEPS, temper)
        if not usable(run, motion, begin, run.first + (now + STAGE_FRAMES) * FRAME_STEPS):
            continue
        rollout = Run(run.plan, run.cast, motion, run.first + first * FRAME_STEPS, run.attempts, run.faults)
        pair, written = _write_pair(recipe, root, name, record, now, first, rollout, key, pictures)
        made.append(pair)
        size += written
    if not made:
        raise DataError(f"log {record.name}, frame {now}: no rollout without a contact came out of {drawn} draws")
    entry = {"now": token(record.name, "frame", now), "prev": token(record.name, "frame", now - 1), "pairs": made}
    target = _group_file(root / name, place)
    target.parent.mkdir(exist_ok=True)
    write_checked_json(target, {**entry, "log_name": record.name})
    return size + len(json.dumps(entry))


def _write_pair(
    recipe: Recipe, root: Path, name: str, record: LogRecord, now: int, first: int, rollout: Run, key: tuple,
    pictures: bool,
) -> tuple[list[str], int]:  # fmt: skip
    """Pictures and pickles of the two scenes of a rollout: ([now's token, prev's token], bytes)."""
    drive = recorded(rollout)
    log_frames = frames_of(drive, record.name, recipe.image_size)
    shift = int(log_frames[1]["timestamp"] - log_frames[0]["timestamp"]) * first
    for frame in log_frames:
        frame["timestamp"] += shift
    there = [on_their_way(rollout, rollout.motion, rollout.first + i * FRAME_STEPS) for i in range(len(log_frames))]
    folder, size, frames = root / name, 0, []
    for i in range(HISTORY_FRAMES + 1):
        paths = {}
        if pictures and _has_picture(recipe, i):
            for view in recipe.cameras:
                paths[view] = f"{record.name}/{view}/{second_stage_token(*key, view, i)}.jpg"
                image = picture_of(recipe, root / "maps", drive, log_frames, i, view)
                shot = jpeg(image, recipe.jpeg_quality)
                write_atomic(folder / SENSORS / paths[view], shot, workshop=folder / WORK_FOLDER, durable=False)
                size += len(shot)
        frames.append(frame_of(log_frames[i], second_stage_token(*key, i), paths))
    later = []
    for i, frame in enumerate(log_frames):
        objects = objects_at(
            drive, i, there[i][drive.members], frame["anns"]["track_tokens"], frame["timestamp"], frame["token"]
        )
        later.append((objects, lights_at(frame["traffic_lights"], frame["timestamp"])))
    tokens = []
    for history, original in ((1, now), (0, now - 1)):
        last = history + HISTORY_FRAMES
        content = scene_of(
            record.name, record.location, frames[history:last], later[last : last + NUM_EXTENDED],
            token(record.name, "frame", original), token(record.name, "frame", original + STAGE_FRAMES),
        )  # fmt: skip
        tokens.append(frames[last - 1]["token"])
        path = folder / PICKLES / f"{tokens[-1]}.pkl"
        write_atomic(path, content, workshop=folder / WORK_FOLDER, durable=False)
        size += len(content)
    return tokens, size


def _has_picture(recipe: Recipe, frame: int) -> bool:
    """As in the logs: the two scenes' own frames, or all of their histories."""
    return bool(recipe.cameras) and (recipe.camera_frames != "now" or frame >= HISTORY_FRAMES - 1)


def _write_split(root: Path, name: str, part: str, groups: list[dict[str, Any]]) -> None:
    """The split's two YAML files, as NAVSIM's configs have them."""
    logs = sorted({group["log_name"] for group in groups})
    scene_filter = {
        "_target_": "navsim.common.dataclasses.SceneFilter",
        "_convert_": "all",
        "num_history_frames": HISTORY_FRAMES,
        "num_future_frames": FIRST_FUTURE_FRAMES,
        "frame_interval": 1,
        "has_route": True,
        "max_scenes": None,
        "include_synthetic_scenes": True,
        "log_names": logs,
        "tokens": [one for group in groups for one in (group["now"], group["prev"])],
        "reactive_synthetic_initial_tokens": [one for group in groups for pair in group["pairs"] for one in pair],
    }
    split = {
        "defaults": [{"scene_filter": name}],
        "data_split": FOLDER_OF_PART[part],
        "reactive_all_mapping": [[group["now"], group["prev"], group["pairs"]] for group in groups],
    }
    for path, content in ((f"scene_filter/{name}.yaml", scene_filter), (f"{name}.yaml", split)):
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=False)
        write_atomic(root / SPLIT_FOLDER / path, text)


if __name__ == "__main__":
    main()
