"""Forms in which others publish questions about pictures, each read into the same rows.

    alphadrive  JSON array or lines {image, problem, solution, thinking}: solution <answer> SPEED, PATH </answer>,
                thinking <think>...</think>, with or without their tags
    messages    JSON lines {messages: [{role, content}], images}: content a text, or parts {type: text | image, ...}
    easyr1      Parquet images, problem, answer; images are paths or {bytes, path} as the hub stores them
    lingoqa     Parquet question_id, segment_id, images, question, answer; rows of one question_id are its references
    drivebench  JSON array {question, answer, question_type, image_path: {camera: path}, frame_token}

DriveLM's nested JSON has a command of its own (``stage1_vlm.data.drivelm``). Parquet is read a batch of rows at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from navsim_ext.errors import CorruptFile, DataError
from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.questions.answers import read_decision
from navsim_ext.questions.catalogue import with_reasoning
from navsim_ext.runtime.parquet import require_columns
from stage1_vlm.data.records import SkipLine, elements, is_array, lines

BATCH_ROWS = 256
ROLES = {"system": "system", "user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt"}
Picture = str | bytes


@dataclass(frozen=True)
class Row:
    """A question as it was published: ``turns`` of (speaker, text), ``pictures`` as paths or bytes of picture files."""

    turns: list[tuple[str, str]]
    pictures: list[Picture]
    fields: dict[str, Any] = field(default_factory=dict)


def rows(path: Path, form: str) -> Iterator[tuple[int, Row | SkipLine]]:
    """(number from 1, row or why it cannot be used) of a file; raises DataError or CorruptFile for the whole of it."""
    if form not in FORMS:
        raise DataError(f"form={form}: {', '.join(FORMS)} are known")
    read, make = FORMS[form]
    for number, content in enumerate(read(path), start=1):
        try:
            yield number, make(content)
        except SkipLine as skip:
            yield number, skip


def form_of(path: Path) -> str:
    """The form of a file by its ending and first row; raises DataError naming what was found."""
    if path.suffix == ".parquet":
        names = set(_parquet(path).schema_arrow.names)
        for form, wanted in PARQUET_COLUMNS.items():
            if wanted <= names:
                return form
        raise DataError(f"{path} has the columns {sorted(names)}: of no known form ({', '.join(PARQUET_COLUMNS)})")
    first = next(_json(path), None)
    keys = set(first) if isinstance(first, Mapping) else set()
    for form, wanted in JSON_KEYS.items():
        if wanted <= keys:
            return form
    raise DataError(f"{path}: its first entry has the keys {sorted(map(str, keys))}: of no known form; give form=, one "
                    f"of {', '.join(FORMS)}")  # fmt: skip


# ---- files


def _json(path: Path) -> Iterator[Any]:
    for _, content in elements(path) if is_array(path) else lines(path):
        if content.strip():
            try:
                yield json.loads(content)
            except (ValueError, RecursionError) as error:
                yield SkipLine("broken line", str(error))


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptFile(f"{path} is no readable Parquet file ({error}): copy or download it again") from error


def _table(form: str) -> Callable[[Path], Iterator[dict[str, Any]]]:
    def read(path: Path) -> Iterator[dict[str, Any]]:
        file = _parquet(path)
        require_columns(path, file.schema_arrow.names, sorted(PARQUET_COLUMNS[form]), f"it is not of form {form}")
        try:
            for batch in file.iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise CorruptFile(f"{path} is damaged ({error}): copy or download it again") from error

    return read


def _questions(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Rows of LingoQA by question: those that follow each other with one question_id."""
    for _, group in groupby(_table("lingoqa")(path), key=lambda row: row["question_id"]):
        yield list(group)


# ---- rows


