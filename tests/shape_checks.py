"""Shapes are checked while tests run: every call of a function whose hints state a shape, every such dataclass.

The hints stand in the code as ``Float[Tensor, "R F 3"]`` (jaxtyping). Nobody evaluates them when Trivium runs; here the
modules of :data:`CHECKED` are imported through a finder that wraps what states a shape with jaxtyping's check
(beartype compares). jaxtyping's own hook wraps every function of a module, compiled kernels and hints of
names that only type checkers import among them; this one takes the hints with shapes and leaves the rest alone.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.abc
import importlib.machinery
import inspect
import re
import sys
import types

from beartype import beartype
from jaxtyping import jaxtyped

CHECKED = (
    "navsim_ext.closed_loop",
    "navsim_ext.pdm",
    "navsim_ext.planners",
    "sim_agents.model",
    "sim_agents.training.losses",
    "stage2_dit",
    "stage3_grpo.core",
)
SHAPED = re.compile(r"\b(?:Float|Float32|Float64|Int|Int64|Bool|Shaped)\[(?:Tensor|np\.ndarray), ")
HINTS: dict[str, dict[str, str]] = {}
"""What is checked: ``module.function`` -> name of the argument (or "return") -> the hint."""


def shaped_hints(thing) -> dict[str, str]:
    hints = getattr(thing, "__annotations__", {})
    return {name: hint for name, hint in hints.items() if isinstance(hint, str) and SHAPED.search(hint)}


def checked(function: types.FunctionType, hints: dict[str, str] | None = None) -> types.FunctionType:
    """The function with its shapes checked; the same function where its hints state none."""
    hints = shaped_hints(function) if hints is None else hints
    if not hints:
        return function
    HINTS[f"{function.__module__}.{function.__qualname__}"] = hints
    bare = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    bare.__kwdefaults__, bare.__qualname__ = function.__kwdefaults__, function.__qualname__
    bare.__module__ = function.__module__
    names = vars(sys.modules[function.__module__])  # the globals of a dataclass's __init__ are not its module's
    bare.__annotations__ = {name: eval(hint, names) for name, hint in hints.items()}  # noqa: S307
    wrapped = jaxtyped(bare, typechecker=beartype)
    return functools.update_wrapper(wrapped, function)


def check_class(cls: type) -> None:
    for name, member in list(vars(cls).items()):
        if isinstance(member, types.FunctionType):
            setattr(cls, name, checked(member))
        elif isinstance(member, classmethod | staticmethod):
            setattr(cls, name, type(member)(checked(member.__func__)))
        elif isinstance(member, property) and member.fget is not None:
            setattr(cls, name, property(checked(member.fget), member.fset, member.fdel, member.__doc__))
    if dataclasses.is_dataclass(cls) and "__init__" in vars(cls):
        cls.__init__ = checked(cls.__init__, hints_of_fields(cls))


def hints_of_fields(cls: type) -> dict[str, str]:
    return {
        field.name: field.type
        for field in dataclasses.fields(cls)
        if isinstance(field.type, str) and SHAPED.search(field.type)
    }


def check_module(module: types.ModuleType) -> None:
    for name, thing in list(vars(module).items()):
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if isinstance(thing, types.FunctionType):
            setattr(module, name, checked(thing))
        elif inspect.isclass(thing):
            check_class(thing)


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        check_module(module)


class ShapeChecks(importlib.abc.MetaPathFinder):
    """Finds the modules of :data:`CHECKED` as usual, and has their shapes checked."""

    def find_spec(self, fullname, path=None, target=None):
        if not any(fullname == one or fullname.startswith(one + ".") for one in CHECKED):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    if not any(isinstance(finder, ShapeChecks) for finder in sys.meta_path):
        sys.meta_path.insert(0, ShapeChecks())
