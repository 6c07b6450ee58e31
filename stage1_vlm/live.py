"""Hidden states computed when they are asked for: the cache's protocol with the VLM behind it.

As ``datamodule.hidden`` of stage 2 (with ``num_workers=0``: the model lives in the training process):

    hidden: {_target_: stage1_vlm.live.live_states, model_path: ..., index: ...}

To train the backbone as well, stage 2 takes ``TrainableStates`` by configuration: a module whose ``forward(scenes)``
gives a HiddenBatch with gradients and whose parameters (LoRA, or all) belong to the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import HiddenBatch, LiveHiddenStates, states_fingerprint
from navsim_ext.hidden_cache.source import dtype_named, pad_states
from navsim_ext.scene import SceneBatch
from stage1_vlm.adapters import LoraSettings, add_lora, freeze
from stage1_vlm.states import StateEncoder


def live_states(
    model_path: str, index: str, *, batch_size: int = 8, states_dtype: str = "bfloat16", **options: Any
) -> LiveHiddenStates:
    """A live source over a checkpoint folder and a scene index; ``options`` as for StateEncoder.load.

    Its fingerprint equals that of a bf16 cache which the same weights, prompt and picture settings made.
    """
    encoder = StateEncoder.load(model_path, index, **options)

    @torch.no_grad()
    def encode(tokens: Sequence[str]) -> list[Tensor]:
        states: list[Tensor] = []
        for start in range(0, len(tokens), batch_size):
            examples = [encoder.questions.encode(token) for token in tokens[start : start + batch_size]]
            states += encoder.states(examples)
        return states

    return LiveHiddenStates(encode, encoder.fingerprint, dtype=states_dtype)


class LiveSceneEncoder:
    """States of scenes that bring their pictures with them (a NAVSIM agent's input), without any index.

    The fingerprint is that of :func:`live_states` with the same weights, prompt and picture settings.
    """

    def __init__(self, model_path: str, *, states_dtype: str = "float32", **options: Any) -> None:
        self._encoder = StateEncoder.load(model_path, None, **options)
        self.dtype = dtype_named(states_dtype)
        self.fingerprint = states_fingerprint(self._encoder.fingerprint)

    @torch.no_grad()
    def __call__(self, scenes: SceneBatch) -> HiddenBatch:
        """[B,L,D] states, rounded to bfloat16 as a cache would keep them."""
        examples = [self._encoder.questions.encode_scene(scenes.to("cpu"), row) for row in range(len(scenes))]
        states = [one.to(torch.bfloat16) for one in self._encoder.states(examples)]
        return pad_states(states, self.dtype).validate()


class TrainableStates(nn.Module):
    """The backbone as a part of a planner that is trained through it.

    ``forward(scenes)`` encodes the scenes' questions and returns their states with gradients, padded on the right.
    With ``lora`` only adapters (and the projector) learn; without it everything that ``frozen`` leaves. The fingerprint
    is that of the weights it started from, so a planner trained with it says where its backbone came from, and
    ``trained`` stands in it: such states are not those of any cache.
    """

    def __init__(
        self,
        model_path: str,
        index: str,
        *,
        lora: Mapping[str, Any] | None = None,
        frozen: Mapping[str, bool] | None = None,
        gradient_checkpointing: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self._encoder = [StateEncoder.load(model_path, index, **options)]  # in a list: its parts are not submodules
        backbone = self._encoder[0].backbone
        freeze(backbone, frozen or {})
        if lora is not None:
            backbone.adapter = add_lora(backbone, LoraSettings(**lora))
        backbone.model.lm_head.requires_grad_(False)  # has no part in hidden states
        if gradient_checkpointing:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = backbone.model

    @property
    def encoder(self) -> StateEncoder:
        return self._encoder[0]

    @property
    def hidden_width(self) -> int:
        return self.encoder.backbone.hidden_width

    @property
    def fingerprint(self) -> Fingerprint:
        start = self.encoder.fingerprint
        return states_fingerprint(Fingerprint("vlm", {**start.fields, "trained": True}, info=start.info))

    def forward(self, scenes: SceneBatch) -> HiddenBatch:
        """States [B,L,D] and mask [B,L] of the scenes, on the model's device, float32 or the model's dtype."""
        on_cpu = scenes.to("cpu")
        examples = [self.encoder.questions.encode_scene(on_cpu, row) for row in range(len(scenes))]
        states = self.encoder.states(examples)
        return pad_states(states, states[0].dtype)
