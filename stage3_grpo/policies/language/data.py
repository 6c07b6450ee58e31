"""Questions as the batches of a reinforcement: prompts with their pictures, and what rewards need to know of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, digest_json, digest_tokens
from navsim_ext.pictures import open_picture
from navsim_ext.questions.answers import read_decision
from navsim_ext.questions.meta_actions import Decision, LaneAhead
from navsim_ext.runtime.sampler import PositionSampler, ResumableLoader
from stage1_vlm import (
    ChatProcessor,
    Example,
    LineIndex,
    LineRules,
    build_index,
    load_processor,
    picture_paths,
    read_mixture,
    turns_from_conversation,
    write_skipped,
)
from stage3_grpo.rewards.replies import Prompted


@dataclass
class AskedPrompt:
    """``example``: the conversation up to the answer that is wanted; ``reply`` [A]: the data's own answer, ended."""

    name: str
    example: Example
    prompted: Prompted
    reply: Tensor


class Prompts(Dataset[AskedPrompt]):
    """Question i of the chosen types of a mixture, each once, whatever its repeat_time.

    ``tokens``: scenes to keep (None: all). Raises DataError when nothing is left, naming what there was.
    """

    def __init__(
        self,
        indices: Sequence[LineIndex],
        processor: ChatProcessor,
        types: Sequence[str],
        tokens: frozenset[str] | None,
        where: str,
    ) -> None:
        self.processor = processor
        self.places: list[tuple[LineIndex, int]] = []
        self.names: list[str] = []
        self.prompted: list[Prompted] = []
        seen: set[str] = set()
        for index in indices:
            for item in range(len(index)):
                record = index.record(item)
                kind = str(record.get("type", index.entry.name))
                token = str(record.get("scene_id", record.get("id", item)))
                if kind not in types:
                    seen.add(kind)
                elif tokens is None or token in tokens:
                    self.places.append((index, item))
                    self.names.append(f"{token}:{kind}:{index.entry.name}:{item}")
                    self.prompted.append(_prompted(token, record, f"{index.entry.annotation}, question {item}"))
        if not self.places:
            listed = f"; other types: {sorted(seen)}" if seen else ""
            kept = "" if tokens is None else f" of the {len(tokens)} listed scenes"
            raise DataError(f"{where} holds no question of types {list(types)}{kept}{listed}: set data.types")

    def __len__(self) -> int:
        return len(self.places)

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint("prompts", {"questions": digest_tokens(self.names)})

    def __getitem__(self, item: int) -> AskedPrompt:
        index, place = self.places[item]
        record = index.record(place)
        turns = turns_from_conversation(record["conversations"])
        pictures = [open_picture(index.entry.root / path) for path in picture_paths(record)]
        example = self.processor.encode(turns[:-1], pictures, generation_prompt=True, name=self.names[item])
        reply = [*self.processor.token_ids(turns[-1].text), self.processor.end_of_turn_id]
        return AskedPrompt(self.names[item], example, self.prompted[item], torch.tensor(reply))


def _prompted(token: str, record: dict[str, Any], where: str) -> Prompted:
    """What the record says about the scene; raises DataError for a decision, speed or road that cannot be read."""
    decision = None
    if str(record.get("type", "")).startswith("decision") or record.get("type") == "meta_action":
        answer = record.get("answer", record["conversations"][-1]["value"])
        decision = read_decision(str(answer))
        if decision is None:
            raise DataError(f"{where}: {answer!r:.80} states no decision")
    speed, road = record.get("speed_mps"), record.get("road")
    if speed is not None and not (isinstance(speed, int | float) and 0.0 <= speed < 1000.0):
        raise DataError(f"{where}: speed_mps is {speed!r:.40}; a speed in m/s was expected")
    return Prompted(token, decision, speed, None if road is None else LaneAhead.from_json(road))


def read_token_list(path: str | os.PathLike[str]) -> frozenset[str]:
    """Scene tokens that ``stage3_grpo.filter_flat`` kept; raises MissingError or DataError."""
    if not Path(path).is_file():
        raise MissingError(f"data.tokens={path} does not exist: make it with python -m stage3_grpo.filter_flat")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        tokens = content["tokens"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no list of tokens ({error!s:.100}): {{tokens: [...]}} was expected") from error
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise DataError(f"{path}: tokens is no list of texts")
    return frozenset(tokens)


class PromptData(pl.LightningDataModule):
    """Batches are lists of prompts. The training order is a function of (seed, epoch, position, number of processes)
    alone, and its place is kept in checkpoints. Lines that cannot be used are listed in ``report_folder``."""

    def __init__(
        self,
        train: str,
        val: str | None,
        model_path: str,
        *,
        types: Sequence[str],
        tokens: str | None = None,
        batch_size: int = 4,
        eval_batch_size: int = 16,
        eval_limit: int | None = None,
        max_sequence_length: int = 4096,
        max_image_tokens: int = 3072,
        max_skipped_share: float = 0.05,
        report_folder: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.mixtures = {"train": train, "val": val}
        self.model_path, self.types = model_path, tuple(types)
        self.tokens = None if tokens is None else read_token_list(tokens)
        self.batch_size, self.eval_batch_size, self.eval_limit = batch_size, eval_batch_size, eval_limit
        self.rules, self.max_image_tokens = LineRules(max_sequence_length), max_image_tokens
        self.max_skipped_share, self.report_folder = max_skipped_share, report_folder
        self.seed, self.num_workers = seed, num_workers
        self._datasets: dict[str, Prompts] = {}

    def dataset(self, name: str) -> Prompts:
        mixture = self.mixtures[name]
        if mixture is None:
            raise DataError(f"no questions for {name!r}: set data.{name}=MIXTURE.json")
        if name not in self._datasets:
            processor = load_processor(self.model_path, max_image_tokens=self.max_image_tokens, exact=True)
            indices = [
                build_index(entry, processor, self.rules, max_skipped_share=self.max_skipped_share)
                for entry in read_mixture(mixture)
            ]
            if self.report_folder is not None:
                write_skipped(indices, Path(self.report_folder) / f"skipped_{name}.jsonl")
            tokens = self.tokens if name == "train" else None
            self._datasets[name] = Prompts(indices, processor, self.types, tokens, f"data.{name}={mixture}")
        return self._datasets[name]

    def identity(self) -> str:
        """Digest of the training questions, for what is made with them."""
        return digest_json(self.dataset("train").names)

    def train_dataloader(self) -> ResumableLoader:
        dataset = self.dataset("train")
        sampler = PositionSampler(len(dataset), self.batch_size, seed=self.seed)
        return ResumableLoader(dataset, sampler, collate_fn=list, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader | list:
        if self.mixtures["val"] is None:
            return []
        dataset: Dataset = self.dataset("val")
        if self.eval_limit is not None:
            dataset = torch.utils.data.Subset(dataset, range(min(self.eval_limit, len(dataset))))
        return DataLoader(dataset, batch_size=self.eval_batch_size, shuffle=False, collate_fn=list)

    def transfer_batch_to_device(self, batch: list[AskedPrompt], device: Any, dataloader_idx: int) -> list[AskedPrompt]:
        """Prompts stay on the CPU: the policy moves what it needs."""
        return batch


def decisions_of(prompts: Prompts) -> list[Decision]:
    """The driven decisions of the questions that have one."""
    return [one.decision for one in prompts.prompted if one.decision is not None]
