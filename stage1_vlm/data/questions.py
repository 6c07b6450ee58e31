"""A mixture of driving-question data sets as one map-style data set of encoded conversations."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from navsim_ext.errors import DataError
from navsim_ext.pictures import open_picture
from stage1_vlm.data.line_index import LineIndex
from stage1_vlm.data.records import picture_paths
from stage1_vlm.processor import ChatProcessor, Example, turns_from_conversation

JPEG_QUALITIES = range(75, 101)  # InternVL's augmentation: one random recompression


def recompress(picture: Image.Image) -> Image.Image:
    """The picture after JPEG compression at a random quality (75 to 100)."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=random.choice(JPEG_QUALITIES))
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


class DrivingQuestions(Dataset):
    """``[i]`` is the i-th entry of the mixture, encoded; ``lengths`` [N] are its token counts, known beforehand, and
    ``pictures`` [N] those of its pictures."""

    def __init__(self, indices: Sequence[LineIndex], processor: ChatProcessor, *, seed: int = 0) -> None:
        self.indices, self.processor = list(indices), processor
        chosen = [index.entry.repeat(len(index), seed) for index in self.indices]
        self._set = np.repeat(np.arange(len(chosen)), [len(items) for items in chosen])
        self._item = np.concatenate(chosen)
        self.lengths: NDArray[np.int32] = np.concatenate([i.lengths[c] for i, c in zip(self.indices, chosen)])
        self.pictures: NDArray[np.int32] = np.concatenate([i.pictures[c] for i, c in zip(self.indices, chosen)])

    def __len__(self) -> int:
        return len(self._item)

    def record(self, position: int) -> tuple[LineIndex, dict[str, Any]]:
        """The data set and JSON record behind an entry."""
        index = self.indices[self._set[position]]
        return index, index.record(self._item[position])

    def __getitem__(self, position: int) -> Example:
        index, record = self.record(position)
        entry = index.entry
        pictures = [open_picture(entry.root / path) for path in picture_paths(record)]
        if entry.data_augment:
            pictures = [recompress(picture) for picture in pictures]
        name = f"{entry.name}:{record.get('id', record.get('scene_id', self._item[position]))}"
        example = self.processor.encode(turns_from_conversation(record["conversations"]), pictures, name=name)
        if len(example) != self.lengths[position]:
            raise DataError(
                f"{entry.annotation}, byte {index.offsets[self._item[position]]}: {len(example)} tokens, "
                f"{self.lengths[position]} in the index; image_size is not that of the "
                f"pictures, {[p.size for p in pictures]}: correct or drop image_size, or set data.verify_pictures=true"
            )
        return example

    def report(self) -> dict[str, dict[str, Any]]:
        """Per data set: lines, skipped (by reason), repeat_time, entries; tokens over all entries."""
        report = {}
        for number, index in enumerate(self.indices):
            mine = self._set == number
            report[index.entry.name] = {
                "lines": index.num_lines,
                "skipped": len(index.skipped),
                "reasons": index.reasons(),
                "repeat_time": float(index.entry.repeat_time),
                "entries": int(mine.sum()),
                "tokens": int(self.lengths[mine].sum()),
            }
        return report


class PackedQuestions(Dataset):
    """Rows of several conversations: ``[r]`` is the list of examples of row r of a packing plan."""

    def __init__(self, questions: DrivingQuestions, rows: Sequence[Sequence[int]]) -> None:
        self.questions, self.rows = questions, rows
        self.lengths = np.asarray([questions.lengths[list(row)].sum() for row in rows])
        self.pictures = np.asarray([questions.pictures[list(row)].sum() for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Example]:
        return [self.questions[position] for position in self.rows[row]]
