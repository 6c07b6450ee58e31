"""What is asked: the four phases of one scene as one growing conversation, the judge's question, and how answers read.

The texts are files in ``prompts/``; a folder with files of the same names replaces them (``prompts=FOLDER``).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from navsim_ext.errors import MissingError
from navsim_ext.files import reading
from navsim_ext.fingerprint import digest_json
from navsim_ext.prompts import COMMAND_WORDS, VIEW_NAMES, TemplateError, format_pose, format_trajectory
from navsim_ext.scene import COMMANDS, SceneBatch
from stage1_vlm.qa_engine.client import Nonsense

PHASES = ("perception", "understanding", "reasoning", "decision")
JUDGE = "judge"
PROMPT_FOLDER = Path(__file__).with_name("prompts")
MEDIA_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


@dataclass(frozen=True)
class QaPair:
    """One question and answer of a phase."""

    phase: str
    question: str
    answer: str


@dataclass(frozen=True)
class Judgement:
    """The judge's score, 1 to 10, and its reason."""

    score: int
    reason: str


class PromptSet:
    """The texts of a task (the five of the phases unless named); ``digest`` covers all of them."""

    def __init__(self, folder: str | Path | None = None, names: Sequence[str] = (*PHASES, JUDGE)) -> None:
        self.folder = PROMPT_FOLDER if folder is None else Path(folder)
        self.texts: dict[str, Template] = {}
        for name in names:
            path = self.folder / f"{name}.txt"
            if not path.is_file():
                raise MissingError(f"prompt file {path} does not exist: {name} is one of {tuple(names)}")
            with reading(path, "write it in UTF-8"):
                self.texts[name] = Template(path.read_text(encoding="utf-8").strip())
        self.digest = digest_json({name: text.template for name, text in self.texts.items()})

    def fill(self, name: str, facts: Mapping[str, str]) -> str:
        try:
            return self.texts[name].substitute(facts)
        except (KeyError, ValueError) as error:
            known = ", ".join(sorted(facts))
            raise TemplateError(f"{self.folder / name}.txt: {error}; the placeholders are {known}") from error


def scene_facts(scenes: SceneBatch, row: int, pairs_per_phase: int) -> dict[str, str]:
    """What the texts may name: speed, command, history, driven trajectory, number of pairs."""
    speed = float(scenes.status[row, 4:6].norm())
    history = ", ".join(format_pose(pose) for pose in scenes.history[row].numpy())
    return {
        "count": str(pairs_per_phase),
        "speed": f"{speed:.2f}",
        "command": COMMAND_WORDS[COMMANDS[int(scenes.status[row, :4].argmax())]],
        "history": history,
        "trajectory": format_trajectory(scenes.target[row].numpy()),
    }


def picture_parts(paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Message parts with the pictures' own bytes as data URLs, each named by its view."""
    parts: list[dict[str, Any]] = []
    for camera, path in paths.items():
        media = MEDIA_TYPES.get(path.suffix.lower())
        if media is None or not path.is_file():
            raise MissingError(f"picture {path} does not exist or is none of {sorted(MEDIA_TYPES)}")
        encoded = base64.b64encode(path.read_bytes()).decode("ascii")
        parts.append({"type": "text", "text": VIEW_NAMES.get(camera, camera)})
        parts.append({"type": "image_url", "image_url": {"url": f"data:{media};base64,{encoded}"}})
    return parts


def phase_messages(
    prompts: PromptSet, phase: str, facts: Mapping[str, str], pictures: Sequence[dict[str, Any]], earlier: Sequence[str]
) -> list[dict[str, Any]]:
    """The conversation up to ``phase``; ``earlier`` are the raw answers of the phases before it."""
    messages: list[dict[str, Any]] = []
    for number, name in enumerate(PHASES[: PHASES.index(phase) + 1]):
        text = {"type": "text", "text": prompts.fill(name, facts)}
        messages.append({"role": "user", "content": [*pictures, text] if number == 0 else [text]})
        if number < len(earlier):
            messages.append({"role": "assistant", "content": earlier[number]})
    return messages


def judge_messages(
    prompts: PromptSet, pair: QaPair, facts: Mapping[str, str], pictures: Sequence[dict[str, Any]], name: str = JUDGE
) -> list[dict[str, Any]]:
    return one_question(prompts, name, {**facts, "question": pair.question, "answer": pair.answer}, pictures)


def one_question(
    prompts: PromptSet, name: str, facts: Mapping[str, str], pictures: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A conversation of one message: the pictures, then the text ``name``."""
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": prompts.fill(name, facts)}]}]


def parse_pairs(phase: str, text: str) -> list[QaPair]:
    """Pairs of an answer: a JSON list, bare, fenced, or after some words; raises Nonsense when there is none."""
    content = _first_json(text, "[")
    if isinstance(content, dict):
        content = content.get("pairs", content.get("qa", [content]))
    pairs = []
    for item in content if isinstance(content, list) else []:
        question, answer = (str(item.get(key, "")).strip() if isinstance(item, dict) else "" for key in _PAIR_KEYS)
        if question and answer:
            pairs.append(QaPair(phase, question, answer))
    if not pairs:
        raise Nonsense(f"no question and answer in {text[:120]!r}")
    return pairs


def parse_judgement(text: str) -> Judgement:
    """Score and reason; raises Nonsense when the score is not a whole number from 1 to 10."""
    content = _first_json(text, "{")
    score = content.get("score") if isinstance(content, dict) else None
    if isinstance(score, str) and re.fullmatch(r"\d+(/10)?", score.strip()):
        score = int(score.split("/")[0])
    if isinstance(score, bool) or not isinstance(score, int | float) or score != int(score) or not 1 <= score <= 10:
        raise Nonsense(f"no score from 1 to 10 in {text[:120]!r}")
    return Judgement(int(score), str(content.get("reason", "")))


_PAIR_KEYS = ("question", "answer")


def _first_json(text: str, opening: str) -> Any:
    """The first JSON value that starts with ``opening`` (or, failing that, the other kind) anywhere in a text."""
    decoder = json.JSONDecoder()
    for bracket in (opening, "{" if opening == "[" else "["):
        for match in re.finditer(re.escape(bracket), text):
            try:
                return decoder.raw_decode(text, match.start())[0]
            except json.JSONDecodeError:
                continue
    raise Nonsense(f"no JSON in {text[:120]!r}")
