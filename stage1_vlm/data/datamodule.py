"""Loaders over a mixture: padded batches grouped by length, or packed rows; what padding costs is measured and said."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from rich.console import Console
from rich.table import Table

from navsim_ext.errors import DataError
from navsim_ext.runtime.collectives import world
from navsim_ext.runtime.sampler import LengthGrouped, PositionSampler, ResumableLoader
from stage1_vlm.collate import pack, pad
from stage1_vlm.data.line_index import LineRules, build_index, write_skipped
from stage1_vlm.data.mixture import read_mixture
from stage1_vlm.data.packing import balanced_plan, length_classes, packing_plan, padding_share, waiting_share
from stage1_vlm.data.questions import DrivingQuestions, PackedQuestions
from stage1_vlm.loading import load_processor

_log = logging.getLogger(__name__)
BATCHING = ("grouped", "packed", "balanced", "random")
SHOWN_RANKS = 8  # for which waiting is told where a run has one process


class RescalableLoader(ResumableLoader):
    """Continues at the same global position when only the split of the global batch over processes has changed."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = self.sampler
        if state.get("batch_size", 0) * state.get("world_size", 0) == mine.global_batch:
            state = {**state, "batch_size": mine.batch_size, "world_size": mine.world_size}
        super().load_state_dict(state)


