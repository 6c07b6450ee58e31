"""A checkpoint folder becomes a model and its processor: the families that Trivium knows, and strict loading.

No remote code is ever run: a folder is read with transformers' native classes or refused. Another family is one more
row of :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.documents import attend_within_documents
from stage1_vlm.folder import CheckpointError, guarded, load_config, read_settings
from stage1_vlm.internvl import InternVLBackbone
from stage1_vlm.processor import ChatProcessor
from stage1_vlm.qwen import QwenBackbone
from stage1_vlm.weights import WEIGHTS_FILE, WEIGHTS_INDEX, check_model_folder, shard_files

OFFICIAL_ARCHITECTURE = "InternVLChatModel"  # OpenGVLab's own classes, which need remote code
FAMILIES: Mapping[str, type[VisionLanguageBackbone]] = {"internvl": InternVLBackbone, "qwen2_5_vl": QwenBackbone}
"""Backbone class by ``model_type`` of config.json."""


def read_config(folder: str | Path) -> tuple[type[VisionLanguageBackbone], Any]:
    """The family and config of a checkpoint folder; raises MissingError or CheckpointError naming the remedy."""
    content = read_settings(folder)
    check_model_folder(folder, weights=False)
    if OFFICIAL_ARCHITECTURE in (content.get("architectures") or ()):
        raise CheckpointError(
            f"{folder} holds OpenGVLab's own format, which needs remote code; convert it once with "
            f"`python -m stage1_vlm.convert source={folder} output_dir={folder}-hf`"
        )
    if content.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"{folder}/config.json: model_type {content.get('model_type')!r:.60} is not one of {sorted(FAMILIES)}"
        )
    config = load_config(folder)
    if type(config) is not FAMILIES[content["model_type"]].model_class.config_class:
        raise CheckpointError(f"{folder}/config.json was read as {type(config).__name__}, which is of another model")
    return FAMILIES[content["model_type"]], config


def load_processor(folder: str | Path, *, max_image_tokens: int | None = None, exact: bool = False) -> ChatProcessor:
    """The processor alone: what data loaders need."""
    family, config = read_config(folder)
    return guarded(folder, lambda: family.make_processor(folder, config, max_image_tokens, exact))


def load_backbone(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    max_image_tokens: int | None = None,
    exact: bool = False,
    attention: str = "sdpa",
    device_map: str | dict[str, Any] | None = None,
) -> VisionLanguageBackbone:
    """Loads a checkpoint folder strictly.

    Modules are created empty (meta device) and filled shard by shard, so the peak is the model plus one shard;
    ``device_map="auto"`` lets accelerate spread it. Raises CheckpointError listing missing, unexpected and
    mismatched keys: nothing is ever left at its random initialisation.
    """
    family, config = read_config(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    shard_files(folder)  # says what is there instead, where they are missing
    if (Path(folder) / WEIGHTS_INDEX).is_file() and (Path(folder) / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds weights twice, {WEIGHTS_FILE} and the shards of {WEIGHTS_INDEX}: remove those that are "
            "not this model's"
        )
    check_model_folder(folder)
    try:
        model, report = family.model_class.from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: its weights (*.safetensors) are missing or damaged ({error}): copy or convert it again"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: its config.json makes no {family.model_class.__name__} ({type(error).__name__}: "
            f"{error!s:.300}): copy or convert it again"
        ) from error
    problems = {key: sorted(map(str, values)) for key, values in report.items() if values}
    if problems:
        raise CheckpointError(f"{folder} does not fit {family.model_class.__name__}: {problems}")
    if attention == "sdpa":
        attend_within_documents(model)
    processor = guarded(folder, lambda: family.make_processor(folder, config, max_image_tokens, exact))
    return family(model, processor)
