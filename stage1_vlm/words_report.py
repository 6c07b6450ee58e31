"""What answers in words are worth, beyond right or wrong: decisions by class, reasons, choices, a judge's opinion.

Everything is read inside ``<answer>``; the reasoning is compared with the reasoning, and nothing else with it.

    F1_c = 2 TP / (2 TP + FP + FN) of each of the 9 actions: an answer names c, and c was driven
    planning accuracy   exactly the two driven words; per pair: among the questions where that pair was driven
    agreement           the decision that is stated (rows) and that of the trajectory that follows it (columns)

Legend: N questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from navsim_ext.bootstrap import bootstrap_mean
from navsim_ext.errors import MissingError
from navsim_ext.questions.answers import normalised, read_decision, read_reply, read_trajectory, stated_actions
from navsim_ext.questions.meta_actions import PAIRS, PATHS, SPEEDS, Decision, LaneAhead, decide
from stage1_vlm.language_metrics import bleu, cider, meteor_1_5, rouge_l, tokens

UNREADABLE = "unreadable"
NO_TRAJECTORY = "no trajectory"
_LETTER = re.compile(r"^\s*\(?([A-Ha-h])(?:[).:,]|\s*$|\s+-)")


@dataclass(frozen=True)
class Decided:
    """A question with a driven decision, and the reply to it."""

    true: Decision
    text: str
    log_name: str
    speed_mps: float | None = None
    road: LaneAhead | None = None


def decision_report(rows: Sequence[Decided]) -> dict[str, Any]:
    """F1 by class, planning accuracy with its interval over logs, per pair, confusion, form, agreement."""
    said = [read_decision(row.text) for row in rows]
    right = np.array([one == row.true for one, row in zip(said, rows, strict=True)], dtype=np.float64)
    report: dict[str, Any] = {
        "questions": len(rows),
        "planning_accuracy": bootstrap_mean(right, [row.log_name for row in rows]).to_json(),
        "f1": class_f1(rows),
        "pairs": _pairs(rows, right),
        "readable": float(np.mean([one is not None for one in said])),
        "well_formed": float(np.mean([read_reply(row.text).well_formed for row in rows])),
        "faults": dict(Counter(fault for row in rows if (fault := read_reply(row.text).fault)).most_common()),
        "confusion": {
            axis: _confusion([(getattr(row.true, axis), getattr(one, axis) if one else UNREADABLE)
                              for row, one in zip(rows, said, strict=True)])
            for axis in ("speed", "path")
        },
    }  # fmt: skip
    known = [(row, one) for row, one in zip(rows, said, strict=True) if row.road is not None and "PT" in row.text]
    if known:
        driven = [_driven(row) for row, _ in known]
        pairs = [(str(one) if one else UNREADABLE, there) for (_, one), there in zip(known, driven, strict=True)]
        agrees = np.array([one == there for one, there in pairs], dtype=np.float64)
        report["agreement"] = bootstrap_mean(agrees, [row.log_name for row, _ in known]).to_json()
        report["agreement_confusion"] = _confusion(pairs)
    return report


def _driven(row: Decided) -> str:
    plan = read_trajectory(row.text).poses
    return NO_TRAJECTORY if plan is None else str(decide(plan, row.speed_mps, row.road))


def class_f1(rows: Sequence[Decided]) -> dict[str, dict[str, float | int | None]]:
    """F1, and how often the class was driven and named; F1 is None for a class that neither happened."""
    table = {}
    stated = [stated_actions(read_reply(row.text).answer) for row in rows]
    for axis, words in (("speed", SPEEDS), ("path", PATHS)):
        for word in words:
            true = np.array([getattr(row.true, axis) == word for row in rows])
            named = np.array([word in (one.speeds if axis == "speed" else one.paths) for one in stated])
            hits, driven, count = int((true & named).sum()), int(true.sum()), int(named.sum())
            score = 2.0 * hits / (driven + count) if driven + count else None
            table[word] = {"f1": score, "driven": driven, "named": count}
    return table


def _pairs(rows: Sequence[Decided], right: np.ndarray) -> dict[str, dict[str, float]]:
    table = {}
    for pair in PAIRS:
        places = [place for place, row in enumerate(rows) if str(row.true) == pair]
        if places:
            table[pair] = {"questions": len(places), "accuracy": float(right[places].mean())}
    return table


def _confusion(pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for row, column in pairs:
        counts = table.setdefault(row, {})
        counts[column] = counts.get(column, 0) + 1
    return table


def language_report(candidates: Sequence[str], references: Sequence[Sequence[str]], *, meteor: bool) -> dict[str, Any]:
    """BLEU-1 to 4, ROUGE-L, CIDEr-D, and METEOR 1.5 where it is asked for; what is absent is named, not 0."""
    cut = [tokens(text) for text in candidates]
    known = [[tokens(text) for text in texts] for texts in references]
    report: dict[str, Any] = {"texts": len(cut)}
    report |= {f"bleu_{order}": score.mean for order, score in bleu(cut, known).items()}
    report |= {"rouge_l": rouge_l(cut, known).mean, "cider_d": cider(cut, known).mean}
    if not meteor:
        return report | {"meteor_1_5": "not asked for (meteor=true)"}
    try:
        return report | {"meteor_1_5": meteor_1_5(candidates, references).mean}
    except MissingError as error:
        return report | {"meteor_1_5": str(error)}


def reasoning_pairs(truths: Sequence[str], texts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(reasoning of the replies, its references) where the data has reasoning; a reply without any is empty text."""
    candidates, references = [], []
    for truth, text in zip(truths, texts, strict=True):
        reasons = read_reply(truth).reasoning
        if reasons:
            candidates.append(read_reply(text).reasoning or "")
            references.append([reasons])
    return candidates, references


def choice_letter(text: str | None) -> str | None:
    """The letter of a multiple-choice answer (``B``, ``(b)``, ``B. the bus``), upper case; None where there is none."""
    found = _LETTER.match(text or "")
    return found[1].upper() if found else None


def choices_report(truths: Sequence[str], texts: Sequence[str], log_names: Sequence[str]) -> dict[str, Any]:
    """Of questions whose answer is a letter: accuracy of the letter, and match of the whole answer."""
    said = [read_reply(text).answer for text in texts]
    letters = [choice_letter(one) for one in said]
    right = [letter == choice_letter(truth) for letter, truth in zip(letters, truths, strict=True)]
    match = [normalised(one or "") == normalised(truth) for one, truth in zip(said, truths, strict=True)]
    return {
        "questions": len(truths),
        "accuracy": bootstrap_mean(np.array(right, dtype=np.float64), log_names).to_json(),
        "match": bootstrap_mean(np.array(match, dtype=np.float64), log_names).to_json(),
        "unreadable": float(np.mean([letter is None for letter in letters])),
    }

