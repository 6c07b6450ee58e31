"""``python -m navsim_ext.evaluation.rank scenes=DIR agents=[replay,idm] truth=law output_dir=DIR``

Which traffic ranks planners rightly? Every planner of a panel drives every scene among each kind of traffic, and among
the traffic that is the truth (in the synthetic world the law that made it). For each kind: Spearman and Kendall rank
correlation with the truth, mean absolute error of the closed-loop score, and the differences between kinds, all with
bootstrap intervals over scenes. The score is fixed before anybody looks (``closed_loop/score.py``).

``agents`` and ``truth`` name entries of ``traffic`` (replay, idm, law, constant_velocity or a policy of your own), or
are checkpoints of ``sim_agents.train``. ``planners`` is a mapping from names to planners: the panel of twenty and five
that leave the recording (``configs/rank/planners``), ``panel`` chooses some of them, ``more_planners`` adds your own.

Each (planner, traffic) is a folder of ``navsim_ext.closed_loop.drive`` in ``output_dir/drives``: a killed run goes on,
drive by drive, and more planners or traffic may be added later. Writes ``rank.json`` and ``scores.parquet``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate
from navsim_ext.closed_loop import drive
from navsim_ext.closed_loop.check import open_scenes
from navsim_ext.closed_loop.score import fingerprint as score_fingerprint
from navsim_ext.errors import DataError
from navsim_ext.evaluation.drives import matrix, read_drives
from navsim_ext.evaluation.ranking import FEWEST_PLANNERS, MEASURES, Agreement, agreement
from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import digest_tokens
from navsim_ext.runtime.config import job
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import spread

RESULT_FILE, SCORES_FILE = "rank.json", "scores.parquet"
CHECKPOINT_SUFFIX = ".ckpt"
LEARNED = "sim_agents.ego.actors.traffic"  # drives by a checkpoint


def kinds_of_traffic(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Name -> configuration of the truth (first) and of every kind to be judged. Raises DataError for a name that
    nobody knows, one that comes twice, or the truth among the judged."""
    known: dict[str, Any] = OmegaConf.to_container(cfg.traffic, resolve=True)
    found: dict[str, dict[str, Any]] = {}
    for name in (cfg.truth, *cfg.agents):
        if name in known:
            label, node = name, known[name]
        elif str(name).endswith(CHECKPOINT_SUFFIX):
            label = _label(Path(name), found)
            node = {"_target_": LEARNED, "checkpoint": str(name), "seed": cfg.seed, "name": label}
        else:
            raise DataError(
                f"there is no traffic {name!r}; there are {', '.join(known)}, or a checkpoint (*{CHECKPOINT_SUFFIX})"
            )
        if label in found:
            raise DataError(f"traffic {label!r} comes twice in truth and agents")
        found[label] = node
    if len(found) < 2:
        raise DataError("agents=[] names no traffic to judge")
    return found


def _label(path: Path, taken: Mapping[str, Any]) -> str:
    """A checkpoint's name in tables: its file's, with as many of its folders as it takes to be unique."""
    parts = path.with_suffix("").parts
    for count in range(1, len(parts) + 1):
        label = "-".join(part.strip("/") for part in parts[-count:])
        if label not in taken:
            return label
    return str(path)


