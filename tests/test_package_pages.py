"""Every package says in a sentence what it is; concept tables of the READMEs name files and things that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("navsim_ext", "stage1_vlm", "stage2_dit", "sim_agents", "stage3_grpo")
FOLDERS = sorted(file.parent for package in PACKAGES for file in (ROOT / package).rglob("__init__.py"))
PAGES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("README.md"))
FILE = re.compile(r"[\w./]+\.(?:py|html)|[\w./]+/")


def defined() -> set[str]:
    """Every name that a module of the packages defines, members of classes among them."""
    names: set[str] = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


NAMES = defined()


def concepts(page: str) -> list[tuple[list[str], list[str]]]:
    """(files, names) of each row ``| concept | file | name |`` of a page."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    rows = (re.split(r"(?<!\\)\|", row) for row in re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE))
    found = []
    for cells in rows:
        files = re.findall(r"`([^`]+)`", cells[1]) if len(cells) == 3 else []
        if files and all(FILE.fullmatch(file) for file in files):
            found.append(
                (files, [name for name in re.findall(r"`([^`]+)`", cells[2]) if re.fullmatch(r"[\w.]+", name)])
            )
    return found


def faults(page: Path, text: str, names: set[str]) -> list[str]:
    rows = concepts(text)
    lost = [f"no file {file}" for files, _ in rows for file in files
            if not any((base / file).exists() for base in (page.parent, ROOT))]  # fmt: skip
    return lost + [f"nothing is called {name}" for _, told in rows for name in told
                   if name.split(".")[-1] not in names]  # fmt: skip


def test_every_package_says_what_it_is():
    told = {folder: ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
            for folder in FOLDERS}  # fmt: skip
    assert len(told) > 30
    assert [str(folder) for folder, text in told.items() if len(text.split()) < 5] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_concept_tables_name_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert len(concepts(text)) >= 5
    assert faults(page, text, NAMES) == []


def test_a_wrong_table_is_found_out():
    page = ROOT / "navsim_ext" / "maps" / "README.md"
    text = page.read_text(encoding="utf-8")
    assert faults(page, text.replace("`layers.py`", "`layer.py`", 1), NAMES) == ["no file layer.py"]
    assert faults(page, text.replace("`LineLayer`", "`LinesLayer`", 1), NAMES) == ["nothing is called LinesLayer"]
