"""The scenes and hidden states of NAVSIM 2's two stages, and what a planner plans for them.

The first stage is recorded; the second stands in an index of its own (``data.second_stage``), with pictures and, where
the planner reads stored hidden states, a cache of its own (``data.second_stage_hidden``). Without a second index there
is one stage.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError
from navsim_ext.evaluation.planning import plan_scenes
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.frames import NUM_FUTURE_POSES, POSE_INTERVAL_S
from navsim_ext.hidden_cache.source import HiddenStateSource
from navsim_ext.planners import Planner
from navsim_ext.readers import SplitConfig

log = logging.getLogger(__name__)

STAGES = ("one", "two")


def stage_datasets(cfg: DictConfig, split: SplitConfig | None) -> list[SceneDataset]:
    """The scenes of each stage: those of ``split``, or without one all of the indices that are given.

    Tokens that an index lacks are left to the evaluation, which counts them by group. A scene has its future as target
    where the index holds one.
    """
    datasets = []
    for stage, folder in zip(STAGES, (cfg.data.index, cfg.data.second_stage)):
        if folder is None:
            continue
        options = {"sensor_root": cfg.data.sensor_root if stage == "one" else None, "cameras": list(cfg.data.cameras)}
        whole = SceneDataset(folder, horizon=None, **options)
        tokens = None if split is None else _held(stage, split, whole)
        horizon = NUM_FUTURE_POSES if whole.index.arrays["target"].shape[1] >= NUM_FUTURE_POSES else None
        datasets.append(SceneDataset(folder, horizon=horizon, tokens=tokens, **options))
    return datasets


def _held(stage: str, split: SplitConfig, whole: SceneDataset) -> list[str]:
    """The tokens of a stage that its index holds; raises DataError where there is none of them."""
    folder, tokens = whole.index.folder, split.first_stage_tokens if stage == "one" else split.second_stage_tokens
    known = set(whole.tokens)
    wanted = [token for token in tokens if token in known]
    if not wanted:
        raise DataError(
            f"{folder} holds none of the {len(tokens)} tokens of stage {stage} of {split.name}: build the index "
            "with data.scene_filter=.../scene_filter/NAME.yaml"
            + (" and data.second_stage=FOLDER" if stage == "two" else "")
        )
    if len(wanted) < len(tokens):
        log.warning("%s lacks %d of %d tokens of stage %s", folder, len(tokens) - len(wanted), len(tokens), stage)
    return wanted


def stage_states(cfg: DictConfig, planner: Planner) -> list[HiddenStateSource | None]:
    """Hidden states of each stage, fit for ``planner``: one cache may hold both, ``data.second_stage_hidden`` names
    another. Raises FingerprintMismatch where the planner was trained on others."""
    if not cfg.hidden:
        return [None] * len(STAGES)
    sources: list[HiddenStateSource] = [instantiate(cfg.hidden)]
    if cfg.data.second_stage is not None:
        second = OmegaConf.create(OmegaConf.to_container(cfg.hidden, resolve=True))
        if "index" in second:  # the VLM runs on the pictures of this index
            second.index = cfg.data.second_stage
        if cfg.data.second_stage_hidden is not None:
            if "folder" not in second:
                raise DataError("data.second_stage_hidden belongs to hidden=cached; this hidden source has no folder")
            second.folder = cfg.data.second_stage_hidden
        sources.append(instantiate(second))
    if hasattr(planner, "require_hidden"):
        for states in sources:
            planner.require_hidden(states.fingerprint)
    return sources


def planned_stages(
    cfg: DictConfig, planner: Planner, datasets: Sequence[SceneDataset], hidden: Sequence[HiddenStateSource | None],
    folder: Path,
) -> Iterator[tuple[pd.DataFrame, Fingerprint]]:  # fmt: skip
    """Plans one stage after another, into ``folder/stage_one`` and ``stage_two``: (trajectories, what made them)."""
    for stage, dataset, states in zip(STAGES, datasets, hidden):
        planned, fingerprint = plan_scenes(
            planner, dataset, states, folder / f"stage_{stage}",
            batch_size=cfg.batch_size, num_workers=cfg.num_loaders, device=cfg.device,
        )  # fmt: skip
        yield planned.assign(interval=POSE_INTERVAL_S), fingerprint
