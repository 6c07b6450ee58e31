"""docs/architecture.md tells the truth about names: files, functions, modules, rooms, and the counts of its walks.

Nothing is imported: names are looked up in the syntax trees of the files.
"""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["importlinter"]["root_packages"]

CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"([\w./]+\.py)(?:: ([\w.]+))?")
DOTTED = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
CLASS = re.compile(r"[A-Z][a-z]\w*[a-z]\w*")
COUNTS = re.compile(r"\*\*(\d+) stops, (\d+) hops, (\d+) files\.\*\*")
STOP = re.compile(r"^\| (\d+) \| `([^`]+)`", re.MULTILINE)


@functools.cache
def names_of(path: Path) -> frozenset[str]:
    """What a file defines: functions, classes, constants, and the members of its classes as ``Class.member``."""

    def collect(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return frozenset(collect(ast.parse(path.read_text()).body))


@functools.cache
def all_names() -> frozenset[str]:
    return frozenset().union(*(names_of(path) for package in PACKAGES for path in (ROOT / package).rglob("*.py")))


def exported(package: Path) -> frozenset[str]:
    """What a package's ``__init__.py`` defines or imports."""
    tree = ast.parse(package.read_text())
    taken = {name.asname or name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
    return names_of(package) | taken


def dotted_exists(dotted: str) -> bool:
    """Whether ``package.module``, ``package.module.name`` or ``package.name`` is there."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place, rest = ROOT.joinpath(*parts[:length]), ".".join(parts[length:])
        if place.with_suffix(".py").is_file():
            return not rest or rest in names_of(place.with_suffix(".py"))
        if (place / "__init__.py").is_file():
            return not rest or rest in exported(place / "__init__.py")
    return False


def faults(page: str) -> list[str]:
    """Everything that the page names and the tree does not have, and every count that its tables contradict."""
    found = []
    for code in CODE.findall(re.sub(r"```.*?```", "", page, flags=re.DOTALL)):
        if match := FILE.fullmatch(code):
            path, name = ROOT / match[1], match[2]
            if not path.is_file():
                found.append(f"no file {match[1]}")
            elif name is not None and name not in names_of(path):
                found.append(f"{match[1]} defines no {name}")
        elif CLASS.fullmatch(code) and code not in all_names():
            found.append(f"no class {code}")
    found += [f"no module or name {dotted}" for dotted in DOTTED.findall(page) if not dotted_exists(dotted)]
    for walk in page.split("\n## ")[1:]:
        title, stops = walk.splitlines()[0], STOP.findall(walk)
        if not stops:
            continue
        if [int(number) for number, _ in stops] != list(range(1, len(stops) + 1)):
            found.append(f"{title}: stops are not numbered 1 to {len(stops)}")
        counted = (len(stops), len(stops) - 1, len({place.split(":")[0] for _, place in stops}))
        stated = COUNTS.search(walk)
        if stated is None or tuple(map(int, stated.groups())) != counted:
            found.append(f"{title}: there are {counted} stops, hops and files, not {stated and stated.groups()}")
    return found


def rooms() -> list[set[str]]:
    """The floors of the base, ground first, as the import check knows them."""
    base = next(one for one in PROJECT["tool"]["importlinter"]["contracts"] if one.get("containers") == ["navsim_ext"])
    return [set(re.findall(r"\w+", layer)) for layer in reversed(base["layers"])]


def test_every_name_on_the_page_exists():
    page = PAGE.read_text()
    assert len(STOP.findall(page)) > 50
    assert faults(page) == []


def test_the_house_has_the_floors_that_the_import_check_knows():
    tree = PAGE.read_text().split("```")[1]
    floors = re.split(r"floor \d|roof", tree)[1:]
    drawn = [set(re.findall(r"[|`]- (\w+)", floor)) for floor in floors]
    assert [floor - {"floor"} for floor in drawn[: len(rooms())]] == rooms()
    assert drawn[len(rooms()) :] == [{"stage1_vlm", "stage2_dit", "sim_agents"}, {"stage3_grpo"}]
    for room in set().union(*rooms()):
        place = ROOT / "navsim_ext" / room
        assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file(), room


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("navsim_ext/pdm/simulator.py:", "navsim_ext/pdm/simulators.py:", "no file"),
        ("simulator.py: simulate_reference", "simulator.py: simulate_referenz", "defines no simulate_referenz"),
        ("NavsimLogs.scenes_of", "NavsimLogs.scenes_off", "defines no NavsimLogs.scenes_off"),
        ("`LoadedScene`", "`LoadedScenes`", "no class LoadedScenes"),
        ("-m navsim_ext.traffic.build", "-m navsim_ext.traffic.builds", "no module"),
        ("| 7 | `navsim_ext/traffic/store.py", "| 8 | `navsim_ext/traffic/store.py", "not numbered"),
        ("**19 stops", "**18 stops", "there are"),
    ],
)
def test_a_wrong_page_is_found_out(old, new, fault):
    page = PAGE.read_text()
    assert page.count(old) >= 1
    assert any(fault in each for each in faults(page.replace(old, new, 1)))
