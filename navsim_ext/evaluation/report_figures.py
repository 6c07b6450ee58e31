"""The plots of the report, as self-contained data URIs (SVG for lines and bars, JPEG for scenes)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from navsim_ext.bootstrap import Estimate
from navsim_ext.evaluation.drawing import trajectory_colour
from navsim_ext.evaluation.table import HEADLINE, TITLES

INK, MUTED, GAIN, LOSS, LINE = "#222222", "#6b6b67", "#0b7a53", "#b3364a", "#2463c2"
SMOOTHED_PARTS = 40
MEAN_LABEL = f"running mean over 1/{SMOOTHED_PARTS} of the rows"
FEW = 12  # rows of a curve whose points are marked
UNITS = {"ade": "m", "fde": "m", "heading_error": "rad", "data_wait": "share of the time", "padding": "share",
         "answer_tokens": "tokens", "invalid_rate": "share"}  # fmt: skip
ENDINGS = {"_per_s": "1/s", "_m": "m", "_mps": "m/s", "_mps2": "m/s2", "_rad": "rad", "_share": "share", "_s": "s"}


def svg_uri(figure: Figure) -> str:
    """``data:`` URI of a figure as SVG, with a fixed id salt so that the same figure gives the same bytes."""
    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "trivium", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def jpeg_uri(figure: Figure, quality: int = 82) -> str:
    """``data:`` URI of a figure as JPEG, for pictures with photographs in them."""
    stream = io.BytesIO()
    figure.savefig(stream, format="jpeg", pil_kwargs={"quality": quality})
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def score_plot(summary: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """One dot with its interval per planner, one panel per headline score."""
    columns = [column for column in HEADLINE if any(column in estimates for estimates in summary.values())]
    names = list(summary)
    figure = Figure(figsize=(3.1 * len(columns) + 1.2, 0.34 * len(names) + 0.9))
    panels = np.atleast_1d(figure.subplots(1, len(columns), sharey=True))
    for panel, column in zip(panels, columns):
        for row, name in enumerate(names):
            estimate = summary[name].get(column)
            if estimate is None or estimate.count == 0:
                continue
            colour = trajectory_colour(name, row)
            if estimate.logs > 1:
                panel.plot([estimate.low * 100, estimate.high * 100], [row, row], color=colour, lw=2.2, alpha=0.55)
            panel.plot([estimate.mean * 100], [row], "o", color=colour, ms=6)
        panel.set_title(TITLES[column], fontsize=9, loc="left", color=INK)
        _plain(panel, x="score x 100")
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.grid(axis="x", color="#eeeeee")
    figure.tight_layout()
    return figure


def waterfall_plot(shares: Mapping[str, Estimate], total: Estimate, title: str) -> Figure:
    """Sub-score shares from the largest to the smallest, and their sum."""
    order = sorted(shares, key=lambda term: -abs(shares[term].mean))
    figure = Figure(figsize=(4.6, 0.28 * (len(order) + 1) + 0.7))
    panel = figure.subplots()
    start = 0.0
    for row, term in enumerate(order):
        value = shares[term].mean * 100
        panel.barh(row, value, left=start, color=GAIN if value >= 0 else LOSS, height=0.62)
        panel.annotate(f"{value:+.1f}", (start + max(value, 0.0), row), xytext=(3, 0), textcoords="offset points",
                       va="center", fontsize=7, color=MUTED)  # fmt: skip
        start += value
    panel.barh(len(order), total.mean * 100, color=INK, height=0.62)
    panel.annotate(f"{total.mean * 100:+.1f}", (max(total.mean * 100, 0.0), len(order)), xytext=(3, 0),
                   textcoords="offset points", va="center", fontsize=7, color=INK)  # fmt: skip
    panel.axvline(0.0, color=MUTED, lw=0.8)
    panel.set_yticks(range(len(order) + 1), [*(TITLES[term] for term in order), "sum"], fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_title(title, fontsize=9, loc="left", color=INK)
    _plain(panel, x="points of score x 100")
    figure.tight_layout()
    return figure


def curves_plot(table: pd.DataFrame, columns: Sequence[str], x: str) -> Figure:
    """Small multiples, one per column, over ``x``.

    A column of at least ``2 * SMOOTHED_PARTS`` rows is drawn faint, with its running mean over 1 / SMOOTHED_PARTS of
    its rows on top; a shorter one as it is.
    """
    across = min(4, max(1, len(columns)))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(2.7 * across, 2.0 * down + 0.3))
    panels = np.atleast_1d(figure.subplots(down, across)).reshape(-1)
    lines = {}
    for panel, column in zip(panels, columns):
        rows = table[[x, column]].dropna()
        window = len(rows) // SMOOTHED_PARTS
        smoothed = window > 1
        width, strength = (0.8, 0.35) if smoothed else (1.2, 1.0)
        dot = "o" if len(rows) < FEW else ""
        (line,) = panel.plot(rows[x], rows[column], color=LINE, lw=width, alpha=strength, marker=dot, ms=2.5)
        lines.setdefault("as measured", line)
        if smoothed:
            mean = rows[column].rolling(window, min_periods=1).mean()
            lines[MEAN_LABEL] = panel.plot(rows[x], mean, color=LINE, lw=1.4)[0]
        unit = unit_of(column)
        panel.set_title(f"{column} [{unit}]" if unit else column, fontsize=7.5, loc="left", color=INK)
        _plain(panel, x=x)
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    if len(lines) > 1:
        figure.legend(lines.values(), lines.keys(), loc="upper left", ncols=2, fontsize=7, frameon=False)
    return figure


def unit_of(column: str) -> str:
    """The unit of a logged column by the last part of its name; empty where it has none (losses, scores)."""
    name = column.rsplit("/", 1)[-1]
    if name.startswith("seconds"):
        return "s"
    return UNITS.get(name, next((unit for ending, unit in ENDINGS.items() if name.endswith(ending)), ""))


def _plain(panel, *, x: str) -> None:
    panel.set_xlabel(x, fontsize=7, color=MUTED, labelpad=2)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#cccccc")
    panel.tick_params(labelsize=7, colors=MUTED, length=2)
