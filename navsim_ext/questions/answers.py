"""What a model's reply says, and whether it is right: the one reader and the one checker of words.

A reply with reasoning has the form ``<think>...</think><answer>...</answer>``; only the answer counts. A reply without
any of these tags is an answer as a whole, which is what the short questions ask for. Everything in between has a named
fault and no answer: what cannot be read is neither right nor wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from navsim_ext.prompts import ParsedTrajectory, parse_trajectory
from navsim_ext.questions.catalogue import PLACE_TOLERANCE, PLACE_TOLERANCE_M, QUESTIONS, Answer
from navsim_ext.questions.meta_actions import PATHS, SPEEDS, Decision

_TAG = re.compile(r"<\s*(/?)\s*(think|answer)\s*>", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_PLACE = re.compile(r"([a-z]+)\s*\(\s*([-+]?\d{1,4})\s*,\s*([-+]?\d{1,4})\s*\)", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d]\w*")
_TRAJECTORY = re.compile(r"[\[({]?\s*\bPT\b")  # where a trajectory in words begins
ORDER = ["think", "/think", "answer", "/answer"]  # of the tags of a well-formed reply
FAULTS = (
    "empty", "no tags", "not closed", "repeated tags", "nested tags", "wrong order", "no reasoning", "no answer",
    "text outside",
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """``reasoning`` and ``answer`` without their tags; None where there is none. ``fault``: one of FAULTS or empty.

    ``answer`` may be readable in a reply with a fault (text outside, no reasoning): accuracy and form are apart.
    """

    text: str
    reasoning: str | None
    answer: str | None
    fault: str

    @property
    def well_formed(self) -> bool:
        return not self.fault


def read_reply(text: str) -> Reply:
    """Cuts a reply; see the header for what is understood."""
    if not text.strip():
        return Reply(text, None, None, "empty")
    found = list(_TAG.finditer(text))
    if not found:
        return Reply(text, None, text.strip(), "no tags")
    names = [f"{tag[1]}{tag[2].lower()}" for tag in found]
    parts: dict[str, str] = {}
    for name in ("think", "answer"):
        opened, closed = names.count(name), names.count(f"/{name}")
        if max(opened, closed) > 1:
            return Reply(text, None, None, "repeated tags")
        if opened != closed:
            return Reply(text, None, None, "not closed")
        if opened:
            start, end = names.index(name), names.index(f"/{name}")
            if end < start:
                return Reply(text, None, None, "wrong order")
            if end != start + 1:
                return Reply(text, None, None, "nested tags")
            parts[name] = text[found[start].end() : found[end].start()].strip()
    reasoning, answer = parts.get("think"), parts.get("answer")
    if not answer:
        return Reply(text, reasoning, None, "no answer")
    if not reasoning:
        return Reply(text, None, answer, "no reasoning")
    if names != ORDER:
        return Reply(text, reasoning, answer, "wrong order")
    outside = text[: found[0].start()] + text[found[1].end() : found[2].start()] + text[found[3].end() :]
    return Reply(text, reasoning, answer, "text outside" if outside.strip() else "")


@dataclass(frozen=True)
class StatedActions:
    """The action words of an answer; ``foreign``: words in front of the trajectory that are none."""

    speeds: frozenset[str]
    paths: frozenset[str]
    foreign: tuple[str, ...] = ()

    @property
    def decision(self) -> Decision | None:
        """The decision that is stated: exactly one word of each axis and nothing else; None otherwise."""
        if len(self.speeds) == len(self.paths) == 1 and not self.foreign:
            return Decision(*self.speeds, *self.paths)
        return None


NOTHING_STATED = StatedActions(frozenset(), frozenset())


def stated_actions(answer: str | None) -> StatedActions:
    """The actions that an answer names, in any order and case, up to a trajectory that may follow."""
    if not answer:
        return NOTHING_STATED
    words = [word.upper() for word in _WORD.findall(decision_part(answer))]
    actions = frozenset(words)
    foreign = tuple(dict.fromkeys(word for word in words if word not in SPEEDS and word not in PATHS))
    return StatedActions(actions & frozenset(SPEEDS), actions & frozenset(PATHS), foreign)


def decision_part(answer: str) -> str:
    """An answer up to where its trajectory begins."""
    mark = _TRAJECTORY.search(answer)
    return answer if mark is None else answer[: mark.start()]


def read_decision(text: str) -> Decision | None:
    """The decision that a reply states; None when it states none, several, or something beside it."""
    return stated_actions(read_reply(text).answer).decision


def read_trajectory(text: str) -> ParsedTrajectory:
    """The trajectory of a reply, with tags or without."""
    reply = read_reply(text)
    if reply.answer is None:
        return ParsedTrajectory(None, f"no answer to read: {reply.fault}")
    return parse_trajectory(reply.answer)


def normalised(text: str) -> str:
    """Lower case, single blanks, no final full stop."""
    return " ".join(text.lower().split()).rstrip(".!")


def is_correct(kind: str, answer: Answer, text: str) -> bool:
    """Whether ``text``, a model's reply to a question of type ``kind``, agrees with the canonical ``answer``.

    Words: the first choice that occurs in the reply (longest match) is the answer's. Decisions: exactly the two words.
    Numbers: the first number within the tolerance. Trajectories: 8 poses whose mean distance is within it. Road users:
    as many, of the same kinds in the same order, each within the larger of PLACE_TOLERANCE_M and PLACE_TOLERANCE.
    """
    question = QUESTIONS[kind]
    said = read_reply(text).answer
    if said is None:
        return False
    if kind == "trajectory":
        return _trajectory_agrees(answer, said, question.tolerance)
    if kind == "road_users":
        return _places_agree(answer, said)
    if question.decides:
        return read_decision(text) == Decision.parse(str(answer))
    if not question.choices:
        number = _NUMBER.search(said)
        return number is not None and abs(float(number.group()) - float(answer)) <= question.tolerance + 1e-9
    return first_choice(said, question.choices) == answer


def first_choice(text: str, choices: Iterable[str]) -> str | None:
    """The first of ``choices`` (in lower case) that occurs as a whole word; the longer one where two begin alike."""
    words = "|".join(sorted((re.escape(choice) for choice in choices), key=len, reverse=True))
    found = re.search(rf"\b(?:{words})\b", " ".join(text.lower().split()))
    return found.group() if found else None


def read_places(text: str) -> list[tuple[str, int, int]] | None:
    """``kind (x, y), ...`` of an answer; [] for ``none``, None for what cannot be read."""
    if normalised(text) == "none":
        return []
    found = list(_PLACE.finditer(text))
    rest = _PLACE.sub("", text)
    if not found or rest.strip(" ,.\n"):
        return None
    return [(place[1].lower(), int(place[2]), int(place[3])) for place in found]


def _places_agree(wanted: Sequence[Sequence[str | int]], text: str) -> bool:
    said = read_places(text)
    if said is None or [place[0] for place in said] != [place[0] for place in wanted]:
        return False
    return all(
        np.hypot(x - a, y - b) <= max(PLACE_TOLERANCE_M, PLACE_TOLERANCE * np.hypot(a, b))
        for (_, x, y), (_, a, b) in zip(said, wanted)
    )


def _trajectory_agrees(wanted: Sequence[Sequence[float]], text: str, tolerance_m: float) -> bool:
    poses = parse_trajectory(text).poses
    if poses is None:
        return False
    wanted = np.asarray(wanted, dtype=np.float64)
    return bool(np.linalg.norm(poses[:, :2] - wanted[:, :2], axis=1).mean() <= tolerance_m)
