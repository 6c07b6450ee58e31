"""Official checkpoints to the native form and back: same bits, same function, nothing missing or left over."""

import json
import shutil

import numpy as np
import pytest
import torch
from damage import judge_damage
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from navsim_ext.errors import MissingError
from stage1_vlm.collate import pad
from stage1_vlm.convert import convert, to_native_name, to_official_name
from stage1_vlm.folder import CheckpointError
from stage1_vlm.loading import load_backbone
from stage1_vlm.processor import Turn


def foreign(folder, copy):
    """A copy of a model's folder as somebody else would have written it: without checksums."""
    shutil.copytree(folder, copy)
    (copy / "checksums.json").unlink()


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
    foreign(tiny_internvl if change == "part" else official, source)
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


def sharded(folder, target, names):
    """``folder`` in shards of the given names, with an index, as downloads of large models come."""
    foreign(folder, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    parts = {name: sorted(weights)[number :: len(names)] for number, name in enumerate(names)}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, target / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def test_only_the_shards_that_the_index_names_are_read(tiny_internvl, official, tmp_path):
    """Left-over shards of another download, under names that come first and last, and a whole file."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    sharded(official, tmp_path / "source", names)
    stale = {name: torch.full_like(value, 7.0) for name, value in load_file(official / "model.safetensors").items()}
    for name in ("a.safetensors", "model-00001-of-00003.safetensors", "model.safetensors", "z.safetensors"):
        save_file(stale, tmp_path / "source" / name, metadata={"format": "pt"})
    assert convert(tmp_path / "source", tmp_path / "target") == "native"
    mine, theirs = load_file(tmp_path / "target" / "model.safetensors"), load_file(tiny_internvl / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    save_file(stale, tmp_path / "source" / names[0], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*index\.json disagree"):
        convert(tmp_path / "source", tmp_path / "other")


def test_a_converted_model_replaces_another_one_whole(official, tmp_path):
    convert(official, tmp_path, shard_bytes=40_000)
    convert(official, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    load_backbone(tmp_path)
    convert(official, tmp_path, shard_bytes=40_000)
    assert not (tmp_path / "model.safetensors").exists()
    load_backbone(tmp_path)


def test_what_a_folder_lacks_is_told_apart(tiny_internvl, official, tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    sharded(tiny_internvl, tmp_path / "shards", names)
    load_backbone(tmp_path / "shards")
    (tmp_path / "shards" / names[1]).unlink()
    with pytest.raises(MissingError, match=r"1 of the 2 shards .* are missing \(model-00002-of-00002"):
        load_backbone(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        load_backbone(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingError, match="copy the shards' index"):
        load_backbone(tmp_path / "shards")
    foreign(tiny_internvl, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\)"):
        load_backbone(tmp_path / "pickled")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text('{"base_model_name_or_path": "OpenGVLab/InternVL3-2B"}')
    save_file({"base_model.x": torch.zeros(2)}, tmp_path / "adapters" / "adapter_model.safetensors")
    for read in (load_backbone, lambda folder: convert(folder, tmp_path / "target")):
        with pytest.raises(CheckpointError, match=r"LoRA adapters alone, of the model 'OpenGVLab/InternVL3-2B'.*merge"):
            read(tmp_path / "adapters")
    sharded(tiny_internvl, tmp_path / "twice", names)
    shutil.copy(tiny_internvl / "model.safetensors", tmp_path / "twice")
    with pytest.raises(CheckpointError, match="weights twice"):
        load_backbone(tmp_path / "twice")


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 2.0}])
def test_both_generations_of_readers_find_the_base_of_the_rotary_positions(official, tmp_path, scaling):
    """Transformers 4 looks for rope_theta and rope_scaling, transformers 5 for rope_parameters."""
    foreign(official, tmp_path / "source")
    content = json.loads((tmp_path / "source" / "config.json").read_text())
    text = content["llm_config"]
    text.pop("rope_parameters")
    text |= {"rope_theta": 1_000_000.0, "rope_scaling": scaling}  # as the published configurations are
    (tmp_path / "source" / "config.json").write_text(json.dumps(content))
    convert(tmp_path / "source", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "official")
    wanted = {"rope_theta": 1_000_000.0, **(scaling or {"rope_type": "default"})}
    for folder, key in (("native", "text_config"), ("official", "llm_config")):
        text = json.loads((tmp_path / folder / "config.json").read_text())[key]
        assert text["rope_theta"] == 1_000_000.0
        assert text["rope_scaling"] == scaling
        assert text["rope_parameters"] == wanted
    assert load_backbone(tmp_path / "native").model.config.text_config.rope_parameters == wanted


def test_no_damage_of_a_folder_that_we_wrote_changes_a_state_in_silence(tiny_internvl, make_picture, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_internvl, folder)

    @torch.no_grad()
    def states():
        backbone = load_backbone(folder, max_image_tokens=16)
        turns = [Turn("user", "<image>\nWhat is ahead?"), Turn("assistant", "A car.")]
        example = backbone.processor.encode(turns, [make_picture(0)])
        return backbone.last_hidden_states(pad([example], backbone.processor.pad_token_id)).numpy().tobytes()

    verdicts = judge_damage(folder, states, np.random.default_rng(0), 8)
    assert {"model.safetensors", "config.json", "tokenizer.json", "checksums.json"} <= set(verdicts)
    assert all(verdict == {"named": 8, "without effect": 0} for verdict in verdicts.values()), verdicts
