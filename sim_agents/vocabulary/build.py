"""Builds a motion vocabulary: ``python -m sim_agents.vocabulary.build scenes=DIR method=k_disks output_dir=DIR``.

``scenes`` is a store of ``navsim_ext.traffic.build`` (10 Hz; verlet and published need it only to measure themselves);
``held_out`` another one, on which the error of
reconstruction is measured. The folder holds the vocabulary with the fingerprint of its data, and ``report.json``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.errors import DataError
from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import digest_file
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore
from sim_agents.vocabulary.encode import encode
from sim_agents.vocabulary.grid import GridCells, grid
from sim_agents.vocabulary.k_disks import k_disks
from sim_agents.vocabulary.motion import (
    CLASS_NAMES,
    MATCHING_BOX_M,
    MotionVocabulary,
    ShapeVocabulary,
    VerletVocabulary,
    class_of,
)
from sim_agents.vocabulary.published import published_tokens
from sim_agents.vocabulary.segments import segments_of
from sim_agents.vocabulary.store import save_vocabulary, vocabulary_fingerprint

logger = logging.getLogger(__name__)

METHODS = ("k_disks", "grid", "verlet", "published")
REPORT_FILE = "report.json"
COVERED_M = 0.1
"""A half second whose end is reconstructed to within this is covered."""


@dataclass(frozen=True)
class VocabularySettings:
    """``tokens`` a class of k-disks; ``cells`` a class of a grid; ``mirror`` adds left-right twins of all motions;
    ``stretch`` {class: factors} adds every motion so many times as long; ``file`` of a published vocabulary."""

    method: str = "k_disks"
    tokens: int = 512
    cells: dict[str, GridCells] | None = None
    mirror: bool = True
    seed: int = 0
    file: str | None = None
    stretch: dict[str, list[float]] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DataError(f"method={self.method}: one of {', '.join(METHODS)} was expected")
        if (self.file is None) == (self.method == "published"):
            raise DataError(f"method={self.method}, file={self.file}: method=published needs a file, others take none")
        for name, factors in (self.stretch or {}).items():
            if name not in CLASS_NAMES or not factors or not all(0.0 < one < math.inf for one in factors):
                raise DataError(f"stretch.{name}={factors}: one of {', '.join(CLASS_NAMES)}, and factors above 0")

    @property
    def needs_scenes(self) -> bool:
        return self.method in ("k_disks", "grid")

    def fields(self) -> dict[str, Any]:
        """What the vocabulary follows from beside the scenes, as JSON: part of its fingerprint."""
        told: dict[str, Any] = {"method": self.method}
        if self.needs_scenes:
            told |= {"mirror": self.mirror, "seed": self.seed, "stretch": self.stretch}
        if self.method == "k_disks":
            told["tokens"] = self.tokens
        elif self.method == "grid":
            told["cells"] = {name: vars(one) for name, one in (self.cells or {}).items()}
        elif self.method == "published":
            told["file"] = digest_file(self.file)
        return told


def make_vocabulary(
    settings: VocabularySettings, scenes: Iterable[TrafficScene]
) -> tuple[MotionVocabulary, dict[str, Any]]:
    """The vocabulary and what is to be told of it, per class. A class without motion in ``scenes`` gets standing
    still alone, which is said in the report."""
    if settings.method == "verlet":
        vocabulary = VerletVocabulary()
        return vocabulary, {name: {"tokens": vocabulary.size} for name in CLASS_NAMES}
    if settings.method == "published":
        found = published_tokens(settings.file)
        return _stacked(list(found.values())), {name: {"tokens": len(table)} for name, table in found.items()}
    segments = segments_of(scenes, mirror=settings.mirror, seed=settings.seed, stretch=settings.stretch)
    tables, told = [], {}
    for name, box in zip(CLASS_NAMES, MATCHING_BOX_M, strict=True):
        entry: dict[str, Any] = {"segments": len(segments[name])}
        if len(segments[name]) == 0:
            table = np.zeros((1, TOKEN_STEPS, 3), np.float32)
            logger.warning("no %s moves for 0.5 s in the scenes: its only token is standing still", name)
        elif settings.method == "k_disks":
            table, entry["radius_m"] = k_disks(segments[name], box, settings.tokens, seed=settings.seed)
        else:
            table = grid(segments[name], (settings.cells or {}).get(name, GridCells()))
        tables.append(table)
        told[name] = entry | {"tokens": len(table)}
    return _stacked(tables), told


def _stacked(tables: list[NDArray[np.float32]]) -> ShapeVocabulary:
    longest = max(map(len, tables))
    shapes = np.stack([np.concatenate([table, np.repeat(table[:1], longest - len(table), 0)]) for table in tables])
    return ShapeVocabulary(torch.from_numpy(shapes), torch.tensor([len(table) for table in tables]))


def reconstruction(vocabulary: MotionVocabulary, scenes: Iterable[TrafficScene]) -> dict[str, dict[str, Any]]:
    """Per class: half seconds matched, mean and 99th percentile of the centre's error (m), share within 0.1 m."""
    errors: dict[str, list[NDArray]] = {name: [] for name in CLASS_NAMES}
    for scene in scenes:
        stride = round(0.5 / scene.dt)
        poses = torch.from_numpy(scene.pose[:, ::stride])
        valid = torch.from_numpy(scene.valid[:, ::stride])
        classes = class_of(torch.from_numpy(scene.kind.astype(np.int64)))
        if valid.shape[1] < 2:
            continue
        found = encode(vocabulary, classes, poses, valid)
        for row, name in enumerate(CLASS_NAMES):
            errors[name].append(found.error[(classes == row)[:, None] & found.valid].numpy())
    told = {}
    for name, parts in errors.items():
        error = np.concatenate(parts) if parts else np.empty(0)
        told[name] = {"half_seconds": len(error)}
        if len(error):
            told[name] |= {
                "mean_error_m": float(error.mean()),
                "p99_error_m": float(np.percentile(error, 99)),
                "covered": float((error <= COVERED_M).mean()),
            }
    return told


