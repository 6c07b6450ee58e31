"""Answer accuracy by question type, against the most frequent answer and with pictures swapped:

    python -m stage1_vlm.evaluate model_path=CHECKPOINT mixture=MIXTURE.json output_dir=DIR

Three figures for each type, with bootstrap intervals over logs: accuracy, that of always giving the type's most
frequent answer in this very data (the hardest such baseline), and accuracy when each question gets the picture of
another scene. A model that looks at the picture beats the second and loses it in the third.

``words.json`` says more of what was said (:mod:`stage1_vlm.words_report`): decisions by class, with greedy answers and
with ``samples`` drawn at temperature 1; reasons and free answers by BLEU, ROUGE-L, CIDEr-D and METEOR; multiple choice;
a judge's scores, where ``judge.url`` names a server.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.files import write_json_atomic
from navsim_ext.questions.answers import normalised
from navsim_ext.runtime.config import job
from navsim_ext.runtime.preflight import measure_slice, preflight
from navsim_ext.runtime.progress import track
from stage1_vlm.asked import Asked, batches_by_length, question_example, read_questions
from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.data.records import picture_paths
from stage1_vlm.export import device_of
from stage1_vlm.loading import load_backbone
from stage1_vlm.words_evaluation import print_words, words_report

_log = logging.getLogger(__name__)

BYTES_PER_ANSWER_TOKEN = 8  # of a row of answers.jsonl, whose fixed part is that of BYTES_PER_ROW
BYTES_PER_ROW = 256


def swapped(asked: Sequence[Asked], seed: int) -> list[Asked]:
    """Every question with the picture of another scene of its type; types with one scene keep theirs.

    Scenes of a type are shuffled and each takes the pictures of the next, so no question keeps its own and each
    picture is used as often as before when scenes ask a type once.
    """
    by_kind: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, one in enumerate(asked):
        by_kind[one.kind][json.dumps(picture_paths(one.record))].append(position)
    result = list(asked)
    generator = np.random.default_rng(seed)
    for pictures in by_kind.values():
        names = [list(pictures)[i] for i in generator.permutation(len(pictures))]
        for name, other in zip(names, names[1:] + names[:1]):
            donor = asked[pictures[other][0]]
            for position in pictures[name]:
                own = asked[position]
                record = {**own.record, "image": donor.record.get("image")}
                result[position] = replace(own, record=record, root=donor.root)
    return result


def answers(backbone: VisionLanguageBackbone, asked: Sequence[Asked], cfg: DictConfig, title: str) -> list[str]:
    """Greedy answers, decoded in batches of questions of like length."""
    texts = [""] * len(asked)
    for batch in track(batches_by_length(asked, cfg.batch_size), title):
        examples = [question_example(backbone, asked[position], str(position)) for position in batch]
        for position, text in zip(batch, backbone.answer(examples, cfg.max_new_tokens)):
            texts[position] = text
    return texts


def say_cost(backbone: VisionLanguageBackbone, asked: Sequence[Asked], cfg: DictConfig) -> None:
    """Tokens, disk, memory, pictures, and hours from some batches of all lengths; raises PreflightError.

    Memory is that of the keys and values of the longest batch, where the model runs on the CPU.
    """
    batches = batches_by_length(asked, cfg.batch_size)
    sample = np.random.default_rng(cfg.seed).permutation(len(batches)).tolist()
    seconds = measure_slice(
        lambda number: answers(backbone, [asked[i] for i in batches[number]], cfg, "measured slice"), sample
    )
    tokens = np.array([one.tokens for one in asked])
    longest_batch = cfg.batch_size * (int(tokens.max()) + cfg.max_new_tokens)
    passes = 2 if cfg.swap_pictures else 1
    preflight(
        output_dir=cfg.output_dir,
        items=len(asked) * passes,
        bytes_per_item=(BYTES_PER_ROW + BYTES_PER_ANSWER_TOKEN * cfg.max_new_tokens) / passes,
        memory_bytes=longest_batch * backbone.cache_bytes() if backbone.model.device.type == "cpu" else 0,
        seconds_per_item=seconds * len(batches) / len(asked),
        files=dict.fromkeys(one.root / path for one in asked for path in picture_paths(one.record)),
        title=f"{len(asked):,} questions, {passes} x {tokens.sum():,} tokens, {tokens.mean():.0f} each, "
        f"at most {tokens.max():,}",
    )


def majority_answers(asked: Sequence[Asked]) -> dict[str, str]:
    """The most frequent answer of each type in this data (by canonical answer where there is one)."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    texts: dict[tuple[str, str], str] = {}
    for one in asked:
        key = json.dumps(one.record.get("answer", normalised(one.truth)))
        counts[one.kind][key] += 1
        texts.setdefault((one.kind, key), one.truth)
    return {kind: texts[kind, count.most_common(1)[0][0]] for kind, count in counts.items()}


