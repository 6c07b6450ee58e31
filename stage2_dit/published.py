"""Published planner checkpoints: what their keys mean, and the way to ours and back, every key accounted for.

Prefixes: Lightning files ``agent.action_head.``, exported files ``action_head.``, ours none. Stray keys of frozen
policies (``old_policy.``, ``ref_policy.``) are counted and left; schedule buffers are recomputed and compared;
``eta.eta_logit`` (a frozen +inf) may be missing. Anything else that is missing, unknown or of another shape is
listed and refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from navsim_ext.errors import TriviumError
from stage2_dit.diffusion.noise_schedule import published_tables
from stage2_dit.layers import ROPE_THETA
from stage2_dit.normaliser import PUBLISHED
from stage2_dit.planner import DiffusionPlanner, PlannerConfig

PREFIXES = ("agent.action_head.", "action_head.", "")
STRAY_PREFIXES = ("old_policy.", "ref_policy.")
ETA = "eta.eta_logit"
ROTARY = "model.rotary_embedder.inv_freq"
TABLE_TOLERANCE = 1e-6  # relative; published tables agree to the last bit, those of bf16 files once both are rounded
WRAPPERS = ("module", "_orig_mod", "_forward_module")  # of DDP, torch.compile and DeepSpeed, anywhere in a name


class CheckpointMismatch(TriviumError):
    """A checkpoint does not fit the planner that it was to be loaded into."""


@dataclass
class ConversionReport:
    """What became of each key of a published file."""

    prefix: str
    parameters: list[str] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)  # buffers, compared with the recomputed ones
    strays: list[str] = field(default_factory=list)  # copies of frozen policies
    foreign: list[str] = field(default_factory=list)  # other modules of the file (a VLM), outside the prefix

    def lines(self) -> list[str]:
        return [
            f"prefix: {self.prefix or '(none)'}",
            f"planner parameters: {len(self.parameters)}",
            f"schedule and frozen tensors, recomputed and equal: {len(self.recomputed)}",
            f"copies of frozen policies, left out: {len(self.strays)}",
            f"tensors of other modules, left out: {len(self.foreign)}",
        ]


def from_published(state: Mapping[str, Tensor], **changes: Any) -> tuple[DiffusionPlanner, ConversionReport]:
    """The planner of a published state dict, with its sizes taken from the shapes.

    ``changes`` override the inferred configuration (``process`` is needed for files without DDIM buffers;
    ``normaliser`` and ``padding`` are not in a file: published waypoint bounds and unmasked context are assumed).
    """
    state = without_wrappers(state)
    prefix = find_prefix(state)
    report = ConversionReport(prefix)
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        if any(part in f".{name}" for part in (f".{stray}" for stray in STRAY_PREFIXES)):
            report.strays.append(key)
        elif not key.startswith(prefix):
            report.foreign.append(key)
        else:
            tensors[name] = tensor
    config = infer_config(tensors, changes)
    planner = DiffusionPlanner(config)
    tables = frozen_tensors(config)
    wrong: list[str] = []
    for name in sorted(tables.keys() & tensors.keys()):
        found = tensors.pop(name)
        if found.shape != tables[name].shape:
            wrong.append(f"{prefix}{name}: file {tuple(found.shape)} | schedule {tuple(tables[name].shape)}")
        elif not torch.allclose(
            found.double(), tables[name].to(found.dtype).double(), rtol=TABLE_TOLERANCE, atol=1e-12
        ):
            wrong.append(f"{prefix}{name}: the values differ from the schedule that this planner computes")
        report.recomputed.append(name)
    wrong += differences(tensors, planner.state_dict(), prefix)
    if wrong:
        raise CheckpointMismatch(
            "the checkpoint does not fit the planner:\n  "
            + "\n  ".join(wrong)
            + "\nconvert it with the configuration that it was trained with"
        )
    report.parameters = sorted(tensors)
    planner.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    return planner, report


def to_published(planner: DiffusionPlanner, prefix: str = PREFIXES[0]) -> dict[str, Tensor]:
    """A state dict under the published names and prefix, with every buffer that published files carry."""
    tensors = {name: tensor.detach().cpu().float() for name, tensor in planner.state_dict().items()}
    tensors |= frozen_tensors(planner.config)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def find_prefix(state: Mapping[str, Tensor]) -> str:
    """The first known prefix under which a planner stands; raises CheckpointMismatch naming some keys otherwise."""
    for prefix in PREFIXES:
        if f"{prefix}feature_encoder.weight" in state:
            return prefix
    raise CheckpointMismatch(
        f"no planner in the file: feature_encoder.weight stands under none of the prefixes {PREFIXES}; its first "
        f"keys are {sorted(state)[:5]}"
    )


def infer_config(tensors: Mapping[str, Tensor], changes: Mapping[str, Any]) -> PlannerConfig:
    """Sizes from shapes. Raises CheckpointMismatch when a tensor that decides a size is missing."""

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise CheckpointMismatch(f"the checkpoint has no {name}, which decides the planner's sizes")
        return tensors[name].shape

    width, hidden_width = shape("feature_encoder.weight")
    head_width = shape("model.transformer_blocks.0.attn.q_norm.weight")[0]
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.transformer_blocks\.(\d+)\.", name))}
    outputs = shape("action_decoder.fc2.weight")[0]
    found: dict[str, Any] = {
        "hidden_width": hidden_width,
        "num_heads": width // head_width,
        "head_width": head_width,
        "num_layers": len(layers),
        "output_width": shape("action_decoder.fc1.weight")[1],
        "encoder_width": shape("action_decoder.fc1.weight")[0],
        "horizon": shape("position_embedding.weight")[0],
        "num_history": shape("his_traj_encoder.fc1.weight")[1] // 3,
        "ego_encoder": "attention" if "ego_status_encoder.query" in tensors else "mlp",
        "mean_variance": outputs == 6,
        "padding": "upstream",
        "normaliser": PUBLISHED["waypoint"],
    }
    if "ddim_t" in tensors:
        found |= {"process": "ddim", "num_steps": len(tensors["ddim_t"])}
    elif not changes.get("process"):
        raise CheckpointMismatch(
            "the checkpoint carries no DDIM buffers, so it was trained as ddpm or flow: say which by process=ddpm or "
            "process=flow_ode"
        )
    return PlannerConfig(**(found | {name: value for name, value in changes.items() if value is not None}))


def frozen_tensors(config: PlannerConfig) -> dict[str, Tensor]:
    """Buffers and frozen tensors of a published file of this configuration, exactly recomputed."""
    tensors = {ROTARY: 1.0 / (ROPE_THETA ** (torch.arange(0, config.head_width, 2).float() / config.head_width))}
    if config.process.startswith("flow"):
        return tensors
    tensors[ETA] = torch.full((1,), torch.inf)  # atanh(1) of a fixed eta 1
    steps = (config.num_steps or 5) if config.process == "ddim" else None
    return tensors | published_tables(steps)


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that the bare module has: what training wrappers put into them is taken out.

    Raises CheckpointMismatch when two names become one.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in plain:
            raise CheckpointMismatch(f"{name}: the file holds {bare} twice, with and without {', '.join(WRAPPERS)}")
        plain[bare] = tensor
    return plain


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """One line for each key that is missing, unknown or of another shape, with both shapes."""
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            lines.append(f"{prefix}{name}: missing in the file | {tuple(wanted[name].shape)} in the planner")
        elif name not in wanted:
            lines.append(f"{prefix}{name}: {tuple(found[name].shape)} in the file | unknown to the planner")
        elif found[name].shape != wanted[name].shape:
            lines.append(f"{prefix}{name}: {tuple(found[name].shape)} in the file | {tuple(wanted[name].shape)}")
    return lines
