"""From one row per token to the table that a paper prints: means with intervals by log, what was invalid, what scored.

A score table is a DataFrame with ``token``, ``name`` (planner), ``log_name``, ``valid``, ``reason``, ``map_label`` and
the columns of :data:`COLUMNS`. Invalid rows never enter a mean; they are counted beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from navsim_ext.bootstrap import REPLICATES, Estimate, bootstrap_mean
from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import reading
from navsim_ext.fingerprint import Fingerprint, digest_tokens
from navsim_ext.pdm.columns import WITHOUT_COMFORT
from navsim_ext.runtime.parquet import read_table, require_columns

V1_COLUMNS = ("pdms_v1", "v1_nc", "v1_dac", "v1_ttc", "v1_ep", "v1_comfort", "v1_ddc")
V2_COLUMNS = (
    "epdms_v2", "epdms_v2_nofilter",
    "v2_nc", "v2_dac", "v2_ddc", "v2_tlc", "v2_ep", "v2_ttc", "v2_lk", "v2_hc", "v2_ec",
)  # fmt: skip
COLUMNS = V1_COLUMNS + tuple(WITHOUT_COMFORT.values()) + V2_COLUMNS
HEADLINE = ("pdms_v1", "epdms_v2", "epdms_v2_nofilter")
TITLES = {
    "pdms_v1": "PDMS v1.1",
    "epdms_v2": "EPDMS v2.2",
    "epdms_v2_nofilter": "EPDMS v2.2, no filter",
    "epdms_v2_no_ec": "EPDMS v2.2 without EC",
    "epdms_v2_no_ec_nofilter": "EPDMS v2.2 without EC, no filter",
    "v1_nc": "NC", "v1_dac": "DAC", "v1_ttc": "TTC", "v1_ep": "EP", "v1_comfort": "C", "v1_ddc": "DDC",
    "v2_nc": "NC", "v2_dac": "DAC", "v2_ddc": "DDC", "v2_tlc": "TLC", "v2_ep": "EP", "v2_ttc": "TTC", "v2_lk": "LK",
    "v2_hc": "HC", "v2_ec": "EC",
}  # fmt: skip
SHORT_TITLES = {
    "epdms_v2_nofilter": "EPDMS no filter",
    "epdms_v2_no_ec": "EPDMS no EC",
    "epdms_v2_no_ec_nofilter": "no EC, no filter",
}  # where 80 columns are all there is

PROBE_PREFIX = "probe_"  # of the names of planners that see nothing (navsim_ext.evaluation.probes)
SCORES_FILE = "scores.parquet"
TRAJECTORIES_FILE = "trajectories.parquet"
FINGERPRINT_KEY = b"trivium_fingerprint"  # in the metadata of a score file
REMEDY = "score again with python -m navsim_ext.evaluation.score"
NAVTRAIN_SIZES = {85_109: "the 85k part of navtrain", 103_288: "the full 103k navtrain"}


def summarise(scores: pd.DataFrame, *, replicates: int = REPLICATES) -> dict[str, dict[str, Estimate]]:
    """{planner: {column: Estimate}} over the valid rows, planners in order of first appearance."""
    summary: dict[str, dict[str, Estimate]] = {}
    for name, rows in scores.groupby("name", sort=False):
        valid = rows[rows["valid"]]
        logs = valid["log_name"].tolist()
        present = [column for column in COLUMNS if column in rows]
        summary[str(name)] = {
            column: bootstrap_mean(valid[column].to_numpy(float), logs, replicates=replicates) for column in present
        }
    return summary


def identity(scores: pd.DataFrame, *, split: str = "") -> dict[str, Any]:
    """What was scored: split, number of tokens and logs, token-list digest, part of navtrain, invalid rows, labels."""
    tokens = scores["token"].unique().tolist()
    labels = sorted(scores["map_label"].unique()) if "map_label" in scores else []
    return {
        "split": split,
        "tokens": len(tokens),
        "logs": int(scores["log_name"].nunique()),
        "token_digest": digest_tokens(tokens)[:16],
        "part": NAVTRAIN_SIZES.get(len(tokens), "") if split == "navtrain" else "",
        "map_labels": labels,
        "invalid": {str(name): int((~rows["valid"]).sum()) for name, rows in scores.groupby("name", sort=False)},
    }


def identity_line(what: Mapping[str, Any], fingerprint: Fingerprint | None = None) -> str:
    """The line that stands under every score."""
    part = f", {what['part']}" if what["part"] else ""
    approx = " | maps of approximate origin (label approx): not comparable with NAVSIM's" if _is_approx(what) else ""
    scorer = f" | scorer {fingerprint.digest[:12]}" if fingerprint else ""
    split = what["split"] or "(unnamed split)"
    traffic = what.get("traffic", "log_replay")
    world = "" if traffic == "log_replay" else f" | traffic {traffic}: not comparable with scores on log replay"
    scored = f"{split}: {what['tokens']} tokens in {what['logs']} logs{part} | tokens {what['token_digest']}"
    return f"{scored}{scorer}{world}{approx}"


def _is_approx(what: Mapping[str, Any]) -> bool:
    return "approx" in what["map_labels"]


def print_table(
    summary: Mapping[str, Mapping[str, Estimate]], what: Mapping[str, Any], *, sub_scores: bool = True
) -> list[Table]:
    """Rich tables of at most 80 columns: the scores with intervals, then the sub-scores of each version."""
    suffix = " (approx maps)" if _is_approx(what) else ""
    scores = _narrow_table(f"Scores x 100, mean [95 % by log]{suffix}")
    headline = headline_of({column for estimates in summary.values() for column in estimates})
    for column in headline:
        scores.add_column(SHORT_TITLES.get(column, TITLES[column]), justify="right", no_wrap=True)
    scores.add_column("inv.", justify="right")
    for name, estimates in summary.items():
        cells = [estimates[column].format() if column in estimates else "-" for column in headline]
        scores.add_row(name, *cells, str(what["invalid"].get(name, 0)))
    tables = [scores]
    for version, columns in (("v1.1", V1_COLUMNS[1:]), ("v2.2", V2_COLUMNS[2:])):
        if not sub_scores or not any(columns[0] in estimates for estimates in summary.values()):
            continue
        table = _narrow_table(f"Sub-scores {version} x 100 (before the human filter)")
        for column in columns:
            table.add_column(TITLES[column], justify="right", no_wrap=True)
        for name, estimates in summary.items():
            row = [f"{estimates[c].mean * 100:.1f}" if estimates[c].count else "-" for c in columns]
            table.add_row(name, *row)
        tables.append(table)
    return tables


def _narrow_table(title: str) -> Table:
    """A table that fits 80 columns: no frame, one space between columns, planner names folded at 24 characters."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("planner", overflow="fold", max_width=24)
    return table


