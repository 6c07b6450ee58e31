"""What a store of traffic scenes holds, and what is wrong in its recordings:

    python -m navsim_ext.traffic.report scenes=STORE output_dir=DIR

``DIR/scenes.jsonl`` has one line per scene (counts, overlapping pairs, vehicles off the road, the reader's notes),
``DIR/summary.json`` their sums, which are also printed. A killed run goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.errors import DataError
from navsim_ext.files import write_json_atomic
from navsim_ext.runtime.checksums import checked_line, checked_lines
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import map_items
from navsim_ext.traffic.codes import LANES, AgentKind, PieceKind, Role
from navsim_ext.traffic.findings import off_road, overlaps
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore

logger = logging.getLogger(__name__)

LINES_FILE, SUMMARY_FILE = "scenes.jsonl", "summary.json"
MOVING_MPS = 2.0
COUNTED = (
    "agents vehicles pedestrians cyclists others moving predicted tracks_with_gaps lone_observations lanes road_edges "
    "lights agents_overlapping vehicles_off_road moving_off_road"
).split()


def describe(scene: TrafficScene) -> dict[str, Any]:
    """One line of the report."""
    found, off = overlaps(scene), off_road(scene)
    seen_again = np.diff(scene.valid.astype(np.int8), axis=1) == 1
    kinds = Counter(scene.kind.tolist())
    return {
        "id": scene.id,
        "source": scene.source,
        "steps": scene.num_steps,
        "dt": scene.dt,
        "now": scene.now,
        "agents": scene.num_agents,
        "vehicles": kinds[AgentKind.VEHICLE],
        "pedestrians": kinds[AgentKind.PEDESTRIAN],
        "cyclists": kinds[AgentKind.CYCLIST],
        "others": kinds[AgentKind.OTHER],
        "moving": len(_moving(scene)),
        "predicted": int(((scene.role & Role.PREDICT) > 0).sum()),
        "tracks_with_gaps": int((seen_again.sum(axis=1) + scene.valid[:, 0] > 1).sum()),
        "lone_observations": int((scene.valid & ~scene.speed_known).sum()),
        "lanes": len(scene.pieces(*LANES)),
        "road_edges": len(scene.pieces(PieceKind.ROAD_EDGE)),
        "lights": len(scene.light_piece),
        "agents_overlapping": len({one for pair in found for one in (pair.first, pair.second)}),
        "vehicles_off_road": None if off is None else len(off),
        "moving_off_road": None if off is None else len(_moving(scene) & {one.agent for one in off}),
        "overlaps": [asdict(one) for one in found],
        "off_road": None if off is None else [asdict(one) for one in off],
        "notes": dict(scene.notes),
    }


def _moving(scene: TrafficScene) -> set[int]:
    """Ids of those that are fast at the present step."""
    return set(scene.agent_id[scene.speed[:, scene.now] > MOVING_MPS].tolist())


def report(
    store_folder: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    num_workers: int = 1,
    count: int | None = None,
) -> dict[str, Any]:
    """Writes (or goes on writing) the report of a store; returns the content of ``summary.json``.

    Raises DataError when ``output_dir`` has the report of another store.
    """
    store, folder = TrafficStore(store_folder), Path(output_dir)
    ids = list(islice(store.ids, count))
    if not ids:
        raise DataError(f"{store_folder} holds 0 scenes: nothing to report")
    with FolderLock(folder):
        path = folder / LINES_FILE
        head = checked_line({"store": store.fingerprint.digest})
        done = _whole_lines(path, head, ids)
        with open(path, "r+" if path.exists() else "w") as stream:
            stream.seek(0)
            stream.truncate(sum(len(line.encode()) for line in done))
            stream.seek(0, os.SEEK_END)
            if not done:
                stream.write(head)
            remaining = ids[max(len(done) - 1, 0) :]
            made = map_items(partial(_line, str(store_folder)), remaining, num_workers=num_workers)
            for line in track(made, "traffic report, scenes", total=len(ids), done=len(ids) - len(remaining)):
                stream.write(line)
                stream.flush()
        found = [line for _, line in checked_lines(path.read_bytes()) if line is not None]
        summary = summarize(found[1:])
        write_json_atomic(folder / SUMMARY_FILE, summary)
    return summary


def _whole_lines(path: Path, head: str, ids: list[str]) -> list[str]:
    """The lines of an earlier run that can stay, its head among them: whole ones, of the first scenes in order."""
    if not path.is_file():
        return []
    lines = [line for _, line in checked_lines(path.read_bytes())]
    if not lines or lines[0] is None:
        return []
    if checked_line(lines[0]) != head:
        raise DataError(f"{path} is the report of another store: choose another output_dir")
    right = takewhile(lambda pair: pair[0] is not None and pair[0].get("id") == pair[1], zip(lines[1:], ids))
    return [head, *(checked_line(line) for line, _ in right)]


@lru_cache(maxsize=2)
def _store(folder: str) -> TrafficStore:
    return TrafficStore(folder)


def _line(folder: str, scene_id: str) -> str:
    return checked_line(describe(_store(folder).load(scene_id)))


def summarize(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the lines of a report; off-road counts come with the number of scenes that could be asked."""
    totals: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for line in lines:
        totals["scenes"] += 1
        totals["scenes_with_road"] += line["vehicles_off_road"] is not None
        totals["vehicles_asked"] += line["vehicles"] if line["vehicles_off_road"] is not None else 0
        for name in COUNTED:
            totals[name] += line[name] or 0
        sources[line["source"]] += 1
        notes.update(line["notes"])
    return {"totals": dict(totals), "sources": dict(sorted(sources.items())), "notes": dict(sorted(notes.items()))}


def table(summary: dict[str, Any]) -> Table:
    """The summary at 80 columns."""
    totals = summary["totals"]
    asked = {"vehicles_off_road": "vehicles_asked", "moving_off_road": "moving"}
    without = ("agents", "lanes", "road_edges", "lights", "lone_observations")
    shown = Table("what", "count", "share", title=f"{totals['scenes']} traffic scenes")
    for name in COUNTED:
        of = asked.get(name, "agents")
        share = f"{100.0 * totals[name] / totals[of]:.1f} % of {of.replace('_', ' ')}" if totals.get(of) else ""
        shown.add_row(name.replace("_", " "), f"{totals[name]:,}", "" if name in without else share)
    for note, number in summary["notes"].items():
        shown.add_row(f"note: {note}", f"{number:,}", "")
    return shown


@job("traffic_report")
def main(cfg: DictConfig) -> None:
    summary = report(cfg.scenes, cfg.output_dir, num_workers=cfg.num_workers, count=cfg.count)
    Console().print(table(summary))
    logger.info(
        "%s: one line per scene, with the overlapping and off-road road users", Path(cfg.output_dir) / LINES_FILE
    )


if __name__ == "__main__":
    main()