def print_report(report: dict[str, Any], console: Console) -> None:
    table = Table(title="Motion vocabulary", title_justify="left")
    for column in ("class", "tokens", "segments", "half seconds", "mean error", "99 %", "within 0.1 m"):
        table.add_column(column, justify="right" if column != "class" else "left")
    for name in CLASS_NAMES:
        made, held = report["classes"][name], report["reconstruction"][name]
        row = [name, str(made["tokens"]), str(made.get("segments", "-")), str(held["half_seconds"])]
        if held["half_seconds"]:
            row += [f"{held[key] * 100:.1f} cm" for key in ("mean_error_m", "p99_error_m")] + [f"{held['covered']:.1%}"]
        table.add_row(*row)
    console.print(table)


def _span(values: Sequence[float]) -> tuple[float, float, int]:
    """(low, high, number of cells) of an option; raises DataError for a range that is none."""
    low, high, count = (float(value) for value in values)
    if not low < high or count < 1 or count != int(count):
        raise DataError(f"cells {list(values)}: low < high and a whole number of cells were expected")
    return low, high, int(count)


@job("vocabulary")
def main(cfg: DictConfig) -> None:
    started = time.perf_counter()
    cells = {
        name: GridCells(_span(one.along), _span(one.across), one.reach, one.neighbours)
        for name, one in cfg.cells.items()
    }
    stretch = {name: [float(one) for one in factors] for name, factors in cfg.stretch.items()}
    settings = VocabularySettings(cfg.method, cfg.tokens, cells, cfg.mirror, cfg.seed, cfg.file, stretch)
    store = TrafficStore(cfg.scenes)
    held_out = store if cfg.held_out is None else TrafficStore(cfg.held_out)
    told = track(store, "segments, scenes", total=len(store)) if settings.needs_scenes else ()
    vocabulary, classes = make_vocabulary(settings, told)
    fingerprint = vocabulary_fingerprint(settings.fields(), store.fingerprint if settings.needs_scenes else None)
    save_vocabulary(cfg.output_dir, vocabulary, fingerprint)
    report = {
        "classes": classes,
        "reconstruction": reconstruction(vocabulary, track(held_out, "reconstruction, scenes", total=len(held_out))),
        "measured_on": str(cfg.scenes if cfg.held_out is None else cfg.held_out),
    }
    write_json_atomic(Path(cfg.output_dir) / REPORT_FILE, report)
    print_report(report, Console())
    logger.info("%s: %.1f s", cfg.output_dir, time.perf_counter() - started)


if __name__ == "__main__":
    main()
