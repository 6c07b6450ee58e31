"""``python -m navsim_ext.evaluation.show scores=[A,B,...]``: the table of several score folders.

Folders of one data set stand in one table. Where they are of several (another split or token list), each gets its
table, and a cross-data-set table follows: planners by data sets, each cell the mean with its interval.
``two_stage=[C]`` adds the table of the two-stage protocol, ``runs=[RUN]`` the checkpoints of a training that
:mod:`navsim_ext.evaluation.watch` scored, beside what the run logged at these steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate
from navsim_ext.errors import DataError
from navsim_ext.evaluation.table import (
    HEADLINE,
    TITLES,
    identity,
    identity_line,
    join_scores,
    print_table,
    read_scores,
    summarise,
)
from navsim_ext.evaluation.two_stage_planner import read_summaries, summary_table
from navsim_ext.evaluation.watched import watched_table
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.config import job

Group = tuple[dict[str, Any], dict[str, dict[str, Estimate]], Fingerprint]  # identity, summary, scorer


def grouped(folders: Sequence[str]) -> list[Group]:
    """One group per data set (split and token list), in order of appearance. Raises FingerprintMismatch for scores of
    two scorers, DataError for no folder."""
    if not folders:
        raise DataError("scores=[] names no score folder")
    tables: dict[tuple[str, str], dict[str, pd.DataFrame]] = {}
    scorer: Fingerprint | None = None
    for folder in folders:
        scores, made = read_scores(folder)
        mine = made.parents["scorer"]
        scorer = scorer or mine
        scorer.require_equal(
            mine, mine=f"scores in {folders[0]}", theirs=f"scores in {folder}", remedy="Score with one scorer again."
        )
        tables.setdefault((made.fields["split"], made.fields["tokens"]), {})[str(folder)] = scores
    groups = []
    for (split, _), parts in tables.items():
        joined = join_scores(parts)
        groups.append((identity(joined, split=split), summarise(joined), scorer))
    return groups


def cross_table(groups: Sequence[Group], score: str) -> Table:
    """Planners by data sets for one score."""
    table = Table(title=f"{TITLES[score]} x 100 across data sets", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("planner", overflow="fold")
    for what, _, _ in groups:
        label = " (approx)" if "approx" in what["map_labels"] else ""
        table.add_column(f"{what['split'] or 'unnamed'}{label}", justify="right")
    names = list(dict.fromkeys(name for _, summary, _ in groups for name in summary))
    for name in names:
        cells = [_cell(summary.get(name, {}), score) for _, summary, _ in groups]
        table.add_row(name, *cells)
    return table


def _cell(estimates: Mapping[str, Estimate], score: str) -> str:
    return estimates[score].format() if score in estimates else "-"


@job("show")
def main(cfg: DictConfig) -> None:
    console = Console()
    groups = grouped(cfg.scores) if cfg.scores or not (cfg.two_stage or cfg.runs) else []
    for what, summary, scorer in groups:
        for table in print_table(summary, what, sub_scores=cfg.sub_scores):
            console.print(table)
        console.print(identity_line(what, scorer), soft_wrap=True, highlight=False)
    if len(groups) > 1:
        for score in HEADLINE[:2]:
            console.print(cross_table(groups, score))
    if cfg.two_stage:
        summary = read_summaries(cfg.two_stage)
        console.print(summary_table(summary))
        for line in (summary["snapshot"], *summary["verdicts"]):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    for run in cfg.runs:
        console.print(watched_table(run))


if __name__ == "__main__":
    main()
