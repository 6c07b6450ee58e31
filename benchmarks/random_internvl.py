"""InternVL3-2B as published in everything but its weights, which are random: made on the device, nothing is loaded."""

from __future__ import annotations

import tempfile

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from stage1_vlm.documents import attend_within_documents
from stage1_vlm.internvl import InternVLBackbone
from stage1_vlm.tiny import build_tiny_internvl

TEXTS = ["Predict the trajectory of the ego car. [PT, (+1.00, -0.20, +0.30)]"] * 50
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": (448, 448), "patch_size": (14, 14)}  # fmt: skip
TEXT = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_674, "layer_types": ["full_attention"] * 28}  # fmt: skip


def random_internvl(device: torch.device | str, *, tiny: bool = False) -> InternVLBackbone:
    """2.1 billion parameters in bfloat16 (``tiny``: some 200,000), a tokeniser of few words, at most 12 tiles."""
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_internvl(folder, TEXTS, tile=56, max_tiles=12)
        config = InternVLConfig.from_pretrained(folder, trust_remote_code=False)
        if not tiny:
            for part, sizes in ((config.vision_config, VISION), (config.text_config, TEXT)):
                for name, value in sizes.items():
                    setattr(part, name, value)
            config.image_seq_length = 256
        processor = InternVLBackbone.make_processor(folder, config, None)
    with torch.device(device):
        model = InternVLForConditionalGeneration._from_config(  # noqa: SLF001
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    attend_within_documents(model)
    model.generation_config.pad_token_id = processor.pad_token_id
    return InternVLBackbone(model, processor)