def panel(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Name -> configuration of the planners. Raises DataError for fewer than FEWEST_PLANNERS or unknown names."""
    every: dict[str, Any] = OmegaConf.to_container(cfg.planners, resolve=True)
    wanted = list(every) if cfg.panel is None else list(cfg.panel)
    unknown = sorted(set(wanted) - set(every))
    if unknown:
        raise DataError(f"the panel has no planner {unknown[0]!r}; it has {', '.join(every)}")
    chosen = {name: every[name] for name in wanted}
    for name, node in OmegaConf.to_container(cfg.more_planners, resolve=True).items():
        if name in chosen:
            raise DataError(f"more_planners: {name!r} is a planner of the panel already")
        chosen[name] = node
    if len(chosen) < FEWEST_PLANNERS:
        raise DataError(f"{len(chosen)} planners: a ranking needs at least {FEWEST_PLANNERS} planners")
    return chosen


DRIVE_KEYS = ("scenes", "horizon_s", "ask_every_s", "without_plan", "batch_size", "device")
"""Options of a drive that all drives of a ranking share."""


class Driver:
    """Drives one (planner, traffic) after the other, in a process of its own."""

    def __init__(self, settings: Mapping[str, Any], name: str) -> None:
        self.settings, self.name = settings, name

    def process(self, item: tuple[str, Mapping[str, Any], str, Mapping[str, Any]]) -> str:
        """The folder of the drives of (planner's name, planner, traffic's name, traffic)."""
        name, planner, traffic, agents = item
        folder = drives_folder(self.settings["output_dir"], traffic, name)
        seen = planner.get("eyes", False)
        cfg = OmegaConf.create({
            **{key: self.settings[key] for key in DRIVE_KEYS},
            "planner": {key: value for key, value in planner.items() if key != "eyes"}, "agents": dict(agents),
            "name": name, "output_dir": str(folder),
            "encoder": self.settings["encoder"] if seen else None,
            "cameras": self.settings["cameras"] and {**self.settings["cameras"], "folder": str(folder / "pictures")}
            if seen else None,
        })  # fmt: skip
        drive.drive(cfg, Console(file=io.StringIO()))
        return str(folder)

    def close(self) -> None:
        """Nothing is kept open."""


def drives_folder(output_dir: str | Path, traffic: str, planner: str) -> Path:
    """Where the drives of a planner among some traffic are."""
    return Path(output_dir) / "drives" / traffic / planner


def rank(cfg: DictConfig, console: Console) -> Agreement:
    """Runs the command. Raises DataError where nothing can be ranked."""
    planners, traffic = panel(cfg), kinds_of_traffic(cfg)
    total, _ = open_scenes(cfg.scenes)
    settings = OmegaConf.to_container(cfg, resolve=True)
    items = [(p, node, t, agents) for t, agents in traffic.items() for p, node in planners.items()]
    console.print(
        f"{len(planners)} planners x {len(traffic)} kinds of traffic x {total} scenes = {len(items) * total} drives of "
        f"{cfg.horizon_s:g} s", highlight=False,
    )  # fmt: skip
    made = spread(
        partial(Driver, settings), items, kind=cfg.workers, num_workers=cfg.num_workers, ray_address=cfg.ray_address
    )
    for _ in track(made, "planner x traffic", total=len(items)):
        pass
    truth, *judged = traffic
    tables = {t: [read_drives(drives_folder(cfg.output_dir, t, p))[0] for p in planners] for t in traffic}
    together, tokens = matrix([table for kind in tables.values() for table in kind])
    scores = dict(zip(traffic, together.reshape(len(traffic), len(planners), -1)))
    found = agreement({name: scores[name] for name in judged}, scores[truth])
    everything = pd.concat(
        [table.assign(traffic=kind) for kind, several in tables.items() for table in several], ignore_index=True
    )
    output = Path(cfg.output_dir)
    write_table(output / SCORES_FILE, everything)
    left_out = total - len(tokens)
    content = {
        "planners": list(planners), "truth": truth, "scenes": len(tokens), "left_out": left_out,
        "ids": digest_tokens(tokens), "score": score_fingerprint().digest, "horizon_s": float(cfg.horizon_s),
        "means": {kind: dict(zip(planners, values.mean(-1).tolist())) for kind, values in scores.items()},
        "agreement": {name: _json(values) for name, values in found.values.items()},
        "differences": {f"{a} - {b}": _json(values) for (a, b), values in found.differences.items()},
    }  # fmt: skip
    write_json_atomic(output / RESULT_FILE, content)
    print_ranking(console, found, scores, list(planners), truth)
    if left_out:
        console.print(f"{left_out} of {total} scenes left out: not valid for every planner and traffic.")
    return found


def _json(values: Mapping[str, Estimate]) -> dict[str, Any]:
    return {measure: estimate.to_json() for measure, estimate in values.items()}


def print_ranking(
    console: Console, found: Agreement, scores: Mapping[str, np.ndarray], planners: list[str], truth: str
) -> None:
    """Planners in the true order with their scores in each traffic, then how well each kind agrees: 80 columns."""
    table = Table(
        title=f"Closed-loop scores x 100 of {found.planners} planners on {found.scenes} scenes; {truth} is the truth",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("planner", overflow="fold", max_width=20)
    for kind in scores:
        table.add_column(kind, justify="right", overflow="fold", max_width=12)
    for p in np.argsort(-scores[truth].mean(-1), kind="stable"):
        table.add_row(planners[p], *[f"{100 * values[p].mean():.1f}" for values in scores.values()])
    console.print(table)
    table = Table(
        title=f"Agreement with {truth} [95 % over scenes]", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("traffic", overflow="fold", max_width=20)
    for measure in MEASURES:
        table.add_column(measure + (" x 100" if measure == "error" else ""), justify="right", no_wrap=True)
    rows = {**found.values, **{f"{a} minus {b}": values for (a, b), values in found.differences.items()}}
    for name, values in rows.items():
        table.add_row(name, *[values[m].format(100.0 if m == "error" else 1.0, 1 if m == "error" else 2)
                              for m in MEASURES])  # fmt: skip
    console.print(table)


@job("rank")
def main(cfg: DictConfig) -> None:
    rank(cfg, Console())


if __name__ == "__main__":
    main()
