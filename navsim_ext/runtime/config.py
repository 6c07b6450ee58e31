"""Where configurations live and how a command starts from one.

Each command ("job") has a root ``configs/<job>/config.yaml`` with its own groups (``experiment/`` among them);
``configs/shared`` is on the search path of every job. So ``experiment=demo`` works the same for all of them.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.errors import MissingError, TriviumError


def config_root() -> Path:
    """The ``configs`` folder: the checkout's own, or the copy inside an installed wheel."""
    here = Path(__file__).resolve()
    for candidate in (here.parents[2] / "configs", here.parent / "configs"):
        if (candidate / "shared").is_dir():
            return candidate
    raise MissingError(f"no configs folder beside {here.parents[2]} or in {here.parent}: reinstall Trivium")


class SharedConfigs(SearchPathPlugin):
    """Puts ``configs/shared`` on every job's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("trivium", f"file://{config_root() / 'shared'}")


Plugins.instance().register(SharedConfigs)


def job(name: str) -> Callable[[Callable[[DictConfig], object]], Callable[[], None]]:
    """Decorator: a function of a composed config becomes the command line of ``configs/<name>/config.yaml``.

    A :class:`TriviumError` ends the command with its message on stderr and its ``exit_code``; any other exception is
    a bug and keeps its traceback. A misspelt group choice names the nearest one that exists.
    """

    def decorate(main: Callable[[DictConfig], object]) -> Callable[[], None]:
        root = config_root() / name

        @functools.wraps(main)
        def guarded(cfg: DictConfig) -> object:
            try:
                return main(cfg)
            except TriviumError as error:
                Console(stderr=True, soft_wrap=True).print(f"{type(error).__name__}: {error}", markup=False)
                sys.exit(error.exit_code)

        def entry() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            try:
                check_choices(root, sys.argv[1:])
            except TriviumError as error:
                Console(stderr=True, soft_wrap=True).print(f"{type(error).__name__}: {error}", markup=False)
                sys.exit(2)
            hydra.main(version_base="1.3", config_path=str(root), config_name="config")(guarded)()

        entry.job = name
        return entry

    return decorate


def check_choices(root: Path, overrides: Sequence[str]) -> None:
    """Raises MissingError for ``group=choice`` where the group is a folder and no such choice is in it."""
    for override in overrides:
        key, _, choice = override.lstrip("+~").partition("=")
        key = key.partition("@")[0]
        folders = [folder for folder in (root / key, config_root() / "shared" / key) if key and folder.is_dir()]
        if not folders or not choice or "," in choice or choice[0] in "[{" or choice == "null":
            continue
        known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        if choice.removesuffix(".yaml") not in known:
            near = difflib.get_close_matches(choice, known, n=1)
            hint = f"did you mean {key}={near[0]}?" if near else "choose one of these."
            raise MissingError(f"{key}={choice} does not exist; there are {', '.join(known)}: {hint}")


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The composed configuration of a job, for tests and programs (no command line involved)."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_root() / name)):
        return hydra.compose("config", overrides=list(overrides))
