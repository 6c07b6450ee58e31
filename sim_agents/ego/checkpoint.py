"""What a checkpoint of a vector planner carries beside its weights, and reading one back.

The record says which planner it is and how large: a checkpoint can drive without the configuration that trained it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, digest_json
from navsim_ext.runtime.checkpoint_file import ema_weights, load_checkpoint, record_of
from sim_agents.training.checkpoint import require_fit

RECORD = "ego_planner"
PREFIX = "network."


def planner_record(kind: str, settings: dict[str, Any], scenes: Fingerprint | None, **more: Any) -> str:
    """JSON text of the record of a "path", "tree" or "token" planner."""
    return json.dumps(
        {"planner": kind, "settings": settings, "scenes": None if scenes is None else scenes.to_json(), **more}
    )


def read_record(checkpoint: Mapping[str, Any], where: str, *more: str) -> dict[str, Any]:
    """What :func:`planner_record` put into a checkpoint; raises DataError for none, or one without these keys."""
    return record_of(checkpoint, RECORD, {"planner", "settings", "scenes", *more}, where, "sim_agents.ego.train")


def read_planner(
    path: str | os.PathLike[str], kind: str, *, ema: bool | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Fingerprint]:
    """(record, weights of the network, fingerprint) of a checkpoint, on the CPU; ``ema`` None takes averaged weights
    where there are some. Raises MissingError, DataError for a checkpoint of something else."""
    path = Path(path)
    if not path.exists():
        raise MissingError(f"checkpoint {path} does not exist: check the path or train it first")
    checkpoint = load_checkpoint(path)
    record = read_record(checkpoint, str(path))
    if record["planner"] != kind:
        raise DataError(f"{path} is a checkpoint of a {record['planner']} planner, not of a {kind} planner")
    averaged = ema_weights(checkpoint)
    if ema and averaged is None:
        raise DataError(f"{path} holds no averaged weights, ema=true was asked for")
    weights = checkpoint["state_dict"] if averaged is None or ema is False else averaged
    own = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    digest = digest_json({name: [float(value.double().sum()), float(value.double().pow(2).sum())]
                          for name, value in sorted(own.items())})  # fmt: skip
    parents = {} if record["scenes"] is None else {"scenes": Fingerprint.from_json(record["scenes"])}
    fields = {"planner": kind, "settings": record["settings"], "weights": digest}
    return record, own, Fingerprint(RECORD, fields, parents, {"path": str(path)})


def fill(network: nn.Module, weights: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Loads weights that must fit exactly; raises DataError naming those that do not."""
    require_fit(network, weights, path)
    network.load_state_dict(weights, strict=True)
