"""Tiny vision-language models with random weights and a tokeniser trained on the spot: demo and tests need no download.

They are written as ordinary checkpoint folders and read back by the same ``load_backbone`` as the real ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
)

from navsim_ext.errors import DataError
from stage1_vlm.internvl import IMAGENET_MEAN, IMAGENET_STD, InternVLProcessor
from stage1_vlm.weights import finish_model_folder

# The special tokens of InternVL3's tokeniser (Qwen2.5's own, then the ones for pictures and grounding).
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
INTERNVL_TOKENS = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>",
)  # fmt: skip
INTERNVL_ROLES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def train_tokenizer(
    texts: Iterable[str], special_tokens: Iterable[str], *, vocabulary: int = 1024, roles: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser of at most ``vocabulary`` entries, learnt from ``texts``; digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*CHAT_TOKENS, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in special_tokens if token not in (roles or {}).values()],
        **({"extra_special_tokens": roles} if roles else {}),
    )


@dataclass(frozen=True)
class TinySizes:
    """What every family has: language model, vision tower (``patch`` in pixels), vocabulary, seed of the weights."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    patch: int = 14
    vocabulary: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < (0 if name == "seed" else 1):
                raise DataError(f"tiny.{name}={value}: 1 or more was expected")
        for width, heads in (("width", "heads"), ("vision_width", "vision_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise DataError(f"tiny.{width}={getattr(self, width)} is no multiple of {heads}={getattr(self, heads)}")


@dataclass(frozen=True)
class TinyInternVL(TinySizes):
    """Sizes of a tiny InternVL: those of every family, and its tiles (``tile`` in pixels, at most ``max_tiles``)."""

    tile: int = 56
    max_tiles: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile % (2 * self.patch):
            raise DataError(f"tiny.tile={self.tile} is no multiple of two patches of {self.patch} pixels")


def text_config(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> Qwen2Config:
    """A Qwen2 language model of that size; the vocabulary is rounded up to a multiple of 64."""
    return Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=max(1, sizes.heads // 2),
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tiny_internvl(folder: str | Path, texts: Iterable[str], **sizes: int) -> Path:
    """Writes a randomly initialised InternVL checkpoint folder; tokens per tile = (tile / patch / 2)^2.

    ``sizes`` are fields of :class:`TinyInternVL`.
    """
    size = TinyInternVL(**sizes)
    tile, max_tiles = size.tile, size.max_tiles
    texts = [*texts, *[f"system\n{InternVLProcessor.default_system}\nuser\nassistant\n"] * 100]
    tokenizer = train_tokenizer(texts, INTERNVL_TOKENS, vocabulary=size.vocabulary, roles=INTERNVL_ROLES)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=size.vision_width,
            intermediate_size=4 * size.vision_width,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=size.vision_heads,
            attention_bias=True,
            image_size=tile,
            patch_size=size.patch,
            layer_scale_init_value=1.0,  # 0.1, made for 24 layers, silences a shallow tower
        ),
        text_config=text_config(tokenizer, size),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(tile // size.patch // 2) ** 2,
        tie_word_embeddings=False,
    )
    model = _random_model(InternVLForConditionalGeneration, config, tokenizer, size.seed)
    positions = model.model.vision_tower.embeddings.position_embeddings  # [1, 1 + patches, D]; zero by default
    with torch.no_grad():
        positions[0, 1:] = sine_positions(tile // size.patch, size.vision_width)
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": tile, "width": tile},
        crop_to_patches=True,
        max_patches=max_tiles,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return _write(folder, model, tokenizer, image_processor)


def sine_positions(side: int, width: int) -> Tensor:
    """[side^2, width] sines and cosines of column and row: a tower this small has no time to learn where things are."""
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x, y = (place.reshape(-1, 1) * frequencies for place in (columns, rows))
    return 0.5 * torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


def build_tiny_qwen(folder: str | Path, texts: Iterable[str], *, max_image_tokens: int = 64, **sizes: int) -> Path:
    """Writes a randomly initialised Qwen2.5-VL checkpoint folder; ``sizes`` are fields of :class:`TinySizes`."""
    size = TinySizes(**sizes)
    tokenizer = train_tokenizer(texts, QWEN_TOKENS, vocabulary=size.vocabulary)
    ids = dict(zip(QWEN_TOKENS, tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS))))
    text = text_config(tokenizer, size).to_dict()
    text = {key: value for key, value in text.items() if key not in {"model_type", "architectures", "use_cache"}}
    half = size.width // size.heads // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "intermediate_size": 4 * size.vision_width,
            "num_heads": size.vision_heads,
            "patch_size": size.patch,
            "out_hidden_size": size.width,
            "window_size": 4 * size.patch,
            "fullatt_block_indexes": [size.vision_layers - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = _random_model(Qwen2_5_VLForConditionalGeneration, config, tokenizer, size.seed)
    area = (2 * size.patch) ** 2
    limits = {"shortest_edge": 4 * area, "longest_edge": max_image_tokens * area}
    return _write(folder, model, tokenizer, Qwen2VLImageProcessorPil(size=limits, patch_size=size.patch))


def _random_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _write(folder: str | Path, model, tokenizer: PreTrainedTokenizerFast, image_processor) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    image_processor.save_pretrained(str(folder))
    finish_model_folder(folder)
    return folder
