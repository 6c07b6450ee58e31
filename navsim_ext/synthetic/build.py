"""``python -m navsim_ext.synthetic.build output_dir=DIR scenes=1000``: a driving data set in NAVSIM's own formats.

DIR is used as OPENSCENE_DATA_ROOT, DIR/maps as NUPLAN_MAPS_ROOT:

    maps/                 nuPlan maps of the four locations
    navsim_logs/<split>/  one pickle per log (trainval holds train and val, test the test town)
    sensor_blobs/<split>/ camera pictures
    train_test_split/     scene filters train, val, test
    qa/                   driving QA and trajectory conversations, with their meta file
    manifest.jsonl        the finished logs; fingerprint.json: what they were made from

The build can be killed at any moment; the same command goes on where it stopped, and a larger ``scenes`` extends a
finished data set (the last log may become longer). Logs do not depend on the number of workers.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from navsim_ext.files import cannot_write
from navsim_ext.fingerprint import FILE_NAME, Fingerprint, package_versions
from navsim_ext.runtime.checksums import seal_folder
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.preflight import preflight
from navsim_ext.runtime.workers import FunctionWorker, spread
from navsim_ext.synthetic.gpkg_writer import write_maps
from navsim_ext.synthetic.manifest import LogRecord, Manifest
from navsim_ext.synthetic.produce import WORK_FOLDER, produce
from navsim_ext.synthetic.recipe import FOLDER_OF_PART, PARTS, Recipe
from navsim_ext.synthetic.splits import FOLDER as SPLIT_FOLDER
from navsim_ext.synthetic.splits import write_splits

log = logging.getLogger(__name__)

KIND = "synthetic-world"
VERSION = 1  # raised whenever the same recipe gives other logs
MAP_BYTES = 4_000_000
WORKER_BYTES = 300_000_000


@job("synthetic")
def main(cfg: DictConfig) -> None:
    build(Path(cfg.output_dir), recipe_of(cfg), workers=cfg.workers)


def recipe_of(cfg: DictConfig) -> Recipe:
    """The recipe of a composed ``configs/synthetic``; raises DataError for a value that makes no sense."""
    options = OmegaConf.to_container(cfg.recipe, resolve=True)
    options["cameras"], options["image_size"] = tuple(options["cameras"]), tuple(options["image_size"])
    return Recipe(scenes=cfg.scenes, seed=cfg.seed, **options).validate()


def build(folder: Path, recipe: Recipe, *, workers: int = 1) -> Manifest:
    """Makes, or finishes, or extends the data set of a recipe in ``folder``; returns its manifest."""
    started = time.perf_counter()
    with FolderLock(folder):
        check_same(folder, recipe)
        manifest = Manifest(folder)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
        todo = [index for index in range(recipe.logs) if not _finished(recipe, folder, manifest, index)]
        try:
            write_maps(folder / "maps", recipe.seed)  # those that are not there
        except OSError as error:
            raise cannot_write(error, folder / "maps") from error
        if todo:
            first = _first(recipe, folder, manifest, todo, workers)
            made = itertools.chain(first, _produce_all(recipe, folder, todo[1:], workers))
            before = recipe.logs - len(todo)
            for record in track(
                made, "logs", total=recipe.logs, completed=before, console=Console(stderr=True), update_period=0.5
            ):
                manifest.add(record)
            shutil.rmtree(folder / "qa", ignore_errors=True)  # questions about fewer logs
        write_splits(folder, manifest.ordered())
        seal_data(folder, manifest)
        if recipe.qa:
            write_questions(folder, recipe, manifest)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    scenes = sum(len(record.tokens) for record in manifest.records.values())
    log.info("%s: %d logs, %d scenes in %.1f s", folder, len(manifest.records), scenes, time.perf_counter() - started)
    return manifest


def seal_data(folder: Path, manifest: Manifest) -> None:
    """Checksums of logs and maps, which the readers compare; pictures carry none."""
    for split in sorted({FOLDER_OF_PART[record.part] for record in manifest.records.values()}):
        logs = folder / "navsim_logs" / split
        seal_folder(logs, [path.name for path in logs.glob("*.pkl")])
    maps = folder / "maps"
    files = [*maps.glob("nuplan-maps-*.json"), *maps.rglob("map.gpkg")]
    seal_folder(maps, [str(path.relative_to(maps)) for path in files])


def write_questions(folder: Path, recipe: Recipe, manifest: Manifest) -> None:
    """Driving QA and trajectory conversations of every part that has logs, in ``qa/``."""
    # Imported here because workers import this module too, and these would double their memory.
    from navsim_ext.questions.write import write_qa
    from navsim_ext.readers import open_source
    from navsim_ext.readers.scene_filter import SceneFilter

    for part in PARTS:
        if any(record.part == part for record in manifest.records.values()):
            scene_filter = SceneFilter.from_yaml(folder / SPLIT_FOLDER / "scene_filter" / f"{part}.yaml")
            source = open_source(folder, FOLDER_OF_PART[part], scene_filter=scene_filter)
            write_qa(source, folder / "qa", name=part, template=recipe.template, seed=recipe.seed)


def check_same(folder: Path, recipe: Recipe) -> None:
    """Stores the recipe on first use; raises FingerprintMismatch when the folder was begun with another one."""
    fields = asdict(recipe)
    fields.pop("scenes")
    mine = Fingerprint(
        KIND,
        {"version": VERSION, "recipe": _plain(fields), "packages": package_versions("numpy", "scipy", "shapely")},
    )
    if (folder / FILE_NAME).exists():
        mine.require_equal(
            Fingerprint.load(folder),
            mine="this command",
            theirs=f"the data set begun in {folder}",
            remedy="use the options it was begun with, or another output_dir",
        )
    else:
        try:
            mine.save(folder)
        except OSError as error:
            raise cannot_write(error, folder / FILE_NAME) from error


def _plain(fields: dict) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _finished(recipe: Recipe, folder: Path, manifest: Manifest, index: int) -> bool:
    """A log is done when it is there with the windows asked for (the last log of a smaller build may have fewer)."""
    done = manifest.records.get(index)
    if done is None or len(done.tokens) < recipe.scenes_of(index):
        return False
    return (folder / "navsim_logs" / FOLDER_OF_PART[done.part] / f"{done.name}.pkl").is_file()


def _first(recipe: Recipe, folder: Path, manifest: Manifest, todo: list[int], workers: int) -> list[LogRecord]:
    """Makes one log, and from what it took says what the rest will take; raises PreflightError if that cannot be."""
    produce(recipe, folder, todo[0])  # compiles and loads everything
    began = time.perf_counter()
    record = produce(recipe, folder, todo[0])
    preflight(
        output_dir=folder,
        items=len(todo),
        bytes_per_item=record.size + MAP_BYTES / recipe.logs,
        memory_bytes=WORKER_BYTES * max(workers, 1),
        seconds_per_item=time.perf_counter() - began,
        workers=workers,
        title=f"synthetic world: {recipe.scenes} scenes in {recipe.logs} logs, {len(todo)} to be made",
    )
    return [record]


def _produce_all(recipe: Recipe, folder: Path, todo: list[int], workers: int) -> Iterator[LogRecord]:
    """Records as logs are finished."""
    kind = "sequential" if workers <= 1 or len(todo) < 2 else "processes"
    make = partial(FunctionWorker, partial(produce, recipe, folder))
    # workers share what produce loads
    made = spread(make, todo, kind=kind, num_workers=max(workers, 1), preload=["navsim_ext.synthetic.produce"])
    return (record for _, record in made)


if __name__ == "__main__":
    main()
