"""The trajectory question of a scene, and the hidden states of a VLM that has read it: export and live share this.

Legend: L tokens, D hidden width, P tokens of the shared prefix (the system turn, the same for every scene).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, package_versions
from navsim_ext.pictures import open_picture
from navsim_ext.prompts import prompt_digest, trajectory_prompt
from navsim_ext.scene import SceneBatch
from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.collate import pad
from stage1_vlm.internvl import InternVLBackbone
from stage1_vlm.loading import load_backbone
from stage1_vlm.processor import ChatProcessor, Example, Turn
from stage1_vlm.weights import weights_digest

PUBLISHED_TILE_TOKENS = 256  # what the cache's 2x2 pooling is made for


class TrajectoryQuestions:
    """Encodes the trajectory prompt of a scene with its pictures; holds no model, so loader workers can use it."""

    def __init__(
        self,
        scenes: SceneDataset | None,
        processor: ChatProcessor,
        *,
        cameras: Sequence[str] = ("CAM_F0",),
        template: str | Path | None = None,
    ) -> None:
        self.scenes, self.processor = scenes, processor
        self.cameras, self.template = tuple(cameras), template
        self._place = {} if scenes is None else {token: place for place, token in enumerate(scenes.tokens)}

    @property
    def tokens(self) -> list[str]:
        return list(self._place)

    def scene(self, token: str) -> SceneBatch:
        if token not in self._place:
            where = "no scene index was given" if self.scenes is None else f"not in {self.scenes.index.folder}"
            raise MissingError(f"token {token}: {where}")
        return self.scenes[self._place[token]]

    def encode(self, token: str) -> Example:
        """Question of one scene; raises DataError or MissingError naming token and picture."""
        return self.encode_scene(self.scene(token), 0)

    def encode_scene(self, scenes: SceneBatch, row: int) -> Example:
        """Question of one row of a batch."""
        token, paths = scenes.token[row], scenes.cameras[row]
        missing = [camera for camera in self.cameras if camera not in paths]
        if missing:
            raise MissingError(f"scene {token} has no camera {missing}; it has {sorted(paths)}")
        root = Path() if self.scenes is None else self.scenes.sensor_root
        pictures = [open_picture(root / paths[camera]) for camera in self.cameras]
        command = int(scenes.status[row, :4].argmax())
        prompt = trajectory_prompt(scenes.history[row].numpy(), command, self.cameras, self.template)
        return self.processor.encode_prompt(prompt, pictures, name=token)

    def prefix_ids(self) -> list[int]:
        """Token ids of the system turn, with which every question begins."""
        prompt = trajectory_prompt([[0.0] * 3] * 4, "unknown", self.cameras, self.template)
        ids, _ = self.processor.tokenize([Turn("system", prompt.system)], [])
        return ids

    def image_spans(self, example: Example, offset: int = 0) -> list[tuple[int, int]]:
        """[start, stop) of each picture's tokens; empty where tiles are not the published 256 tokens."""
        if getattr(self.processor, "tokens_per_tile", None) != PUBLISHED_TILE_TOKENS:
            return []
        inside = (example.input_ids == self.processor.image_token_id).int()
        edges = torch.diff(inside, prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten() - offset
        return [(int(start), int(stop)) for start, stop in edges.view(-1, 2)]


class StateEncoder:
    """Runs the backbone over questions and gives the last hidden states, unpadded."""

    def __init__(
        self, backbone: VisionLanguageBackbone, questions: TrajectoryQuestions, fingerprint: Fingerprint
    ) -> None:
        self.backbone, self.questions, self.fingerprint = backbone, questions, fingerprint
        self._prefix: DynamicCache | None = None

    @classmethod
    def load(
        cls,
        model_path: str,
        index: str | None,
        *,
        cameras: Sequence[str] = ("CAM_F0",),
        template: str | None = None,
        dtype: str = "bfloat16",
        device: str | torch.device = "cpu",
        max_image_tokens: int | None = None,
        attention: str = "sdpa",
        sensor_root: str | None = None,
    ) -> StateEncoder:
        """From a checkpoint folder and a scene index (None: only scenes that bring their pictures' paths).

        ``max_image_tokens`` bounds the pictures of one question.
        """
        backbone = load_backbone(model_path, dtype=dtype, max_image_tokens=max_image_tokens, attention=attention)
        backbone.model.to(device).eval()
        scenes = None if index is None else SceneDataset(index, horizon=None, cameras=cameras, sensor_root=sensor_root)
        questions = TrajectoryQuestions(scenes, backbone.processor, cameras=cameras, template=template)
        fields: dict[str, Any] = {
            "weights": weights_digest(model_path),
            "prompt": prompt_digest(template, cameras),
            "pictures": backbone.processor.fingerprint_fields(),
            "dtype": dtype,
        }
        info = {"attention": attention, "versions": package_versions("torch", "transformers")}
        return cls(backbone, questions, Fingerprint("vlm", fields, info=info))

    @property
    def device(self) -> torch.device:
        return self.backbone.model.device

    def states(self, examples: Sequence[Example]) -> list[Tensor]:
        """[L_i,D] of each question, run together; padding is computed and dropped."""
        batch = pad(examples, self.backbone.processor.pad_token_id).to(self.device)
        hidden = self.backbone.last_hidden_states(batch)
        return [hidden[row, : len(example)] for row, example in enumerate(examples)]

    @torch.no_grad()
    def left_padded_states(self, examples: Sequence[Example], length: int) -> list[Tensor]:
        """[length,D] as published weights saw them: padded on the left, padding rows kept.

        Raises DataError for a question longer than that.
        """
        longest = max(len(example) for example in examples)
        if longest > length:
            raise DataError(f"a question of {longest} tokens does not fit pad_to={length}")
        blank = Example(torch.full((length,), self.backbone.processor.pad_token_id), torch.full((length,), -100))
        batch = pad([*examples, blank], self.backbone.processor.pad_token_id, side="left")
        batch.input_ids, batch.attention_mask = batch.input_ids[:-1], batch.attention_mask[:-1]
        return list(self.backbone.last_hidden_states(batch.to(self.device)))

    @torch.no_grad()
    def prefix_states(self) -> Tensor:
        """[P,D] of the system turn, run once; its keys and values serve :meth:`states_after_prefix`."""
        if not isinstance(self.backbone, InternVLBackbone):
            raise DataError(
                f"share_prefix is not made for {type(self.backbone).__name__}: its positions are not linear"
            )
        ids = torch.tensor([self.questions.prefix_ids()], device=self.device)
        output = self.backbone.model.model(input_ids=ids, use_cache=True)
        self._prefix = output.past_key_values
        return output.last_hidden_state[0]

    @torch.no_grad()
    def states_after_prefix(self, examples: Sequence[Example]) -> list[Tensor]:
        """[L_i - P,D]: the prefix's keys and values are reused, so its own states are the same for every scene."""
        prefix = self.questions.prefix_ids()
        length = len(prefix)
        expected = torch.tensor(prefix)
        for example in examples:
            if not torch.equal(example.input_ids[:length], expected):
                raise DataError(f"question {example.name} does not begin with the shared prefix")
        rest = [Example(e.input_ids[length:], e.labels[length:], e.pixels, e.name) for e in examples]
        batch = pad(rest, self.backbone.processor.pad_token_id).to(self.device)
        mask = torch.cat([batch.attention_mask.new_ones(len(rest), length), batch.attention_mask], 1)
        cache = DynamicCache(config=self.backbone.model.config.get_text_config())
        for layer, stored in enumerate(self._prefix.layers):
            keys, values = (part.expand(len(rest), -1, -1, -1) for part in (stored.keys, stored.values))
            cache.update(keys, values, layer)
        inputs = {**self.backbone.model_inputs(batch), "attention_mask": mask}
        hidden = self.backbone.model.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
        return [hidden[row, : len(example)] for row, example in enumerate(rest)]
