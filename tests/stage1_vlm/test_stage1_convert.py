"""Official checkpoints to the native form and back: same bits, same function, nothing missing or left over."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from navsim_ext.errors import MissingError
from stage1_vlm.backbone import CheckpointError, load_backbone
from stage1_vlm.convert import convert, to_native_name, to_official_name


@pytest.fixture(scope="module")
def official(tiny_internvl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    assert convert(tiny_internvl, folder) == "official"
    return folder


def official_vision(weights, config, pixels):
    """Projected picture tokens by the official architecture, written from its published description."""
    vision = config["vision_config"]
    heads = vision["num_attention_heads"]

    def get(name):
        return weights[f"vision_model.{name}"]

    size = vision["patch_size"]
    kernel = get("embeddings.patch_embedding.weight")
    patches = functional.conv2d(pixels, kernel, get("embeddings.patch_embedding.bias"), stride=size)
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([get("embeddings.class_embedding").expand(len(x), -1, -1), x], 1)
    x = x + get("embeddings.position_embedding")
    for i in range(vision["num_hidden_layers"]):
        layer = {
            k.split(f"layers.{i}.")[1]: v
            for k, v in weights.items()
            if k.startswith(f"vision_model.encoder.layers.{i}.")
        }
        norm = functional.layer_norm(x, x.shape[-1:], layer["norm1.weight"], layer["norm1.bias"], 1e-6)
        qkv = functional.linear(norm, layer["attn.qkv.weight"], layer["attn.qkv.bias"])
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        mixed = functional.linear(mixed, layer["attn.proj.weight"], layer["attn.proj.bias"])
        x = x + layer["ls1"] * mixed
        norm = functional.layer_norm(x, x.shape[-1:], layer["norm2.weight"], layer["norm2.bias"], 1e-6)
        inner = functional.gelu(functional.linear(norm, layer["mlp.fc1.weight"], layer["mlp.fc1.bias"]))
        x = x + layer["ls2"] * functional.linear(inner, layer["mlp.fc2.weight"], layer["mlp.fc2.bias"])
    x = x[:, 1:]
    side = int(x.shape[1] ** 0.5)
    x = x.unflatten(1, (side, side))  # [T, row, column, C]; pixel shuffle v2 halves both sides
    n, w, h, c = x.shape
    x = x.reshape(n, w, h // 2, c * 2).permute(0, 2, 1, 3).reshape(n, h // 2, w // 2, c * 4).permute(0, 2, 1, 3)
    x = x.reshape(n, -1, x.shape[-1])
    x = functional.layer_norm(x, x.shape[-1:], weights["mlp1.0.weight"], weights["mlp1.0.bias"])
    x = functional.gelu(functional.linear(x, weights["mlp1.1.weight"], weights["mlp1.1.bias"]))
    return functional.linear(x, weights["mlp1.3.weight"], weights["mlp1.3.bias"])


def test_round_trip_is_the_same_bits(tiny_internvl, official, tmp_path):
    assert convert(official, tmp_path) == "native"
    first, second = load_file(tiny_internvl / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    mine, theirs = load_backbone(tiny_internvl), load_backbone(tmp_path)
    assert mine.processor.fingerprint_fields()["vocabulary"] == theirs.processor.fingerprint_fields()["vocabulary"]
    assert theirs.processor.tokenizer.start_image_token == "<img>"
    assert mine.model.config.image_token_id == theirs.model.config.image_token_id


@torch.no_grad()
def test_vision_tower_and_projector_compute_the_official_function(internvl, official):
    weights, config = load_file(official / "model.safetensors"), json.loads((official / "config.json").read_text())
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = official_vision(weights, config, pixels)
    found = internvl.image_features({"pixel_values": pixels})
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_official_names_are_those_of_the_published_checkpoints(official):
    names = set(load_file(official / "model.safetensors"))
    for name in (
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.encoder.layers.1.attn.qkv.bias",
        "vision_model.encoder.layers.0.attn.proj.weight",
        "vision_model.encoder.layers.0.norm1.weight",
        "vision_model.encoder.layers.0.ls2",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "mlp1.0.weight",
        "mlp1.3.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.bias",
        "language_model.lm_head.weight",
    ):
        assert name in names
    for name in names - {n for n in names if ".attn.qkv." in n}:
        assert to_official_name(to_native_name(name)) == name


@pytest.mark.parametrize("change", ["missing", "extra", "part"])
def test_weights_that_do_not_fit_are_named(tiny_internvl, official, tmp_path, change):
    source = tmp_path / "source"
    source.mkdir()
    parent = tiny_internvl if change == "part" else official
    for path in parent.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    if change == "missing":
        del weights["vision_model.encoder.layers.1.attn.qkv.bias"]
    elif change == "extra":
        weights["vision_model.encoder.layers.9.ls1"] = torch.zeros(3)
    else:
        del weights["vision_tower.encoder.layer.0.attention.k_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing|left over"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target" / "config.json").exists()
    with pytest.raises(MissingError):
        load_backbone(tmp_path / "target")


def test_shards_are_indexed(tiny_internvl, official, tmp_path):
    convert(official, tmp_path, shard_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    sharded, whole = load_backbone(tmp_path).model, load_backbone(tiny_internvl).model
    for (name, mine), (_, theirs) in zip(sharded.state_dict().items(), whole.state_dict().items()):
        assert torch.equal(mine, theirs), name
    assert isinstance(sharded.lm_head, nn.Linear)
