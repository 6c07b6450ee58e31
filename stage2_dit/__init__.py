"""Stage 2: the diffusion planner on the hidden states of a VLM. What stands here is what other stages may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from navsim_ext.exports import exported

if TYPE_CHECKING:
    from stage2_dit.checkpoint import LoadedPlanner, load_planner, planner_record, require_hidden, save_planner
    from stage2_dit.conditioning import Conditioning
    from stage2_dit.diffusion.process import PRESETS, Chain, Exploration, NoDensity, Process, WrongProcess
    from stage2_dit.diffusion.sampling import Steps, build_process, log_prob, sample_chain, step_distributions
    from stage2_dit.inference import PlannerRunner, load_trajectory_planner
    from stage2_dit.noise import ChainNoise, keyed_generator, keyed_noise
    from stage2_dit.normaliser import NormaliserBounds, TrajectoryNormaliser
    from stage2_dit.not_finite import NotFiniteLoss, not_finite_loss
    from stage2_dit.planner import SHARDED_METHODS, DiffusionPlanner, PlannerConfig
    from stage2_dit.published import CheckpointMismatch

__all__ = [
    "PRESETS",
    "SHARDED_METHODS",
    "Chain",
    "ChainNoise",
    "CheckpointMismatch",
    "Conditioning",
    "DiffusionPlanner",
    "Exploration",
    "LoadedPlanner",
    "NoDensity",
    "NormaliserBounds",
    "NotFiniteLoss",
    "PlannerConfig",
    "PlannerRunner",
    "Process",
    "Steps",
    "TrajectoryNormaliser",
    "WrongProcess",
    "build_process",
    "keyed_generator",
    "keyed_noise",
    "load_planner",
    "load_trajectory_planner",
    "log_prob",
    "not_finite_loss",
    "planner_record",
    "require_hidden",
    "sample_chain",
    "save_planner",
    "step_distributions",
]

__getattr__ = exported(
    __name__,
    {
        "PRESETS": "diffusion.process",
        "SHARDED_METHODS": "planner",
        "Chain": "diffusion.process",
        "ChainNoise": "noise",
        "CheckpointMismatch": "published",
        "Conditioning": "conditioning",
        "DiffusionPlanner": "planner",
        "Exploration": "diffusion.process",
        "LoadedPlanner": "checkpoint",
        "NoDensity": "diffusion.process",
        "NormaliserBounds": "normaliser",
        "NotFiniteLoss": "not_finite",
        "PlannerConfig": "planner",
        "PlannerRunner": "inference",
        "Process": "diffusion.process",
        "Steps": "diffusion.sampling",
        "TrajectoryNormaliser": "normaliser",
        "WrongProcess": "diffusion.process",
        "build_process": "diffusion.sampling",
        "keyed_generator": "noise",
        "keyed_noise": "noise",
        "load_planner": "checkpoint",
        "load_trajectory_planner": "inference",
        "log_prob": "diffusion.sampling",
        "not_finite_loss": "not_finite",
        "planner_record": "checkpoint",
        "require_hidden": "checkpoint",
        "sample_chain": "diffusion.sampling",
        "save_planner": "checkpoint",
        "step_distributions": "diffusion.sampling",
    },
)
