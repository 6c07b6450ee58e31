"""``python -m navsim_ext.closed_loop.drive planner=... agents=... scenes=DIR horizon_s=15 output_dir=DIR``

Drives every scene with one planner in the ego's seat among replayed, rule-following or reacting road users, and scores
the whole drives. Writes ``drives/`` (traffic scenes of what happened), ``scores.parquet`` (one row a scene),
``aggregate.json`` (means with bootstrap intervals over scenes) and ``fingerprint.json``. Killed and started again, it
goes on with the first scene that is not finished; a folder begun with other settings is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.closed_loop import score, tracker
from navsim_ext.closed_loop.check import chunks, open_scenes
from navsim_ext.closed_loop.drives import drive_scene
from navsim_ext.closed_loop.ego import EgoSeat
from navsim_ext.closed_loop.policy import AgentPolicy, Mixed
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, TriviumError
from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import FILE_NAME, Fingerprint, digest_tokens
from navsim_ext.planners import Planner
from navsim_ext.runtime.config import job
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.parquet import read_frame, write_table
from navsim_ext.runtime.preflight import preflight
from navsim_ext.runtime.progress import track
from navsim_ext.shards import ShardWriter, merge
from navsim_ext.traffic import record
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import fingerprint_of

SCORES_FILE, AGGREGATE_FILE, DRIVES_FOLDER, ROWS_FOLDER = "scores.parquet", "aggregate.json", "drives", "rows"
SCORED = (*score.COLUMNS, "unknown", "contacts", "progress_m", "recorded_m", "mean_speed", "first_fault_s", "clean")
NUMBERS = (*SCORED, "unanswered")
BYTES_PER_SCENE = 120_000
REMEDY = "delete it and run the command again: its scenes are driven again"


class NothingDriven(TriviumError):
    """Not one scene could be driven to its end."""


def seat(planner: Planner | AgentPolicy, cfg: DictConfig) -> AgentPolicy:
    """What drives the ego: a policy as it is, a planner of the suite behind tracker, encoder and cameras."""
    if hasattr(planner, "act"):
        return planner
    encoder = instantiate(cfg.encoder) if cfg.encoder else None
    cameras = instantiate(cfg.cameras) if cfg.cameras else None
    return EgoSeat(
        planner, encoder=encoder, cameras=cameras, ask_every_s=cfg.ask_every_s, without_plan=cfg.without_plan
    )


def drive_batch(
    sources: Sequence[TrafficScene], ego: AgentPolicy, agents: AgentPolicy, horizon_s: float, device: str = "cpu"
) -> tuple[list[dict], list[TrafficScene]]:
    """(rows, drives) of some scenes; a row whose scene could not be driven has ``valid`` False and a ``reason``."""
    rows, usable = [], []
    for scene in sources:
        if scene.valid[scene.ego, scene.now]:
            usable.append(scene)
        else:
            rows.append(_row(scene, False, f"the ego is not observed at the present step {scene.now}"))
    if not usable:
        return rows, []
    world = World(horizon_s=horizon_s, device=device)
    state = world.reset(WorldScenes.build(usable, device))
    policy = Mixed({"all": agents, "ego": ego})
    policy.start(state, usable)
    while state.steps_left >= 5:
        world.step(state, policy.act(state))
    columns = score.score_drives(state)
    failures: Mapping[int, str] = getattr(ego, "failures", {})
    unanswered: Sequence[int] = getattr(ego, "unanswered", [0] * len(usable))
    drives = []
    for b, scene in enumerate(usable):
        values = {name: float(columns[name][b]) for name in SCORED} if b not in failures else {}
        values["unanswered"] = float(unanswered[b])
        rows.append(_row(scene, b not in failures, failures.get(b, ""), values))
        drives.append(drive_scene(state, b))
    return rows, drives


def _row(scene: TrafficScene, valid: bool, reason: str, values: Mapping[str, float] | None = None) -> dict:
    nothing = dict.fromkeys(NUMBERS, np.nan)
    return {"id": scene.id, "source": scene.source, "valid": valid, "reason": reason, **nothing, **(values or {})}


def summarise(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Means of all numbers over valid scenes, with intervals; each scene is a drive of its own."""
    valid = rows[rows["valid"]]
    return {name: bootstrap_mean(valid[name].to_numpy(float), valid["id"].tolist()) for name in NUMBERS}


