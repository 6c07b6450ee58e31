"""``python -m navsim_ext.evaluation.report``: one self-contained HTML file of a whole job.

Reads score folders (``navsim_ext.evaluation.score``), training folders of the stages and the scenes themselves;
writes ``report.html`` with everything inside (no script, no network): table, intervals, waterfalls, training curves,
flight recorder, gallery of best, worst and most improved scenes, drives in closed loop with films, fingerprints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from navsim_ext.bootstrap import REPLICATES, Estimate
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.compare import FORMULAS, compare
from navsim_ext.evaluation.drawing import scene_figure
from navsim_ext.evaluation.glossary import TERMS, meaning
from navsim_ext.evaluation.report_drives import drive_sections
from navsim_ext.evaluation.report_figures import curves_plot, jpeg_uri, score_plot, svg_uri, waterfall_plot
from navsim_ext.evaluation.table import (
    HEADLINE,
    REMEDY,
    TITLES,
    TRAJECTORIES_FILE,
    V1_COLUMNS,
    V2_COLUMNS,
    identity,
    identity_line,
    join_scores,
    read_scores,
    summarise,
)
from navsim_ext.evaluation.two_stage_planner import SUMMARY_TITLES, read_summaries, summary_rows
from navsim_ext.evaluation.watched import SCORED, figure_columns, read_watched, watched_file
from navsim_ext.files import reading, write_atomic
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.readers import SceneSource, open_configured
from navsim_ext.runtime.config import job
from navsim_ext.runtime.parquet import read_frame

REPORT_FILE = "report.html"


def load_folders(folders: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Fingerprint]]:
    """Score rows and trajectories of several score folders, and the fingerprint of each planner's scores.

    Raises DataError when a planner name comes twice, FingerprintMismatch when the scorers differ.
    """
    if not folders:
        raise DataError("scores=[] names no score folder: nothing to report")
    tables: dict[str, pd.DataFrame] = {}
    paths: dict[str, pd.DataFrame] = {}
    made: dict[str, Fingerprint] = {}
    for folder in folders:
        scores, fingerprint = read_scores(folder)
        for name in scores["name"].unique():
            made.setdefault(str(name), fingerprint)
        first = next(iter(made.values()))
        first.parents["scorer"].require_equal(
            fingerprint.parents["scorer"],
            mine=f"scores in {folders[0]}",
            theirs=f"scores in {folder}",
            remedy="A table may hold one scorer only: score again.",
        )
        tables[str(folder)] = scores
        if Path(folder).is_file():
            raise DataError(f"{folder} holds no trajectories to draw: score with output=FOLDER and give the folder")
        paths[str(folder)] = read_frame(Path(folder) / TRAJECTORIES_FILE, REMEDY)
    return join_scores(tables), join_scores(paths), made


def training_section(title: str, folder: str, columns: Sequence[str] | None) -> dict[str, str]:
    """Curves of one training folder, from the newest ``metrics.csv`` in it. Raises MissingError if there is none."""
    table, path = newest_csv(folder, "metrics.csv")
    x = "step" if "step" in table else table.columns[0]
    available = [c for c in table.columns if c not in (x, "epoch") and table[c].notna().any()]
    chosen = list(columns) if columns else available[:8]
    unknown = sorted(set(chosen) - set(table.columns))
    if unknown:
        raise DataError(f"{path} has no column {unknown}; it has {available}")
    plot = svg_uri(curves_plot(table, chosen, x))
    return {"title": title, "plot": plot, "caption": f"{path.name} of {title}, {len(table)} rows over {x}"}


def training_sections(title: str, folder: str, columns: Sequence[str] | None) -> list[dict[str, str]]:
    """Curves of a run, and of its checkpoints where somebody scored them while it trained."""
    sections = [training_section(title, folder, columns)]
    if watched_file(folder) is not None:
        table = read_watched(folder)
        scored = table[table["status"] == SCORED]
        chosen = figure_columns(scored)[:8]
        if chosen:
            plot = svg_uri(curves_plot(scored, chosen, "step"))
            failed = f", {len(table) - len(scored)} could not be scored" if len(scored) < len(table) else ""
            caption = f"{len(scored)} checkpoints of {title} scored while it trained{failed}"
            sections.append({"title": f"{title}, scored while it trained", "plot": plot, "caption": caption})
    return sections


def newest_csv(folder: str | os.PathLike[str], name: str) -> tuple[pd.DataFrame, Path]:
    """The newest file of that name under a training folder, by modification time."""
    found = sorted(Path(folder).rglob(name), key=lambda path: path.stat().st_mtime)
    if not found:
        raise MissingError(f"no {name} under {folder}: is it the output_dir of a training run?")
    return _table(found[-1]), found[-1]


def _table(path: Path, *columns: str) -> pd.DataFrame:
    """A table that a training wrote. Raises CorruptFile, DataError for one without these columns."""
    with reading(path, "a training writes it"):
        table = pd.read_csv(path)
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    return table


def recorder_section(folder: str, columns: Sequence[str] | None) -> dict[str, Any]:
    """Stage 3's flight recorder (``rewards.csv``, ``kl_divergence.csv``, ``advantages.csv``) and ``alarms.csv``."""
    names = ("rewards.csv", "kl_divergence.csv", "advantages.csv")
    tables = [_table(newest_csv(folder, name)[1], "step") for name in names]
    table = tables[0]
    for other in tables[1:]:
        table = table.merge(other[[c for c in other if c == "step" or c not in table]], on="step", how="outer")
    numbers = [c for c in table.select_dtypes("number") if c not in ("step", "rollout", "epoch")]
    wanted = list(columns) if columns else numbers[:16]
    unknown = sorted(set(wanted) - set(numbers))
    if unknown:
        raise DataError(f"the flight recorder of {folder} has no column {unknown}; it has {numbers}")
    chosen = [c for c in wanted if table[c].notna().any()]
    alarms = [
        f"step {row.step}: {row.alarm} ({row.cause}, value {row.value:.3g}): {row.action}"
        for path in sorted(Path(folder).rglob("alarms.csv"))
        for row in _table(path, "step", "alarm", "cause", "value", "action").itertuples()
    ]
    plot = svg_uri(curves_plot(table, chosen, "step"))
    caption = f"{len(table)} rollouts; {len(alarms)} alarms" + (":" if alarms else ".")
    return {"plot": plot, "caption": caption, "alarms": alarms}


