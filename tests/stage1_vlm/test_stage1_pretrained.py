"""The tiny model that ships with the suite: stage 1 fine-tunes it, damage is named, what it says of itself is true."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.config import compose
from stage1_vlm import pretrained
from stage1_vlm.loading import load_backbone
from stage1_vlm.pretrained import CARD_FILE, FOLDER, LARGEST_BYTES, copy_pretrained, pack, sizes_of
from stage1_vlm.tiny import TinyInternVL
from stage1_vlm.train import build_initial_model, train
from stage1_vlm.weights import weights_digest

SMALL = {"width": 32, "layers": 2, "heads": 2, "vision_width": 32, "vision_heads": 2}


def evaluation(folder: Path, step: int, accuracy: float) -> None:
    row = {
        name: {"mean": value, "low": value, "high": value, "count": 40, "logs": 8}
        for name, value in {"accuracy": accuracy, "swapped": 0.25, "majority": 0.5}.items()
    }
    (folder / str(step)).mkdir(parents=True)
    (folder / str(step) / "accuracy.json").write_text(json.dumps({"image-dependent": row, "all": row}))


@pytest.fixture
def packed(tiny_internvl, tmp_path) -> Path:
    """A small model as ``pack`` leaves it."""
    model, curve = tmp_path / "model", tmp_path / "curve"
    shutil.copytree(tiny_internvl, model)
    Fingerprint("vlm", {"steps": 20, "weights": weights_digest(model)}).save(model)
    evaluation(curve, 10, 0.5)
    evaluation(curve, 20, 0.75)
    pack(model, curve, tmp_path / "packed")
    return tmp_path / "packed"


def test_packed_weights_are_those_of_the_run_in_half_the_bits(packed, tiny_internvl):
    whole, half = load_file(tiny_internvl / "model.safetensors"), load_file(packed / "model.safetensors")
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], whole[name].to(torch.bfloat16)) for name in whole)
    first, second = load_backbone(tiny_internvl), load_backbone(packed)
    assert first.processor.fingerprint_fields() == second.processor.fingerprint_fields()
    card = json.loads((packed / CARD_FILE).read_text())
    assert card["weights"] == weights_digest(packed)
    assert [(point["step"], point["accuracy"], point["swapped"]) for point in card["curve"]] == [
        (10, 0.5, 0.25),
        (20, 0.75, 0.25),
    ]
    assert card["accuracy_in_unseen_towns"]["all"]["questions"] == 40
    assert {**SMALL, "vocabulary": card["sizes"]["vocabulary"]}.items() <= card["sizes"].items()


def test_a_model_without_its_own_evaluation_is_not_packed(tiny_internvl, tmp_path):
    shutil.copytree(tiny_internvl, tmp_path / "model")
    Fingerprint("vlm", {"steps": 30}).save(tmp_path / "model")
    evaluation(tmp_path / "curve", 20, 0.75)
    with pytest.raises(DataError, match=r"no evaluation of the 30 steps .* only of \[20\]"):
        pack(tmp_path / "model", tmp_path / "curve", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_stage_1_fine_tunes_the_shipped_model(packed, toy_mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "FOLDER", packed)
    run, initial = tmp_path / "run", tmp_path / "run" / "initial"
    changes = [
        "init=tiny", "callbacks.progress=null",
        f"model_path={initial}", f"output_dir={run}", f"data.mixture={toy_mixture}", "trainer=cpu",
        "strategy=single", "trainer.max_epochs=1", "global_batch_size=4", "data.batch_size=4", "data.num_workers=0",
        "data.index_workers=0", "data.max_image_tokens=16", "module.gradient_checkpointing=false",
    ]  # fmt: skip
    train(compose("stage1", changes))
    assert weights_digest(initial) == weights_digest(packed)
    made = Fingerprint.load(run)
    assert made.fields["initial_weights"] == weights_digest(packed)
    tuned, start = load_file(run / "model.safetensors"), load_file(packed / "model.safetensors")
    moved = [float((tuned[name] - start[name].float()).abs().max()) for name in start]
    assert 0.0 < max(moved) < 0.1  # it learnt, from there


def test_packing_again_gives_the_same_folder(packed, tmp_path):
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    evaluation(tmp_path / "curve", 15, 0.6)
    pack(tmp_path / "model", tmp_path / "curve", packed)
    copy_pretrained(tmp_path / "copy", {}, packed)  # whole: the checksums are of what is there
    changed = {path.name for path in packed.iterdir() if path.read_bytes() != before.get(path.name)}
    assert changed == {CARD_FILE, "checksums.json"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json", CARD_FILE]
)
def test_a_damaged_shipped_file_is_named(packed, tmp_path, name):
    content = bytearray((packed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (packed / name).write_bytes(content)
    with pytest.raises(CorruptFile, match=rf"{re.escape(name)}.*damaged"):
        copy_pretrained(tmp_path / "copy", {}, packed)
    assert not (tmp_path / "copy").exists()
    (packed / name).unlink()
    with pytest.raises(MissingError, match=re.escape(name)):
        copy_pretrained(tmp_path / "copy", {}, packed)


def test_an_installation_without_it_is_named(tmp_path):
    with pytest.raises(MissingError, match="ships with the suite"):
        copy_pretrained(tmp_path / "copy", {}, tmp_path)


def test_other_sizes_than_the_shipped_ones_are_refused(packed, tmp_path):
    vocabulary = sizes_of(packed)["vocabulary"]
    copy_pretrained(tmp_path / "same", {**SMALL, "vocabulary": vocabulary}, packed)
    copy_pretrained(tmp_path / "room", {**SMALL, "vocabulary": 4 * vocabulary}, packed)
    with pytest.raises(DataError, match=r"tiny\.vocabulary=64 \(there: "):
        copy_pretrained(tmp_path / "copy", {"vocabulary": 64}, packed)
    with pytest.raises(DataError, match=r"tiny\.width=64 \(there: 32\)"):
        copy_pretrained(tmp_path / "copy", {"width": 64}, packed)

@pytest.mark.parametrize("experiment", ["demo", "language_demo"])
def test_what_ships_is_what_the_demos_fine_tune(experiment, tmp_path):
    cfg = compose(
        "stage1",
        [f"experiment={experiment}", f"output_dir={tmp_path}", "data.mixture=none.json"],
    )
    assert cfg.init == "tiny"
    build_initial_model(cfg)
    backbone = load_backbone(tmp_path / "initial", max_image_tokens=cfg.data.max_image_tokens, exact=True)
    tokens = backbone.processor.image_tokens(480, 270)
    assert tokens == cfg.data.max_image_tokens == backbone.processor.tokens_per_tile
    card = json.loads((FOLDER / CARD_FILE).read_text())
    assert card["weights"] == weights_digest(FOLDER)
    assert card["sizes"] == sizes_of(FOLDER)
    assert set(card["sizes"]) <= set(TinyInternVL.__dataclass_fields__)
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= LARGEST_BYTES
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    seen = card["accuracy_in_unseen_towns"]["image-dependent"]
    assert seen["accuracy"] > seen["swapped"]
    assert seen["accuracy"] > seen["majority"]
