"""Fine-tunes a vision-language model: ``python -m stage1_vlm.train experiment=demo output_dir=...``."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from navsim_ext.errors import DataError
from navsim_ext.files import read_json, write_json_atomic
from navsim_ext.fingerprint import Fingerprint, digest_json, package_versions
from navsim_ext.runtime.config import job
from stage1_vlm.data.mixture import read_mixture

_log = logging.getLogger(__name__)


def build_initial_model(cfg: DictConfig) -> None:
    """Writes a tiny model into ``cfg.model_path``, once: with ``init=tiny`` the one that ships with the suite, with
    ``init=random`` one of the sizes of ``cfg.tiny``, if there are any. Raises DataError for sizes that the shipped one
    has not."""
    from navsim_ext.runtime.collectives import launched_rank

    sizes = None if cfg.get("tiny") is None else OmegaConf.to_container(cfg.tiny, resolve=True)
    folder = Path(cfg.model_path)
    if (sizes is None and cfg.init == "random") or (folder / "config.json").is_file() or launched_rank() != 0:
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} has files, but no config.json: empty it, or give another model_path")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")  # a killed build is no model
    if cfg.init == "tiny":
        from stage1_vlm.pretrained import copy_pretrained

        copy_pretrained(temporary, sizes or {})
    else:
        from stage1_vlm.tiny import build_tiny_internvl

        build_tiny_internvl(temporary, _texts(cfg), seed=cfg.seed, **sizes)
    os.replace(temporary, folder)
    _log.info("wrote a tiny InternVL (init=%s) to %s", cfg.init, folder)


def _texts(cfg: DictConfig) -> list[str]:
    """What the tokeniser of a tiny model learns from: the conversations of the mixture."""
    texts = []
    for entry in read_mixture(cfg.data.mixture):
        with open(entry.annotation, "rb") as stream:
            lines = [line for line, _ in zip(stream, range(cfg.tiny_texts))]
        for line in lines:
            try:
                said = [message["value"] for message in json.loads(line)["conversations"]]
            except (ValueError, RecursionError, KeyError, TypeError):
                continue  # counted and listed when the data set is indexed
            texts += [text for text in said if isinstance(text, str)]
    if not texts:
        raise DataError(f"{cfg.data.mixture}: no readable conversation to learn a vocabulary from")
    return texts


def with_accumulation(cfg: DictConfig) -> DictConfig:
    """Sets the accumulation that makes ``global_batch_size`` of batch size x processes, or raises DataError."""
    from navsim_ext.runtime.collectives import launched_processes

    per_step = cfg.data.batch_size * launched_processes()
    accumulation, rest = divmod(cfg.global_batch_size, per_step)
    if rest or not accumulation:
        raise DataError(
            f"global_batch_size={cfg.global_batch_size} is not a multiple of data.batch_size={cfg.data.batch_size} x "
            f"{launched_processes()} processes: change one of them"
        )
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.trainer.accumulate_grad_batches = accumulation
    return cfg


def train(cfg: DictConfig) -> dict[str, Any]:
    """Builds the tiny model if asked, trains, and publishes the result; returns the metrics."""
    # PyTorch, Lightning and transformers are loaded here: --help has no use for them
    from navsim_ext.runtime.collectives import launched_rank
    from navsim_ext.runtime.run import run
    from stage1_vlm.outputs import METRICS_FILE, last_metrics, publish
    from stage1_vlm.weights import weights_digest

    needed = ((cfg, "output_dir"), (cfg, "model_path"), (cfg.data, "mixture"))
    if any(OmegaConf.is_missing(node, key) for node, key in needed):
        return run(cfg)  # says which keys have no value
    build_initial_model(cfg)
    start = time.perf_counter()
    result = run(with_accumulation(cfg))
    if launched_rank() != 0:
        return result["metrics"]
    output_dir, run_dir = Path(cfg.output_dir), Path(result["run_dir"])
    previous = output_dir / METRICS_FILE  # written last: what it says is there
    if result["resumed_from"] and not result["metrics"] and previous.is_file():
        return read_json(previous, "delete it and run the same command again")  # nothing was left to do
    data = result["module"].trainer.datamodule.report
    metrics = {
        **last_metrics(run_dir),  # not those of this process: it may have come to an end that was reached before
        "global_step": result["global_step"],
        "epoch": result["epoch"],
        "seconds": time.perf_counter() - start,
        "data": data,
    }
    publish(output_dir, run_dir, result["global_step"])
    fields = {
        "initial_weights": weights_digest(cfg.model_path),
        "weights": weights_digest(output_dir),
        "data": digest_json(data["datasets"]),
        "module": OmegaConf.to_container(cfg.module, resolve=True),
        "seed": cfg.seed,
        "steps": result["global_step"],
    }
    info = {"versions": package_versions("torch", "transformers", "lightning", "peft", "deepspeed")}
    Fingerprint("vlm", fields, info=info).save(output_dir)
    write_json_atomic(previous, metrics)
    return metrics


@job("stage1")
def main(cfg: DictConfig) -> None:
    train(cfg)


if __name__ == "__main__":
    main()