def drive(cfg: DictConfig, console: Console) -> pd.DataFrame:
    """Runs the command and returns the table. Raises NothingDriven when no row is valid."""
    output = Path(cfg.output_dir)
    if not 0.5 <= cfg.horizon_s <= 600.0 or cfg.batch_size < 1:
        raise DataError(f"horizon_s {cfg.horizon_s} (0.5 to 600) or batch_size {cfg.batch_size} (>= 1) makes no sense")
    total, scenes = open_scenes(cfg.scenes)
    planner, agents = instantiate(cfg.planner), instantiate(cfg.agents)
    name = cfg.name or planner.name
    made_from = {
        "planner": getattr(planner, "fingerprint", None),
        "agents": getattr(agents, "fingerprint", None),
        "tracker": None if hasattr(planner, "act") else tracker.fingerprint(),
    }
    made = Fingerprint(
        "closed-loop-drives",
        {
            "planner": name,
            "planner_settings": OmegaConf.to_container(cfg.planner, resolve=True),
            "agents": OmegaConf.to_container(cfg.agents, resolve=True),
            "encoder": OmegaConf.to_container(cfg.encoder, resolve=True) if cfg.encoder else None,
            "cameras": OmegaConf.to_container(cfg.cameras, resolve=True) if cfg.cameras else None,
            "horizon_s": float(cfg.horizon_s),
            "ask_every_s": float(cfg.ask_every_s),
            "without_plan": str(cfg.without_plan),
            "scenes": total,
        },
        {"score": score.fingerprint(), **{k: v for k, v in made_from.items() if isinstance(v, Fingerprint)}},
    )
    with FolderLock(output):
        if (output / FILE_NAME).is_file():
            made.require_equal(
                Fingerprint.load(output),
                mine="this command",
                theirs=f"the drives in {output}",
                remedy="Choose another output_dir, or delete the folder to drive again.",
            )
        else:
            made.save(output)
        preflight(
            output_dir=output, items=total, bytes_per_item=BYTES_PER_SCENE, title=f"driving ({name})", console=console
        )
        rows = _drive_all(cfg, scenes, total, seat(planner, cfg), agents, name, output, made)
        write_table(output / SCORES_FILE, rows)
        estimates = summarise(rows)
        content = {
            "planner": name, "agents": agents.name, "scenes": len(rows), "invalid": int((~rows["valid"]).sum()),
            "unanswered": int(rows["unanswered"].sum()),
            "ids": digest_tokens(rows["id"]), "horizon_s": float(cfg.horizon_s), "score": score.fingerprint().digest,
            "estimates": {key: value.to_json() for key, value in estimates.items()},
        }  # fmt: skip
        write_json_atomic(output / AGGREGATE_FILE, content)
    print_drives(console, {name: rows}, agents.name)
    if not rows["valid"].any():
        raise NothingDriven(
            f"0 of {len(rows)} scenes were driven to the end: {rows['reason'].value_counts().to_dict()}"
        )
    return rows


def _drive_all(cfg, scenes, total, ego, agents, name, output, made) -> pd.DataFrame:
    folder = output / ROWS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    store = fingerprint_of({"driven": made.digest})
    with ShardWriter(output / DRIVES_FOLDER, store) as writer:
        known: set[str] = set()

        def todo() -> Iterator[TrafficScene]:
            for scene in scenes:
                if scene.id in known:
                    raise DataError(f"{cfg.scenes} holds two scenes with the id {scene.id!r}: make ids unique")
                known.add(scene.id)
                if not _row_file(folder, scene.id).is_file():
                    yield scene

        done = len(list(folder.glob("*.parquet")))
        driven = (
            row
            for part in chunks(todo(), cfg.batch_size)
            for row in _drive_part(part, ego, agents, cfg, name, folder, writer)
        )
        for _ in track(driven, f"driving ({name})", total=total, done=done):
            pass
    if (output / DRIVES_FOLDER).is_dir():
        merge(output / DRIVES_FOLDER)
    return pd.concat([read_frame(path, REMEDY) for path in sorted(folder.glob("*.parquet"))], ignore_index=True)


def _drive_part(part, ego, agents, cfg, name, folder, writer) -> Iterator[dict]:
    rows, drives = drive_batch(part, ego, agents, cfg.horizon_s, cfg.device)
    for driven in drives:
        if driven.id not in writer.done:  # the drive first, then the row that says it is finished
            writer.put(driven.id, record.encode(driven))
    for row in rows:
        table = pd.DataFrame([{**row, "planner": name, "agents": agents.name}])
        write_table(_row_file(folder, row["id"]), table)
        yield row


def _row_file(folder: Path, scene_id: str) -> Path:
    return folder / f"{digest_tokens([scene_id])[:24]}.parquet"


def print_drives(console: Console, tables: Mapping[str, pd.DataFrame], agents: str) -> None:
    """Scores and terms of several planners, at most 80 columns."""
    count = max(len(rows) for rows in tables.values())
    table = Table(
        title=f"Closed loop among {agents}: {count} scenes, x 100 [95 %]", title_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("planner", overflow="fold", min_width=12, max_width=18)
    for column in score.COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("inv.", justify="right")
    for name, rows in tables.items():
        estimates = summarise(rows)
        cells = [estimates["score"].format()]
        cells += [_points(estimates[c].mean) if estimates[c].count else "-" for c in score.COLUMNS[1:]]
        table.add_row(name, *cells, str(int((~rows["valid"]).sum())))
    console.print(table)
    unanswered = {name: int(rows["unanswered"].sum()) for name, rows in tables.items()}
    for name, count in unanswered.items():
        if count:
            console.print(f"{name}: no plan at {count} questions", highlight=False)
    console.print(
        f"score {score.fingerprint().digest[:12]}: not comparable with PDMS, EPDMS or nuPlan's closed-loop score"
    )


def _points(share: float) -> str:
    """A share in points of 100, in at most four characters."""
    return "100" if share >= 0.9995 else f"{100 * share:.1f}"


@job("closed_loop_drive")
def main(cfg: DictConfig) -> None:
    drive(cfg, Console())


if __name__ == "__main__":
    main()
