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

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.planning import plan_scenes
from navsim_ext.evaluation.table import TRAJECTORIES_FILE
from navsim_ext.evaluation.two_stage_planner import STAGES, stage_datasets, stage_states
from navsim_ext.frames import POSE_INTERVAL_S
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
    if cfg.data.split_config is not None:
        if cfg.data.second_stage is None:
            raise MissingError("data.split_config is of two stages: give data.second_stage=FOLDER, its second index")
        datasets = list(stage_datasets(cfg, read_split(cfg.data.split_config)))
    else:
        folders = [folder for folder in (cfg.data.index, cfg.data.second_stage) if folder is not None]
        datasets = [
            SceneDataset(
                folder, horizon=None, cameras=list(cfg.data.cameras), sensor_root=None if i else cfg.data.sensor_root
            )
            for i, folder in enumerate(folders)
        ]
    rows = sum(map(len, datasets))
    output = Path(cfg.output_dir)
    preflight(output_dir=output, items=rows, bytes_per_item=BYTES_PER_ROW, title="planning", console=console)
    planner: Planner = instantiate(cfg.planner)
    hidden = stage_states(cfg) if len(datasets) > 1 else (instantiate(cfg.hidden) if cfg.hidden else None,)
    tables = []
    for stage, dataset, states in zip(STAGES, datasets, hidden):
        if states is not None and hasattr(planner, "require_hidden"):
            planner.require_hidden(states.fingerprint)
        planned, _ = plan_scenes(
            planner, dataset, states, output / f"stage_{stage}",
            batch_size=cfg.batch_size, num_workers=cfg.num_loaders, device=cfg.device,
        )  # fmt: skip
        tables.append(planned.assign(interval=POSE_INTERVAL_S))
    table = pd.concat(tables, ignore_index=True)
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
