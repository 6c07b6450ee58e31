"""Stage 1: the vision-language model that answers driving questions, and its hidden states. What stands here is what
other stages may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import navsim_ext  # noqa: F401 - answers --help before a command loads anything
from navsim_ext.exports import exported

if TYPE_CHECKING:
    from stage1_vlm.adapters import LoraSettings, add_lora, freeze, trainable_summary
    from stage1_vlm.backbone import VisionLanguageBackbone
    from stage1_vlm.data.line_index import LineIndex, LineRules, build_index, write_skipped
    from stage1_vlm.data.mixture import read_mixture
    from stage1_vlm.data.records import picture_paths
    from stage1_vlm.loading import load_backbone, load_processor
    from stage1_vlm.outputs import save_plain_model
    from stage1_vlm.processor import ChatProcessor, Example, turns_from_conversation
    from stage1_vlm.sampling import (
        AnswerSampling,
        AnswerScores,
        EncodedPrompt,
        SampledAnswer,
        encode_prompt,
        sample_answers,
        score_answers,
        score_conversations,
    )
    from stage1_vlm.weights import weights_digest

__all__ = [
    "AnswerSampling",
    "AnswerScores",
    "ChatProcessor",
    "EncodedPrompt",
    "Example",
    "LineIndex",
    "LineRules",
    "LoraSettings",
    "SampledAnswer",
    "VisionLanguageBackbone",
    "add_lora",
    "build_index",
    "encode_prompt",
    "freeze",
    "load_backbone",
    "load_processor",
    "picture_paths",
    "read_mixture",
    "sample_answers",
    "save_plain_model",
    "score_answers",
    "score_conversations",
    "trainable_summary",
    "turns_from_conversation",
    "weights_digest",
    "write_skipped",
]

__getattr__ = exported(
    __name__,
    {
        "AnswerSampling": "sampling",
        "AnswerScores": "sampling",
        "ChatProcessor": "processor",
        "EncodedPrompt": "sampling",
        "Example": "processor",
        "LineIndex": "data.line_index",
        "LineRules": "data.line_index",
        "LoraSettings": "adapters",
        "SampledAnswer": "sampling",
        "VisionLanguageBackbone": "backbone",
        "add_lora": "adapters",
        "build_index": "data.line_index",
        "encode_prompt": "sampling",
        "freeze": "adapters",
        "load_backbone": "loading",
        "load_processor": "loading",
        "picture_paths": "data.records",
        "read_mixture": "data.mixture",
        "sample_answers": "sampling",
        "save_plain_model": "outputs",
        "score_answers": "sampling",
        "score_conversations": "sampling",
        "trainable_summary": "adapters",
        "turns_from_conversation": "processor",
        "weights_digest": "weights",
        "write_skipped": "data.line_index",
    },
)
