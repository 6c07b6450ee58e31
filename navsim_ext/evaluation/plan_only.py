"""``score protocol=plan``: trajectories alone, of splits that hide objects and future and that only a server can score.

    python -m navsim_ext.evaluation.score protocol=plan planner=... data.index=FIRST [data.second_stage=SECOND] \\
        [data.split_config=YAML] output_dir=DIR

DIR gets ``trajectories.parquet`` (``token``, ``name``, ``poses``, ``interval``) of all given scenes, which
``navsim_ext.devkit.submission`` turns into a submission. ``data.split_config`` restricts the scenes to those of a
two-stage split, and says how many are lacking.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.stages import planned_stages, stage_datasets, stage_states
from navsim_ext.evaluation.table import TRAJECTORIES_FILE
from navsim_ext.planners import Planner
from navsim_ext.readers import read_split
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.preflight import preflight

BYTES_PER_ROW = 500


def plan_stages(cfg: DictConfig, console: Console) -> pd.DataFrame:
    """Plans the index, and that of the second stage where one is given; returns and writes the trajectories."""
    given = {"metric_cache": cfg.metric_cache, "traffic": cfg.traffic, "probes": cfg.probes or None}
    unread = [key for key, value in given.items() if value is not None]
    if unread:
        raise DataError(f"{', '.join(unread)} belong to scoring, and protocol=plan scores nothing: leave them out")
    if cfg.data.split_config is not None and cfg.data.second_stage is None:
        raise MissingError("data.split_config is of two stages: give data.second_stage=FOLDER, its second index")
    datasets = stage_datasets(cfg, None if cfg.data.split_config is None else read_split(cfg.data.split_config))
    rows = sum(map(len, datasets))
    output = Path(cfg.output_dir)
    preflight(output_dir=output, items=rows, bytes_per_item=BYTES_PER_ROW, title="planning", console=console)
    planner: Planner = instantiate(cfg.planner)
    hidden = stage_states(cfg, planner)
    planned = planned_stages(cfg, planner, datasets, hidden, output)
    table = pd.concat([trajectories for trajectories, _ in planned], ignore_index=True)
    if cfg.name:
        table["name"] = cfg.name
    table = table[["token", "name", "poses", "interval"]]
    write_table(output / TRAJECTORIES_FILE, table)
    counts = " + ".join(str(len(dataset)) for dataset in datasets)
    console.print(
        f"{output / TRAJECTORIES_FILE}: {counts} scenes planned, none scored. Submission: "
        f"python -m navsim_ext.devkit.submission trajectories={output / TRAJECTORIES_FILE} output=submission.pkl ...",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
    return table
