"""A checkpoint folder is data: code that it brings is not run, not asked about; damage is named with the folder."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from navsim_ext.errors import TriviumError
from stage1_vlm.convert import convert
from stage1_vlm.folder import CheckpointError
from stage1_vlm.loading import load_backbone, load_processor

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("navsim_ext", "stage1_vlm", "stage2_dit", "stage3_grpo", "benchmarks", "scripts")


def auto_calls() -> list[tuple[str, ast.Call]]:
    """Every call of a class method of transformers' ``Auto`` classes, and every one that could be."""
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = ast.unparse(node.func.value)
                    if node.func.attr == "from_pretrained" and owner.split(".")[-1].startswith("Auto"):
                        found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_auto_class_is_told_to_run_no_remote_code():
    calls = auto_calls()
    assert {where.split(":")[0] for where, _ in calls} == {"stage1_vlm/folder.py"}
    for where, call in calls:
        told = {keyword.arg: keyword.value for keyword in call.keywords}
        assert isinstance(told.get("trust_remote_code"), ast.Constant), where
        assert told["trust_remote_code"].value is False, where


def test_nothing_says_trust():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert ast.unparse(node.value) == "False", f"{path}:{node.value.lineno}"


@pytest.fixture
def with_own_code(tiny_internvl, tmp_path, monkeypatch):
    """A copy of a folder whose files name code of its own, for all that transformers may ask; and where it would leave
    its mark."""
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_internvl, folder)
    (folder / "checksums.json").unlink()  # somebody else's folder has none
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")

    def name_code(name: str, auto_map: dict, **changes: object) -> Path:
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(content | changes | {"auto_map": auto_map}))
        return folder

    def no_prompt(*_: object) -> str:
        raise AssertionError("somebody is asked whether code may run")

    monkeypatch.setattr("builtins.input", no_prompt)
    yield name_code
    assert not mark.exists()
    assert "own" not in sys.modules


def how_it_ends(read: Callable[[Path], object], folder: Path) -> str:
    """The message of the named error, or "read"."""
    try:
        read(folder)
    except TriviumError as error:
        return str(error)
    return "read"


CODE = {
    "config.json": {"AutoConfig": "own.Own", "AutoModel": "own.Own"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.Own", "own.Own"]},
    "preprocessor_config.json": {"AutoImageProcessor": "own.Own"},
}


@pytest.mark.parametrize("name", CODE)
def test_a_folder_that_names_code_is_read_natively(with_own_code, name):
    folder = with_own_code(name, CODE[name])
    assert load_processor(folder).tokenizer.__class__.__module__.startswith("transformers.")
    load_backbone(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"model_type": "own"}),
        ("config.json", {"model_type": "own", "architectures": ["InternVLChatModel"]}),
        ("tokenizer_config.json", {"tokenizer_class": "Own"}),
    ],
)
def test_or_refused_by_name_where_nothing_native_can(with_own_code, tmp_path, name, changes):
    folder = with_own_code(name, CODE[name], **changes)
    for read in (load_processor, load_backbone, lambda folder: convert(folder, tmp_path / "converted")):
        ended = how_it_ends(read, folder)
        assert str(folder) in ended or (ended == "read" and name == "tokenizer_config.json"), ended


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"model_type": 3}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_settings_are_named(tiny_qwen, tmp_path, name, content):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_qwen.iterdir():
        if path.name not in (name, "checksums.json"):  # somebody else's folder has none
            (folder / path.name).symlink_to(path)
    (folder / name).write_bytes(content)
    ended = how_it_ends(load_processor, folder)
    assert str(folder) in ended or (ended == "read" and name not in ("config.json", "tokenizer.json")), ended


def test_a_config_that_makes_no_sense_is_named(tiny_internvl, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_internvl, folder)
    (folder / "checksums.json").unlink()  # somebody else's folder has none
    content = json.loads((folder / "config.json").read_text())
    for part, key, value in [("vision_config", "patch_size", [0, 0]), ("text_config", "hidden_size", "many"),
                             ("vision_config", "hidden_size", -4)]:  # fmt: skip
        changed = json.loads(json.dumps(content))
        changed[part][key] = value
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="model"):
            load_backbone(folder)