def gallery_section(
    scores: pd.DataFrame,
    trajectories: pd.DataFrame,
    source: SceneSource,
    *,
    planner: str,
    baseline: str,
    metric: str,
    count: int,
) -> list[dict[str, Any]]:
    """Most improved, best and worst scenes of ``planner`` against ``baseline``, each drawn with both and the human."""
    pairs = compare(scores[scores["name"] == baseline], scores[scores["name"] == planner]).pairs
    rows = {name: scores[scores["name"] == name].set_index("token") for name in (baseline, planner)}
    change, after = pairs[f"{metric}_change"], pairs[f"{metric}_b"]
    groups = {
        f"Most improved over {baseline}": change.sort_values(ascending=False, kind="stable").index[:count],
        f"Most lost against {baseline}": change.sort_values(kind="stable").index[:count],
        f"Best scenes of {planner}": after.sort_values(ascending=False, kind="stable").index[:count],
        f"Worst scenes of {planner}": after.sort_values(kind="stable").index[:count],
    }
    by_key = {(row.token, row.name_): row.poses for row in trajectories.rename(columns={"name": "name_"}).itertuples()}
    sections = []
    for title, index in groups.items():
        drawn = []
        for _, row in pairs.loc[index].iterrows():
            scene = source.scene(row["token"])
            paths = {
                name: np.asarray(by_key[row["token"], name]).reshape(-1, 3)
                for name in ("human", baseline, planner)
                if (row["token"], name) in by_key
            }
            figure = scene_figure(
                scene, source.map_for(scene), paths, sensor_root=source.sensor_root if scene.cameras else None
            )
            said = [
                f"{name} {row[f'{metric}_{side}'] * 100:.1f}{why_zero(metric, rows[name].loc[row['token']])}"
                for name, side in ((baseline, "a"), (planner, "b"))
            ]
            score = f"{TITLES[metric]} {', '.join(said)}"
            drawn.append(
                {
                    "token": row["token"],
                    "picture": jpeg_uri(figure),
                    "caption": f"{row['token']} ({row['log_name']}): {score}",
                }
            )
        sections.append({"title": title, "scenes": drawn})
    return sections


def why_zero(metric: str, row: pd.Series) -> str:
    """`` (DAC 0)``: the multipliers that make a score 0, as a caption says them; empty for a score above 0."""
    formula = FORMULAS.get("epdms_v2_nofilter" if metric == "epdms_v2" else metric)
    if formula is None or row[metric] > 0.0:
        return ""
    names = [TITLES[term] for term in formula.multipliers if row[term] == 0.0]
    return f" ({', '.join(f'{name} 0' for name in names)})" if names else ""


