"""OpenGVLab's own InternVL checkpoints to transformers' native form and back, strictly both ways:

    python -m stage1_vlm.convert source=InternVL3-2B output_dir=InternVL3-2B-hf

Only names change, and the vision tower's fused ``qkv`` is cut in three; the values are the same bits. Tensors are
read one by one, so the memory needed is one shard. The result is checked against the names that the native class
has: nothing may be missing or left over.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)

from navsim_ext.files import read_json, write_json_atomic
from navsim_ext.runtime.config import job
from navsim_ext.runtime.progress import track
from stage1_vlm.folder import REMEDY, CheckpointError, guarded, load_config, load_tokenizer, read_settings
from stage1_vlm.internvl import IMAGENET_MEAN, IMAGENET_STD
from stage1_vlm.loading import OFFICIAL_ARCHITECTURE
from stage1_vlm.tiny import INTERNVL_ROLES
from stage1_vlm.weights import WEIGHTS_INDEX, check_model_folder, finish_model_folder, shard_files, with_rope_keys

_log = logging.getLogger(__name__)

# (official, native) prefixes; native names are those in the files, which differ from the modules' in their prefixes.
RENAMES = (
    ("vision_model.encoder.layers.", "vision_tower.encoder.layer."),
    ("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"),
    ("vision_model.embeddings.patch_embedding.", "vision_tower.embeddings.patch_embeddings.projection."),
    ("mlp1.0.", "multi_modal_projector.layer_norm."),
    ("mlp1.1.", "multi_modal_projector.linear_1."),
    ("mlp1.3.", "multi_modal_projector.linear_2."),
    ("language_model.", "language_model."),
)
LAYER_RENAMES = (
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
# (module, file): how transformers renames InternVL's modules when it writes a checkpoint
FILE_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
LM_HEAD = "language_model.lm_head.weight"
VISION_LAYER = {"official": "vision_model.encoder.layers.", "native": "vision_tower.encoder.layer."}


def to_native_name(name: str) -> str:
    """Native name of an official one (``attn.qkv`` apart)."""
    if name.startswith(VISION_LAYER["official"]):
        for official, native in LAYER_RENAMES:
            name = name.replace(official, native)
    for official, native in RENAMES:
        if name.startswith(official):
            return native + name[len(official) :]
    raise CheckpointError(f"official weight {name!r} has no native name: is this an InternVL 2.5 or 3 checkpoint?")


def to_official_name(name: str) -> str:
    """Inverse of :func:`to_native_name` (``attention.{q,k,v}_proj`` apart)."""
    for official, native in RENAMES:
        if name.startswith(native):
            renamed = official + name[len(native) :]
            break
    else:
        raise CheckpointError(f"native weight {name!r} has no official name: is this an InternVL checkpoint?")
    if name.startswith(VISION_LAYER["native"]):
        for official, native in LAYER_RENAMES:
            renamed = renamed.replace(native, official)
    return renamed


def file_name(name: str) -> str:
    """Name in the file of a module's weight; a file's own name stays as it is."""
    for module, file in FILE_NAMES:
        if name.startswith(module):
            return file + name[len(module) :]
    return name


def native_weights(official: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Renames, and cuts ``attn.qkv`` [3 D, ...] into q, k, v."""
    for name, value in official:
        match = re.fullmatch(r"(vision_model\.encoder\.layers\.\d+)\.attn\.qkv\.(weight|bias)", name)
        if match is None:
            yield to_native_name(name), value
            continue
        stem = VISION_LAYER["native"] + match[1].removeprefix(VISION_LAYER["official"])
        for part, chunk in zip("qkv", value.chunk(3)):
            yield f"{stem}.attention.{part}_proj.{match[2]}", chunk.contiguous()