class DrivingQuestionData(pl.LightningDataModule):
    """Training (and optional validation) loaders.

    Args:
        mixture: meta JSON (see ``data/mixture.py``); ``datasets`` chooses some of it by name,
            ``repeat`` replaces their repeat_time by name pattern.
        model_path: checkpoint folder, for tokeniser and picture settings.
        batch_size: conversations (rows, when packed) per process and step.
        batching: ``grouped`` by length, ``packed`` rows of up to max_sequence_length tokens, ``balanced`` rows of so
            many that are alike in tokens and in tiles of pictures, or ``random``.
        index_folder: where line indices are kept; skipped lines are listed in ``<report_folder>/skipped.jsonl``.
    """

    def __init__(
        self,
        mixture: str,
        model_path: str,
        *,
        validation: str | None = None,
        datasets: Sequence[str] | None = None,
        repeat: Mapping[str, float] | None = None,
        batch_size: int = 1,
        batching: str = "grouped",
        max_sequence_length: int = 12_288,
        max_image_tokens: int | None = None,
        index_folder: str | None = None,
        report_folder: str | None = None,
        verify_pictures: bool = False,
        max_skipped_share: float = 0.05,
        index_workers: int = 0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batching not in BATCHING:
            raise DataError(f"batching={batching!r}; choose one of {BATCHING}")
        self.mixture, self.validation, self.model_path = mixture, validation, model_path
        self.repeat = dict(repeat or {})
        self.datasets, self.batch_size, self.batching = datasets, batch_size, batching
        self.rules = LineRules(max_sequence_length, verify_pictures)
        self.max_image_tokens, self.max_skipped_share = max_image_tokens, max_skipped_share
        self.index_folder = Path(index_folder) if index_folder else None
        self.report_folder = Path(report_folder) if report_folder else None
        self.index_workers, self.num_workers, self.seed = index_workers, num_workers, seed
        self.report: dict[str, Any] = {}
        self._questions: DrivingQuestions | None = None

    def reads(self) -> dict[str, str]:
        """The question files that a run reads, by key of its identity: they count by content."""
        named = {"mixture": (self.mixture, self.datasets), "validation": (self.validation, None)}
        return {
            f"datamodule.{key}.{entry.name}": str(entry.annotation)
            for key, (path, names) in named.items()
            if path
            for entry in read_mixture(path, names)
        }

    def prepare_data(self) -> None:
        """Builds the line indices on one process of each machine; the others read them."""
        if self.index_folder is not None:
            for path in filter(None, (self.mixture, self.validation)):
                self._read(path)

    def setup(self, stage: str | None = None) -> None:
        if self._questions is not None:
            return
        self._questions = self._read(self.mixture, self.datasets, self.repeat)
        self._validation = self._read(self.validation) if self.validation else None
        lengths, capacity = self._questions.lengths, self.rules.max_sequence_length
        self._rows = packing_plan(lengths, capacity) if self.batching == "packed" else None
        if self.batching == "balanced":
            self._rows = balanced_plan(lengths, self._questions.pictures, capacity, seed=self.seed)
        self.report = {"datasets": self._questions.report(), "padding": self._padding(lengths)}
        if self.trainer is None or self.trainer.is_global_zero:
            self._say()

    def train_dataloader(self) -> RescalableLoader:
        processor = self._questions.processor
        if self._rows is not None:
            dataset = PackedQuestions(self._questions, self._rows)
            grouping, collate = self._grouping(dataset), partial(pack, pad_token_id=processor.pad_token_id)
        else:
            dataset = self._questions
            grouping = LengthGrouped(length_classes(dataset.lengths)) if self.batching == "grouped" else None
            collate = partial(pad, pad_token_id=processor.pad_token_id)
        sampler = PositionSampler(len(dataset), self.batch_size, seed=self.seed, grouping=grouping, drop_last=False)
        return RescalableLoader(dataset, sampler, collate_fn=collate, num_workers=self.num_workers)

    def val_dataloader(self) -> ResumableLoader | list:
        if self._validation is None:
            return []
        collate = partial(pad, pad_token_id=self._validation.processor.pad_token_id)
        sampler = PositionSampler(
            len(self._validation), self.batch_size, seed=self.seed, shuffle=False, drop_last=False
        )
        return ResumableLoader(self._validation, sampler, collate_fn=collate, num_workers=self.num_workers)

    def _grouping(self, rows: PackedQuestions) -> LengthGrouped | None:
        """Balanced rows of like tiles stand in one step: what packing could not level, nobody waits for."""
        return LengthGrouped(rows.pictures) if self.batching == "balanced" else None

    def _read(
        self, mixture: str, names: Sequence[str] | None = None, repeat: Mapping[str, float] | None = None
    ) -> DrivingQuestions:
        processor = load_processor(self.model_path, max_image_tokens=self.max_image_tokens, exact=True)
        options = {
            "cache": self.index_folder,
            "workers": self.index_workers,
            "max_skipped_share": self.max_skipped_share,
        }
        indices = [
            build_index(entry, processor, self.rules, **options) for entry in read_mixture(mixture, names, repeat)
        ]
        return DrivingQuestions(indices, processor, seed=self.seed)

    def _padding(self, lengths: np.ndarray) -> dict[str, float]:
        """Padding share of random, grouped and packed batches of this data, by the order of the first epoch."""
        size = max(2, self.batch_size)  # one conversation a row never pads: two show what batching would cost
        shares = {"batch_size": float(size)}
        if len(lengths) < size:
            return shares
        for name, grouping in (("random", None), ("grouped", LengthGrouped(length_classes(lengths)))):
            sampler = PositionSampler(
                len(lengths), size, seed=self.seed, grouping=grouping, rank=0, world_size=1, drop_last=False
            )
            shares[name] = padding_share(lengths, sampler.order(0), size)
        rows = self._rows if self._rows is not None else packing_plan(lengths, self.rules.max_sequence_length)
        packed = PackedQuestions(self._questions, rows)
        kind = "balanced" if self.batching == "balanced" else "packed"
        shares[kind] = float(1.0 - packed.lengths.sum() / (packed.lengths.max() * len(rows)))
        shares["conversations_per_row"] = len(lengths) / len(rows)
        ranks = world()[1] if world()[1] > 1 else SHOWN_RANKS
        sampler = PositionSampler(
            len(rows), self.batch_size, seed=self.seed, grouping=self._grouping(packed), rank=0, world_size=ranks,
            drop_last=False,
        )  # fmt: skip
        order = sampler.order(0)
        for name, costs in (("tokens", packed.lengths), ("tiles", packed.pictures)):
            shares[f"waiting_{name}"] = waiting_share(costs, order, self.batch_size, ranks)
        return shares

    def _say(self) -> None:
        table = Table("data set", "lines", "skipped", "repeat", "entries", "tokens", title="mixture")
        for name, row in self.report["datasets"].items():
            table.add_row(
                name, f"{row['lines']:,}", f"{row['skipped']:,}", f"{row['repeat_time']:g}", f"{row['entries']:,}",
                f"{row['tokens']:,}",
            )  # fmt: skip
        console = Console(stderr=True)
        console.print(table)
        shares = self.report["padding"]
        names = [name for name in BATCHING if name in shares]
        text = ", ".join(f"{name} {shares[name]:.1%}{' (used)' if name == self.batching else ''}" for name in names)
        console.print(f"padding share of all tokens at {shares['batch_size']:.0f} a batch: {text}")
        if self._rows is not None and "waiting_tokens" in shares:
            waits = ", ".join(f"{name} {shares[f'waiting_{name}']:.1%}" for name in ("tokens", "tiles"))
            console.print(f"processes wait for the busiest of a step: {waits} of their work")
        _log.info("padding: %s", shares)
        if self.report_folder is not None:
            write_skipped(self._questions.indices, self.report_folder / "skipped.jsonl")
