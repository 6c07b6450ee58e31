"""The tiny InternVL that ships with the suite (``init=tiny``): it has learnt to see a synthetic world.

    python -m stage1_vlm.pretrained model_path=RUN curve=DIR output_dir=stage1_vlm/tiny_internvl

packs what ``scripts/pretrain_tiny.sh`` trained: weights in bf16, tokeniser, picture settings, checksums of all of them,
and ``card.json``: how they were made and what they can do. Stage 1 copies the folder and fine-tunes it, as real users
fine-tune a downloaded InternVL3.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import read_json, write_json_atomic
from navsim_ext.runtime.config import job

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tiny_internvl"
CARD_FILE = "card.json"  # of the figures; carried along, never read to make a number
LARGEST_BYTES = 8_000_000  # of the weights: they are part of the package
_REMEDY = "install Trivium again, or check stage1_vlm/tiny_internvl out anew"


def copy_pretrained(target: Path, sizes: Mapping[str, Any], folder: Path | None = None) -> None:
    """Copies the shipped model to the new folder ``target``, whose files are compared with their checksums.

    ``sizes`` (some of ``TinyInternVL``) are those that the configuration states: DataError where the shipped model has
    others. Raises MissingError or CorruptFile naming the shipped file that is not as it was.
    """
    from stage1_vlm.weights import check_model_folder

    folder = folder or FOLDER
    if not (folder / "checksums.json").is_file():
        raise MissingError(f"{folder} does not hold the tiny model that ships with the suite: {_REMEDY}")
    check_model_folder(folder)
    own = sizes_of(folder)
    other = {name: value for name, value in sizes.items() if name in own and own[name] != value}
    if sizes.get("vocabulary", own["vocabulary"]) > own["vocabulary"]:
        del other["vocabulary"]  # of tiny it is the largest that is allowed
    if other:
        stated = ", ".join(f"tiny.{name}={value} (there: {own[name]})" for name, value in sorted(other.items()))
        raise DataError(f"init=tiny is a finished model of other sizes: {stated}. Leave them out, or take init=random")
    shutil.copytree(folder, target)


def sizes_of(folder: Path) -> dict[str, int]:
    """The sizes of a tiny InternVL's folder, by the names of :class:`~stage1_vlm.tiny.TinyInternVL`."""
    config = read_json(folder / "config.json", _REMEDY)
    pictures = read_json(folder / "preprocessor_config.json", _REMEDY)
    vision, text = config["vision_config"], config["text_config"]
    return {
        "width": text["hidden_size"],
        "layers": text["num_hidden_layers"],
        "heads": text["num_attention_heads"],
        "vision_width": vision["hidden_size"],
        "vision_layers": vision["num_hidden_layers"],
        "vision_heads": vision["num_attention_heads"],
        "patch": vision["patch_size"][0],
        "tile": vision["image_size"][0],
        "max_tiles": pictures["max_patches"],
        "vocabulary": text["vocab_size"],
    }


def pack(model: Path, curve: Path, output_dir: Path) -> dict[str, Any]:
    """Writes the folder that ships from a finished run of stage 1 and its evaluations; returns the card.

    ``curve`` holds a folder for each evaluated step, as ``stage1_vlm.evaluate`` writes it, the last one among them.
    Raises MissingError where there is none, DataError when the model's own is not there or the weights are larger than
    LARGEST_BYTES.
    """
    import torch

    from navsim_ext.fingerprint import Fingerprint
    from stage1_vlm.loading import load_backbone
    from stage1_vlm.weights import finish_model_folder, weights_digest

    evaluated = {int(path.parent.name): read_json(path) for path in sorted(curve.glob("[0-9]*/accuracy.json"))}
    if not evaluated:
        raise MissingError(f"{curve} holds no folder STEP/accuracy.json: run stage1_vlm.evaluate for each kept step")
    made = Fingerprint.load(model)
    steps = int(made.fields["steps"])
    if steps not in evaluated:
        raise DataError(f"{curve} has no evaluation of the {steps} steps of {model}, only of {sorted(evaluated)}")
    backbone = load_backbone(model, dtype=torch.bfloat16)
    output_dir.mkdir(parents=True, exist_ok=True)
    backbone.save_pretrained(output_dir)
    size = (output_dir / "model.safetensors").stat().st_size
    if size > LARGEST_BYTES:
        raise DataError(f"{output_dir}/model.safetensors has {size:,} bytes, {LARGEST_BYTES:,} at most are shipped")
    card = {
        "made_by": "bash scripts/pretrain_tiny.sh",
        "sizes": sizes_of(output_dir),
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "weights": weights_digest(output_dir),
        "trained": {
            "fingerprint": made.digest,
            "steps": steps,
            "seed": made.fields.get("seed"),
            "versions": made.info.get("versions"),
        },
        "accuracy_in_unseen_towns": {kind: _figures(row) for kind, row in evaluated[steps].items()},
        "curve": [{"step": step} | _figures(evaluated[step]["image-dependent"]) for step in sorted(evaluated)],
    }
    write_json_atomic(output_dir / CARD_FILE, card)
    finish_model_folder(output_dir)  # once more: the checksums cover the card too
    return card


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of one question type: accuracy, that with swapped pictures, that of the most frequent answer."""
    means = {name: round(row[name]["mean"], 4) for name in ("accuracy", "swapped", "majority") if name in row}
    return means | {"questions": row["accuracy"]["count"]}


@job("stage1_pack")
def main(cfg: DictConfig) -> None:
    card = pack(Path(cfg.model_path), Path(cfg.curve), Path(cfg.output_dir))
    _log.info("%s: %s", cfg.output_dir, card["accuracy_in_unseen_towns"]["image-dependent"])


if __name__ == "__main__":
    main()
