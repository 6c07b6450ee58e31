"""``python -m navsim_ext.evaluation.closed_loop drives=[A,B,...] scores=[...]``: closed loop beside open loop.

Reads folders of ``navsim_ext.closed_loop.drive`` (any planners, any traffic) and score folders of the same planners
(``navsim_ext.evaluation.score``). For each kind of traffic, over the scenes that are valid for all its planners: scores
with intervals, paired differences of the ``pairs`` asked for, and whether closed loop puts the planners in the order of
open loop: rank correlations, and the pairs that change places, by the score and by the share of the drive before the
first fault (``clean``), which still grades planners when every drive ends with one. Writes ``closed_loop.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.closed_loop.score import COLUMNS
from navsim_ext.errors import DataError
from navsim_ext.evaluation.drives import TITLES, matrix, read_drives
from navsim_ext.evaluation.ranking import FEWEST_PLANNERS, discordant, kendall, spearman
from navsim_ext.evaluation.table import read_scores
from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import Fingerprint, digest_tokens
from navsim_ext.runtime.config import job

RESULT_FILE = "closed_loop.json"
OPEN = "pdms_v1"
MEASURES = ("score", "clean")


def read_all(folders: Sequence[str]) -> tuple[dict[str, dict[str, pd.DataFrame]], Fingerprint]:
    """({traffic: {planner: rows}}, fingerprint of the closed-loop score). Raises DataError for a planner that comes
    twice among one kind of traffic, FingerprintMismatch where horizons or scores differ."""
    found: dict[str, dict[str, pd.DataFrame]] = {}
    first: tuple[str, Fingerprint] | None = None
    for folder in folders:
        rows, made = read_drives(folder)
        traffic, name = str(rows["agents"].iloc[0]), str(rows["name"].iloc[0])
        judge = Fingerprint("judge", {"horizon_s": made.fields["horizon_s"]}, {"score": made.parents["score"]})
        if first is None:
            first = (folder, judge)
        judge.require_equal(
            first[1],
            mine=f"drives in {folder}",
            theirs=f"drives in {first[0]}",
            remedy="A table may hold one score and one horizon only: drive again.",
        )
        if name in found.setdefault(traffic, {}):
            raise DataError(f"planner {name!r} drives among {traffic} twice, the second time in {folder}")
        found[traffic][name] = rows
    if first is None:
        raise DataError("drives=[] names no folder of drives")
    return found, first[1].parents["score"]


def open_means(folders: Sequence[str]) -> dict[str, Estimate]:
    """PDMS of every planner of the score folders, over its valid rows."""
    means = {}
    for folder in folders:
        scores, _ = read_scores(folder)
        for name, rows in scores[scores["valid"]].groupby("name", sort=False):
            means[str(name)] = bootstrap_mean(rows[OPEN].to_numpy(float), rows["log_name"].tolist())
    return means


def judge(
    traffic: Mapping[str, pd.DataFrame], opened: Mapping[str, Estimate], pairs: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Everything that is said of one kind of traffic; see the module."""
    names = list(traffic)
    found = {measure: matrix(list(traffic.values()), measure) for measure in MEASURES}
    tokens = found["score"][1]
    rows = {name: table.set_index("token").loc[tokens] for name, table in traffic.items()}
    means = {
        name: {column: bootstrap_mean(rows[name][column].to_numpy(float), tokens) for column in (*COLUMNS, "clean")}
        for name in names
    }
    differences = {}
    for before, after in pairs:
        missing = {before, after} - set(names)
        if missing:
            raise DataError(f"pairs names {sorted(missing)}, who did not drive; there are {names}")
        differences[f"{after} - {before}"] = {
            measure: bootstrap_mean(values[names.index(after)] - values[names.index(before)], tokens)
            for measure, (values, _) in found.items()
        }
    shared = [name for name in names if name in opened]
    result: dict[str, Any] = {
        "scenes": len(tokens), "left_out": {n: int(len(t) - len(tokens)) for n, t in traffic.items()},
        "invalid": {n: int((~t["valid"]).sum()) for n, t in traffic.items()}, "ids": digest_tokens(tokens),
        "means": means, "differences": differences, "order": None,
    }  # fmt: skip
    if len(shared) >= FEWEST_PLANNERS:
        rows_of = [names.index(name) for name in shared]
        result["order"] = {m: _order(shared, values[rows_of], opened) for m, (values, _) in found.items()}
    return result


