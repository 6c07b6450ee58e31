"""Drives in the report: a table for each kind of traffic, and films of the scenes in which planners differ most.

A film is an MP4 inside the page, with the browser's own time slider; without ffmpeg it is a GIF, which has none.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate

from navsim_ext.bootstrap import bootstrap_mean
from navsim_ext.closed_loop.drive import DRIVES_FOLDER
from navsim_ext.closed_loop.film import FilmCamera, frames, write_film
from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.closed_loop.score import COLUMNS
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.closed_loop import read_all
from navsim_ext.evaluation.drives import TITLES, read_drives
from navsim_ext.traffic.store import TrafficStore


def drive_sections(folders: Sequence[str], films: Mapping[str, Any]) -> dict[str, Any] | None:
    """``tables`` of the kinds of traffic and ``films`` of some scenes, or None without folders. ``films``: ``count``
    of scenes, one picture ``every`` so many steps, ``height`` in pixels, ``cameras`` of navsim_ext.closed_loop.film."""
    if not folders:
        return None
    traffic, score = read_all(folders)
    tables = [
        {
            "title": f"Among {kind}",
            "columns": [TITLES[column] for column in COLUMNS],
            "rows": [
                {"name": name, "cells": _cells(rows), "invalid": int((~rows["valid"]).sum())}
                for name, rows in planners.items()
            ],
        }
        for kind, planners in traffic.items()
    ]
    camera = instantiate(films["cameras"]) if films["cameras"] else None
    return {"digest": score.digest[:12], "tables": tables, "films": _films(folders, films, camera)}


def _cells(rows: pd.DataFrame) -> list[str]:
    valid = rows[rows["valid"]]
    estimates = [bootstrap_mean(valid[column].to_numpy(float), valid["token"].tolist()) for column in COLUMNS]
    rest = [f"{100 * estimate.mean:.1f}" if estimate.count else "-" for estimate in estimates[1:]]
    return [estimates[0].format(), *rest]


def chosen_scenes(tables: Sequence[pd.DataFrame], count: int) -> list[str]:
    """Scenes that all have driven, in which scores differ most; of one table those with the lowest scores."""
    together = pd.concat([rows.set_index("token")["score"] for rows in tables], axis=1, join="inner")
    scores, tokens = together.to_numpy(float), together.index
    if len(tables) == 1:
        key = np.nan_to_num(scores[:, 0], nan=-1.0)
    else:
        known = np.nan_to_num(scores, nan=0.0)
        key = known.min(axis=1) - known.max(axis=1)
    return [str(tokens[k]) for k in np.argsort(key, kind="stable")[:count]]


def _films(folders: Sequence[str], films: Mapping[str, Any], camera: FilmCamera | None) -> list[dict[str, Any]]:
    if not films["count"]:
        return []
    tables = [read_drives(folder)[0] for folder in folders]
    stores = [TrafficStore(Path(folder) / DRIVES_FOLDER) for folder in folders]
    sections = []
    for token in chosen_scenes(tables, films["count"]):
        shown = []
        for rows, store in zip(tables, stores):
            row = rows.set_index("token").loc[token]
            pictures = frames(store.load(token), camera=camera, every=films["every"], height=films["height"])
            what = f"{row['name']} among {row['agents']}"
            said = f"score {100 * row['score']:.1f}" if row["valid"] else f"invalid: {row['reason']}"
            shown.append({**film_uri(pictures, 1.0 / (STEP_S * films["every"])), "caption": f"{what}: {said}"})
        sections.append({"title": token, "drives": shown})
    return sections


def film_uri(pictures, fps: float) -> dict[str, Any]:
    """``uri`` of a film in the page and whether it is a ``video``; raises DataError for a film of no pictures."""
    shown = list(pictures)
    if not shown:
        raise DataError("a film of 0 pictures: the drive ends at its present step")
    with tempfile.TemporaryDirectory() as folder:
        path, kind = Path(folder) / "film.mp4", "video/mp4"
        try:
            write_film(path, iter(shown), fps)
        except MissingError:
            path, kind = Path(folder) / "film.gif", "image/gif"
            write_film(path, iter(shown), fps)
        content = base64.b64encode(path.read_bytes()).decode()
    return {"uri": f"data:{kind};base64,{content}", "video": kind == "video/mp4"}
