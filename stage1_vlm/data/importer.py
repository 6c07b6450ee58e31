"""Other people's question sets into the format that stage 1 trains on and evaluates.

    python -m stage1_vlm.data.importer source=train.json root=PICTURES output_dir=DIR

Writes ``<name>.jsonl``, the meta file ``mixture.json``, and ``skipped.jsonl`` with each entry that cannot be used and
why. Pictures that are stored inside a Parquet file are written to ``pictures/``, by their content, each once. The form
is recognised (:mod:`stage1_vlm.data.forms`) or given.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import atomic_stream, plain_name, write_atomic, write_json_atomic
from navsim_ext.pictures import BadPicture, stored_kind
from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.runtime.checksums import CHECKSUM_KEY, file_checksums
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from stage1_vlm.data.forms import Row, form_of, rows
from stage1_vlm.data.records import SkipLine

_log = logging.getLogger(__name__)
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
PICTURES = "pictures"


def import_questions(
    source: str | Path,
    output_dir: str | Path,
    *,
    root: str | Path | None = None,
    form: str = "auto",
    name: str = "imported",
    max_skipped_share: float = 0.05,
) -> dict[str, Any]:
    """Returns counts by type, what was skipped by reason, and the form.

    ``root``: folder that picture paths start at (default: the source's). Raises MissingError, CorruptFile, and
    DataError when more than ``max_skipped_share`` cannot be used, or nothing is left.
    """
    source, output_dir, name = Path(source), Path(output_dir), plain_name(name, "name=")
    root = source.parent if root is None else Path(root)
    if not source.is_file():
        raise MissingError(f"source={source} does not exist: give a JSON, JSONL or Parquet file of questions")
    if not root.is_dir():
        raise MissingError(f"root={root} is no folder: give the folder that the picture paths start at")
    form = form_of(source) if form == "auto" else form
    output_dir.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    skipped: list[dict[str, Any]] = []
    embedded: set[bool] = set()
    with atomic_stream(output_dir / f"{name}.jsonl") as stream:
        for number, row in track(rows(source, form), f"{form} questions"):
            try:
                if isinstance(row, SkipLine):
                    raise row
                record, stored = _record(row, output_dir)
            except SkipLine as skip:
                skipped.append({"dataset": name, "line": number, "reason": skip.reason, "detail": skip.detail})
                continue
            embedded |= stored
            record.setdefault("type", name)
            record.setdefault("id", number)
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            counts[record["type"]] += 1
        total = sum(counts.values()) + len(skipped)
        write_atomic(output_dir / "skipped.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in skipped))
        reasons = dict(Counter(entry["reason"] for entry in skipped))
        if not counts or len(skipped) > max_skipped_share * total:
            raise DataError(
                f"{source}: {len(skipped)} of {total} entries of form {form} cannot be used "
                f"({reasons or 'it is empty'}); see {output_dir / 'skipped.jsonl'}, give another form=, or raise "
                f"max_skipped_share={max_skipped_share}"
            )
        if len(embedded) > 1:
            raise DataError(f"{source} has pictures as bytes and as paths: one folder cannot hold both; split the file")
    folder = output_dir if True in embedded else root
    entry = {"root": os.path.relpath(folder, output_dir), "annotation": f"{name}.jsonl", "repeat_time": 1}
    entry |= {"data_augment": False, "length": sum(counts.values())}
    entry[CHECKSUM_KEY] = file_checksums(output_dir, [f"{name}.jsonl"])[f"{name}.jsonl"]
    write_json_atomic(output_dir / "mixture.json", {name: entry})
    if skipped:
        _log.warning("%d of %d entries were skipped: %s", len(skipped), total, output_dir / "skipped.jsonl")
    return {"form": form, "records": dict(counts), "skipped": reasons}


def _record(row: Row, output_dir: Path) -> tuple[dict[str, Any], set[bool]]:
    """The record, and whether its pictures are stored inside the file (of each)."""
    spoken = [speaker for speaker, _ in row.turns if speaker != "system"]
    if not spoken or spoken != ["human", "gpt"] * (len(spoken) // 2) or not all(text.strip() for _, text in row.turns):
        raise SkipLine("malformed record", f"questions and answers must take turns, none empty: {spoken}")
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for speaker, text in row.turns if speaker == "human")
    if placeholders not in (0, len(row.pictures)):
        raise SkipLine("wrong placeholders", f"{placeholders} {IMAGE_PLACEHOLDER} for {len(row.pictures)} pictures")
    turns = [{"from": speaker, "value": text} for speaker, text in row.turns]
    record: dict[str, Any] = {"conversations": turns, **row.fields}
    paths = [_store(picture, output_dir) if isinstance(picture, bytes) else picture for picture in row.pictures]
    if paths:
        record["image"] = paths[0] if len(paths) == 1 else paths
    return record, {isinstance(picture, bytes) for picture in row.pictures}


def _store(content: bytes, output_dir: Path) -> str:
    """Writes a picture file as it is, under the digest of its bytes."""
    try:
        ending = ENDINGS.get(stored_kind(content))
    except BadPicture as error:
        raise SkipLine("unreadable picture", str(error)) from error
    if ending is None:
        raise SkipLine("unreadable picture", f"of another kind than {', '.join(ENDINGS)}")
    path = Path(PICTURES) / f"{hashlib.sha256(content).hexdigest()[:24]}.{ending}"
    target = output_dir / path
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        write_atomic(target, content)
    return str(path)


@job("importer")
def main(cfg: DictConfig) -> None:
    """Imports one file and prints what came of it."""
    told = import_questions(
        cfg.source,
        cfg.output_dir,
        root=cfg.root,
        form=cfg.form,
        name=cfg.name,
        max_skipped_share=cfg.max_skipped_share,
    )
    _log.info("%s: %s", cfg.output_dir, told)


if __name__ == "__main__":
    main()
