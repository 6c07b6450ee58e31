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
from hydra.errors import ConfigCompositionException, InstantiationException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue
from rich.console import Console

from navsim_ext.errors import MissingError, TriviumError


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

    A :class:`TriviumError` ends the command with its message on stderr and its ``exit_code``, also where Hydra wrapped
    it while instantiating; so does a key without a value, a misspelt key or group choice (naming the nearest one that
    exists), and an ``output_dir`` that cannot be written. Any other exception is a bug and keeps its traceback.
    """

    def decorate(main: Callable[[DictConfig], object]) -> Callable[[], None]:
        root = config_root() / name

        @functools.wraps(main)
        def guarded(cfg: DictConfig) -> object:
            try:
                return main(cfg)
            except (TriviumError, InstantiationException, MissingMandatoryValue) as error:
                end(error)

        def entry() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            try:
                check_choices(root, sys.argv[1:])
                check_writable(sys.argv[1:])
                hydra.main(version_base="1.3", config_path=str(root), config_name="config")(guarded)()
            except ConfigCompositionException as error:
                end(explain_key(name, error))
            except (TriviumError, OverrideParseException, MissingMandatoryValue, InterpolationToMissingValueError) as e:
                end(e)
            except KeyboardInterrupt:
                end(Stopped("by Ctrl-C: what is finished is kept, and the same command goes on from there"))

        entry.job = name
        return entry

    return decorate


def end(error: Exception) -> NoReturn:
    """Ends the process with the message of an error that the user can act on; raises any other one again."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TriviumError):
        cause = cause.__cause__
    if isinstance(error, InstantiationException) and cause is None:
        raise error
    known = cause if isinstance(cause, TriviumError) else error
    title, message = type(known).__name__, str(known)
    if isinstance(known, (MissingMandatoryValue, InterpolationToMissingValueError)):
        key = re.search(r"full_key: (\S+)|Missing mandatory value: (\S+)|to missing value: '?([\w.]+)", message)
        found = next(filter(None, key.groups()), "a key") if key else "a key"
        found = "output_dir" if found == "hydra.run.dir" else found  # which it is interpolated from
        title, message = "MissingValue", f"{found} has no value: give {found}=..."
    Console(stderr=True, soft_wrap=True).print(f"{title}: {message}", markup=False, highlight=False)
    sys.exit(getattr(known, "exit_code", TriviumError.exit_code))


def explain_key(name: str, error: ConfigCompositionException) -> Exception:
    """The error of an override whose key does not exist, with the nearest key that does."""
    found = re.search(r"Could not override '([^']+)'", str(error))
    if found is None:
        return MissingError(f"{error}")
    near = difflib.get_close_matches(found[1], list(dotted_keys(OmegaConf.to_container(compose(name)))), n=1)
    hint = f"did you mean {near[0]}?" if near else f"see {config_root() / name / 'config.yaml'}"
    return MissingError(f"there is no key {found[1]}: {hint} (+{found[1]}=... adds a new one)")


def dotted_keys(node: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """All keys of nested mappings, ``trainer.max_epochs`` for nested ones."""
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from dotted_keys(value, f"{above}{key}.")


def check_writable(overrides: Sequence[str]) -> None:
    """Raises TriviumError where ``output_dir`` takes no file, before Hydra trips over it with a traceback."""
    chosen = [override.partition("=")[2] for override in overrides if override.startswith("output_dir=")]
    if not chosen or not chosen[-1]:
        return
    folder = Path(chosen[-1].strip("'\""))
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
