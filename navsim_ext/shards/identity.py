"""What a store's folder says of itself: ``fingerprint.json``, and ``store.json`` that guards it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from navsim_ext.errors import MissingError
from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import FILE_NAME, Fingerprint, digest_file, digest_json
from navsim_ext.shards.container import FORMAT
from navsim_ext.shards.errors import CorruptShard

STORE_FILE = "store.json"


def claim_folder(folder: Path, fingerprint: Fingerprint) -> None:
    """Writes the fingerprint into an empty folder, or requires the folder to have it (under the ``start`` lock)."""
    if (folder / STORE_FILE).is_file():
        read_identity(folder)[0].require_equal(
            fingerprint,
            mine=f"the store in {folder}",
            theirs="what is about to be written",
            remedy="write into another folder, or make the same thing again with the settings of this one",
        )
    else:
        fingerprint.save(folder)
        write_identity(folder, parts=[])


def write_identity(folder: Path, *, parts: list[str]) -> None:
    """Writes ``store.json``; ``parts`` are the names of the shards that the last merge made."""
    write_json_atomic(folder / STORE_FILE, store_content(folder, parts))


def store_content(folder: Path, parts: list[str]) -> dict[str, Any]:
    content = {"format": FORMAT, "fingerprint_sha256": digest_file(folder / FILE_NAME), "parts": parts}
    return content | {"digest": digest_json(content)}


def read_identity(folder: Path) -> tuple[Fingerprint, list[str]]:
    """The folder's fingerprint and the names of its merged parts.

    Raises MissingError for a folder that is no store, CorruptShard when a byte of the two files was changed.
    """
    path = folder / STORE_FILE
    if not path.is_file() or not (folder / FILE_NAME).is_file():
        raise MissingError(
            f"{folder} is not a store: {STORE_FILE} or {FILE_NAME} is missing; build it, or give another folder"
        )
    stored = path.read_bytes()
    try:
        parts = json.loads(stored)["parts"]
        expected = json.dumps(store_content(folder, parts), indent=1, sort_keys=True) + "\n"
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise CorruptShard(f"{path}: is damaged ({error}); {REMEDY}") from error
    if stored != expected.encode():
        raise CorruptShard(f"{path}: does not fit its own digest or {FILE_NAME}; {REMEDY}")
    return Fingerprint.load(folder), parts


REMEDY = f"{STORE_FILE} or {FILE_NAME} was changed: restore both, or build the store again"