def table_of(asked: Sequence[Asked], columns: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Estimates by group: each type, all image-dependent questions, all questions."""
    groups = {kind: [i for i, one in enumerate(asked) if one.kind == kind] for kind in sorted({a.kind for a in asked})}
    groups["image-dependent"] = [i for i, one in enumerate(asked) if one.needs_picture]
    groups["all"] = list(range(len(asked)))
    result = {}
    for name, places in groups.items():
        if places:
            logs = [asked[i].log_name for i in places]
            result[name] = {column: bootstrap_mean(values[places], logs) for column, values in columns.items()}
    return result


def evaluate(cfg: DictConfig) -> dict[str, dict[str, Estimate]]:
    """Asks, checks, writes answers.jsonl and accuracy.json, prints the table; returns the estimates."""
    backbone = load_backbone(
        cfg.model_path, dtype=cfg.dtype, attention=cfg.attention, max_image_tokens=cfg.max_image_tokens
    )
    backbone.model.to(device_of(cfg.device)).eval()
    asked = read_questions(cfg, backbone)
    say_cost(backbone, asked, cfg)
    majority = majority_answers(asked)
    texts = answers(backbone, asked, cfg, "questions")
    right = np.array([one.correct(text) for one, text in zip(asked, texts)], dtype=np.float64)
    base = np.array([one.correct(majority[one.kind]) for one in asked], dtype=np.float64)
    columns = {"accuracy": right, "majority": base, "gain": right - base}
    if cfg.swap_pictures:
        others = swapped(asked, cfg.seed)
        other_texts = answers(backbone, others, cfg, "swapped pictures")
        swapped_right = np.array([one.correct(text) for one, text in zip(asked, other_texts)], dtype=np.float64)
        columns |= {"swapped": swapped_right, "gain_swapped": swapped_right - base}
    result = table_of(asked, columns)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / "answers.jsonl", "w", encoding="utf-8") as stream:
        for one, text, good in zip(asked, texts, right):
            row = {"type": one.kind, "scene_id": one.record.get("scene_id"), "truth": one.truth, "answer": text}
            stream.write(json.dumps(row | {"correct": bool(good)}, ensure_ascii=False) + "\n")
    report = words_report(backbone, asked, texts, cfg)
    write_json_atomic(output_dir / "words.json", report)
    as_json = {name: {key: value.to_json() for key, value in row.items()} for name, row in result.items()}
    write_json_atomic(output_dir / "accuracy.json", as_json)
    _print(result)
    print_words(report)
    return result


def _print(result: dict[str, dict[str, Estimate]]) -> None:
    columns = list(next(iter(result.values())))
    table = Table("questions", "n", *columns, title="accuracy in per cent, 95 % intervals over logs")
    for name, row in result.items():
        table.add_row(name, str(row["accuracy"].count), *(row[column].format() for column in columns))
    Console(stderr=True, width=160).print(table)


@job("stage1_eval")
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
