"""No two modules need each other, and no two rooms: whatever is read first can be understood alone.

Imports inside functions count like those at the top of a file. What stands under ``TYPE_CHECKING`` does not: nothing
runs it. A room is a module or a folder beside others in one package; between two rooms all imports point one way.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("navsim_ext", "stage1_vlm", "stage2_dit", "sim_agents", "stage3_grpo")

Graph = dict[str, set[str]]


def modules(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """File by module name; a package by its own name."""
    files = (file for package in packages for file in sorted((root / package).rglob("*.py")))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: all but the bodies of ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from executed(other)
        else:
            yield node
            yield from executed(node)


def imported(source: str, module: str, is_package: bool, known: Mapping[str, Path]) -> set[str]:
    """The modules among ``known`` that ``module`` imports, anywhere in its source."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {name if (name := f"{base}.{alias.name}") in known else base for alias in node.names}
    return {name for name in found if name in known and name != module}


def import_graph(root: Path, packages: tuple[str, ...] = PACKAGES) -> Graph:
    files = modules(root, packages)
    return {
        name: imported(file.read_text(encoding="utf-8"), name, file.name == "__init__.py", files)
        for name, file in files.items()
    }


def rooms(graph: Graph, package: str) -> Graph:
    """The graph between the children of ``package``: an import from inside one into another is an edge."""
    prefix = f"{package}."
    between: Graph = {}
    for importer, targets in graph.items():
        if importer.startswith(prefix):
            room = importer.removeprefix(prefix).split(".")[0]
            others = {target.removeprefix(prefix).split(".")[0] for target in targets if target.startswith(prefix)}
            between.setdefault(room, set()).update(others - {room})
    return between


def circle(graph: Graph) -> list[str]:
    """One circle of the graph, its first member again at the end; [] where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


GRAPH = import_graph(ROOT)
INNER = sorted(name for name, file in modules(ROOT).items() if file.name == "__init__.py")


def test_no_module_needs_itself_in_the_end():
    assert len(GRAPH) > 450
    assert sum(map(len, GRAPH.values())) > 1500
    assert circle(GRAPH) == []


@pytest.mark.parametrize("package", INNER)
def test_between_two_rooms_imports_point_one_way(package):
    assert circle(rooms(GRAPH, package)) == []


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("from house.second import b", "", False),
        ("from house.second import b", "def f():\n    from house.first import a", True),
        ("from house import second", "from .first import a", True),
        ("import house.second", "class C:\n    def f(self):\n        from . import first", True),
        ("import house.second", "if TYPE_CHECKING:\n    from house.first import a", False),
        ("import house.second", "if TYPE_CHECKING:\n    pass\nelse:\n    from house.first import a", True),
    ],
)
def test_a_circle_is_found_wherever_it_hides(tmp_path, first, second, found):
    write(tmp_path, {"house/__init__.py": "", "house/first.py": first, "house/second.py": second})
    chain = circle(import_graph(tmp_path, ("house",)))
    assert bool(chain) == found
    assert not found or set(chain) == {"house.first", "house.second"}


def test_a_circle_between_rooms_needs_no_circle_of_modules(tmp_path):
    files = {"one/a": "", "one/b": "import house.two.c", "two/c": "", "two/d": "import house.one.a"}
    write(tmp_path, {f"house/{name}.py": source for name, source in files.items()})
    write(tmp_path, {f"house/{name}__init__.py": "" for name in ("", "one/", "two/")})
    graph = import_graph(tmp_path, ("house",))
    assert circle(graph) == []
    assert set(circle(rooms(graph, "house"))) == {"one", "two"}
