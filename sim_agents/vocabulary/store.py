"""A vocabulary on disk: one checksummed record and the fingerprint of the data that it was made from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from navsim_ext.closed_loop.kinematics import TOKEN_S
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards import ShardStore, ShardWriter, merge
from sim_agents.vocabulary.motion import CLASS_NAMES, MotionVocabulary, ShapeVocabulary, VerletVocabulary

KIND = "motion_vocabulary"
VERSION = 1
RECORD = "motion"


def vocabulary_fingerprint(fields: dict[str, object], scenes: Fingerprint | None) -> Fingerprint:
    """``fields`` say how it was made; ``scenes`` what from (None for one that needs no data)."""
    whole = {"version": VERSION, "interval_s": TOKEN_S, "classes": list(CLASS_NAMES), **fields}
    return Fingerprint(KIND, whole, {} if scenes is None else {"scenes": scenes})


def save_vocabulary(
    folder: str | os.PathLike[str], vocabulary: ShapeVocabulary | VerletVocabulary, fingerprint: Fingerprint
) -> None:
    """Writes the store; an equal one that is there already is left alone, another one is refused."""
    if isinstance(vocabulary, VerletVocabulary):
        arrays = {"width": np.array(vocabulary.width), "changes": np.array(vocabulary.changes)}
    else:
        arrays = {"shapes": vocabulary.shapes.numpy(), "counts": vocabulary.counts.numpy()}
    with ShardWriter(folder, fingerprint) as writer:
        if RECORD not in writer.done:
            writer.put(RECORD, arrays)
    merge(folder)


def load_vocabulary(folder: str | os.PathLike[str]) -> tuple[MotionVocabulary, Fingerprint]:
    """The vocabulary of a folder and what it was made from. Raises DataError for a store of something else, of other
    classes or of another interval, CorruptShard for a damaged one."""
    store = ShardStore(folder)
    fingerprint = store.fingerprint
    wanted = {"version": VERSION, "interval_s": TOKEN_S, "classes": list(CLASS_NAMES)}
    if fingerprint.kind != KIND:
        raise DataError(f"{Path(folder)} is a store of kind {fingerprint.kind!r}; {KIND!r} was expected")
    for key, value in wanted.items():
        found = fingerprint.fields.get(key)
        if found != value:
            raise DataError(f"{Path(folder)}: the vocabulary's {key} is {found!r}, {value!r} is needed: build it again")
    arrays = store.get(RECORD)
    if "shapes" in arrays:
        shapes, counts = (torch.from_numpy(np.array(arrays[name])) for name in ("shapes", "counts"))
        return ShapeVocabulary(shapes, counts), fingerprint
    return VerletVocabulary(float(arrays["width"]), int(arrays["changes"])), fingerprint
