"""One table of planners that drove the same scenes: score, gates, goals reached, jerk.

    python -m sim_agents.ego.table drives=[runs/idm,runs/token,runs/tree] scenes=SCENES output_dir=runs/table

``drives`` are folders of ``navsim_ext.closed_loop.drive``. A goal is where the scene's ego was recorded last within the
time that was driven; it is reached where the drive comes within 2 m of it. Jerk is the mean absolute change of
acceleration, of speeds over half seconds (over single steps it would be rounding). Intervals are 95 % bootstraps over
scenes; invalid drives take no part and are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.closed_loop.drive import DRIVES_FOLDER, SCORES_FILE
from navsim_ext.closed_loop.events import GOAL_RADIUS_M
from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_S, TOKEN_STEPS
from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import write_json_atomic
from navsim_ext.runtime.config import job
from navsim_ext.runtime.parquet import read_frame
from navsim_ext.runtime.progress import track
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore

TABLE_FILE = "table.json"
COLUMNS = ("score", "nc", "dac", "tlc", "ep", "ttc", "c", "goal", "jerk")
SHARES = COLUMNS[:-1]  # shown x 100


def goal_reached(driven: TrafficScene, recorded: TrafficScene) -> float:
    """1 or 0; NaN where the recording ends at the present, or its ego did not move."""
    seen = np.flatnonzero(recorded.valid[recorded.ego])
    driven_s = (driven.num_steps - 1 - driven.now) * driven.dt
    last = seen[seen <= recorded.now + round(driven_s / recorded.dt)].max()
    way = recorded.pose[recorded.ego, [recorded.now, last], :2]
    goal = way[1] + recorded.origin[:2] - driven.origin[:2]
    if last == recorded.now or np.hypot(*(way[1] - way[0])) <= GOAL_RADIUS_M:
        return float("nan")
    path = driven.pose[driven.ego, driven.now :, :2]
    return float((np.hypot(*(path - goal).T) <= GOAL_RADIUS_M).any())


def mean_jerk(track_xy: NDArray[np.floating]) -> float:
    """m/s^3 of positions [n,2] 0.1 s apart; NaN for less than 1.5 s."""
    speed = np.hypot(*np.diff(track_xy.astype(np.float64), axis=0).T) / STEP_S
    count = len(speed) // TOKEN_STEPS
    if count < 3:
        return float("nan")
    mean = speed[: count * TOKEN_STEPS].reshape(count, TOKEN_STEPS).mean(axis=1)
    return float(np.abs(np.diff(mean, n=2) / TOKEN_S**2).mean())


def measure(folder: Path, scenes: TrafficStore) -> pd.DataFrame:
    """The rows of a folder of drives, with ``goal`` and ``jerk``. Raises MissingError for a folder that is none."""
    if not (folder / SCORES_FILE).is_file():
        raise MissingError(f"{folder} holds no {SCORES_FILE}: drive first (python -m navsim_ext.closed_loop.drive)")
    rows = read_frame(folder / SCORES_FILE, "drive again")
    drives = TrafficStore(folder / DRIVES_FOLDER)
    goal, jerk = [], []
    for row in track(rows.itertuples(), f"reading {folder.name}", total=len(rows)):
        if row.id not in scenes:
            raise DataError(f"{folder}: scene {row.id} is not in {scenes.folder}: give the store that was driven")
        if not row.valid:
            goal.append(np.nan)
            jerk.append(np.nan)
            continue
        driven = drives.load(row.id)
        goal.append(goal_reached(driven, scenes.load(row.id)))
        jerk.append(mean_jerk(driven.pose[driven.ego, driven.now :, :2]))
    return rows.assign(goal=goal, jerk=jerk)


def summarise(rows: pd.DataFrame) -> dict[str, Estimate]:
    valid = rows[rows["valid"]]
    return {name: bootstrap_mean(valid[name].to_numpy(float), valid["id"].tolist()) for name in COLUMNS}


def require_same_scenes(tables: Mapping[str, pd.DataFrame]) -> None:
    """Raises DataError where two planners drove other scenes, among others, or for another time."""
    first_name, first = next(iter(tables.items()))
    for name, rows in tables.items():
        if set(rows["id"]) != set(first["id"]):
            raise DataError(f"{name} drove {len(rows)} scenes, {first_name} {len(first)}, and not the same ones")
        if set(rows["agents"]) != set(first["agents"]):
            raise DataError(f"{name} drove among {set(rows['agents'])}, {first_name} among {set(first['agents'])}")


def print_table(tables: Mapping[str, dict[str, Estimate]], invalid: Mapping[str, int], console: Console) -> None:
    """At most 80 columns; shares x 100, jerk in m/s^3."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("planner", overflow="fold", max_width=16)
    for name in (*COLUMNS, "inv."):
        table.add_column(name, justify="right", no_wrap=True)
    for name, found in tables.items():
        cells = [found["score"].format()]
        cells += [f"{100 * found[c].mean:.1f}" if found[c].count else "-" for c in SHARES[1:]]
        cells += [f"{found['jerk'].mean:.2f}" if found["jerk"].count else "-", str(invalid[name])]
        table.add_row(name, *cells)
    console.print(table)


@job("ego_table")
def main(cfg: DictConfig) -> None:
    scenes, tables = TrafficStore(cfg.scenes), {}
    for folder in map(Path, cfg.drives):
        rows = measure(folder, scenes)
        name = str(rows["planner"].iloc[0])
        if name in tables:
            raise DataError(f"two of the folders hold drives of {name!r}: drive with other names (name=...)")
        tables[name] = rows
    require_same_scenes(tables)
    found = {name: summarise(rows) for name, rows in tables.items()}
    invalid = {name: int((~rows["valid"]).sum()) for name, rows in tables.items()}
    print_table(found, invalid, Console())
    content = {
        "scenes": len(next(iter(tables.values()))), "agents": sorted(set(next(iter(tables.values()))["agents"])),
        "planners": {
            name: {"invalid": invalid[name], "estimates": {key: value.to_json() for key, value in values.items()}}
            for name, values in found.items()
        },
    }  # fmt: skip
    write_json_atomic(Path(cfg.output_dir) / TABLE_FILE, content)


if __name__ == "__main__":
    main()