def headline_of(columns: Collection[str]) -> tuple[str, ...]:
    """The scores of a table with these columns: EPDMS under the names that say whether extended comfort is in."""
    bare = any(name in columns for name in WITHOUT_COMFORT.values())
    return tuple(WITHOUT_COMFORT.get(name, name) for name in HEADLINE) if bare else HEADLINE


def require_same_quantity(parts: Mapping[str, Collection[str]]) -> None:
    """Raises DataError where EPDMS of one table ({where: columns}) has extended comfort and that of another has not."""
    bare = [where for where, columns in parts.items() if set(WITHOUT_COMFORT.values()) & set(columns)]
    whole = [where for where, columns in parts.items() if set(WITHOUT_COMFORT) & set(columns)]
    if bare and whole:
        raise DataError(
            f"{bare[0]} has EPDMS without two-frame extended comfort (two_frame=false), {whole[0]} with it: these are "
            "two quantities. Score one of them again"
        )


def join_scores(parts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The tables of several folders as one; a blind probe that stands in several counts once.

    Raises DataError when another planner's name comes twice, or as :func:`require_same_quantity`.
    """
    require_same_quantity({folder: list(scores.columns) for folder, scores in parts.items()})
    where: dict[str, str] = {}
    kept = []
    for folder, scores in parts.items():
        repeated = [name for name in scores["name"].unique() if name in where]
        for name in repeated:
            if not name.startswith(PROBE_PREFIX):
                raise DataError(f"planner {name!r} is in {where[name]} and in {folder}: give one of them another name")
        where |= dict.fromkeys(scores["name"].unique(), folder)
        kept.append(scores[~scores["name"].isin(repeated)])
    return pd.concat(kept, ignore_index=True)


def read_scores(place: str | os.PathLike[str]) -> tuple[pd.DataFrame, Fingerprint]:
    """The per-token table and the fingerprint of scores.

    ``place``: a folder that ``navsim_ext.evaluation.score`` or ``score_file`` finished, or a Parquet file that the
    latter wrote.
    """
    path = Path(place) if Path(place).is_file() else Path(place) / SCORES_FILE
    if not path.is_file():
        raise MissingError(
            f"{path} is missing: give a folder that navsim_ext.evaluation.score finished, or what "
            "navsim_ext.evaluation.score_file wrote (its folder or its .parquet file)"
        )
    table = read_table(path, REMEDY)
    require_columns(path, table.column_names, ("token", "name", "log_name", "valid", "map_label"), REMEDY)
    if path.parent == Path(place):
        return table.to_pandas(), Fingerprint.load(place)
    content = (table.schema.metadata or {}).get(FINGERPRINT_KEY)
    if content is None:
        raise DataError(f"{path} does not say what made it: it is no file of navsim_ext.evaluation.score_file")
    with reading(path, REMEDY):
        return table.to_pandas(), Fingerprint.from_json(json.loads(content))
