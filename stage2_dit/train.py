"""Trains a planner by imitation on cached hidden states.

    python -m stage2_dit.train experiment=demo data.index=... data.val_index=... data.hidden_cache=...
    torchrun --nproc-per-node 8 -m stage2_dit.train experiment=recogdrive_2b trainer=ddp ...

The same command continues a run that was killed, bit for bit.
"""

from __future__ import annotations

from omegaconf import DictConfig

from navsim_ext.runtime.config import job


@job("stage2")
def main(cfg: DictConfig) -> None:
    """One training run; says where the checkpoints are and what validation measured."""
    from navsim_ext.runtime.run import run, tell  # loads PyTorch and Lightning, which --help has no use for

    result = run(cfg)
    measured = [name for name in result["metrics"] if name.startswith("val/")]
    tell(result, "validation", measured, otherwise="no validation was run")


if __name__ == "__main__":
    main()
