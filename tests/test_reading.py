"""The law of reading: whatever a library reads from a file, its complaints become named errors.

A call that parses a file's content stands inside ``with reading(path)`` (``navsim_ext/files.py``), or in a ``try`` that
catches what the library raises, or is listed here with the reason why its content cannot be bad.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("navsim_ext", "stage1_vlm", "stage2_dit", "sim_agents", "stage3_grpo")
GUARDS = {"reading", "disk_errors"}  # context managers that make named errors
# call -> errors of which a surrounding try must catch one group whole; "Exception" catches all
READERS: dict[str, set[str]] = {
    "json.load": {"ValueError", "RecursionError"},
    "json.loads": {"ValueError", "RecursionError"},
    "np.load": {"OSError", "ValueError", "BadZipFile"},
    "np.loadtxt": {"OSError", "ValueError"},
    "np.fromfile": {"OSError", "ValueError"},
    "pq.read_table": {"OSError", "ArrowException"},
    "pd.read_parquet": {"OSError", "ArrowException"},
    "pd.read_csv": {"OSError", "ValueError"},
    "csv.reader": {"OSError", "Error"},
    "csv.DictReader": {"OSError", "Error"},
    "yaml.safe_load": {"YAMLError", "RecursionError"},
    "yaml.load": {"YAMLError", "RecursionError"},
    "OmegaConf.load": {"YAMLError", "RecursionError"},
    "Image.open": {"OSError"},
    "pickle.load": {"UnpicklingError"},
    "pickle.loads": {"UnpicklingError"},
    "torch.load": {"UnpicklingError", "RuntimeError", "EOFError"},
    "safe_open": {"SafetensorError"},
    "load_file": {"SafetensorError"},
    "safetensors_numpy.load": {"SafetensorError"},
    "zipfile.ZipFile": {"BadZipFile", "OSError"},
    "tarfile.open": {"TarError", "OSError", "EOFError"},
    "lzma.open": {"LZMAError", "OSError"},
    "gzip.open": {"OSError", "EOFError"},
    "pyogrio.read_dataframe": {"DataSourceError"},
    "pyogrio.list_layers": {"DataSourceError"},
    "imageio.imread": {"OSError"},
    "ET.parse": {"ParseError"},
    "tomllib.load": {"TOMLDecodeError"},
}
# file -> {call: why its content cannot be bad}
_CHECKED = "its bytes were compared with their checksum just before"
_OWN = "a configuration that belongs to the program"
JUSTIFIED: dict[str, dict[str, str]] = {
    "navsim_ext/maps/nuplan_gpkg.py": {
        "pyogrio.list_layers": "called by read_gpkg alone, inside its reading",
        "pyogrio.read_dataframe": "called by read_gpkg alone, inside its reading",
    },
    "navsim_ext/pdm/polygon_table.py": {"np.load": _CHECKED},
    "navsim_ext/pdm/record.py": {"json.loads": _CHECKED},
    "navsim_ext/realism/submission.py": {"tarfile.open": "one of the two writes"},
    "navsim_ext/runtime/checksums.py": {"json.loads": _CHECKED},
    "navsim_ext/runtime/options.py": {"yaml.safe_load": _OWN},
    "navsim_ext/runtime/usage.py": {"yaml.safe_load": _OWN},
    "navsim_ext/scene_index.py": {"json.loads": _CHECKED},
    "navsim_ext/shards/container.py": {"json.loads": _CHECKED},
    "navsim_ext/shards/journal.py": {"json.loads": _CHECKED},
    "navsim_ext/traffic/build.py": {"json.loads": _CHECKED},
    "stage1_vlm/data/line_index.py": {"np.load": _CHECKED},
    "stage1_vlm/data/questions.py": {"Image.open": "a picture that was written in memory"},
}


class Calls(ast.NodeVisitor):
    """(dotted name, line, guards around it) of each call of a reader in a file."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, bool]] = []
        self._caught: list[set[str]] = []
        self._guarded = 0

    def visit_With(self, node: ast.With) -> None:
        guards = 0
        for item in node.items:
            self.visit(item.context_expr)
            call = item.context_expr
            if isinstance(call, ast.Call) and dotted(call.func).split(".")[-1] in GUARDS:
                guards += 1
                self._guarded += 1  # what stands after it in the same line is inside too
        for line in node.body:
            self.visit(line)
        self._guarded -= guards

    def visit_Try(self, node: ast.Try) -> None:
        caught = {name for handler in node.handlers for name in caught_by(handler)}
        self._caught.append(caught)
        for line in node.body:
            self.visit(line)
        self._caught.pop()
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(part)

    def visit_Call(self, node: ast.Call) -> None:
        name = dotted(node.func)
        if name in READERS and not _of_own_text(node):
            caught = set().union(*self._caught)
            self.found.append((name, node.lineno, bool(self._guarded) or is_caught(name, caught)))
        self.generic_visit(node)


def _of_own_text(call: ast.Call) -> bool:
    """``json.loads(json.dumps(...))``, or of a record of the program's own: what was never in a file."""
    inner = call.args[0] if call.args else None
    made = ("dumps", "serialize", "record", "agent_record", "planner_record")
    return isinstance(inner, ast.Call) and dotted(inner.func).split(".")[-1] in made


def is_caught(name: str, caught: set[str]) -> bool:
    return "Exception" in caught or READERS[name] <= caught


def caught_by(handler: ast.ExceptHandler) -> Iterator[str]:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    for kind in kinds:
        name = dotted(kind) if kind is not None else ""
        yield name.split(".")[-1]
        if name == "json.JSONDecodeError":
            yield "ValueError"


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls_of(source: str) -> list[tuple[str, int, bool]]:
    visitor = Calls()
    visitor.visit(ast.parse(source))
    return visitor.found


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_what_is_read_is_guarded_or_justified():
    bare, used = [], {}
    for path in sources():
        name = str(path.relative_to(ROOT))
        for call, line, guarded in calls_of(path.read_text(encoding="utf-8")):
            if call in JUSTIFIED.get(name, ()):
                used.setdefault(name, set()).add(call)
            elif not guarded:
                bare.append(f"{name}:{line} {call}")
    assert not bare, "put these inside `with reading(path)`:\n" + "\n".join(bare)
    assert {name: set(calls) for name, calls in JUSTIFIED.items()} == used, "a justification that nothing needs"


@pytest.mark.parametrize(
    ("source", "guarded"),
    [
        ("json.loads(x)", False),
        ("with reading(p):\n    json.loads(x)", True),
        ("with files.reading(p), np.load(p) as a:\n    pass", True),
        ("with np.load(p) as a, reading(p):\n    pass", False),
        ("with open(p) as s:\n    json.load(s)", False),
        ("try:\n    json.loads(x)\nexcept (ValueError, RecursionError):\n    raise Named", True),
        ("try:\n    json.loads(x)\nexcept KeyError:\n    raise Named", False),
        ("try:\n    json.loads(x)\nexcept ValueError:\n    raise Named", False),
        ("try:\n    pass\nexcept ValueError:\n    json.loads(x)", False),
        ("with reading(p):\n    pass\njson.loads(x)", False),
    ],
)
def test_the_law_itself(source, guarded):
    assert [each for *_, each in calls_of(source)] == [guarded]
