"""The weights of a model's folder: which files hold them, whether all is as it was written, and who can read it.

Folders that Trivium wrote carry ``checksums.json`` over every file a reader looks at, and are compared before they are
read. Folders from elsewhere (a download) have none: they are taken as they are, and the digest of their weights goes
into every fingerprint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from navsim_ext.errors import MissingError, TriviumError
from navsim_ext.files import read_json, write_json_atomic
from navsim_ext.fingerprint import digest_file, digest_json
from navsim_ext.runtime.checksums import CHECKSUMS_FILE, CheckedFiles, seal_folder
from stage1_vlm.folder import ADAPTER_CONFIG, REMEDY, CheckpointError, read_settings, unmerged

_log = logging.getLogger(__name__)

WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
_OTHERS = (CHECKSUMS_FILE, "trainer_state.json", "metrics.json")  # beside a model, and written after it


def shard_files(folder: str | Path) -> list[Path]:
    """The files that hold a model's weights: those that ``model.safetensors.index.json`` names, and nothing else, or
    ``model.safetensors`` where there is no index.

    Raises MissingError naming the shards that are not there, or saying what the folder holds instead of a model;
    CheckpointError for an index that is none.
    """
    folder = Path(folder)
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        if (folder / WEIGHTS_FILE).is_file():
            return [folder / WEIGHTS_FILE]
        raise _no_weights(folder)
    content = read_json(index, REMEDY)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, Mapping) or not names or not all(_is_name(name) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to file names beside it: {REMEDY}")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise MissingError(
            f"{folder}: {len(missing)} of the {len(files)} shards that {WEIGHTS_INDEX} names are missing "
            f"({', '.join(missing[:4])}): download or copy them, too"
        )
    ignored = sorted(path.name for path in folder.glob("*.safetensors") if path not in files)
    if ignored:
        _log.warning("%s: %s does not name %s: not read", folder, WEIGHTS_INDEX, ", ".join(ignored[:4]))
    return files


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _no_weights(folder: Path) -> TriviumError:
    """What a folder without a model's weights holds instead."""
    if (folder / ADAPTER_CONFIG).is_file():
        return unmerged(folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return MissingError(
            f"{folder} holds {', '.join(shards[:4])}, but neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX}: copy the shards' "
            "index, too"
        )
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return CheckpointError(
            f"{folder} holds pickled weights ({pickled[0]}), which are not read: save them as safetensors"
        )
    return MissingError(f"{folder} holds no *.safetensors: it is not a model's folder")


def weights_digest(folder: str | Path) -> str:
    """SHA-256 hex over the safetensors files and the config of a checkpoint folder."""
    files = shard_files(folder)
    config = read_settings(folder)
    config.pop("transformers_version", None)
    return digest_json({"config": config, "files": {file.name: digest_file(file) for file in files}})


def finish_model_folder(folder: str | Path) -> None:
    """Last step of writing a model: a config for readers old and new, then the checksums of all that readers look at.

    Transformers 5 writes ``rope_parameters`` alone; transformers 4 looks for ``rope_theta`` and ``rope_scaling`` and,
    where it finds none, computes with 10,000 in silence. Both kinds of key are kept.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    write_json_atomic(folder / "config.json", with_rope_keys(config))
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES and not path.is_symlink()]
    names = [str(path.relative_to(folder)) for path in files if path.name not in _OTHERS]
    seal_folder(folder, names)


def with_rope_keys(config: Any) -> Any:
    """A configuration in which every part that has ``rope_parameters`` says the same in transformers 4's keys."""
    if not isinstance(config, dict):
        return config
    content = {key: with_rope_keys(value) for key, value in config.items()}
    rope = content.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        content["rope_theta"] = rope["rope_theta"]
        content["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    return content


def check_model_folder(folder: str | Path, *, weights: bool = True) -> None:
    """Compares the files of a folder that Trivium wrote with their checksums; ``weights=False`` leaves out the large.

    Raises CorruptFile or MissingError naming the file, CheckpointError where files lie beside that would be read.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS_FILE).is_file():
        return
    files = CheckedFiles.sealed(folder, REMEDY)
    for name in files.entries:
        if weights or not name.endswith(".safetensors"):
            files.check(name)
    strange = [path.name for path in shard_files(folder) if path.name not in files.entries] if weights else []
    if strange:
        raise CheckpointError(
            f"{folder}: {', '.join(strange[:4])} was not written with the rest of the model; {REMEDY}"
        )
