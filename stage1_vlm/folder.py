"""What is read of a checkpoint folder besides its weights: config, tokeniser, picture settings.

The one place that calls transformers' ``Auto`` classes. A folder is data: code that it brings or names (``auto_map``)
is never run and never asked about; what transformers has no class of its own for is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, AutoTokenizer

from navsim_ext.errors import MissingError, TriviumError
from navsim_ext.files import read_json

Loaded = TypeVar("Loaded")
REMEDY = "copy or download the folder again"
ADAPTER_CONFIG = "adapter_config.json"  # of peft


class CheckpointError(TriviumError):
    """A checkpoint folder that does not hold the model it says, whole and in the native form."""


def read_settings(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON mapping of the folder; raises MissingError, CorruptFile or CheckpointError naming the remedy."""
    path = Path(folder) / name
    if not path.is_file():
        if (Path(folder) / ADAPTER_CONFIG).is_file():
            raise unmerged(Path(folder))
        raise MissingError(f"{path} is missing: {folder} is not a checkpoint folder")
    content = read_json(path, REMEDY)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a mapping was expected: {REMEDY}")
    return content


def unmerged(folder: Path) -> CheckpointError:
    """The error for a folder of LoRA adapters without their model."""
    content = read_json(folder / ADAPTER_CONFIG, REMEDY)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return CheckpointError(
        f"{folder} holds LoRA adapters alone, of the model {base!r:.200}: merge them first, with peft's "
        "PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(merged), and give that folder "
        "(runs of stage 1 write merged models: give the folder above adapter/)"
    )


def load_config(folder: str | Path) -> Any:
    """transformers' config of the folder."""
    return guarded(
        folder, lambda: AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    )


def load_tokenizer(folder: str | Path, **options: Any) -> Any:
    """transformers' tokeniser of the folder."""
    return guarded(
        folder,
        lambda: AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **options),
    )


def load_pictures(kind: type[Loaded], folder: str | Path, **settings: Any) -> Loaded:
    """Picture processor of a class of transformers: as the folder says where it says so, ``settings`` aside."""
    if not (Path(folder) / "preprocessor_config.json").is_file():
        return kind(**settings)
    return guarded(folder, lambda: kind.from_pretrained(str(folder), local_files_only=True, **settings))


def guarded(folder: str | Path, load: Callable[[], Loaded]) -> Loaded:
    """What ``load`` makes of the folder; whatever it meets is raised as CheckpointError with folder and remedy."""
    try:
        return load()
    except TriviumError:
        raise
    except Exception as error:
        own_code = _with_own_code(Path(folder))
        reason = f"{', '.join(own_code)} name code of the folder's own (auto_map), which is never run; " * bool(
            own_code
        )
        raise CheckpointError(
            f"{folder} cannot be read with transformers' own classes: {reason}{type(error).__name__}: {error!s:.300}. "
            f"{'Use a folder in the native form' if own_code else REMEDY.capitalize()}"
        ) from error


def _with_own_code(folder: Path) -> list[str]:
    """JSON files of the folder that name code."""
    found = []
    for path in sorted(folder.glob("*config.json")):
        try:
            content = read_json(path)
        except TriviumError:
            continue
        if isinstance(content, dict) and "auto_map" in content:
            found.append(path.name)
    return found
