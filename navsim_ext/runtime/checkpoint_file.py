"""One checkpoint: written so that it is either whole or absent, and read back without running anything in it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.files import reading
from navsim_ext.runtime.checkpoint_folder import RunCheckpointError
from navsim_ext.runtime.torch_file import load_torch, require_stored

ZERO_WEIGHTS = "checkpoint/mp_rank_00_model_states.pt"  # in a folder (DeepSpeed): all weights, and states of callbacks
REMEDY = "copy it again, or take an earlier one of its folder"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, renames: kill -9 or a full disk never leaves half a checkpoint.

    (Lightning's own writer holds a second copy in memory and moves it from the temporary folder, which is a plain
    copy when that is another file system.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                torch.save(canonical(checkpoint), stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
            raise RunCheckpointError(
                f"cannot write {target}: {error} ({free / 2**30:.2f} GiB free): make room; the last complete "
                "checkpoint beside it is untouched and the same command continues from it"
            ) from error


def canonical(content: Any) -> Any:
    """The same plain containers, made anew with one object per text: equal contents are then equal bytes.

    (Pickle writes an object that it has seen before as a reference, so that a text that was read from a checkpoint and
    one that stands in the program make different files.)
    """
    if type(content) is str:
        return sys.intern(content)
    if type(content) in (list, tuple):
        return type(content)(canonical(each) for each in content)
    if type(content) in (dict, OrderedDict):
        made = type(content)((canonical(key), canonical(value)) for key, value in content.items())
        if type(content) is OrderedDict and vars(content):  # a state_dict's _metadata
            vars(made).update({name: canonical(value) for name, value in vars(content).items()})
        return made
    return content


def require_undamaged(path: Path) -> None:
    """Compares every byte of a checkpoint, file or folder, with the checksums of its zip format; PyTorch does not.

    Raises RunCheckpointError naming the file. A file that is no zip is left to its reader, which refuses it.
    """
    for file in sorted(path.rglob("*.pt")) if path.is_dir() else [path]:
        if not zipfile.is_zipfile(file):
            continue
        try:
            with zipfile.ZipFile(file) as archive:
                require_stored(archive, file)  # else a small file may unpack to hours of reading
                bad = archive.testzip()
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            raise RunCheckpointError(f"checkpoint {file} is damaged ({error}): {REMEDY}") from error
        if bad is not None:
            raise RunCheckpointError(f"checkpoint {file} is damaged: its part {bad} is not as it was written; {REMEDY}")


def record_of(checkpoint: Mapping[str, Any], name: str, keys: set[str], where: str, made_by: str) -> dict[str, Any]:
    """The JSON object that a command put into its checkpoint under ``name``, with at least these keys.

    Raises DataError naming ``where`` and ``made_by``, the command, for none or another.
    """
    if name not in checkpoint:
        raise DataError(f"{where} is no checkpoint of {made_by} (it has no record {name!r})")
    with reading(where, f"its record {name!r} is damaged: {REMEDY}", DataError):
        record = json.loads(checkpoint[name])
    if not isinstance(record, dict) or not keys <= record.keys():
        raise DataError(f"{where}: its record {name!r} lacks {sorted(keys - set(record))}: another version's?")
    return record


def load_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """Contents of a checkpoint, read without executing anything in it: a file, or a folder that ZeRO 1 or 2 wrote.

    Raises MissingError if it does not exist, RunCheckpointError if it is not whole and undamaged or holds objects
    beyond tensors and plain containers.
    """
    path = Path(path)
    if not path.exists():
        raise MissingError(f"checkpoint {path} does not exist: check the path or train it first")
    if path.is_dir():
        if not (path / ZERO_WEIGHTS).is_file():
            raise RunCheckpointError(
                f"{path} is a folder without {ZERO_WEIGHTS} (ZeRO 3): convert it to one file with its zero_to_fp32.py"
            )
        content = load_checkpoint(path / ZERO_WEIGHTS, map_location)
        return content | {"state_dict": content["module"]}
    require_undamaged(path)
    try:
        return load_torch(path, map_location=map_location)
    except CorruptFile as error:
        raise RunCheckpointError(f"checkpoint {error}") from error


def ema_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor] | None:
    """The averaged weights that the EMA callback stored in a checkpoint, by parameter name; None without EMA."""
    for name, state in checkpoint.get("callbacks", {}).items():
        if name.split("{")[0] == "EMA":
            return state["shadow"]
    return None


def load_weights(path: str | os.PathLike[str], *, ema: bool | None = None) -> dict[str, Tensor]:
    """The module's state dict of a run's checkpoint: the averaged weights where there are any, else the live ones.

    ``ema=False`` asks for the live weights, ``ema=True`` raises RunCheckpointError when there is no average.
    """
    checkpoint = load_checkpoint(path)
    if "state_dict" not in checkpoint:
        raise RunCheckpointError(
            f"{path} has no 'state_dict' but {sorted(checkpoint)[:6]}: it is not a run's checkpoint"
        )
    weights = dict(checkpoint["state_dict"])
    average = ema_weights(checkpoint)
    if ema is True and average is None:
        raise RunCheckpointError(f"{path} holds no EMA weights: use ema=false, or train with callbacks.ema")
    if ema is not False and average is not None:
        weights |= {name: value.to(weights[name].dtype) for name, value in average.items()}
    return weights
