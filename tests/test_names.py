"""Names mean one thing, and stages know of each other only what is exported."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = [name for name in ("stage1_vlm", "stage2_dit", "sim_agents", "stage3_grpo") if (ROOT / name).is_dir()]
PACKAGES = ["navsim_ext", *STAGES]


def files(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def test_no_class_name_is_there_twice():
    homes = defaultdict(list)
    for package in PACKAGES:
        for file in files(package):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes[node.name].append(str(file.relative_to(ROOT)))
    assert len(homes) > 300
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def exports(package: str) -> set[str]:
    """``__all__`` of a package."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()


def reached(file: Path, others: set[str]) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import in ``file`` from the packages ``others``, type checking included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in others:
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in others:
                    yield node.lineno, alias.name, ""


@pytest.mark.parametrize("stage", STAGES)
def test_stages_reach_each_other_only_through_what_is_exported(stage):
    exported = {other: exports(other) for other in STAGES if other != stage}
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {module}.{name}"
        for file in files(stage)
        for line, module, name in reached(file, set(exported))
        if name not in exported.get(module, ())
    ]
    assert wrong == []


@pytest.mark.parametrize("package", STAGES)
def test_what_is_exported_is_there(package):
    source = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
    bound = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert exports(package) <= bound
