"""``python -m navsim_ext.closed_loop.check scenes=DIR``: does the loop itself cost anything?

Before anybody is trained or ranked in a world, the recorded drive through our own loop must score what log replay
scores. Printed for every set of scenes: the score of log replay (poses as recorded), that of the recorded trajectory
given as a plan every half second and driven by tracker and bicycle, both among replayed traffic, and their difference.
A world whose difference exceeds ``tolerance`` points is refused (exit code 2), with the scenes that lose most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.closed_loop import score
from navsim_ext.closed_loop.ego import EgoSeat
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.policy import AgentPolicy, Mixed
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.planners import Human
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.scene_v1 import read_scenes, scene_files
from navsim_ext.traffic.store import TrafficStore


class CeilingMissed(TriviumError):
    """The recorded drive does not score in the loop what it scores when it is replayed."""


@dataclass(frozen=True)
class Ceiling:
    """``rows``: id, <column>_replay, <column>_loop of every scene; ``skipped``: id -> why it could not be driven."""

    rows: pd.DataFrame
    skipped: dict[str, str]

    @property
    def difference(self) -> float:
        """Points (of 100) that the loop costs on the mean."""
        return 100.0 * float((self.rows["score_replay"] - self.rows["score_loop"]).mean())


def open_scenes(folder: str | Path) -> tuple[int, Iterator[TrafficScene]]:
    """(how many, the scenes) of a traffic store or a folder of scene.v1 files; raises MissingError for neither."""
    try:
        store = TrafficStore(folder)
    except MissingError as no_store:
        try:
            return len(scene_files(folder)), read_scenes(folder)
        except MissingError as no_files:
            raise MissingError(
                f"{folder} holds no traffic scenes: {no_store}; {no_files}. Make some with python -m "
                "navsim_ext.traffic.build"
            ) from no_files
    if not len(store):
        raise DataError(f"{folder} holds 0 traffic scenes")
    return len(store), iter(store)


def chunks(scenes: Iterable[TrafficScene], size: int) -> Iterator[list[TrafficScene]]:
    """Lists of at most ``size`` scenes."""
    part: list[TrafficScene] = []
    for scene in scenes:
        part.append(scene)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def drive_and_score(scenes: WorldScenes, policy: AgentPolicy, horizon_s: float | None) -> dict[str, np.ndarray]:
    """Columns of one drive of each scene."""
    world = World(horizon_s=horizon_s)
    state = world.reset(scenes)
    policy.start(state, scenes.sources)
    while state.steps_left >= 5:
        world.step(state, policy.act(state))
    return score.score_drives(state)


def ceiling(
    scenes: Iterable[TrafficScene], *, horizon_s: float | None = None, batch: int = 8, total: int | None = None
) -> Ceiling:
    """Both drives of all scenes. A scene is driven as long as its ego was recorded, in whole tokens, unless
    ``horizon_s`` says less. Raises DataError when not one scene could be driven."""
    rows, skipped = [], {}
    for part in chunks(track(scenes, "recorded drives", total=total), batch):
        built, usable = _buildable(part, skipped)
        if built is None:
            continue
        length = min(_recorded_s(scene) for scene in usable)
        length = min(length, horizon_s) if horizon_s else length
        replay = drive_and_score(built, Replay(), length)
        seat = EgoSeat(Human())
        loop = drive_and_score(built, Mixed({"all": Replay(), "ego": seat}), length)
        for b, scene in enumerate(usable):
            if b in seat.failures:
                skipped[scene.id] = seat.failures[b]
                continue
            row = {"id": scene.id, "horizon_s": length}
            for name in score.COLUMNS:
                row[f"{name}_replay"], row[f"{name}_loop"] = float(replay[name][b]), float(loop[name][b])
            rows.append(row)
    if not rows:
        raise DataError(f"0 scenes could be driven: {dict(list(skipped.items())[:3])}")
    return Ceiling(pd.DataFrame(rows), skipped)


def _buildable(part: Sequence[TrafficScene], skipped: dict[str, str]) -> tuple[WorldScenes | None, list[TrafficScene]]:
    """The batch of those scenes that can be driven; the others with their reason in ``skipped``."""
    usable = []
    for scene in part:
        if not scene.valid[scene.ego, scene.now]:
            skipped[scene.id] = "the ego is not observed at the present step"
        elif _recorded_s(scene) < 1.0:
            skipped[scene.id] = "less than 1 s of the ego's future was recorded"
        else:
            usable.append(scene)
    return (WorldScenes.build(usable), usable) if usable else (None, usable)


def _recorded_s(scene: TrafficScene) -> float:
    """Seconds after now for which the ego was recorded without a gap, in whole tokens."""
    after = scene.valid[scene.ego, scene.now :]
    count = int(after.cumprod().sum()) - 1
    return 0.5 * int(count * scene.dt / 0.5 + 1e-6)


def print_ceiling(console: Console, found: Ceiling, tolerance: float) -> None:
    """The table of at most 80 columns."""
    table = Table(
        title=f"Recorded drives of {len(found.rows)} scenes, x 100", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("")
    for name in score.COLUMNS:
        table.add_column(name, justify="right")
    for side, title in (("replay", "log replay"), ("loop", "through the loop")):
        table.add_row(title, *[f"{100 * found.rows[f'{name}_{side}'].mean():.1f}" for name in score.COLUMNS])
    console.print(table)
    console.print(f"The loop costs {found.difference:+.2f} points; at most {tolerance} are accepted.", highlight=False)
    for name, reason in list(found.skipped.items())[:5]:
        console.print(f"left out: {name}: {reason}", highlight=False)
    if len(found.skipped) > 5:
        console.print(f"... and {len(found.skipped) - 5} more left out")


def refuse(found: Ceiling, tolerance: float) -> None:
    """Raises CeilingMissed, with the scenes that change most, where the loop costs (or gives) more than ``tolerance``
    points."""
    if abs(found.difference) <= tolerance:
        return
    change = (found.rows["score_replay"] - found.rows["score_loop"]).abs()
    worst = found.rows.loc[change.sort_values(ascending=False).index[:5]]
    named = ", ".join(f"{r.id} ({100 * r.score_replay:.1f} -> {100 * r.score_loop:.1f})" for r in worst.itertuples())
    raise CeilingMissed(
        f"the recorded drive loses {found.difference:+.2f} points in the loop, {tolerance} are accepted: {named}. A "
        "score from these scenes would measure the loop; look at them before you use them."
    )


@job("closed_loop_check")
def main(cfg: DictConfig) -> None:
    total, scenes = open_scenes(cfg.scenes)
    found = ceiling(scenes, horizon_s=cfg.horizon_s, batch=cfg.batch_size, total=total)
    print_ceiling(Console(), found, cfg.tolerance)
    refuse(found, cfg.tolerance)


if __name__ == "__main__":
    main()
