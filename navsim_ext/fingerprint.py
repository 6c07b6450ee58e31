"""What made an artefact: a small JSON that travels with every cache, checkpoint and score file.

A fingerprint has a ``kind``, flat or nested JSON ``fields`` (weights digest, prompt digest, scorer version and
options, token-list digest, package versions ...) and the fingerprints it was made from (``parents``). Its
``digest`` covers all of it except ``info``, which is recorded but never compared (host, time, forced mixing).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from navsim_ext.errors import CorruptFile, MissingError, TriviumError
from navsim_ext.files import read_json, write_json_atomic

FILE_NAME = "fingerprint.json"


class FingerprintMismatch(TriviumError):
    """Two artefacts that do not belong together were about to be mixed."""


@dataclass(frozen=True)
class Fingerprint:
    """Identity and lineage of an artefact; equality of ``digest`` means "made the same way from the same things"."""

    kind: str
    fields: Mapping[str, Any]
    parents: Mapping[str, Fingerprint] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 (hex, 64 characters) of kind, fields and the parents' digests; independent of key order."""
        parents = {name: parent.digest for name, parent in self.parents.items()}
        return digest_json({"kind": self.kind, "fields": self.fields, "parents": parents})

    def to_json(self) -> dict[str, Any]:
        parents = {name: parent.to_json() for name, parent in self.parents.items()}
        return {
            "kind": self.kind,
            "digest": self.digest,
            "fields": dict(self.fields),
            "parents": parents,
            "info": dict(self.info),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Fingerprint:
        """Rebuilds a fingerprint; raises FingerprintMismatch when the stored digest is not that of the content."""
        parents = {name: cls.from_json(parent) for name, parent in content.get("parents", {}).items()}
        fingerprint = cls(content["kind"], content["fields"], parents, content.get("info", {}))
        stored = content.get("digest", fingerprint.digest)
        if stored != fingerprint.digest:
            raise FingerprintMismatch(
                f"fingerprint of kind {fingerprint.kind!r} was edited: it says {stored[:12]}, its content gives "
                f"{fingerprint.digest[:12]}; rebuild the artefact"
            )
        return fingerprint

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``fingerprint.json`` into ``folder`` atomically."""
        write_json_atomic(Path(folder) / FILE_NAME, self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Fingerprint:
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise MissingError(f"{path} is missing: {folder} is not a finished Trivium artefact; build it again")
        return cls.read(path)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Fingerprint:
        """The fingerprint in a JSON file of any name; raises CorruptFile naming a damaged one."""
        try:
            return cls.from_json(read_json(path))
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise CorruptFile(f"{path} is no fingerprint ({error!r:.300}): build the artefact again") from error
        except FingerprintMismatch as error:
            raise FingerprintMismatch(f"{path}: {error}") from error

    def differences(self, other: Fingerprint) -> list[str]:
        """One line ``key: mine | theirs`` for each leaf that differs, parents included."""
        mine, theirs = flatten_json(self.compared()), flatten_json(other.compared())
        keys = sorted(mine.keys() | theirs.keys())
        return [
            f"{key}: {mine.get(key, '(absent)')!r} | {theirs.get(key, '(absent)')!r}"
            for key in keys
            if mine.get(key, "(absent)") != theirs.get(key, "(absent)")
        ]

    def compared(self) -> dict[str, Any]:
        """The part that the digest covers, as nested JSON."""
        parents = {name: parent.compared() for name, parent in self.parents.items()}
        return {"kind": self.kind, "fields": self.fields, "parents": parents}

    def require_equal(self, other: Fingerprint, *, mine: str, theirs: str, remedy: str) -> None:
        """Raises FingerprintMismatch listing every difference; ``mine`` and ``theirs`` name the two artefacts."""
        if self.digest != other.digest:
            lines = "\n  ".join(self.differences(other))
            raise FingerprintMismatch(
                f"{mine} ({self.digest[:12]}) and {theirs} ({other.digest[:12]}) do not belong together:\n"
                f"  {lines}\n{remedy}"
            )


def digest_json(content: Any) -> str:
    """SHA-256 hex digest of canonical JSON (sorted keys, no spaces); raises TypeError for anything not JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_tokens(tokens: Iterable[str]) -> str:
    """Order-independent SHA-256 hex digest of a token list (duplicates count)."""
    return hashlib.sha256("\n".join(sorted(tokens)).encode()).hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 hex digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions of the named distributions; ``absent`` for those that a machine does without."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def flatten_json(content: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    if isinstance(content, Mapping):
        flat: dict[str, Any] = {}
        for key, value in content.items():
            flat.update(flatten_json(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: content}