def comparison_sections(scores: pd.DataFrame, pairs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Waterfalls of the configured [before, after] planners, PDMS and EPDMS."""
    sections = []
    for before, after in pairs:
        result = compare(scores[scores["name"] == before], scores[scores["name"] == after])
        for score, shares in result.waterfall.items():
            total = result.differences[score]
            title = f"{after} minus {before}: {TITLES[score]}"
            interval = f"{total.mean * 100:+.1f} [{total.low * 100:+.1f}, {total.high * 100:+.1f}]"
            caption = f"Paired difference {interval} over {total.count} tokens in {total.logs} logs"
            sections.append({"title": title, "plot": svg_uri(waterfall_plot(shares, total, title)), "caption": caption})
    return sections


def table_rows(summary: Mapping[str, Mapping[str, Estimate]], columns: Sequence[str], *, intervals: bool) -> list[dict]:
    rows = []
    for name, estimates in summary.items():
        cells = []
        for column in columns:
            estimate = estimates.get(column)
            if estimate is None or estimate.count == 0:
                cells.append("-")
            else:
                cells.append(estimate.format() if intervals else f"{estimate.mean * 100:.1f}")
        rows.append({"name": name, "cells": cells})
    return rows


def headers(columns: Sequence[str]) -> list[dict[str, str]]:
    """Short titles of score columns, each with its sentence of the glossary."""
    return [{"title": TITLES[column], "meaning": meaning(column)} for column in columns]


def two_stage_section(folders: Sequence[str]) -> dict[str, Any] | None:
    """The table of NAVSIM 2's two-stage protocol; nothing for no folder."""
    if not folders:
        return None
    summary = read_summaries(folders)
    human = "with" if summary["human_filter"] else "without"
    return {
        "columns": SUMMARY_TITLES,
        "rows": summary_rows(summary),
        "snapshot": f"{summary['snapshot']}; traffic {summary['traffic']}, {human} human filter",
        "verdicts": summary["verdicts"],
    }


def build_report(cfg: DictConfig) -> Path:
    """Writes ``<output_dir>/report.html`` atomically and returns its path."""
    scores, trajectories, made = load_folders(cfg.scores)
    summary = summarise(scores)
    what = identity(scores, split=cfg.data.split or "")
    scorer = next(iter(made.values())).parents["scorer"]
    planners = table_rows(summary, HEADLINE, intervals=True)
    for row in planners:
        row["invalid"] = what["invalid"][row["name"]]
    warnings = []
    if "approx" in what["map_labels"]:
        warnings.append(
            "Maps of approximate origin: these scores carry the label approx and compare with none of NAVSIM's."
        )
    gallery = []
    if cfg.gallery.count:
        source = open_configured(cfg.data)
        gallery = gallery_section(
            scores,
            trajectories,
            source,
            planner=cfg.gallery.planner,
            baseline=cfg.gallery.baseline,
            metric=cfg.gallery.metric,
            count=cfg.gallery.count,
        )
    content = {
        "title": cfg.title,
        "identity": [identity_line(what, scorer)],
        "warnings": warnings,
        "headline": headers(HEADLINE),
        "planners": planners,
        "replicates": REPLICATES,
        "score_plot": svg_uri(score_plot(summary)),
        "sub_scores": [
            {
                "title": f"Sub-scores of {version} (before the human filter)",
                "columns": headers(columns),
                "rows": table_rows(summary, columns, intervals=False),
            }
            for version, columns in (("NAVSIM v1.1", V1_COLUMNS[1:]), ("NAVSIM v2.2", V2_COLUMNS[2:]))
        ],
        "two_stage": two_stage_section(cfg.two_stage),
        "comparisons": comparison_sections(scores, cfg.comparisons),
        "closed_loop": drive_sections(cfg.drives, OmegaConf.to_container(cfg.films, resolve=True)),
        "training": [
            section for run in cfg.training for section in training_sections(run.title, run.folder, run.columns)
        ],
        "recorder": recorder_section(cfg.recorder.folder, cfg.recorder.columns) if cfg.recorder.folder else None,
        "gallery": gallery,
        "glossary": TERMS,
        "fingerprints": [
            {
                "name": name,
                "digest": fingerprint.digest[:16],
                "text": json.dumps(fingerprint.to_json(), indent=1, sort_keys=True),
            }
            for name, fingerprint in made.items()
        ],
    }
    template = resources.files("navsim_ext.evaluation").joinpath("report_template.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(template).render(content)
    path = Path(cfg.output_dir) / REPORT_FILE
    write_atomic(path, html)
    return path


@job("report")
def main(cfg: DictConfig) -> None:
    path = build_report(cfg)
    Console().print(f"Report: {path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)


if __name__ == "__main__":
    main()
