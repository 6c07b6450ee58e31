"""Where a run writes and what it continues from; refuses to continue what another configuration began.

<output_dir>/config.yaml, training_log.txt
<output_dir>/version_N/checkpoints/epoch=E-step=S.ckpt, last.ckpt
<output_dir>/version_N/metrics.csv, hparams.yaml, identity.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from navsim_ext.errors import CorruptFile, MissingError
from navsim_ext.files import read_json, write_json_atomic
from navsim_ext.fingerprint import FILE_NAME, Fingerprint, digest_file, digest_json, flatten_json
from navsim_ext.runtime.checkpoint_folder import is_complete, place_of, resume_point, step_of
from navsim_ext.runtime.rng import ResumeMismatch

IDENTITY_NAME = "identity.json"
MODEL_CONFIG = "config.json"  # of a folder in transformers' form
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model")
# what may change between two parts of one run without changing its result
FREE_KEYS = frozenset(
    {"num_workers", "prefetch_factor", "persistent_workers", "pin_memory", "index_folder", "report_folder",
     "index_workers", "threads", "run_dir", "dirpath"}
)  # fmt: skip
FREE_TRAINER_KEYS = frozenset(
    {"_target_", "accelerator", "devices", "num_nodes", "log_every_n_steps", "num_sanity_val_steps",
     "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "default_root_dir", "profiler",
     "detect_anomaly", "benchmark", "barebones"}
)  # fmt: skip
FREE_CALLBACKS = frozenset(
    {"checkpoint", "signals", "cost", "throughput", "learning_rate", "progress", "storage", "recorder"}
)
CONTENT = "fingerprint"  # of what lies at a configured path, kept below the path's own key


@dataclass(frozen=True)
class RunPlan:
    """``checkpoint`` is None for a fresh start in ``run_dir``."""

    run_dir: Path
    checkpoint: Path | None


def plan_run(output_dir: Path, resume: str) -> RunPlan:
    """Decides from the files alone, changing none, so that every process of a run decides alike.

    ``auto``: the newest version folder continues from its ``last.ckpt``, and is begun again if it holds no complete
    checkpoint. ``never``: a new version folder. Anything else: the path of a checkpoint; one of this output_dir
    continues in its own version folder, one from elsewhere starts a new one here.
    """
    versions = sorted(
        (int(folder.name.removeprefix("version_")), folder)
        for folder in output_dir.glob("version_*")
        if folder.name.removeprefix("version_").isdigit()
    )
    following = output_dir / f"version_{versions[-1][0] + 1 if versions else 0}"
    if resume == "never":
        return RunPlan(following, None)
    if resume == "auto":
        if not versions:
            return RunPlan(following, None)
        folder = versions[-1][1]
        return RunPlan(folder, resume_point(folder / "checkpoints"))
    path = Path(resume)
    if not path.exists():
        raise MissingError(f"resume={path} does not exist: give a checkpoint's path, or auto or never")
    if not is_complete(path.resolve()):
        raise ResumeMismatch(f"resume={path} is not a complete checkpoint: take an earlier one of its folder")
    path = path.resolve()
    step_of(path)
    own = path.parents[1] if path.parents[1].parent == output_dir.resolve() else None
    return RunPlan(own or following, path)


def identity(cfg: DictConfig, world_size: int, reads: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All configured values that a resumed run must share with its beginning, flat, as JSON.

    A path (scene index, cache, weights, question file) comes with a digest of what lies there under
    ``<key>.fingerprint``; ``reads`` names further files that the data are read from, by key.
    """
    content = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("module", "datamodule")}
    trainer = OmegaConf.to_container(cfg.trainer, resolve=True)
    content["trainer"] = {key: value for key, value in trainer.items() if key not in FREE_TRAINER_KEYS}
    content |= {"seed": cfg.seed, "world_size": world_size}
    callbacks = OmegaConf.to_container(cfg.get("callbacks") or OmegaConf.create(), resolve=True)
    content["callbacks"] = {name: each for name, each in callbacks.items() if each and name not in FREE_CALLBACKS}
    flat = {key: value for key, value in flatten_json(content).items() if not _free(key)} | dict(reads or {})
    for key, value in list(flat.items()):
        if isinstance(value, str) and (digest := digest_path(value)) is not None:
            flat[f"{key}.{CONTENT}"] = digest
    return flat


def digest_path(path: str) -> str | None:
    """Digest of an artefact's fingerprint, a file, or the files of a model's folder; None for anything else.

    (Folders that are neither artefact nor model, such as one of pictures, are known by their path alone.)
    """
    if not os.path.isabs(path) and os.sep not in path and not os.path.exists(path):
        return None  # a word, not a path
    if os.path.isfile(os.path.join(path, FILE_NAME)):
        return Fingerprint.load(path).digest
    if os.path.isfile(path):
        return digest_file(path)
    if os.path.isfile(os.path.join(path, MODEL_CONFIG)):
        files = sorted(each for each in Path(path).iterdir() if each.suffix in MODEL_SUFFIXES and each.is_file())
        return digest_json({each.name: digest_file(each) for each in files})
    return None


def require_room(checkpoint: Path, trainer: DictConfig) -> None:
    """Raises ResumeMismatch when the run would end before the checkpoint that it continues from."""
    epoch, step = place_of(checkpoint)
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if epochs not in (None, -1) and epoch >= epochs:
        raise ResumeMismatch(
            f"{checkpoint} is in epoch {epoch} (the first is 0), trainer.max_epochs={epochs} ends before it: set "
            f"trainer.max_epochs to {epoch + 1} or more, or start afresh with resume=never"
        )
    if steps not in (None, -1) and step > steps:
        raise ResumeMismatch(
            f"{checkpoint} is of step {step}, trainer.max_steps={steps} ends before it: set trainer.max_steps to "
            f"{step} or more, or start afresh with resume=never"
        )


def _free(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in FREE_KEYS


def _same(key: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether both runs agree on a key; where both know what lies at a path, its content decides."""
    content = key if key.endswith(f".{CONTENT}") else f"{key}.{CONTENT}"
    if content in then and content in now:
        return then[content] == now[content]
    return content == key or then.get(key, "(absent)") == now.get(key, "(absent)")


def check_identity(checkpoint: Path, now: dict[str, Any], ignore: list[str]) -> None:
    """Raises ResumeMismatch listing ``key: then | now`` for each difference outside the prefixes in ``ignore``."""
    path = checkpoint.parents[1] / IDENTITY_NAME
    if not path.is_file():
        raise MissingError(f"{path} is missing, so {checkpoint} cannot be checked: it is not a run of Trivium")
    then = read_json(path, "restore it from a copy of the run's folder, or start afresh with resume=never")
    if not isinstance(then, dict):
        raise CorruptFile(f"{path} holds a {type(then).__name__}, not what a run wrote: start afresh with resume=never")
    now = json.loads(json.dumps(now))
    differing = [
        f"{key}: {then.get(key, '(absent)')!r} | {now.get(key, '(absent)')!r}"
        for key in sorted(then.keys() | now.keys())
        if not _free(key)
        and not _same(key, then, now)
        and not any(key == prefix or key.startswith(f"{prefix}.") for prefix in ignore)
    ]
    if differing:
        lines = "\n  ".join(differing)
        raise ResumeMismatch(
            f"{checkpoint} was made by another configuration (then | now):\n  {lines}\nSet these back, start afresh "
            "with resume=never, or accept them by name with resume_ignore=[key,...]"
        )


def save_identity(run_dir: Path, content: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(run_dir / IDENTITY_NAME, content)
