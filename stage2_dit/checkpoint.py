"""Saving and loading planners with what belongs to them: configuration, normaliser, and the hidden states' origin.

Two kinds of file: checkpoints of a training run (``*.ckpt``, with optimizer and EMA; a planner stands under
``planner.`` in the state dict and its record under ``planner``), and single planners (``*.safetensors``, the record
in the metadata). Both are read without executing anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from navsim_ext.errors import MissingError
from navsim_ext.files import atomic_file, reading
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import require_states
from navsim_ext.runtime.checkpoint_file import ema_weights, load_checkpoint
from navsim_ext.runtime.checksums import PLACE, check_stamp, stamp
from stage2_dit.planner import DiffusionPlanner, PlannerConfig
from stage2_dit.published import CheckpointMismatch, differences, without_wrappers

PREFIX = "planner."  # of the planner's weights in a training checkpoint
RECORD = "planner"  # key of the record there
METADATA_KEY = "trivium_planner"  # of the record in a safetensors file
CHECKSUM_KEY = "trivium_checksum"

log = logging.getLogger(__name__)

COPY_AGAIN = "copy it again, or save it again with the program that made it"


@dataclass(frozen=True)
class LoadedPlanner:
    """A planner from a file; ``hidden`` is the fingerprint of the hidden states it was trained on (None: unknown)."""

    planner: DiffusionPlanner
    hidden: Fingerprint | None
    path: Path
    averaged: bool  # weights are the EMA

    @property
    def fingerprint(self) -> Fingerprint:
        """Identity of the planner: configuration and weights, made from its hidden states."""
        parents = {"hidden": self.hidden} if self.hidden else {}
        fields = {"config": self.planner.config.to_json(), "weights": weights_digest(self.planner)}
        return Fingerprint("planner", fields, parents, {"path": str(self.path), "ema": self.averaged})


def planner_record(planner: DiffusionPlanner, hidden: Fingerprint | None) -> dict[str, Any]:
    """What a checkpoint carries beside the weights, as plain JSON; stages put it under :data:`RECORD`."""
    return {"config": planner.config.to_json(), "hidden": hidden.to_json() if hidden else None}


def load_planner(path: str | os.PathLike[str], *, ema: bool | None = None) -> LoadedPlanner:
    """Reads a planner from a ``.ckpt`` of any training stage or a ``.safetensors`` file, on the CPU, in eval mode.

    ``ema`` None: averaged weights where the file has them; True or False ask for one kind. Raises MissingError,
    CheckpointMismatch (no planner in the file, or weights that do not fit its record; every difference listed).
    """
    path = Path(path)
    if not path.exists():
        raise MissingError(f"planner checkpoint {path} does not exist: check the path or train it first")
    if path.suffix == ".safetensors":
        try:
            record, weights = _read_safetensors(path)
        except SafetensorError as error:
            raise CheckpointMismatch(f"{path} is damaged or half written ({error}): copy or save it again") from error
        averaged = bool(record.get("averaged"))
        if ema is not None and ema != averaged:
            raise CheckpointMismatch(f"{path} holds {'averaged' if averaged else 'live'} weights only, ema={ema} was "
                                     "asked for")  # fmt: skip
    else:
        record, weights, averaged = _read_training(path, ema)
    if not isinstance(record, Mapping) or not isinstance(record.get("config"), Mapping):
        raise CheckpointMismatch(f"{path}: its planner record has no configuration: save it again")
    config = PlannerConfig.from_json(record["config"])
    with torch.device("meta"):
        wanted = DiffusionPlanner(config).state_dict()
    wrong = differences(weights, wanted)
    if wrong:
        raise CheckpointMismatch(f"{path}: weights do not fit the recorded configuration:\n  " + "\n  ".join(wrong))
    planner = DiffusionPlanner(config)
    planner.load_state_dict(weights, strict=True)
    hidden = Fingerprint.from_json(record["hidden"]) if record.get("hidden") else None
    return LoadedPlanner(planner.eval(), hidden, path, averaged)


def save_planner(
    path: str | os.PathLike[str], planner: DiffusionPlanner, hidden: Fingerprint | None, *, averaged: bool = False
) -> Path:
    """Writes a single planner as ``.safetensors`` (float32), atomically."""
    path = Path(path)
    stem = (
        path.stem if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") else path.name
    )  # of "run.v2": all
    path = path.with_name(f"{stem}.safetensors")
    record = planner_record(planner, hidden) | {"averaged": averaged}
    weights = {name: tensor.detach().cpu().float().contiguous() for name, tensor in planner.state_dict().items()}
    with atomic_file(path) as temporary:
        save_file(weights, temporary, metadata={METADATA_KEY: json.dumps(record), CHECKSUM_KEY: PLACE})
        stamp(temporary)
    return path


def require_hidden(loaded: LoadedPlanner, source: Fingerprint, *, allow_mismatch: bool = False) -> None:
    """Raises FingerprintMismatch listing every difference when hidden states of another origin are to be used.

    ``allow_mismatch`` warns instead. A planner of unknown origin (a converted one) accepts any source.
    """
    if loaded.hidden is not None:
        require_states(loaded.hidden, source, allow_other=allow_mismatch)


def weights_digest(planner: DiffusionPlanner) -> str:
    """SHA-256 over names and bytes of all weights, independent of device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(planner.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    check_stamp(path, COPY_AGAIN, required=False)
    with reading(path, COPY_AGAIN, CheckpointMismatch):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()} if METADATA_KEY in metadata else {}
        record = json.loads(metadata.get(METADATA_KEY, "null"))
    if not isinstance(record, dict):
        raise CheckpointMismatch(
            f"{path} has no planner record in its metadata: convert a published file with "
            "`python -m stage2_dit.convert` first"
        )
    if CHECKSUM_KEY not in metadata:
        log.warning("%s carries no checksum (an earlier version wrote it): its weights are taken as they are", path)
    return record, weights


def _read_training(path: Path, ema: bool | None) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    checkpoint = load_checkpoint(path)
    record = checkpoint.get(RECORD)
    if not isinstance(record, Mapping) or "config" not in record:
        raise CheckpointMismatch(
            f"{path} has no planner record under {RECORD!r}; its keys are {sorted(checkpoint)[:8]}: convert a "
            "published file with `python -m stage2_dit.convert` first"
        )
    weights = _planner_weights(checkpoint["state_dict"])
    average = ema_weights(checkpoint)
    if ema is True and average is None:
        raise CheckpointMismatch(f"{path} holds no EMA weights: use ema=false, or train with callbacks.ema")
    use = average is not None and ema is not False
    if use:
        weights |= _planner_weights(average)
    return dict(record), weights, use


def _planner_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The planner's part of a state dict, under its own names."""
    plain = without_wrappers(state)
    return {name.removeprefix(PREFIX): tensor for name, tensor in plain.items() if name.startswith(PREFIX)}
