"""Pickles made to do harm, given to every reader of pickles: each ends in a named error (or is read, where it is
harmless), within seconds, in little memory, without a crash, and no code runs.

Every reader is a process of its own under a memory limit: ``python -m pytest tests/hard/test_attacks.py -m slow``.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import attacked
import forked
import pickle_attacks
import pytest

SECONDS = 5.0
SMALL = 20_000  # bytes
# Pickles of plain values in odd clothes, and names that lie inert in a list: there is no harm in reading them.
HARMLESS = {"forged_flag_array", "huge_memo_key", "huge_memo_key_text", "type_as_value", "function_as_value"}
HARMLESS |= {"announced_frame"}


def attack(reader: str, names: dict[str, bytes], folder: Path) -> dict[str, dict]:
    """How the reading of each file ended; a name without an outcome ended the process."""
    logs = folder / "navsim_logs" / "mini"
    logs.mkdir(parents=True)
    for name, content in names.items():
        (logs / f"{name}.pkl").write_bytes(content)
    ended = forked.run(attacked.__file__, reader, logs, folder=folder)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"{lines[-1:]} ended the process with {ended.returncode}\n{ended.stderr[-2000:]}"
    assert sorted(path.name for path in folder.iterdir()) == ["navsim_logs"], "code ran"
    return {line["name"]: line for line in lines if "outcome" in line}


def check(found: dict[str, dict], names: dict[str, bytes], harmless: set[str]) -> None:
    assert found.keys() == names.keys()
    raw = {name: line for name, line in found.items() if line["outcome"].startswith("raw")}
    assert not raw
    read = {name for name, line in found.items() if line["outcome"] == "read"}
    assert read <= harmless
    slow = {name: line["seconds"] for name, line in found.items() if line["seconds"] > SECONDS}
    assert not slow


def test_small_attacks_on_the_unpickler(tmp_path):
    names = {name: made for name, made in pickle_attacks.ATTACKS.items() if isinstance(made, bytes)}
    names = {name: content for name, content in names.items() if len(content) < SMALL}
    assert len(names) > 50
    check(attack("load", names, tmp_path), names, HARMLESS)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["load", "submission", "navsim", "scenarionet"])
def test_every_attack(reader, tmp_path):
    names = {name: pickle_attacks.content_of(name) for name in pickle_attacks.ATTACKS}
    check(attack(reader, names, tmp_path), names, HARMLESS if reader == "load" else set())


@pytest.mark.slow
def test_every_attack_packed_as_a_metric_cache(tmp_path):
    names = {name: pickle_attacks.content_of(name) for name in pickle_attacks.ATTACKS}
    names |= pickle_attacks.GEOMETRY_ATTACKS
    packed = {name: pickle_attacks.packed(content) for name, content in names.items()}
    packed |= {"not_packed": b"N.", "zeros_packed": pickle_attacks.packed_zeros()}
    packed |= {"huge_dictionary": pickle_attacks.packed_with_huge_dictionary()}
    check(attack("metric_cache", packed, tmp_path), packed, set())


def as_checkpoint(content: bytes) -> bytes:
    """The zip of torch.save with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


CHECKPOINTS = {
    "set_of_bytearray": b"\x80\2" + pickle_attacks.call(
        "builtins", "set", pickle_attacks.call("builtins", "bytearray", b"J\xff\xff\xff\x7f")
    ) + b".",
    "tuple_as_key_2": b"\x80\2" + pickle_attacks.ATTACKS["tuple_as_key"],
    "tensor_without_storage": b"\x80\2}" + pickle_attacks.text("a") + pickle_attacks.call(
        "torch._utils", "_rebuild_tensor_v2", b"N", b"K\0", b"K\3\x85", b"K\1\x85", b"\x89", b")"
    ) + b"s.",
}  # fmt: skip


@pytest.mark.parametrize("reader", ["checkpoint", pytest.param("published", marks=pytest.mark.slow)])
def test_attacks_inside_checkpoints(reader, tmp_path):
    """torch's own reader of weights alone crashes on a nested key, and hangs on a set of a giant bytearray."""
    names = dict(CHECKPOINTS)
    if reader == "published":
        names |= {name: pickle_attacks.content_of(name) for name in pickle_attacks.ATTACKS}
    packed = {name: as_checkpoint(content) for name, content in names.items()}
    packed |= {"no_zip": b"PK", "old_format": pickle.dumps(0x1950A86A20F9469CFC6C), "empty": b""}
    check(attack(reader, packed, tmp_path), packed, HARMLESS if reader == "checkpoint" else set())


@pytest.mark.slow
def test_every_attack_inside_a_checkpoint(tmp_path):
    packed = {name: as_checkpoint(pickle_attacks.content_of(name)) for name in pickle_attacks.ATTACKS}
    check(attack("checkpoint", packed, tmp_path), packed, HARMLESS)
