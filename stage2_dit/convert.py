"""Converts planner checkpoints between the published form and ours, and says what became of every key.

    python -m stage2_dit.convert source=published.ckpt target=planner.safetensors normaliser=waypoint
    python -m stage2_dit.convert source=planner.safetensors target=published.ckpt to=published

Published Lightning files (``agent.action_head.``) and exported ones (``action_head.``) are read; bare state dicts and
``.safetensors`` too. Nothing in a file is executed. What does not fit is listed with both shapes and refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.files import atomic_file
from navsim_ext.runtime.checkpoint_file import require_undamaged
from navsim_ext.runtime.config import job
from navsim_ext.runtime.torch_file import load_torch
from stage2_dit.checkpoint import load_planner, save_planner
from stage2_dit.normaliser import PUBLISHED
from stage2_dit.published import PREFIXES, CheckpointMismatch, ConversionReport, from_published, to_published

FORMS = {"lightning": PREFIXES[0], "exported": PREFIXES[1]}


def read_published(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a published file. Raises MissingError or CheckpointMismatch naming what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"checkpoint {path} does not exist: check source=")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointMismatch(f"{path} is not a safetensors file, or was cut short: {error}") from error
    require_undamaged(path)
    try:
        content = load_torch(path, mmap=True)
    except CorruptFile as error:
        raise CheckpointMismatch(
            f"{error}; it cannot be read without executing what is in it: save its state_dict alone, with the program "
            "that made it, and convert that"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointMismatch(f"{path} holds no state dict of tensors; its first keys are {list(content)[:5]}")
    return dict(state)


def to_ours(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, normaliser: str, **changes: Any
) -> tuple[Path, ConversionReport]:
    """Writes ``target`` (``.safetensors``); ``changes`` as for :func:`stage2_dit.published.from_published`."""
    if normaliser not in PUBLISHED:
        raise DataError(f"normaliser {normaliser!r} does not exist; published planners use {', '.join(PUBLISHED)}")
    planner, report = from_published(read_published(source), normaliser=PUBLISHED[normaliser], **changes)
    return save_planner(target, planner, hidden=None), report


def to_theirs(source: str | os.PathLike[str], target: str | os.PathLike[str], *, form: str) -> tuple[Path, int]:
    """Writes a planner of ours as ``{"state_dict": ...}`` (or bare ``.safetensors``) under the published names."""
    if form not in FORMS:
        raise DataError(f"form {form!r} does not exist; choose one of {', '.join(FORMS)}")
    tensors = to_published(load_planner(source).planner, FORMS[form])
    target = Path(target)
    with atomic_file(target) as temporary:
        if target.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        else:
            torch.save({"state_dict": tensors}, temporary)
    return target, len(tensors)


@job("convert")
def main(cfg: DictConfig) -> None:
    """One conversion; prints what became of the keys."""
    console = Console(soft_wrap=True)
    if cfg.to == "published":
        target, count = to_theirs(cfg.source, cfg.target, form=cfg.form)
        console.print(f"{target}: {count} tensors under {FORMS[cfg.form]!r}")
        return
    if cfg.to != "trivium":
        raise DataError(f"to={cfg.to} does not exist; choose trivium or published")
    target, report = to_ours(
        cfg.source, cfg.target, normaliser=cfg.normaliser, padding=cfg.padding, padded_length=cfg.padded_length,
        process=cfg.process, num_steps=cfg.num_steps,
    )  # fmt: skip
    console.print(f"{target}:", *report.lines(), sep="\n  ", markup=False)


if __name__ == "__main__":
    main()
