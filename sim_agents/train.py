"""Trains a traffic model: behaviour cloning, then closed-loop fine-tuning by the same command.

    python -m sim_agents.train experiment=demo data.train=SCENES vocabulary=DIR output_dir=runs/bc
    python -m sim_agents.train experiment=demo_catk module.init_from=CKPT data.train=SCENES vocabulary=DIR output_dir=B

The same command continues a run that was killed, bit for bit.
"""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from navsim_ext.runtime.config import job
from navsim_ext.runtime.run import run


@job("sim_agents")
def main(cfg: DictConfig) -> None:
    """One training run; says where the checkpoints are and what validation measured."""
    result = run(cfg)
    console = Console(stderr=True, soft_wrap=True)
    values = {name: round(value, 4) for name, value in result["metrics"].items() if name.startswith("val/")}
    console.print(f"{result['run_dir']}: step {result['global_step']}, last {result['last']}")
    console.print(f"validation: {values}" if values else "no validation was run")


if __name__ == "__main__":
    main()
