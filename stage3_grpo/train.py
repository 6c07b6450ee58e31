"""Trains a planner by reinforcement on PDM scores, from an imitation checkpoint.

    python -m stage3_grpo.train experiment=demo init=PLANNER data.train=... data.hidden_cache=... data.metric_cache=...
    python -m stage3_grpo.train experiment=recogdrive_2b algorithm=diffgrpo_clip reward=published init=...
    torchrun --nproc-per-node 8 -m stage3_grpo.train experiment=recogdrive_2b trainer=ddp ...

The same command continues a run that was killed, bit for bit.
"""

from __future__ import annotations

from omegaconf import DictConfig

from navsim_ext.runtime.config import job

MEASURED = ("val/pdm_score", "val/gain", "val/pdms_v1", "val/epdms_v2_no_ec", "val/reverse_tail", "val/standing",
            "val/score", "val/accuracy", "val/well_formed", "val/readable")  # fmt: skip


def without_held_out(index: str | None, every: int | None) -> str:
    """Why a run has no figures of held-out scenes."""
    if index is None:
        return "no held-out scenes were scored: give data.val=INDEX"
    when = "trainer.val_check_interval" if every is None else "trainer.check_val_every_n_epoch"
    return f"no held-out scenes of data.val={index} were scored: the run ended before its first validation (see {when})"


@job("stage3")
def main(cfg: DictConfig) -> None:
    """One training run; says where the checkpoints are and what the held-out scenes say.

    Raises StoppedByAlarm, exit code 3, when an alarm ended it: a pipeline does not go on with such a planner.
    """
    from navsim_ext.runtime.run import run, tell  # loads PyTorch and Lightning, which --help has no use for

    result = run(cfg)
    why = without_held_out(cfg.data.val, cfg.trainer.check_val_every_n_epoch)
    tell(result, "held out", MEASURED, otherwise=why)
    if result["module"].stopped_by_alarm:
        raise result["module"].stopped("an alarm stopped the run")


if __name__ == "__main__":
    main()
