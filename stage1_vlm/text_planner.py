"""Drives by words: the VLM is asked for the trajectory, and its answer is read.

As a planner of the scorer and of the closed loop (``planner=vlm_text``). An answer that cannot be parsed becomes NaN
poses, which the scorer marks invalid and counts, and so does the closed loop (or goes on with the last plan, see
``closed_loop/ego.py``); :attr:`failure_rate` and the file of answers stand beside the score.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from navsim_ext.fingerprint import Fingerprint
from navsim_ext.frames import NUM_FUTURE_POSES
from navsim_ext.hidden_cache.schema import HiddenBatch
from navsim_ext.prompts import ParsedTrajectory, parse_trajectory
from navsim_ext.scene import SceneBatch
from stage1_vlm.states import StateEncoder

_log = logging.getLogger(__name__)


class VlmText:
    """``index`` is the scene index whose sensor root holds the pictures (None: scenes bring theirs, as in closed loop);
    ``answers`` a JSONL file to append to."""

    name = "vlm_text"

    def __init__(
        self,
        model_path: str,
        index: str | None,
        *,
        cameras: Sequence[str] = ("CAM_F0",),
        template: str | None = None,
        dtype: str = "bfloat16",
        device: str = "cpu",
        max_image_tokens: int | None = 3072,
        attention: str = "sdpa",
        sensor_root: str | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 320,
        answers: str | None = None,
    ) -> None:
        self._encoder = StateEncoder.load(
            model_path,
            index,
            cameras=cameras,
            template=template,
            dtype=dtype,
            device=device,
            max_image_tokens=max_image_tokens,
            attention=attention,
            sensor_root=sensor_root,
        )
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.answers = Path(answers) if answers else None
        self.counts: Counter[str] = Counter()
        vlm = self._encoder.fingerprint
        self.fingerprint = Fingerprint("planner", {"name": self.name, "max_new_tokens": max_new_tokens}, {"vlm": vlm})

    @property
    def failure_rate(self) -> float:
        """Share of answers so far that could not be parsed; NaN before the first."""
        asked = self.counts["asked"]
        return self.counts["unparsable"] / asked if asked else float("nan")

    @property
    def required_cameras(self) -> tuple[str, ...]:
        return self._encoder.questions.cameras

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        """[B,8,3] float32; NaN where the answer is no trajectory."""
        scenes = batch.to("cpu")
        examples = [self._encoder.questions.encode_scene(scenes, row) for row in range(len(scenes))]
        texts: list[str] = []
        for start in range(0, len(examples), self.batch_size):
            texts += self._encoder.backbone.answer(examples[start : start + self.batch_size], self.max_new_tokens)
        parsed = [parse_trajectory(text) for text in texts]
        self._record(scenes.token, texts, parsed)
        unknown = np.full((NUM_FUTURE_POSES, 3), np.nan)
        poses = np.stack([unknown if one.poses is None else one.poses for one in parsed])
        return torch.from_numpy(poses).float().to(batch.history.device)

    def _record(self, tokens: Sequence[str], texts: Sequence[str], parsed: Sequence[ParsedTrajectory]) -> None:
        self.counts["asked"] += len(parsed)
        for one in parsed:
            self.counts["unparsable"] += not one.valid
            self.counts.update(f"repaired:{rule}" for rule in one.repairs if one.valid)
        if self.answers is not None:
            self.answers.parent.mkdir(parents=True, exist_ok=True)
            with open(self.answers, "a", encoding="utf-8") as stream:
                for token, text, one in zip(tokens, texts, parsed):
                    row = {"token": token, "answer": text, "valid": one.valid, "reason": one.reason}
                    stream.write(json.dumps(row | {"repairs": list(one.repairs)}, ensure_ascii=False) + "\n")
        _log.info("vlm_text: %.1f%% of %d answers unparsable", 100 * self.failure_rate, self.counts["asked"])
