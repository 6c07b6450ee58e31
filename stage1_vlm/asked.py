"""Checkable questions of a mixture, and how they are put to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from navsim_ext.errors import DataError
from navsim_ext.pictures import open_picture
from navsim_ext.questions.answers import is_correct, normalised, read_reply
from navsim_ext.questions.catalogue import QUESTIONS
from navsim_ext.questions.meta_actions import Decision, LaneAhead
from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.data.line_index import LineRules, build_index, write_skipped
from stage1_vlm.data.mixture import read_mixture
from stage1_vlm.data.records import picture_paths
from stage1_vlm.processor import Example, turns_from_conversation
from stage1_vlm.words_report import Decided


@dataclass(frozen=True)
class Asked:
    """One checkable question.

    The record, its type, its log (the cluster of the bootstrap), where its pictures are, and the tokens of the whole
    conversation with its pictures.
    """

    record: dict[str, Any]
    kind: str
    log_name: str
    root: Path
    tokens: int

    @property
    def truth(self) -> str:
        """The text of the last answer."""
        return self.record["conversations"][-1]["value"].strip()

    @property
    def references(self) -> list[str]:
        """All answers that the data has to the question."""
        return list(self.record.get("references") or [read_reply(self.truth).answer or self.truth])

    @property
    def decision(self) -> Decision | None:
        """What was driven, of questions that ask for it."""
        asks = self.kind in QUESTIONS and QUESTIONS[self.kind].decides
        return Decision.parse(str(self.record["answer"])) if asks and "answer" in self.record else None

    def decided(self, text: str) -> Decided:
        road, speed = self.record.get("road"), self.record.get("speed_mps")
        known = road is not None and speed is not None
        return Decided(self.decision, text, self.log_name, speed, LaneAhead.from_json(road) if known else None)

    @property
    def needs_picture(self) -> bool:
        return bool(self.record.get("image_dependent", False))

    def correct(self, text: str) -> bool:
        """By the type's own rule where it has one, else equality of the normalised texts."""
        if self.kind in QUESTIONS and "answer" in self.record:
            return is_correct(self.kind, self.record["answer"], text)
        return normalised(text) == normalised(self.truth)


def read_questions(cfg: DictConfig, backbone: VisionLanguageBackbone) -> list[Asked]:
    """Questions of the mixture's data sets, each once; raises DataError when none is of the chosen types.

    Lines that cannot be used are listed in ``<output_dir>/skipped.jsonl``.
    """
    rules = LineRules(cfg.max_sequence_length)
    indices = [
        build_index(entry, backbone.processor, rules, max_skipped_share=cfg.max_skipped_share)
        for entry in read_mixture(cfg.mixture, cfg.datasets)
    ]
    write_skipped(indices, Path(cfg.output_dir) / "skipped.jsonl")
    asked = []
    for index in indices:
        entry = index.entry
        for item in range(len(index)):
            record = index.record(item)
            kind = str(record.get("type", entry.name))
            if (cfg.types is None or kind in cfg.types) and kind not in cfg.exclude_types:
                paths = picture_paths(record)
                log_name = Path(paths[0]).parts[0] if paths else str(record.get("scene_id", item))
                asked.append(Asked(record, kind, log_name, entry.root, int(index.lengths[item])))
    if not asked:
        raise DataError(f"{cfg.mixture} holds no question of types {cfg.types}: choose others")
    return asked if cfg.limit is None else asked[: cfg.limit]


def question_example(backbone: VisionLanguageBackbone, asked: Asked, name: str) -> Example:
    """The conversation up to its last answer, which the model is to give."""
    turns = turns_from_conversation(asked.record["conversations"])[:-1]
    pictures = [open_picture(asked.root / path) for path in picture_paths(asked.record)]
    return backbone.processor.encode(turns, pictures, generation_prompt=True, name=name)


def batches_by_length(asked: Sequence[Asked], batch_size: int) -> list[list[int]]:
    """Positions of questions of like length."""
    order = np.argsort([one.tokens for one in asked], kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
