"""Reasons for known decisions, by a large model: what AlphaDrive distils (arXiv:2503.07608).

The server sees the picture, the question (speed, navigation) and the true decision, and explains it in one or two
sentences; a judge compares the explanation with picture and facts. Everything else (resuming, limits, files that are
always whole) is the question engine's.

<output_dir>/decision.jsonl     the questions with ``<think>explanation</think><answer>decision</answer>``
<output_dir>/rejected.jsonl     explanations at or below the threshold, with score and reason
<output_dir>/mixture.json       meta JSON of the first
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from navsim_ext.dataset import SceneDataset
from navsim_ext.files import write_json_atomic
from navsim_ext.fingerprint import digest_json
from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.questions.catalogue import with_reasoning
from navsim_ext.questions.meta_actions import Decision
from navsim_ext.runtime.checksums import CHECKSUM_KEY, checked_lines, file_checksums
from stage1_vlm.data.mixture import read_mixture
from stage1_vlm.data.records import SkipLine, elements, is_array, lines, parse_record
from stage1_vlm.qa_engine.client import ChatClient, Nonsense, ServerSettings
from stage1_vlm.qa_engine.engine import JOURNAL, QaEngine
from stage1_vlm.qa_engine.phases import (
    PromptSet,
    QaPair,
    judge_messages,
    one_question,
    parse_judgement,
    picture_parts,
    scene_facts,
)

TEXTS = ("explanation", "explanation_judge")
MAX_CHARACTERS = 600
MAX_SENTENCES = 3  # asked for: one or two


class ReasoningEngine(QaEngine):
    """Explains ``records`` (questions of type decision by token) of ``scenes``, each of which must have one."""

    def __init__(
        self,
        records: Mapping[str, dict[str, Any]],
        scenes: SceneDataset,
        output_dir: str | Path,
        server: ServerSettings,
        judge: ServerSettings,
        **options: Any,
    ) -> None:
        self.records = {token: records[token] for token in scenes.tokens}
        super().__init__(scenes, output_dir, server, judge, **options)

    def prompt_set(self, folder: str | Path | None) -> PromptSet:
        return PromptSet(folder, TEXTS)

    def task_fields(self) -> dict[str, Any]:
        decisions = {token: record["answer"] for token, record in self.records.items()}
        return {"task": "reasoning", "decisions": digest_json(decisions)}

    async def _scene(self, client: ChatClient, judge: ChatClient, place: int) -> dict[str, Any]:
        scene = self.scenes[place]
        record = self.records[scene.token[0]]
        asked = next(turn["value"] for turn in record["conversations"] if turn["from"] == "human")
        question = asked.replace(IMAGE_PLACEHOLDER, "").strip()
        facts = scene_facts(scene, 0, 1) | {"question": question, "decision": record["answer"]}
        pictures = picture_parts(self._pictures(place))
        said = await client.complete(one_question(self.prompts, TEXTS[0], facts, pictures), parse_explanation)
        pair = QaPair("decision", question, said)
        judged = await judge.complete(
            judge_messages(self.prompts, pair, facts, pictures, TEXTS[1]), parse_judgement, temperature=0.0
        )
        return {"token": scene.token[0], "pairs": [{**vars(pair), **vars(judged)}]}

    def _publish(self, failed: int) -> dict[str, int]:
        content = (self.output_dir / JOURNAL).read_bytes()
        by_token = {line["token"]: line["pairs"][0] for _, line in checked_lines(content) if line is not None}
        kept, rejected = [], []
        for token in self.scenes.tokens:
            if token not in by_token:
                continue
            pair, record = by_token[token], self.records[token]
            reply = with_reasoning(pair["answer"], record["answer"])
            turns = [*record["conversations"][:-1], {"from": "gpt", "value": reply}]
            explained = record | {"conversations": turns, "reasoning_source": self.server.model}
            explained |= {"score": pair["score"], "reason": pair["reason"]}
            (kept if pair["score"] > self.keep_above else rejected).append(explained)
        for name, records in (("decision", kept), ("rejected", rejected)):
            self._write_lines(f"{name}.jsonl", records)
        if kept:
            entry = {"root": os.path.relpath(self.scenes.sensor_root, self.output_dir), "annotation": "decision.jsonl"}
            entry |= {"repeat_time": 1, "data_augment": False, "length": len(kept)}
            entry[CHECKSUM_KEY] = file_checksums(self.output_dir, ["decision.jsonl"])["decision.jsonl"]
            write_json_atomic(self.output_dir / "mixture.json", {"Decision_reasoning": entry})
        numbers = {"scenes": len(by_token), "failed": failed, "kept": len(kept), "rejected": len(rejected)}
        return {**numbers, **self.counts}


def decision_records(mixture: str | Path) -> dict[str, dict[str, Any]]:
    """Questions of type decision by scene token; raises DataError for one without a decision as its answer."""
    found = {}
    for entry in read_mixture(mixture):
        for _, content in elements(entry.annotation) if is_array(entry.annotation) else lines(entry.annotation):
            try:
                record = parse_record(content)
            except SkipLine:
                continue  # listed when the set is indexed
            if record.get("type") == "decision" and isinstance(record.get("scene_id"), str):
                Decision.parse(str(record.get("answer")))
                found[record["scene_id"]] = record
    return found


def parse_explanation(text: str) -> str:
    """One or two sentences of plain text (three are let through); raises Nonsense for anything else."""
    said = " ".join(text.split())
    if re.search(r"[<>{}\[\]]", said):
        raise Nonsense(f"tags or lists in {said[:120]!r}")
    sentences = len(re.findall(r"[.!?。](?:\s|$)", said)) or 1
    if not re.search(r"[^\W\d_]{2}", said) or len(said) > MAX_CHARACTERS or sentences > MAX_SENTENCES:
        raise Nonsense(f"{sentences} sentences of {len(said)} characters: {said[:120]!r}")
    return said
