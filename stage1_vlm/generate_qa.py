"""Generates driving questions: ``python -m stage1_vlm.generate_qa data.index=... server.url=... output_dir=...``.

With ``reasons_for=MIXTURE.json`` it explains the decisions of that question set instead, one or two sentences each.
"""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError
from navsim_ext.runtime.config import job
from stage1_vlm.qa_engine.client import server_settings
from stage1_vlm.qa_engine.engine import QaEngine
from stage1_vlm.qa_engine.reasoning import ReasoningEngine, decision_records

_log = logging.getLogger(__name__)


def generate(cfg: DictConfig) -> dict[str, int]:
    chosen = {"cameras": tuple(cfg.data.cameras), "sensor_root": cfg.data.sensor_root}
    scenes = SceneDataset(cfg.data.index, **chosen)
    servers = server_settings(cfg.server), server_settings(cfg.judge)
    options: dict[str, Any] = {
        "cameras": tuple(cfg.data.cameras),
        "prompts": cfg.prompts,
        "template": cfg.template,
        "pairs_per_phase": cfg.pairs_per_phase,
        "keep_above": cfg.keep_above,
        "scenes_at_once": cfg.scenes_at_once,
        "give_up_after": cfg.give_up_after,
    }
    if cfg.reasons_for is not None:
        decisions = decision_records(cfg.reasons_for)
        tokens = [token for token in scenes.tokens if token in decisions]
        if not tokens:
            raise DataError(
                f"reasons_for={cfg.reasons_for} has no question of type decision about a scene of {cfg.data.index}: "
                "write them with python -m navsim_ext.questions.write types=[decision]"
            )
        scenes = SceneDataset(cfg.data.index, **chosen, tokens=tokens)
        return ReasoningEngine(decisions, scenes, cfg.output_dir, *servers, **options).run()
    return QaEngine(scenes, cfg.output_dir, *servers, **options).run()


@job("generate_qa")
def main(cfg: DictConfig) -> None:
    _log.info("%s: %s", cfg.output_dir, generate(cfg))


if __name__ == "__main__":
    main()
