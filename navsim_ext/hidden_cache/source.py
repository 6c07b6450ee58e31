"""Where hidden states come from: cached or live behind one protocol, and the refusal to mix what made them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache.codecs import codec_named
from navsim_ext.hidden_cache.pooling import check_pooling
from navsim_ext.hidden_cache.schema import HiddenBatch, PackedHiddenBatch
from navsim_ext.scene import SceneBatch

KIND = "hidden_states"


class HiddenStateSource(Protocol):
    """Gives the VLM's last hidden states of samples by token."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What made the states: see :func:`states_fingerprint`."""

    def fetch(self, tokens: Sequence[str]) -> HiddenBatch | PackedHiddenBatch:
        """States of these samples, in this order; what it gives has ``to(device)``, which is a HiddenBatch."""


class SceneEncoder(Protocol):
    """Gives hidden states of scenes that stand in no index: where all there is are pictures and ego states."""

    @property
    def fingerprint(self) -> Fingerprint:
        """As that of a source: see :func:`states_fingerprint`."""

    def __call__(self, scenes: SceneBatch) -> HiddenBatch:
        """States of these scenes; ``scenes.cameras`` names the pictures, by absolute paths."""


def states_fingerprint(
    vlm: Fingerprint, *, codec: str = "bf16", pooling: str | None = None, pad_to: int | None = None
) -> Fingerprint:
    """Fingerprint of states as a planner sees them.

    ``vlm`` says what computed them (weights, prompt template, image settings). Of the cache only what changes values
    counts: the codec, pooling of image tokens, the padded layout. So a live VLM and a bf16 cache of it are equal, and
    lossless compression or the sharing of a prefix does not show.
    """
    codec_named(codec)
    check_pooling(pooling)
    return Fingerprint(KIND, {"codec": codec, "pooling": pooling, "pad_to": pad_to}, parents={"vlm": vlm})


def require_states(trained_on: Fingerprint, offered: Fingerprint, *, allow_other: bool = False) -> None:
    """Raises FingerprintMismatch, naming both, unless a planner may use this source; warns where it was allowed."""
    if allow_other:
        if trained_on.digest != offered.digest:
            lines = "\n  ".join(trained_on.differences(offered))
            warnings.warn(
                f"hidden states {offered.digest[:12]} are used by a planner trained on {trained_on.digest[:12]}, as "
                f"allowed by allow_hidden_mismatch:\n  {lines}",
                stacklevel=2,
            )
        return
    trained_on.require_equal(
        offered,
        mine="the hidden states that the planner was trained on",
        theirs="the offered source",
        remedy="use the cache or the VLM that the planner was trained on, or set allow_hidden_mismatch=true",
    )


class LiveHiddenStates:
    """States computed when they are asked for.

    ``encode`` runs the VLM: tokens -> one tensor [L,D] each, without padding. They are rounded to bfloat16, so that
    they are what a bf16 cache of the same VLM holds, and given in ``dtype``.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Sequence[Tensor]],
        vlm: Fingerprint,
        *,
        dtype: str | torch.dtype = torch.bfloat16,
    ) -> None:
        self.encode = encode
        self.dtype = dtype_named(dtype)
        self._fingerprint = states_fingerprint(vlm)

    @property
    def fingerprint(self) -> Fingerprint:
        return self._fingerprint

    def fetch(self, tokens: Sequence[str]) -> HiddenBatch:
        states = self.encode(tokens)
        if len(states) != len(tokens):
            raise DataError(f"the VLM gave {len(states)} samples for {len(tokens)} tokens")
        return pad_states([one.to(torch.bfloat16) for one in states], self.dtype).validate()


def pad_states(states: Sequence[Tensor], dtype: torch.dtype) -> HiddenBatch:
    """Pads tensors [L_i,D] of one width on the right with zeros."""
    widths = {one.shape[1] for one in states}
    if len(widths) != 1:
        raise DataError(f"hidden states of one batch have widths {sorted(widths)}; one VLM gives one width")
    lengths = torch.tensor([len(one) for one in states])
    hidden = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(dtype)
    mask = torch.arange(hidden.shape[1])[None, :] < lengths[:, None]
    return HiddenBatch(hidden, mask.to(hidden.device))


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """bfloat16 or float32, by name (from a configuration) or as it is."""
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    dtype = known.get(name, name) if isinstance(name, str) else name
    if dtype not in known.values():
        raise DataError(f"hidden states come as {' or '.join(known)}, not {name}")
    return dtype
