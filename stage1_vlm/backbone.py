"""The contract between Trivium and a vision-language model.

Legend: B rows, L tokens, D hidden width, V vocabulary.
A family contributes a :class:`~stage1_vlm.processor.ChatProcessor` and a subclass of this one; everything else
(data, training, export, evaluation) speaks to the contract. :mod:`stage1_vlm.loading` knows the families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stage1_vlm.collate import VisionLanguageBatch, pad
from stage1_vlm.documents import packed_inputs
from stage1_vlm.processor import ChatProcessor, Example
from stage1_vlm.weights import finish_model_folder


class VisionLanguageBackbone(ABC):
    """A model with its processor."""

    model_class: ClassVar[type[PreTrainedModel]]
    no_split: ClassVar[tuple[str, ...]]  # blocks that sharding (FSDP2, device maps) keeps whole

    def __init__(self, model: PreTrainedModel, processor: ChatProcessor) -> None:
        self.model = model
        self.processor = processor
        self.adapter: Any = None  # the peft model around it, when LoRA is on

    @classmethod
    @abstractmethod
    def make_processor(
        cls, folder: str | Path, config: Any, max_image_tokens: int | None, exact: bool = False
    ) -> ChatProcessor:
        """The processor of a checkpoint folder.

        ``max_image_tokens`` bounds the tokens of a conversation's pictures (thumbnails extra); with ``exact`` it
        replaces the bound that the checkpoint states, even by a higher one.
        """

    @property
    def hidden_width(self) -> int:
        """D, the width of the last hidden states (1,536 for InternVL3-2B, 3,584 for 8B)."""
        return self.model.config.get_text_config().hidden_size

    @property
    @abstractmethod
    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules by part: vision, projector, language; together they hold every parameter."""

    @property
    @abstractmethod
    def vision_blocks(self) -> list[tuple[nn.Module, nn.Module]]:
        """(attention, feed-forward) of each vision block, for stochastic depth; empty where it does not apply."""

    @abstractmethod
    def position_ids(self, batch: VisionLanguageBatch) -> Tensor | None:
        """Positions of a packed batch in the model's own form; None for a padded one."""

    @abstractmethod
    def blank_pixels(self) -> dict[str, Tensor]:
        """The smallest picture input: lets the vision tower take part in a batch that has no picture."""

    @abstractmethod
    def image_features(self, pixels: dict[str, Tensor]) -> Tensor:
        """Projected picture tokens of the whole batch."""

    @abstractmethod
    def vision_flops(self, pixels: dict[str, Tensor]) -> float:
        """Floating-point operations of one forward pass of the vision tower."""

    def language_flops(self, tokens: int, documents: Sequence[int]) -> float:
        """Operations of one forward pass of the language model without its head: 2 x weights + causal attention."""
        text = self.model.config.get_text_config()
        layers = self.parts["language"][0].layers
        weights = sum(p.numel() for p in layers.parameters())
        width = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        attention = len(layers) * 2 * width * sum(length * length for length in documents)
        return 2.0 * tokens * weights + attention

    def cache_bytes(self) -> int:
        """Bytes of keys and values that generation keeps for one token."""
        text = self.model.config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * text.num_key_value_heads * head * self.model.dtype.itemsize

    def model_inputs(self, batch: VisionLanguageBatch) -> dict[str, Tensor | None]:
        """Keyword arguments of the model for a batch."""
        dtype = self.model.dtype
        pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.pixels.items()}
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **pixels}

    def last_hidden_states(self, batch: VisionLanguageBatch) -> Tensor:
        """[B,L,D] after the final norm; equal to ``hidden_states[-1]`` on valid tokens, without the LM head."""
        inputs = self.model_inputs(batch)
        inputs["position_ids"] = self.position_ids(batch)
        inputs |= packed_inputs(self.model, batch.documents)
        return self.model.model(**inputs, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """[...,D] -> [...,V]."""
        return self.model.lm_head(hidden)

    def next_position(self, positions: Tensor) -> int:
        """Position of the token behind a prompt with ``positions`` (those of :meth:`position_ids`)."""
        return int(positions.max()) + 1

    @property
    def text_model(self) -> nn.Module:
        """The language model without its head, on text tokens: what generation steps through after the prompt."""
        return self.model.model.language_model

    def text_positions(self, positions: Tensor) -> Tensor:
        """Positions [B,L] of text that follows a prompt, in the form of :attr:`text_model`."""
        return positions

    @torch.no_grad()
    def answer(self, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        """Greedy answers to prompts, decoded together (left-padded)."""
        batch = pad(examples, self.processor.pad_token_id, side="left").to(self.model.device)
        generated = self.model.generate(
            **self.model_inputs(batch),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.processor.end_of_turn_id,
            pad_token_id=self.processor.pad_token_id,
        )
        answers = generated[:, batch.input_ids.shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights (safetensors), config, tokeniser and picture settings, readable by transformers and load_backbone."""
        self.model.save_pretrained(str(folder))
        self.processor.save_pretrained(folder)
        finish_model_folder(folder)
