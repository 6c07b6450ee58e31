"""The part of the evaluation that looks at words: drawn answers, reasons, free answers, a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import bootstrap_mean
from navsim_ext.questions.answers import read_decision, read_reply
from navsim_ext.questions.catalogue import QUESTIONS
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.rng import derive_seed
from stage1_vlm.asked import Asked, batches_by_length, question_example
from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.data.records import HUMAN
from stage1_vlm.qa_engine.answer_judge import judge_answers
from stage1_vlm.qa_engine.client import server_settings
from stage1_vlm.sampling import AnswerSampling, encode_prompt, sample_answers
from stage1_vlm.words_report import choice_letter, choices_report, decision_report, language_report, reasoning_pairs


def words_report(
    backbone: VisionLanguageBackbone, asked: Sequence[Asked], texts: Sequence[str], cfg: DictConfig
) -> dict[str, Any]:
    """By part: decisions (greedy, sampled), reasoning, free answers, choices, judge; parts without questions are left
    out."""
    report: dict[str, Any] = {}
    decided = [place for place, one in enumerate(asked) if one.decision is not None]
    if decided:
        report["decisions"] = decision_report([asked[place].decided(texts[place]) for place in decided])
        if cfg.samples:
            drawn = sampled(backbone, [asked[place] for place in decided], cfg)
            report["decisions_sampled"] = sampled_report([asked[place] for place in decided], drawn)
    candidates, references = reasoning_pairs([one.truth for one in asked], texts)
    if candidates:
        report["reasoning"] = language_report(candidates, references, meteor=cfg.meteor)
    others = [place for place, one in enumerate(asked) if one.kind not in QUESTIONS and one.decision is None]
    letters = [place for place in others if choice_letter(asked[place].truth) is not None]
    if letters:
        report["choices"] = choices_report(
            [asked[place].truth for place in letters],
            [texts[place] for place in letters],
            [asked[place].log_name for place in letters],
        )
    free = [place for place in others if place not in set(letters)]
    if free:
        said = [read_reply(texts[place]).answer or "" for place in free]
        report["free_answers"] = language_report(said, [asked[place].references for place in free], meteor=cfg.meteor)
        if cfg.judge.url is not None:
            report["judge"] = judged([asked[place] for place in free], said, cfg)
    return report


def sampled(backbone: VisionLanguageBackbone, asked: Sequence[Asked], cfg: DictConfig) -> list[list[str]]:
    """``samples`` answers to each question at temperature 1, each keyed by seed, question and number."""
    sampling = AnswerSampling(temperature=1.0, max_new_tokens=cfg.max_new_tokens)
    texts: list[list[str]] = [[]] * len(asked)
    rows = max(1, cfg.batch_size // cfg.samples)
    for batch in track(batches_by_length(asked, rows), "sampled answers"):
        with torch.no_grad():
            prompts = [encode_prompt(backbone, question_example(backbone, asked[place], "")) for place in batch]
        keys = [
            [derive_seed(cfg.seed, "sample", str(asked[place].record.get("scene_id", place)), asked[place].kind, number)
             for number in range(cfg.samples)]
            for place in batch
        ]  # fmt: skip
        for place, row in zip(batch, sample_answers(backbone, prompts, keys, sampling)):
            texts[place] = [answer.text(backbone) for answer in row]
    return texts


def sampled_report(asked: Sequence[Asked], drawn: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Planning accuracy of one drawn answer, its interval over logs, and how many different decisions are drawn."""
    right = [[read_decision(text) == one.decision for text in row] for one, row in zip(asked, drawn)]
    logs = [one.log_name for one in asked]
    distinct = [len({str(read_decision(text)) for text in row}) for row in drawn]
    return {
        "samples": len(drawn[0]),
        "planning_accuracy": bootstrap_mean(np.array([np.mean(row) for row in right]), logs).to_json(),
        "best_of_samples": bootstrap_mean(np.array([float(any(row)) for row in right]), logs).to_json(),
        "distinct_decisions": float(np.mean(distinct)),
    }


def judged(asked: Sequence[Asked], said: Sequence[str], cfg: DictConfig) -> dict[str, Any]:
    """Scores 1 to 10 of free answers by a server, against the data's answers; those it gave none to are counted."""
    questions = [
        (next(turn["value"] for turn in one.record["conversations"] if turn["from"] in HUMAN), one.references, text)
        for one, text in zip(asked, said)
    ]
    scores = judge_answers(questions, server_settings(cfg.judge))
    known = [(score, one.log_name) for score, one in zip(scores, asked) if score is not None]
    told: dict[str, Any] = {"model": cfg.judge.model, "answers": len(scores), "without_score": scores.count(None)}
    if known:
        values, logs = zip(*known)
        told["score"] = bootstrap_mean(np.array(values, dtype=np.float64), logs).to_json()
    return told


def print_words(report: dict[str, Any]) -> None:
    console = Console(stderr=True, width=100)
    if "decisions" in report:
        decisions = report["decisions"]
        table = Table("action", "F1 %", "driven", "named", title="decisions, inside <answer>")
        for action, row in decisions["f1"].items():
            f1 = "-" if row["f1"] is None else f"{100 * row['f1']:.1f}"
            table.add_row(action, f1, str(row["driven"]), str(row["named"]))
        console.print(table)
        for name in ("decisions", "decisions_sampled"):
            if name in report:
                found = report[name]["planning_accuracy"]
                between = "" if found["low"] is None else f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
                console.print(f"{name}: planning accuracy {100 * found['mean']:.1f}{between} %", markup=False)
        console.print(f"readable {decisions['readable']:.1%}, well formed {decisions['well_formed']:.1%}")
    for name in ("reasoning", "free_answers"):
        if name in report:
            console.print(f"{name}: {report[name]}", markup=False)
