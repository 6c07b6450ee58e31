"""Qwen2.5-VL behind the same contract: native resolution instead of tiles, three-axis rotary positions.

A picture is resized to multiples of patch x merge (28 pixels) within a budget of pixels; (height/28) x (width/28)
tokens stand for it. With several pictures the budget is shared, as InternVL shares its tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from navsim_ext.errors import DataError
from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.collate import VisionLanguageBatch
from stage1_vlm.folder import load_pictures, load_tokenizer
from stage1_vlm.processor import ChatProcessor

MAX_ASPECT = 200  # of Qwen2-VL's own resizing


class QwenProcessor(ChatProcessor):
    """ChatML turns; ``<|vision_start|>``, pad tokens, ``<|vision_end|>`` for each picture."""

    default_system = "You are a helpful assistant."
    image_start, image_token, image_end = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        max_image_tokens: int | None = None,
        patch_size: int,
        merge_size: int,
        exact: bool = False,
    ) -> QwenProcessor:
        pictures: dict[str, Any] = {"patch_size": patch_size, "merge_size": merge_size}
        image_processor = load_pictures(Qwen2VLImageProcessorPil, folder, **pictures)
        if max_image_tokens is not None:
            longest = max_image_tokens * (patch_size * merge_size) ** 2
            longest = longest if exact else min(longest, image_processor.size["longest_edge"])
            shortest = min(image_processor.size["shortest_edge"], longest)
            image_processor.size = {"shortest_edge": shortest, "longest_edge": longest}
        return cls(load_tokenizer(folder), image_processor)

    def budget(self, pictures: int) -> dict[str, int]:
        """Least and most pixels of each of ``pictures`` pictures (the names are the image processor's)."""
        size = self.image_processor.size
        longest = size["longest_edge"] // pictures
        return {"shortest_edge": min(size["shortest_edge"], longest), "longest_edge": longest}

    def image_tokens(self, width: int, height: int, pictures: int = 1) -> int:
        size = self.budget(pictures)
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise DataError(
                f"a picture of {width} x {height} pixels: Qwen's pictures are at most {MAX_ASPECT} times as long as "
                "wide: crop it"
            )
        least = (self.image_processor.patch_size * self.image_processor.merge_size) ** 2
        if size["longest_edge"] < least:
            raise DataError(f"{pictures} pictures share {size['longest_edge'] * pictures} pixels; each needs {least}")
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        patches = self.image_processor.get_number_of_image_patches(height, width, limits)
        return patches // self.image_processor.merge_size**2

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """``pixel_values`` [patches, 3 x 2 x patch x patch] and ``image_grid_thw`` [pictures, 3]."""
        images = [picture.convert("RGB") for picture in pictures]
        return dict(self.image_processor(images, size=self.budget(len(pictures)), return_tensors="pt"))

    def settings(self) -> dict[str, Any]:
        processor = self.image_processor
        return {
            "family": "qwen2_5_vl",
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
            "patch_size": processor.patch_size,
            "merge_size": processor.merge_size,
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "resample": int(processor.resample),
        }


class QwenBackbone(VisionLanguageBackbone):
    """Qwen2.5-VL with its window-attention vision tower, patch merger and Qwen2.5 language model."""

    model_class = Qwen2_5_VLForConditionalGeneration
    no_split = ("Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer")

    @classmethod
    def make_processor(
        cls, folder: str | Path, config: Any, max_image_tokens: int | None, exact: bool = False
    ) -> QwenProcessor:
        vision = config.vision_config
        return QwenProcessor.from_pretrained(
            folder,
            max_image_tokens=max_image_tokens,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            exact=exact,
        )

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        core = self.model.model
        tower = [child for name, child in core.visual.named_children() if name != "merger"]
        return {
            "vision": tower,
            "projector": [core.visual.merger],
            "language": [core.language_model, self.model.lm_head],
        }

    @property
    def vision_blocks(self) -> list[tuple[nn.Module, nn.Module]]:
        return []  # blocks see all pictures as one row: no per-picture stochastic depth

    def model_inputs(self, batch: VisionLanguageBatch) -> dict[str, Tensor | None]:
        inputs = super().model_inputs(batch)
        inputs["mm_token_type_ids"] = (batch.input_ids == self.processor.image_token_id).int()
        return inputs

    def position_ids(self, batch: VisionLanguageBatch) -> Tensor | None:
        """[4,B,L]: text positions (they tell the packed conversations apart), then time, height and width."""
        text = batch.restarting_positions()
        if text is None:
            return None
        grids = batch.pixels.get("image_grid_thw")
        spatial = text.expand(3, *text.shape).clone()
        picture = 0
        for row, lengths in enumerate(batch.documents or ()):
            start = 0
            for length in lengths:
                ids = batch.input_ids[row : row + 1, start : start + length]
                is_image = ids == self.processor.image_token_id
                pictures = int((ids == self.image_start_id).sum()) if bool(is_image.any()) else 0
                if pictures:
                    positions, _ = self.model.model.get_rope_index(
                        ids, is_image.int(), image_grid_thw=grids[picture : picture + pictures]
                    )
                    spatial[:, row, start : start + length] = positions[:, 0]
                    picture += pictures
                start += length
        return torch.cat([text[None], spatial])

    def next_position(self, positions: Tensor) -> int:
        """A picture counts by its rows and columns, not by its tokens: the largest of the three axes goes on."""
        return int(positions[1:].max()) + 1

    def text_positions(self, positions: Tensor) -> Tensor:
        """[3,B,L]: time, height and width go on alike."""
        return positions.expand(3, *positions.shape)

    @property
    def image_start_id(self) -> int:
        return self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_start)

    def blank_pixels(self) -> dict[str, Tensor]:
        processor = self.processor.image_processor
        side = processor.merge_size
        width = 3 * processor.temporal_patch_size * processor.patch_size**2
        return {"pixel_values": torch.zeros(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}

    def image_features(self, pixels: dict[str, Tensor]) -> Tensor:
        return torch.cat(self.model.model.get_image_features(**pixels, return_dict=True).pooler_output)

    def vision_flops(self, pixels: dict[str, Tensor]) -> float:
        """Projections and feed-forward only; the window attention's own products are left out (a few per cent)."""
        vision = self.model.config.vision_config
        weights = vision.hidden_size * (4 * vision.hidden_size + 3 * vision.intermediate_size)
        return 2.0 * len(pixels["pixel_values"]) * vision.depth * weights
