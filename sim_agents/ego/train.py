"""Trains a vector planner for the ego.

    python -m sim_agents.ego.train experiment=path data.train=SCENES data.val=SCENES output_dir=runs/path
    python -m sim_agents.ego.train experiment=tree data.train=SCENES data.val=SCENES output_dir=runs/tree
    python -m sim_agents.ego.train experiment=token data.train=SCENES module.base=CKPT output_dir=runs/token

The same command continues a run that was killed.
"""

from __future__ import annotations

from omegaconf import DictConfig

from navsim_ext.runtime.config import job
from navsim_ext.runtime.run import run, tell


@job("ego")
def main(cfg: DictConfig) -> None:
    """One training run; says where the checkpoints are and what validation measured."""
    result = run(cfg)
    names = sorted(name for name in result["metrics"] if name.startswith("val/"))
    tell(result, "validation", names, otherwise="no validation was run")


if __name__ == "__main__":
    main()
