"""What a planner sees of the VLM: hidden states and their mask, which never travel without each other.

Legend: B samples, L tokens (longest of the batch), D width of the hidden state, P tokens of a shared prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.hidden_cache.codecs import codec_named


@dataclass(frozen=True)
class HiddenBatch:
    """Last hidden states of B samples, padded on the right with zeros."""

    hidden: Tensor  # [B,L,D] bfloat16 or float32: after the VLM's final norm
    mask: Tensor  # [B,L] bool: True where a token is

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def lengths(self) -> Tensor:
        """[B] int64: number of tokens of each sample."""
        return self.mask.sum(1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HiddenBatch:
        return HiddenBatch(
            self.hidden.to(device, non_blocking=non_blocking), self.mask.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> HiddenBatch:
        return HiddenBatch(self.hidden.pin_memory(), self.mask.pin_memory())

    def validate(self) -> HiddenBatch:
        """Returns itself; raises DataError unless shapes fit, each sample has a token and its states are finite."""
        if self.hidden.ndim != 3 or not self.hidden.is_floating_point():
            raise DataError(f"hidden must be floating [B,L,D], is {self.hidden.dtype} {tuple(self.hidden.shape)}")
        if self.mask.dtype != torch.bool or self.mask.shape != self.hidden.shape[:2]:
            expected, found = tuple(self.hidden.shape[:2]), tuple(self.mask.shape)
            raise DataError(f"mask must be bool [B,L] = {expected}, is {self.mask.dtype} {found}")
        if not self.mask.any(1).all():
            raise DataError(f"sample {int((~self.mask.any(1)).nonzero()[0])} of the batch has no token")
        if not torch.isfinite(self.hidden[self.mask]).all():
            raise DataError("hidden states contain NaN or infinite values")
        return self


@dataclass(frozen=True)
class PackedHiddenBatch:
    """A HiddenBatch that is still encoded: fewer bytes to the device, decoded there.

    ``to(device)`` moves it and gives the decoded :class:`HiddenBatch`: Lightning's transfer of a batch does just that.
    """

    codec: str
    parts: Mapping[str, Tensor]  # each [B,L,...], padded with zeros, which decode to zeros
    mask: Tensor  # [B,L] bool
    prefix: Tensor | None = None  # [P,D] bfloat16: stands before the tokens of every sample
    dtype: torch.dtype = torch.bfloat16

    def __len__(self) -> int:
        return len(self.mask)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HiddenBatch:
        moved = PackedHiddenBatch(
            self.codec,
            {name: part.to(device, non_blocking=non_blocking) for name, part in self.parts.items()},
            self.mask.to(device, non_blocking=non_blocking),
            None if self.prefix is None else self.prefix.to(device, non_blocking=non_blocking),
            self.dtype,
        )
        return moved.decode()

    def pin_memory(self) -> PackedHiddenBatch:
        return PackedHiddenBatch(
            self.codec,
            {name: part.pin_memory() for name, part in self.parts.items()},
            self.mask.pin_memory(),
            None if self.prefix is None else self.prefix.pin_memory(),
            self.dtype,
        )

    def decode(self) -> HiddenBatch:
        """The states, decoded where the parts are."""
        hidden, mask = codec_named(self.codec).decode(self.parts), self.mask
        if self.prefix is not None:
            hidden = torch.cat([self.prefix.expand(len(self), -1, -1), hidden], 1)
            mask = torch.cat([mask.new_ones(len(self), len(self.prefix)), mask], 1)
        return HiddenBatch(hidden.to(self.dtype), mask)
