"""Encoded conversations into a batch: padded rows with a mask, or packed rows with restarting positions.

Legend: B rows, L tokens of the longest row. Packing puts several conversations into one row; they are told apart by
position ids that restart at 0 and by passing no attention mask at all (with an all-ones mask transformers no longer
looks at the positions and every conversation sees the ones before it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from navsim_ext.errors import DataError
from stage1_vlm.processor import IGNORED_LABEL, Example


@dataclass
class VisionLanguageBatch:
    """``input_ids``, ``labels`` [B,L]; either ``attention_mask`` [B,L] or ``documents`` (lengths per row), not both."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    documents: list[list[int]] | None = None
    pixels: dict[str, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    valid_tokens: int = 0

    def __len__(self) -> int:
        """Conversations, however many rows they take."""
        return len(self.names)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VisionLanguageBatch:
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        return VisionLanguageBatch(
            move(self.input_ids),
            move(self.labels),
            move(self.attention_mask),
            self.documents,
            {name: move(values) for name, values in self.pixels.items()},
            self.names,
            self.valid_tokens,
        )

    def pin_memory(self) -> VisionLanguageBatch:
        pin = lambda tensor: None if tensor is None else tensor.pin_memory()  # noqa: E731
        return VisionLanguageBatch(
            pin(self.input_ids),
            pin(self.labels),
            pin(self.attention_mask),
            self.documents,
            {name: pin(values) for name, values in self.pixels.items()},
            self.names,
            self.valid_tokens,
        )

    def restarting_positions(self) -> Tensor | None:
        """[B,L] positions that restart at each conversation (and at the padding); None for a padded batch."""
        if self.documents is None:
            return None
        length = self.input_ids.shape[1]
        rows = []
        for lengths in self.documents:
            pieces = [*lengths, length - sum(lengths)]
            rows.append(torch.cat([torch.arange(piece) for piece in pieces]))
        return torch.stack(rows).to(self.input_ids.device)


def pad(examples: Sequence[Example], pad_token_id: int, *, side: str = "right") -> VisionLanguageBatch:
    """One conversation a row; ``side="left"`` is what generation needs."""
    if not examples:
        raise DataError("cannot collate 0 conversations")
    length = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    labels = torch.full((len(examples), length), IGNORED_LABEL)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        where = slice(0, len(example)) if side == "right" else slice(length - len(example), length)
        input_ids[row, where] = example.input_ids
        labels[row, where] = example.labels
        mask[row, where] = 1
    return VisionLanguageBatch(
        input_ids,
        labels,
        attention_mask=mask,
        pixels=_join_pixels(examples),
        names=[example.name for example in examples],
        valid_tokens=int(mask.sum()),
    )


def pack(rows: Sequence[Sequence[Example]], pad_token_id: int) -> VisionLanguageBatch:
    """Several conversations a row, in order, the tail filled up to the longest row."""
    if not rows or not all(rows):
        raise DataError("cannot pack a row of 0 conversations")
    lengths = [[len(example) for example in row] for row in rows]
    longest = max(sum(row) for row in lengths)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED_LABEL)
    for index, row in enumerate(rows):
        filled = sum(lengths[index])
        input_ids[index, :filled] = torch.cat([example.input_ids for example in row])
        labels[index, :filled] = torch.cat([example.labels for example in row])
        # The first label of a conversation would be predicted from the end of the one before it.
        starts = torch.tensor([0, *lengths[index][:-1]]).cumsum(0)
        labels[index, starts] = IGNORED_LABEL
    flat = [example for row in rows for example in row]
    return VisionLanguageBatch(
        input_ids,
        labels,
        documents=lengths,
        pixels=_join_pixels(flat),
        names=[example.name for example in flat],
        valid_tokens=sum(map(sum, lengths)),
    )


def _join_pixels(examples: Sequence[Example]) -> dict[str, Tensor]:
    keys = {key for example in examples for key in example.pixels}
    return {key: torch.cat([example.pixels[key] for example in examples if key in example.pixels]) for key in keys}
