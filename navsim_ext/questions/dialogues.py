"""Questions that only the picture answers, as the turns of one conversation about it.

The picture is then encoded once for all of its answers, where single questions encode it for each: several times as
many answers for the same computation. Such data sets are for training; accuracy is measured on single questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.questions.catalogue import QUESTIONS
from navsim_ext.runtime.rng import derive_seed

Record = dict[str, Any]
_PLACEHOLDER = f"{IMAGE_PLACEHOLDER}\n"


def joined(kind: str) -> bool:
    """Whether questions of a type become turns: those that need the picture, decisions and trajectories aside."""
    question = QUESTIONS[kind]
    return question.image_dependent and bool(question.wordings) and not question.decides


def with_dialogues(records: Iterable[Record], seed: int) -> Iterator[Record]:
    """The records of each scene, its picture questions joined to one; the others stay as they are.

    Records of a scene must follow each other.
    """
    for _, group in groupby(records, key=lambda record: record["scene_id"]):
        scene = list(group)
        turns = [record for record in scene if joined(record["type"])]
        if turns:
            yield dialogue(turns, seed)
        yield from (record for record in scene if not joined(record["type"]))


def dialogue(records: Sequence[Record], seed: int) -> Record:
    """One conversation of questions about the same picture; the order of turns is drawn by (seed, scene).

    ``types`` lists the types in the order of their turns. Only the first question carries the picture.
    """
    scene_id = records[0]["scene_id"]
    order = np.random.default_rng(derive_seed(seed, "turns", scene_id)).permutation(len(records))
    asked = [records[position] for position in order]
    turns = [dict(turn) for record in asked for turn in record["conversations"]]
    for turn in turns:
        if turn["from"] == "human":
            turn["value"] = turn["value"].removeprefix(_PLACEHOLDER)
    turns[0]["value"] = _PLACEHOLDER + turns[0]["value"]
    return {
        "image": asked[0]["image"],
        "conversations": turns,
        "image_size": asked[0]["image_size"],
        "scene_id": scene_id,
        "types": [record["type"] for record in asked],
    }
