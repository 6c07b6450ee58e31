"""Trains a planner by imitation on cached hidden states.

    python -m stage2_dit.train experiment=demo data.index=... data.val_index=... data.hidden_cache=...
    torchrun --nproc-per-node 8 -m stage2_dit.train experiment=recogdrive_2b trainer=ddp ...

The same command continues a run that was killed, bit for bit.
"""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.runtime.config import job
from navsim_ext.runtime.run import run


@job("stage2")
def main(cfg: DictConfig) -> None:
    """One training run; says where the checkpoints are and what validation measured."""
    result = run(cfg)
    console = Console(stderr=True, soft_wrap=True)
    values = {name: round(value, 4) for name, value in result["metrics"].items() if name.startswith("val/")}
    console.print(f"{result['run_dir']}: step {result['global_step']}, last {result['last']}, best {result['best']}")
    console.print(f"validation: {values}" if values else "no validation was run")


if __name__ == "__main__":
    main()
