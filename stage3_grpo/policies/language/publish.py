"""The reinforced model as a folder that everything else reads: evaluation, export, planner, transformers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from navsim_ext.errors import MissingError
from navsim_ext.runtime.checkpoint_file import load_checkpoint
from navsim_ext.runtime.checkpoints import BestCheckpoints
from stage1_vlm import save_plain_model
from stage3_grpo.policies.language.policy import MODULE

BEST, LAST = "best", "last"


class PublishModel(Callback):
    """At the end of a run writes ``folder``: the weights of the best checkpoint by held-out score, or the last ones.

    LoRA is merged; ``adapter/`` holds the adapters alone. A run without held-out questions has no best: the last.
    """

    def __init__(self, folder: str | os.PathLike[str], which: str = BEST) -> None:
        if which not in (BEST, LAST):
            raise MissingError(f"callbacks.publish.which={which}: best or last was expected")
        self.folder, self.which = Path(folder), which

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        policy = pl_module.policy
        weights = {name: value.detach().cpu() for name, value in policy.backbone.model.state_dict().items()}
        if self.which == BEST:
            best = [each.best for each in trainer.checkpoint_callbacks if isinstance(each, BestCheckpoints)]
            if best and best[0] is not None:
                weights = best_weights(best[0], weights)
        temporary = self.folder.with_name(f".{self.folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        trained = SimpleNamespace(backbone=policy.backbone, lora_scaling=policy.lora_scaling)
        save_plain_model(trained, weights, temporary)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(temporary, self.folder)


def best_weights(path: Path, present: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint; raises MissingError where some of ``present`` are not in it."""
    state = load_checkpoint(path)["state_dict"]
    prefix = f"{MODULE}."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if missing := sorted(present.keys() - weights.keys()):
        raise MissingError(f"{path} lacks {len(missing)} weights of the model, {missing[0]} the first")
    return {name: weights[name] for name in present}
