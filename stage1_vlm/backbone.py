"""The contract between Trivium and a vision-language model, and how a checkpoint folder becomes one.

Legend: B rows, L tokens, D hidden width, V vocabulary.
A family contributes a :class:`~stage1_vlm.processor.ChatProcessor` and a subclass of this one; everything else
(data, training, export, evaluation) speaks to the contract. No remote code is ever run: a folder is read with
transformers' native classes or refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from navsim_ext.fingerprint import digest_file, digest_json
from stage1_vlm.collate import VisionLanguageBatch, pad
from stage1_vlm.documents import attend_within_documents, packed_inputs
from stage1_vlm.folder import CheckpointError, guarded, load_config, read_settings
from stage1_vlm.processor import ChatProcessor, Example
from stage1_vlm.weights import WEIGHTS_FILE, WEIGHTS_INDEX, check_model_folder, finish_model_folder, shard_files

OFFICIAL_ARCHITECTURE = "InternVLChatModel"  # OpenGVLab's own classes, which need remote code


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


def families() -> dict[str, type[VisionLanguageBackbone]]:
    """Backbone class by ``model_type`` of config.json."""
    from stage1_vlm.internvl import InternVLBackbone
    from stage1_vlm.qwen import QwenBackbone

    return {"internvl": InternVLBackbone, "qwen2_5_vl": QwenBackbone}


def read_config(folder: str | Path) -> tuple[type[VisionLanguageBackbone], Any]:
    """The family and config of a checkpoint folder; raises MissingError or CheckpointError naming the remedy."""
    content = read_settings(folder)
    check_model_folder(folder, weights=False)
    if OFFICIAL_ARCHITECTURE in (content.get("architectures") or ()):
        raise CheckpointError(
            f"{folder} holds OpenGVLab's own format, which needs remote code; convert it once with "
            f"`python -m stage1_vlm.convert source={folder} output_dir={folder}-hf`"
        )
    known = families()
    if content.get("model_type") not in known:
        raise CheckpointError(
            f"{folder}/config.json: model_type {content.get('model_type')!r:.60} is not one of {sorted(known)}"
        )
    config = load_config(folder)
    if type(config) is not known[content["model_type"]].model_class.config_class:
        raise CheckpointError(f"{folder}/config.json was read as {type(config).__name__}, which is of another model")
    return known[content["model_type"]], config


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


def weights_digest(folder: str | Path) -> str:
    """SHA-256 hex over the safetensors files and the config of a checkpoint folder."""
    files = shard_files(folder)
    config = read_settings(folder)
    config.pop("transformers_version", None)
    return digest_json({"config": config, "files": {file.name: digest_file(file) for file in files}})