def official_weights(native: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Renames, and joins q, k, v, which may come in any order; raises CheckpointError when one is missing."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, value in native:
        match = re.fullmatch(r"(vision_tower\.encoder\.layer\.\d+)\.attention\.([qkv])_proj\.(weight|bias)", name)
        if match is None:
            yield to_official_name(name), value
            continue
        stem = VISION_LAYER["official"] + match[1].removeprefix(VISION_LAYER["native"])
        key = f"{stem}.attn.qkv.{match[3]}"
        parts = waiting.setdefault(key, {})
        parts[match[2]] = value
        if len(parts) == 3:
            yield key, torch.cat([parts[part] for part in "qkv"])
            del waiting[key]
    if waiting:
        raise CheckpointError(
            f"parts of {sorted(waiting)[:4]} are missing: {[sorted(p) for p in waiting.values()][:4]}"
        )


def native_config(official: Mapping[str, Any], image_token_id: int) -> InternVLConfig:
    """InternVLConfig of an official config.json; raises CheckpointError for a language model other than Qwen2."""
    vision, text = official["vision_config"], dict(official["llm_config"])
    if text.get("model_type") != "qwen2":
        raise CheckpointError(f"llm_config.model_type is {text.get('model_type')!r}: InternVL3 has qwen2")
    if official.get("select_layer", -1) != -1 or official.get("ps_version", "v2") != "v2":
        raise CheckpointError("select_layer and ps_version other than -1 and v2 have no native counterpart")
    for key in ("architectures", "torch_dtype", "_name_or_path", "auto_map", "transformers_version", "model_type"):
        text.pop(key, None)
    tied = bool(text.pop("tie_word_embeddings", official.get("tie_word_embeddings", False)))
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_attention_heads"],
            attention_bias=vision["qkv_bias"],
            use_qk_norm=vision.get("qk_normalization", False),
            hidden_act=vision["hidden_act"],
            norm_type=vision.get("norm_type", "layer_norm"),
            layer_norm_eps=vision["layer_norm_eps"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
        ),
        text_config=Qwen2Config(**text, tie_word_embeddings=tied),
        image_token_id=image_token_id,
        image_seq_length=int((vision["image_size"] // vision["patch_size"] * official["downsample_ratio"]) ** 2),
        downsample_ratio=official["downsample_ratio"],
        tie_word_embeddings=tied,
    )


def official_config(native: InternVLConfig) -> dict[str, Any]:
    """config.json of the official form, with what the native config knows."""
    vision, text = native.vision_config, native.text_config
    llm = {key: value for key, value in text.to_dict().items() if value is not None and key != "dtype"}
    return with_rope_keys({
        "architectures": [OFFICIAL_ARCHITECTURE],
        "model_type": "internvl_chat",
        "template": "internvl2_5",
        "downsample_ratio": native.downsample_ratio,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": vision.image_size[0],
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "tie_word_embeddings": native.tie_word_embeddings,
        "llm_config": {**llm, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": native.tie_word_embeddings},
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "hidden_act": vision.hidden_act,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.layer_norm_eps,
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
        },
    })  # fmt: skip


def convert(source: str | Path, output_dir: str | Path, *, shard_bytes: int = 4_000_000_000) -> str:
    """Converts a checkpoint folder into the other form; returns the form that was written.

    Raises MissingError, CheckpointError; a folder that is left by an error has no config.json and is no checkpoint.
    """
    source, target = Path(source), Path(output_dir)
    content = read_settings(source)
    check_model_folder(source)
    official = OFFICIAL_ARCHITECTURE in (content.get("architectures") or ())
    if not official and content.get("model_type") != "internvl":
        raise CheckpointError(
            f"{source}/config.json: model_type {content.get('model_type')!r:.60} and architectures "
            f"{content.get('architectures')!r:.100} are neither OpenGVLab's InternVL nor the native form of it"
        )
    if target.resolve() == source.resolve():
        raise CheckpointError(f"output_dir={target} is the source itself: choose another folder")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").unlink(missing_ok=True)
    if official:
        tokenizer = load_tokenizer(source, extra_special_tokens=INTERNVL_ROLES)
        image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        config = guarded(source, lambda: native_config(content, image_token))
        expected = native_names(config)
        write_shards(native_weights(read_weights(source)), target, shard_bytes, expected)
        tokenizer.save_pretrained(str(target))
        GotOcr2ImageProcessorPil(
            size={"height": config.vision_config.image_size[0], "width": config.vision_config.image_size[1]},
            crop_to_patches=True,
            max_patches=content.get("max_dynamic_patch", 12),
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        ).save_pretrained(str(target))
        config.architectures = ["InternVLForConditionalGeneration"]
        config.save_pretrained(str(target))
        finish_model_folder(target)
        return "native"
    config = load_config(source)
    expected = {name for name, _ in official_weights((name, torch.zeros(1)) for name in native_names(config))}
    write_shards(official_weights(read_weights(source)), target, shard_bytes, expected)
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".jinja") and not path.name.startswith(("config", "model", "preprocessor")):
            shutil.copyfile(path, target / path.name)
    write_json_atomic(target / "config.json", official_config(config))
    finish_model_folder(target)
    return "official"


def native_names(config: InternVLConfig) -> set[str]:
    """Names of the native model's stored weights (a tied LM head is not stored)."""
    with init_empty_weights():
        names = {file_name(name) for name in InternVLForConditionalGeneration(config).state_dict()}
    return names - {LM_HEAD} if config.tie_word_embeddings else names


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model's shards (:func:`stage1_vlm.model_folder.shard_files`), one at a time.

    Raises CheckpointError for a damaged shard, or one that holds other tensors than the index says.
    """
    index, files = folder / WEIGHTS_INDEX, shard_files(folder)
    names = read_json(index, REMEDY)["weight_map"] if index.is_file() else None
    for file in track(files, f"converting {folder.name}"):
        try:
            with safe_open(file, framework="pt") as stream:
                held = list(stream.keys())
                wanted = held if names is None else [name for name, shard in names.items() if shard == file.name]
                if differing := sorted(set(wanted) ^ set(held)):
                    raise CheckpointError(
                        f"{file} and {WEIGHTS_INDEX} disagree on {differing[:4]}: the shard is of another download; "
                        f"{REMEDY}"
                    )
                for name in wanted:
                    yield file_name(name), stream.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or half copied ({error}): {REMEDY}") from error


def write_shards(weights: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int, expected: set[str]) -> None:
    """Writes ``model-0000i-of-n.safetensors`` and index; raises CheckpointError unless the names are ``expected``."""
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            save_file(pending, folder / f".shard-{len(shards)}", metadata={"format": "pt"})
            shards.append({name: value.numel() * value.element_size() for name, value in pending.items()})
            pending.clear()

    for name, value in weights:
        if name == LM_HEAD and name not in expected:
            continue  # tied: the embedding is the one that is stored
        size = value.numel() * value.element_size()
        if sum(v.numel() * v.element_size() for v in pending.values()) + size > shard_bytes:
            flush()
        pending[name] = value.contiguous()
    flush()
    written = {name for shard in shards for name in shard}
    if written != expected:
        for number in range(len(shards)):
            (folder / f".shard-{number}").unlink()
        raise CheckpointError(
            f"missing {sorted(expected - written)[:6]}, left over {sorted(written - expected)[:6]}: the weights do not "
            "fit their config.json"
        )
    for stale in (*folder.glob("model*.safetensors"), folder / WEIGHTS_INDEX):
        stale.unlink(missing_ok=True)  # of another model that was written here before
    names = {}
    for number, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f".shard-{number}").rename(folder / name)
        names |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(size for shard in shards for size in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": names}
        write_json_atomic(folder / WEIGHTS_INDEX, index)


@job("vlm_convert")
def main(cfg: DictConfig) -> None:
    form = convert(cfg.source, cfg.output_dir, shard_bytes=cfg.shard_bytes)
    _log.info("wrote %s in %s form", cfg.output_dir, form)


if __name__ == "__main__":
    main()