def _text(holder: Any, key: str) -> str:
    value = holder.get(key) if isinstance(holder, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise SkipLine("malformed record", f"{key} is {value!r:.80}; a text was expected")
    return value.strip()


def _pictures(value: Any) -> list[Picture]:
    """Paths, bytes, or the hub's {bytes, path}; one or a list of them."""
    found: list[Picture] = []
    for one in value if isinstance(value, list) else [] if value in (None, "") else [value]:
        if isinstance(one, Mapping):
            one = one.get("bytes") or one.get("path")
        if not isinstance(one, str | bytes) or not one:
            raise SkipLine("malformed record", f"a picture is {one!r:.80}; a path or bytes were expected")
        found.append(one)
    return found


def _alphadrive(content: Any) -> Row:
    if isinstance(content, SkipLine):
        raise content
    asked, solution = _text(content, "problem"), _text(content, "solution")
    answer = solution if "<answer>" in solution else f"<answer>{solution}</answer>"
    decision = read_decision(answer)
    if decision is None:
        raise SkipLine("no decision", f"solution {solution!r:.80} is not one speed and one path action")
    thinking = content.get("thinking") or ""
    if not isinstance(thinking, str):
        raise SkipLine("malformed record", f"thinking is {thinking!r:.80}; a text was expected")
    thinking = thinking.replace("<think>", "").replace("</think>", "").strip()
    reply = with_reasoning(thinking, str(decision)) if thinking else f"<answer>{decision}</answer>"
    fields = {"type": "decision", "answer": str(decision), "image_dependent": True}
    if thinking:
        fields["reasoning_source"] = "published"
    return Row([("human", asked), ("gpt", reply)], _pictures(content.get("image")), fields)


def _messages(content: Any) -> Row:
    if isinstance(content, SkipLine):
        raise content
    messages = content.get("messages") if isinstance(content, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise SkipLine("malformed record", "an object with a list `messages` was expected")
    turns, inside = [], []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise SkipLine("malformed record", f"role {role!r:.40}; there are {sorted(ROLES)}")
        text, pictures = _content(message.get("content"))
        turns.append((ROLES[role], text))
        inside += pictures
    beside = _pictures(content.get("images") or content.get("image"))
    if inside and beside:
        raise SkipLine("malformed record", "pictures both inside the messages and beside them")
    return Row(turns, inside or beside)


def _content(content: Any) -> tuple[str, list[Picture]]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise SkipLine("malformed record", f"content is {content!r:.80}; a text or a list of parts was expected")
    texts, pictures = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(_text(part, "text"))
        elif kind in ("image", "image_url"):
            where = part.get("image") or part.get("image_url") or part.get("path")
            pictures += _pictures(where.get("url") if isinstance(where, Mapping) and "url" in where else where)
            texts.append(IMAGE_PLACEHOLDER)
        else:
            raise SkipLine("other media", f"a part of type {kind!r:.40}: text and pictures are read")
    return "\n".join(texts), pictures


def _easyr1(content: dict[str, Any]) -> Row:
    asked, answer = _text(content, "problem"), _text(content, "answer")
    decision = read_decision(answer)
    fields = {"type": "decision", "answer": str(decision), "image_dependent": True} if decision else {}
    reply = f"<answer>{decision}</answer>" if decision else answer
    return Row([("human", asked), ("gpt", reply)], _pictures(content.get("images")), fields)


def _lingoqa(group: list[dict[str, Any]]) -> Row:
    first = group[0]
    references = list(dict.fromkeys(_text(row, "answer") for row in group))
    if len({row["question"] for row in group}) > 1:
        raise SkipLine("malformed record", f"question_id {first['question_id']!r} has several questions")
    fields = {"type": "lingoqa", "scene_id": str(first["segment_id"]), "image_dependent": True}
    turns = [("human", _text(first, "question")), ("gpt", references[0])]
    return Row(turns, _pictures(first["images"]), fields | {"references": references})


def _drivebench(content: Any) -> Row:
    if isinstance(content, SkipLine):
        raise content
    asked, answer = _text(content, "question"), _text(content, "answer")
    paths = content.get("image_path")
    pictures = _pictures(list(paths.values()) if isinstance(paths, Mapping) else paths)
    views = [f"{name}: {IMAGE_PLACEHOLDER}" for name in paths] if isinstance(paths, Mapping) else []
    fields = {"type": str(content.get("question_type") or "drivebench"), "image_dependent": True}
    if content.get("frame_token"):
        fields["scene_id"] = str(content["frame_token"])
    return Row([("human", "\n".join([*views, asked])), ("gpt", answer)], pictures, fields)


PARQUET_COLUMNS = {
    "lingoqa": {"question_id", "segment_id", "images", "question", "answer"},
    "easyr1": {"images", "problem", "answer"},
}
JSON_KEYS = {
    "alphadrive": {"image", "problem", "solution"},
    "messages": {"messages"},
    "drivebench": {"question", "answer", "image_path"},
}
FORMS: dict[str, tuple[Callable[[Path], Iterator[Any]], Callable[[Any], Row]]] = {
    "alphadrive": (_json, _alphadrive),
    "messages": (_json, _messages),
    "easyr1": (_table("easyr1"), _easyr1),
    "lingoqa": (_questions, _lingoqa),
    "drivebench": (_json, _drivebench),
}