def _order(names: Sequence[str], scores: np.ndarray, opened: Mapping[str, Estimate]) -> dict[str, Any]:
    closed, o = scores.mean(-1), np.array([opened[name].mean for name in names])
    swapped = []
    for i, j in discordant(o, closed):
        change = bootstrap_mean(scores[j] - scores[i], [str(k) for k in range(scores.shape[1])])
        swapped.append({"better_open": names[i], "better_closed": names[j], "by": change, "certain": change.low > 0.0})
    return {
        "planners": list(names),
        "spearman": float(spearman(o, closed)),
        "kendall": float(kendall(o, closed)),
        "swapped": swapped,
    }


def verdict(orders: Mapping[str, Any] | None, measure: str = "score") -> str:
    """One sentence in plain words."""
    order = None if orders is None else orders[measure]
    if order is None:
        return f"Fewer than {FEWEST_PLANNERS} planners have both scores: nothing is said of their order."
    if np.isnan(order["spearman"]):
        return "All planners have the same: nothing is said of their order."
    if not order["swapped"]:
        return "The order of open loop holds in closed loop."
    certain = [f"{one['better_closed']} over {one['better_open']}" for one in order["swapped"] if one["certain"]]
    unsure = [f"{one['better_closed']} over {one['better_open']}" for one in order["swapped"] if not one["certain"]]
    parts = []
    if certain:
        parts.append("closed loop puts " + ", ".join(certain) + ", beyond its interval")
    if unsure:
        parts.append("within the interval " + ", ".join(unsure))
    return "The order of open loop does not hold: " + "; ".join(parts) + "."


def print_closed_loop(console: Console, traffic: str, found: Mapping[str, Any], opened: Mapping[str, Estimate]) -> None:
    """Tables of at most 80 columns."""
    table = Table(
        title=f"Among {traffic}: {found['scenes']} scenes, x 100 [95 % by scene]", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("planner", overflow="fold", max_width=17)
    table.add_column("PDMS", justify="right", no_wrap=True)
    table.add_column("closed loop", justify="right", no_wrap=True)
    for column in (*COLUMNS[1:], "clean"):
        table.add_column(TITLES[column], justify="right", no_wrap=True)
    for name, estimates in sorted(found["means"].items(), key=lambda item: -item[1]["score"].mean):
        cells = [f"{100 * opened[name].mean:.1f}" if name in opened else "-", estimates["score"].format()]
        cells += [f"{100 * estimates[c].mean:.0f}" if estimates[c].count else "-" for c in (*COLUMNS[1:], "clean")]
        table.add_row(name, *cells)
    console.print(table)
    for name, change in found["differences"].items():
        told = ", ".join(f"{measure} {estimate.format()}" for measure, estimate in change.items())
        console.print(f"{name}: {told}", highlight=False)
    for measure in MEASURES if found["order"] else ():
        order = found["order"][measure]
        console.print(f"By {measure}: Spearman {order['spearman']:.2f}, Kendall {order['kendall']:.2f}. "
                      f"{verdict(found['order'], measure)}", highlight=False, soft_wrap=True)  # fmt: skip


def _plain(content: Any) -> Any:
    if isinstance(content, Estimate):
        return content.to_json()
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and np.isnan(content) else content


@job("closed_loop_table")
def main(cfg: DictConfig) -> None:
    console = Console()
    drives, score = read_all(cfg.drives)
    opened = open_means(cfg.scores)
    result = {}
    for traffic, tables in drives.items():
        result[traffic] = judge(tables, opened, cfg.pairs)
        print_closed_loop(console, traffic, result[traffic], opened)
    console.print(f"score {score.digest[:12]}: not comparable with PDMS, EPDMS or nuPlan's closed-loop score")
    if cfg.output_dir:
        content = {"score": score.digest, "open": opened, "open_score": OPEN, "traffic": result}
        output = Path(cfg.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        verdicts = {traffic: {m: verdict(found["order"], m) for m in MEASURES} for traffic, found in result.items()}
        write_json_atomic(output / RESULT_FILE, _plain({**content, "verdicts": verdicts}))


if __name__ == "__main__":
    main()
