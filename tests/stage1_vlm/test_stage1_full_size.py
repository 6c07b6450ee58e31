"""InternVL3-2B at full size with random weights: written, loaded and run once on a CPU within 12 GB."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from PIL import Image
from accelerate import init_empty_weights
from safetensors.torch import save_file
from stage1_vlm.loading import load_backbone
from stage1_vlm.collate import pad
from stage1_vlm.convert import native_names, file_name
from stage1_vlm.processor import Turn
from stage1_vlm.tiny import build_tiny_internvl
from transformers import InternVLConfig, InternVLForConditionalGeneration

folder = Path(sys.argv[1])
build_tiny_internvl(folder, ["Is the light red? yes."] * 20, vocabulary=400)  # tokeniser and settings
config = InternVLConfig.from_pretrained(folder)
vision, text = config.vision_config, config.text_config
vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads = 1024, 4096, 24, 16
vision.image_size, vision.patch_size = (448, 448), (14, 14)
text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1536, 8960, 28
text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 12, 2, 151674
text.layer_types = ["full_attention"] * 28
config.image_seq_length = 256
with init_empty_weights():
    shapes = {file_name(k): v.shape for k, v in InternVLForConditionalGeneration(config).state_dict().items()}
(folder / "model.safetensors").unlink()
names = sorted(shapes)
parts = [names[i::4] for i in range(4)]
for number, part in enumerate(parts):
    weights = {name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in part}
    save_file(weights, folder / f"model-{number + 1:05d}-of-00004.safetensors", metadata={"format": "pt"})
    del weights
import json
where = {n: f"model-{k + 1:05d}-of-00004.safetensors" for k, part in enumerate(parts) for n in part}
index = {"metadata": {}, "weight_map": where}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
config.save_pretrained(folder)
backbone = load_backbone(folder, dtype="bfloat16", max_image_tokens=256)
backbone.model.eval()
assert 2.0e9 < sum(p.numel() for p in backbone.model.parameters()) < 2.4e9
picture = Image.new("RGB", (448, 448))
example = backbone.processor.encode([Turn("user", "<image>\\nWhat?")], [picture], generation_prompt=True)
with torch.no_grad():
    hidden = backbone.last_hidden_states(pad([example], 0))
assert hidden.shape == (1, len(example), 1536) and torch.isfinite(hidden).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_internvl3_2b_loads_and_runs_within_12_gb(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak_gib = float(done.stdout.strip().splitlines()[-1])
    assert peak_gib * 2**30 < 12e9
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
