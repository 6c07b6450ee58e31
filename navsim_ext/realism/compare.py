"""Models side by side: ``python -m navsim_ext.realism.compare "scores={cat_k: [A], bc: [B, C]}" output_dir=DIR``.

Each name stands for one or more folders of ``navsim_ext.realism.score`` on the same scenes and rules: several are
trainings that differ in their seed, and count by their mean in each scenario. Given in the order in which they are
expected to stand, neighbours are compared: the mean difference of the meta-metric, paired by scenario, with its
bootstrap interval. Where the interval crosses 0 the order is not shown, and that is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.errors import MissingError
from navsim_ext.files import read_json, write_json_atomic
from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.likelihood import buckets
from navsim_ext.realism.rules import BUCKETS, rules_of
from navsim_ext.realism.score import METRICS, SCENARIOS_FILE, SUMMARY_FILE
from navsim_ext.runtime.config import job
from navsim_ext.runtime.parquet import read_frame

RESULT_FILE = "comparison.json"
FIGURES = (
    "metametric", *BUCKETS, "min_average_displacement_error", "average_displacement_error", "simulated_collision_rate",
    "simulated_offroad_rate", "simulated_traffic_light_violation_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """``estimates`` of each figure by name of the model; ``seeds``: the mean meta-metric of each of its folders;
    ``steps``: (better, worse, difference) of neighbours; all over the same ``scenarios``, ``left_out`` were not valid
    for all."""

    year: int
    scenarios: int
    left_out: int
    estimates: Mapping[str, Mapping[str, Estimate]]
    seeds: Mapping[str, Sequence[float]]
    steps: Sequence[tuple[str, str, Estimate]]

    def to_json(self) -> dict[str, Any]:
        return {
            "year": self.year, "scenarios": self.scenarios, "left_out": self.left_out,
            "models": {name: {key: one.to_json() for key, one in found.items()}
                       for name, found in self.estimates.items()},
            "metametric_by_folder": {name: list(values) for name, values in self.seeds.items()},
            "neighbours": [{"better": a, "worse": b, "difference": one.to_json(), "shown": shown(one)}
                           for a, b, one in self.steps],
        }  # fmt: skip


def shown(difference: Estimate) -> bool:
    """Whether the interval lies above 0."""
    return bool(difference.low > 0.0)


def compare(folders: Mapping[str, Sequence[str]]) -> Compared:
    """Reads the scores and compares them; raises RealismError for scores of other scenes or rules, MissingError for a
    folder without scores."""
    if len(folders) < 2:
        raise RealismError(f"{len(folders)} models: at least 2 are compared")
    tables = {name: [_table(folder) for folder in several] for name, several in folders.items()}
    first_name, first = next((name, several[0]) for name, several in tables.items())
    for name, several in tables.items():
        if not several:
            raise RealismError(f"scores.{name} names 0 folders")
        for one in several:
            for key in ("year", "scenes"):
                if one.attrs[key] != first.attrs[key]:
                    raise RealismError(
                        f"{first_name} and {name} are scored with {key} {first.attrs[key]} and {one.attrs[key]}: score "
                        "both on the same scenes by the same rules"
                    )
    whole = [set(one.index[one["valid"]]) for several in tables.values() for one in several]
    names = sorted(set.intersection(*whole))
    if not names:
        raise RealismError("0 scenarios are valid for all models")
    rows = {name: sum(one.loc[names, list(FIGURES)] for one in several) / len(several)
            for name, several in tables.items()}  # fmt: skip
    return Compared(
        year=first.attrs["year"],
        scenarios=len(names),
        left_out=len(set.union(*whole)) - len(names),
        estimates={name: {key: bootstrap_mean(table[key].to_numpy(float), names) for key in FIGURES}
                   for name, table in rows.items()},
        seeds={name: [float(one.loc[names, "metametric"].mean()) for one in several]
               for name, several in tables.items()},
        steps=[(a, b, bootstrap_mean((rows[a]["metametric"] - rows[b]["metametric"]).to_numpy(float), names))
               for a, b in pairwise(rows)],
    )  # fmt: skip


def _table(folder: str) -> pd.DataFrame:
    """Figures by scenario, with the buckets; ``attrs`` say by which rules and on which scenes."""
    path = Path(folder) / SUMMARY_FILE
    if not path.is_file():
        raise MissingError(f"{path} is missing: score the rollouts with navsim_ext.realism.score output_dir={folder}")
    summary = read_json(path)
    table = read_frame(Path(folder) / SCENARIOS_FILE, "score the rollouts again").set_index("scenario")
    missing = sorted({"valid", *METRICS} - set(table.columns))
    if missing:
        raise RealismError(f"{folder}: {SCENARIOS_FILE} lacks {', '.join(missing)}: score again")
    rules = rules_of(int(summary["year"]))
    per_row = [buckets(row, rules) for row in table.to_dict("records")]
    for name in BUCKETS:
        table[name] = np.array([row[name] for row in per_row], float)
    table.attrs = {"year": rules.year, "scenes": summary["fingerprint"]["fields"]["scenes"][:12]}
    return table


def print_comparison(found: Compared, console: Console) -> None:
    """Two tables of 80 columns: figures by model, and differences of neighbours."""
    table = Table(title=f"Realism, rules of {found.year}, {found.scenarios} scenarios: mean [95 % over scenarios]",
                  title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    for column in ("model", "realism", "", "kin.", "inter.", "map", "minADE", "hits"):
        named = column == "model"
        table.add_column(column, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    for name, of in found.estimates.items():
        best = of["metametric"]
        interval = "-" if np.isnan(best.low) else f"[{best.low:.3f}, {best.high:.3f}]"
        row = [name, f"{best.mean:.3f}", interval]
        row += [f"{of[key].mean:.3f}" for key in BUCKETS]
        row += [f"{of['min_average_displacement_error'].mean:.2f} m", f"{of['simulated_collision_rate'].mean:.1%}"]
        table.add_row(*row)
    console.print(table)
    steps = Table(title="Neighbours: difference of realism, paired by scenario", title_justify="left",
                  box=box.SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    for column in ("better", "worse", "difference", "interval", "shown"):
        steps.add_column(column, overflow="fold",
                         justify="left" if column in ("better", "worse", "shown") else "right")  # fmt: skip
    for better, worse, one in found.steps:
        interval = "-" if np.isnan(one.low) else f"[{one.low:+.3f}, {one.high:+.3f}]"
        verdict = "yes" if shown(one) else "reversed" if one.high < 0 else "no: 0 is in it"
        steps.add_row(better, worse, f"{one.mean:+.3f}", interval, verdict)
    console.print(steps)
    several = {name: values for name, values in found.seeds.items() if len(values) > 1}
    for name, values in several.items():
        console.print(f"{name}: {', '.join(f'{value:.4f}' for value in values)} by seed", highlight=False)
    if found.left_out:
        console.print(f"{found.left_out} scenarios are not valid for all models and left out", highlight=False)


@job("realism_compare")
def main(cfg: DictConfig) -> None:
    found = compare({str(name): [str(one) for one in folders] for name, folders in (cfg.scores or {}).items()})
    write_json_atomic(Path(cfg.output_dir) / RESULT_FILE, found.to_json())
    print_comparison(found, Console())


if __name__ == "__main__":
    main()
