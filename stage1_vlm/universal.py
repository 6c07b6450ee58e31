"""Makes a ZeRO checkpoint loadable by another number of processes:

    python -m stage1_vlm.universal checkpoint=RUN/version_0/checkpoints/epoch=0-step=200.ckpt

writes ``RUN/version_0/universal/epoch=0-step=200.ckpt``; continue with ``resume=<that path> strategy.universal=true
resume_ignore=[world_size,datamodule.batch_size,trainer.strategy]`` and the same global batch.
DeepSpeed's own converter does the work, in a process of its own: it writes to standard output and loads pickles.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig

from navsim_ext.errors import MissingError, TriviumError
from navsim_ext.runtime.checkpoint_folder import COMPLETE_MARK, is_complete
from navsim_ext.runtime.config import job

_log = logging.getLogger(__name__)
TAG = "checkpoint"


class ConversionFailed(TriviumError):
    """DeepSpeed's converter ended with an error, which the message quotes."""


def to_universal(checkpoint: str | Path) -> Path:
    """Converts a complete ZeRO checkpoint folder; returns the universal one (an existing one is kept)."""
    source = Path(checkpoint).resolve()
    if not (source / TAG).is_dir() or not is_complete(source):
        raise MissingError(
            f"{source} is not a complete DeepSpeed checkpoint: give a folder epoch=E-step=S.ckpt of a run"
        )
    target = source.parents[1] / "universal" / source.name
    if target.is_dir():
        return target
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source / TAG),
        "--output_folder", str(temporary / TAG), "--inject_missing_state", "--num_extract_workers", "1",
        "--num_merge_workers", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConversionFailed(f"{source}: {done.stderr.strip()[-600:]}")
    (temporary / COMPLETE_MARK).touch()
    temporary.rename(target)
    return target


@job("universal")
def main(cfg: DictConfig) -> None:
    _log.info("%s", to_universal(cfg.checkpoint))


if __name__ == "__main__":
    main()
