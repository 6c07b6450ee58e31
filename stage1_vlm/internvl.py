"""InternVL (1B, 2B, 8B, any size) through transformers' native classes: processor and backbone.

Dynamic tiling: a picture is resized to the grid of ``tile`` x ``tile`` tiles (between min and max tiles) whose
aspect ratio is nearest and cut; more than one tile is followed by a thumbnail of the whole. Each tile becomes
(tile / patch * downsample)^2 tokens: 448 / 14 * 0.5 = 16, 256 tokens. (InternVL 1.5, arXiv:2404.16821, section 3.2.)
With several pictures each gets at most max_tiles // pictures tiles, as in InternVL's training code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GotOcr2ImageProcessorPil, InternVLForConditionalGeneration

from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.collate import VisionLanguageBatch
from stage1_vlm.folder import load_pictures, load_tokenizer
from stage1_vlm.processor import ChatProcessor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InternVLProcessor(ChatProcessor):
    """ChatML turns in the form ``internvl2_5``; ``<img>``, context tokens, ``</img>`` for each picture."""

    # The published system message of InternVL 2.5 and 3: "You are InternVL, a multimodal model made by ...".
    default_system = (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
    image_start, image_token, image_end = "<img>", "<IMG_CONTEXT>", "</img>"

    def __init__(self, tokenizer: Any, image_processor: GotOcr2ImageProcessorPil, tokens_per_tile: int) -> None:
        super().__init__(tokenizer, image_processor)
        self.tokens_per_tile = tokens_per_tile

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, tokens_per_tile: int, tile: int, max_tiles: int | None = None, exact: bool = False
    ) -> InternVLProcessor:
        """Reads the tokeniser and picture settings; ImageNet statistics and tiling are set, whatever the file says.

        ``max_tiles`` bounds the checkpoint's own number, or replaces it when ``exact`` (training decides it anew).
        The class default of GotOcr2ImageProcessorPil is CLIP's statistics; InternViT was trained with ImageNet's.
        """
        size = {"height": tile, "width": tile}
        pictures = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "size": size, "crop_to_patches": True}
        image_processor = load_pictures(GotOcr2ImageProcessorPil, folder, **pictures)
        if max_tiles is not None:
            image_processor.max_patches = max_tiles if exact else min(max_tiles, image_processor.max_patches)
        return cls(load_tokenizer(folder), image_processor, tokens_per_tile)

    def tiling(self, pictures: int) -> dict[str, Any]:
        """Tiling options of each of ``pictures`` pictures in one conversation."""
        return {"crop_to_patches": True, "max_patches": max(1, self.image_processor.max_patches // pictures)}

    def image_tokens(self, width: int, height: int, pictures: int = 1) -> int:
        tiles = self.image_processor.get_number_of_image_patches(height, width, self.tiling(pictures))
        return self.tokens_per_tile * tiles

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """``pixel_values`` [T,3,tile,tile], tiles of all pictures in order."""
        options = self.tiling(len(pictures))
        tiles = self.image_processor([picture.convert("RGB") for picture in pictures], return_tensors="pt", **options)
        return {"pixel_values": tiles["pixel_values"]}

    def settings(self) -> dict[str, Any]:
        processor = self.image_processor
        return {
            "family": "internvl",
            "tile": processor.size["height"],
            "min_tiles": processor.min_patches,
            "max_tiles": processor.max_patches,
            "tokens_per_tile": self.tokens_per_tile,
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "resample": int(processor.resample),
        }


class InternVLBackbone(VisionLanguageBackbone):
    """InternViT, pixel shuffle and projector, Qwen2 (or another) language model."""

    model_class = InternVLForConditionalGeneration
    no_split = ("InternVLVisionLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer", "Qwen3DecoderLayer")

    @classmethod
    def make_processor(
        cls, folder: str | Path, config: Any, max_image_tokens: int | None, exact: bool = False
    ) -> InternVLProcessor:
        tile = config.vision_config.image_size[0]
        tokens_per_tile = int((tile // config.vision_config.patch_size[0] * config.downsample_ratio) ** 2)
        tiles = None if max_image_tokens is None else max(1, max_image_tokens // tokens_per_tile)
        return InternVLProcessor.from_pretrained(
            folder, tokens_per_tile=tokens_per_tile, tile=tile, max_tiles=tiles, exact=exact
        )

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        core = self.model.model
        return {
            "vision": [core.vision_tower],
            "projector": [core.multi_modal_projector],
            "language": [core.language_model, self.model.lm_head],
        }

    @property
    def vision_blocks(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(layer.attention, layer.mlp) for layer in self.model.model.vision_tower.encoder.layer]

    def position_ids(self, batch: VisionLanguageBatch) -> Tensor | None:
        return batch.restarting_positions()

    def blank_pixels(self) -> dict[str, Tensor]:
        size = self.processor.image_processor.size
        return {"pixel_values": torch.zeros(1, 3, size["height"], size["width"])}

    def image_features(self, pixels: dict[str, Tensor]) -> Tensor:
        return self.model.model.get_image_features(**pixels, return_dict=True).pooler_output

    def vision_flops(self, pixels: dict[str, Tensor]) -> float:
        vision = self.model.config.vision_config
        tiles, _, height, width = pixels["pixel_values"].shape
        tokens = (height // vision.patch_size[0]) * (width // vision.patch_size[1]) + 1
        weights = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
        attention = 2 * tokens * vision.hidden_size
        return 2.0 * tiles * tokens * vision.num_hidden_layers * (weights + attention)
