"""Writes the hidden states of all scenes of an index into the hidden cache:

    python -m stage1_vlm.export model_path=CHECKPOINT data.index=SCENE_INDEX output_dir=CACHE
    torchrun --nproc-per-node 8 -m stage1_vlm.export ...

Scenes are dealt out in chunks, and chunks are cut into batches by length; both depend on the index alone, not on the
number of processes or on what is done already. So a run that was killed, or continued by another number of
processes, ends in the same bytes: a sample is always computed beside the same neighbours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import write_json_atomic
from navsim_ext.hidden_cache import HiddenCacheWriter
from navsim_ext.hidden_cache.merge import merge
from navsim_ext.runtime.collectives import launched_processes, launched_rank
from navsim_ext.runtime.config import job
from navsim_ext.runtime.preflight import measure_slice, preflight
from navsim_ext.runtime.progress import track
from stage1_vlm.processor import Example
from stage1_vlm.states import StateEncoder, TrajectoryQuestions

_log = logging.getLogger(__name__)

BATCHES_PER_CHUNK = 8


class Chunks(Dataset):
    """Item i: the questions of chunk i and the scenes of it that could not be encoded, as (token, reason)."""

    def __init__(self, questions: TrajectoryQuestions, chunks: Sequence[Sequence[str]], skip_bad: bool) -> None:
        self.questions, self.chunks, self.skip_bad = questions, chunks, skip_bad

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> tuple[list[Example], list[tuple[str, str]]]:
        examples, bad = [], []
        for token in self.chunks[number]:
            try:
                examples.append(self.questions.encode(token))
            except (DataError, MissingError) as error:
                if not self.skip_bad:
                    raise
                bad.append((token, str(error)))
        return examples, bad


def chunks_of(tokens: Sequence[str], batch_size: int) -> list[list[str]]:
    """Consecutive runs of tokens, the unit of work."""
    size = batch_size * BATCHES_PER_CHUNK
    return [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]


def batches_of(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches of like length; ties by name, so that the cut is always the same."""
    ordered = sorted(examples, key=lambda example: (len(example), example.name))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def export(cfg: DictConfig) -> dict[str, int]:
    """Exports this process's share; returns counts (stored, skipped, already there)."""
    rank, world = launched_rank(), launched_processes()
    device = device_of(cfg.device)
    encoder = StateEncoder.load(
        cfg.model_path,
        cfg.data.index,
        cameras=tuple(cfg.data.cameras),
        template=cfg.template,
        dtype=cfg.dtype,
        device=device,
        max_image_tokens=cfg.max_image_tokens,
        attention=cfg.attention,
        sensor_root=cfg.data.sensor_root,
    )
    if cfg.pad_to is not None and cfg.share_prefix:
        raise DataError("pad_to and share_prefix exclude each other: left padding stands before the prefix")
    if world > 1:
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        counts = _export_share(cfg, encoder, rank, world)
        if world > 1:
            distributed.barrier()
        if rank == 0 and cfg.merge:
            merge(cfg.output_dir)
        if world > 1:
            distributed.barrier()
    finally:
        if world > 1:
            distributed.destroy_process_group()
    return counts


def _export_share(cfg: DictConfig, encoder: StateEncoder, rank: int, world: int) -> dict[str, int]:
    questions = encoder.questions
    mine = chunks_of(questions.tokens, cfg.batch_size)[rank::world]
    counts = {"stored": 0, "skipped": 0, "already": 0}
    prefix = encoder.prefix_states() if cfg.share_prefix else None
    _say_cost(cfg, encoder, mine, rank, world)
    with HiddenCacheWriter(
        cfg.output_dir,
        encoder.fingerprint,
        codec=cfg.codec,
        compression=cfg.compression,
        pooling=cfg.pooling,
        pad_to=cfg.pad_to,
        prefix=prefix,
        writer=str(rank),
        skip_bad=cfg.skip_bad,
    ) as writer:
        done = set(writer.done)
        counts["already"] = sum(token in done for chunk in mine for token in chunk)
        todo = [chunk for chunk in mine if not done.issuperset(chunk)]
        loader = DataLoader(
            Chunks(questions, todo, cfg.skip_bad),
            batch_size=None,
            num_workers=cfg.num_workers,
            prefetch_factor=1 if cfg.num_workers else None,
        )
        bad: list[tuple[str, str]] = []
        for examples, unreadable in track(
            loader, f"hidden states ({rank})", total=len(mine), done=len(mine) - len(todo)
        ):
            bad += unreadable
            for batch in batches_of(examples, cfg.batch_size):
                if not done.issuperset(example.name for example in batch):
                    counts["stored"] += _store_batch(cfg, encoder, writer, batch, done)
        bad += list(writer.rejected.items())
        counts["skipped"] = len(bad)
        if bad:
            path = Path(cfg.output_dir) / f"skipped-{rank}.json"
            write_json_atomic(path, dict(bad))
            _log.warning("%d scenes were skipped: %s", len(bad), path)
    return counts


def _store_batch(
    cfg: DictConfig, encoder: StateEncoder, writer: HiddenCacheWriter, batch: list[Example], done: set[str]
) -> int:
    offset = 0
    if cfg.pad_to is not None:
        states = encoder.left_padded_states(batch, cfg.pad_to)
    elif cfg.share_prefix:
        states, offset = encoder.states_after_prefix(batch), len(encoder.questions.prefix_ids())
    else:
        with torch.no_grad():
            states = encoder.states(batch)
    stored = 0
    for example, own in zip(batch, states):
        if example.name in done:
            continue
        padding = 0 if cfg.pad_to is None else len(own) - len(example)
        spans = encoder.questions.image_spans(example, offset - padding)
        stored += writer.put(example.name, own.to(torch.bfloat16).cpu(), image_spans=spans, padding=padding)
    return stored


def _say_cost(cfg: DictConfig, encoder: StateEncoder, mine: list[list[str]], rank: int, world: int) -> None:
    """Disk and time, from the first scenes of the first process."""
    if rank != 0 or not mine:
        return
    examples = [encoder.questions.encode(token) for token in mine[0][: 2 * cfg.batch_size]] if not cfg.skip_bad else []
    if not examples:
        return
    with torch.no_grad():
        seconds = measure_slice(lambda batch: encoder.states(batch), list(batches_of(examples, cfg.batch_size)))
    tokens = sum(map(len, examples)) / len(examples)
    bytes_per_value = 2 if cfg.codec == "bf16" else 1.1
    items = len(encoder.questions.tokens)
    preflight(
        output_dir=cfg.output_dir,
        items=items,
        bytes_per_item=tokens * encoder.backbone.hidden_width * bytes_per_value,
        seconds_per_item=seconds / cfg.batch_size,
        workers=world,
        title=f"export of {items:,} scenes, {tokens:.0f} tokens x {encoder.backbone.hidden_width} each",
    )


def device_of(name: str) -> torch.device:
    """``auto``: this process's GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


@job("export")
def main(cfg: DictConfig) -> None:
    counts = export(cfg)
    _log.info("%s: %s", cfg.output_dir, counts)
    if counts["stored"] + counts["already"] == 0 and launched_rank() == 0:
        raise TriviumError(f"no hidden state was stored in {cfg.output_dir}: every scene was skipped")


if __name__ == "__main__":
    main()
