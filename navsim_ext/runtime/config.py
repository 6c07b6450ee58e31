"""Where configurations live and how a command starts from one.

Each command ("job") has a root ``configs/<job>/config.yaml`` with its own groups (``experiment/`` among them);
``configs/shared`` is on the search path of every job. So ``experiment=demo`` works the same for all of them.
"""

from __future__ import annotations

import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from navsim_ext.errors import MissingError, TriviumError
from navsim_ext.runtime.command_line import flags_of, overrides_from
from navsim_ext.runtime.options import Field, OptionError, check, declared
from navsim_ext.runtime.usage import usage


class Stopped(TriviumError):
    """Somebody ended the command."""

    exit_code = 130  # 128 + SIGINT


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

    Before anything starts, every option is checked (:mod:`navsim_ext.runtime.options`). A :class:`TriviumError` ends
    the command with its message on stderr and its ``exit_code``, also where Hydra wrapped it while instantiating. So
    does what the machine refuses (a file that cannot be read or written, memory). Any other exception is a bug and
    keeps its traceback.
    """

    def decorate(main: Callable[[DictConfig], object]) -> Callable[[], None]:
        root = config_root() / name

        @functools.wraps(main)
        def guarded(cfg: DictConfig) -> object:
            try:
                return main(cfg)
            except (TriviumError, InstantiationException, OSError, MemoryError) as error:
                end(error)

        def entry() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            if {"-h", "--help"} & set(sys.argv[1:]):
                sys.stdout.write(usage(root, config_root() / "shared", options_of(name)))
                return
            try:
                flags, arguments = flags_of(sys.argv[1:])
                overrides = overrides_from(arguments, options_of(name))
                cfg = composed(name, overrides)
                if not flags:
                    check(cfg, root, config_root() / "shared", overrides)
                    check_writable(OmegaConf.select(cfg, "output_dir"))
            except TriviumError as error:
                end(error)
            sys.argv[1:] = [*flags, *overrides]
            try:
                hydra.main(version_base="1.3", config_path=str(root), config_name="config")(guarded)()
            except KeyboardInterrupt:
                end(Stopped("by Ctrl-C: what is finished is kept, and the same command goes on from there"))

        entry.job = name
        return entry

    return decorate


def end(error: BaseException) -> NoReturn:
    """Ends the process with the message of an error that the user can act on; raises any other one again."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (TriviumError, OSError, MemoryError)):
        cause = cause.__cause__
    if cause is None:
        raise error
    message = str(cause) or "this machine has not enough memory"
    Console(stderr=True, soft_wrap=True).print(f"{type(cause).__name__}: {message}", markup=False, highlight=False)
    sys.exit(getattr(cause, "exit_code", TriviumError.exit_code))


def options_of(name: str) -> dict[str, Field]:
    """Everything that can be given to a command."""
    return declared(config_root() / name, config_root() / "shared")


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a job as its command line makes it. Raises OptionError where it cannot be made."""
    root = config_root() / name
    check_choices(root, overrides)
    try:
        return compose(name, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group that is no word
        raise explain(name, error) from error


def checked(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The composed configuration of a job whose every option was checked. Raises OptionError."""
    cfg = composed(name, overrides)
    check(cfg, config_root() / name, config_root() / "shared", overrides)
    return cfg


def configured(name: str, arguments: Sequence[str]) -> DictConfig:
    """The checked configuration of a job from arguments as one types them. Raises OptionError."""
    return checked(name, overrides_from(arguments, options_of(name)))


def explain(name: str, error: Exception) -> OptionError:
    """The error of an override that Hydra refused, with the nearest key that exists."""
    found = re.search(r"Could not override '([^']+)'", str(error))
    if found is None:
        return OptionError(" ".join(str(error).split()))
    known = [*dotted_keys(OmegaConf.to_container(compose(name))), *options_of(name)]
    near = difflib.get_close_matches(found[1], known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists all"
    return OptionError(f"there is no key {found[1]}: {hint}")


def dotted_keys(node: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """All keys of nested mappings, ``trainer.max_epochs`` for nested ones."""
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from dotted_keys(value, f"{above}{key}.")


def check_writable(output_dir: str | None) -> None:
    """Raises TriviumError where ``output_dir`` takes no file, before Hydra trips over it with a traceback."""
    if output_dir is None:
        return
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room or choose another output_dir" if full else "choose another output_dir"
        raise TriviumError(f"cannot write to output_dir={folder} ({error.strerror}): {remedy}") from error


def check_choices(root: Path, overrides: Sequence[str]) -> None:
    """Raises MissingError for ``group=choice`` where the group is a folder and no such choice is in it."""
    for override in overrides:
        key, _, choice = override.lstrip("+~").partition("=")
        key, choice = key.partition("@")[0], choice.strip("'")
        folders = [folder for folder in (root / key, config_root() / "shared" / key) if key and folder.is_dir()]
        if not folders or not choice or "," in choice or choice[0] in "[{" or choice == "null":
            continue
        if any(each.startswith("hydra.searchpath=") for each in overrides):
            continue  # it may be in a folder of the user's
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
