"""A page of pictures with question, reasoning and answer of two models, and the rewards that lie between them.

    python -m stage1_vlm.answers_page before=EVAL after=EVAL mixture=MIXTURE.json recorder=RUN output_dir=DIR

``before`` and ``after`` are folders of ``stage1_vlm.evaluate`` on the same questions. One self-contained HTML file. The
questions that are shown are spread evenly over four kinds (became right, became wrong, stayed right, stayed wrong); how
many of each kind there are stands above them, so that no choice flatters.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import DictConfig

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.evaluation.report import newest_csv
from navsim_ext.evaluation.report_figures import curves_plot, svg_uri
from navsim_ext.files import read_json, write_atomic
from navsim_ext.pictures import open_picture
from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.questions.answers import read_reply
from navsim_ext.questions.meta_actions import PATHS, SPEEDS
from navsim_ext.runtime.config import job
from stage1_vlm.data.mixture import read_mixture
from stage1_vlm.data.records import SkipLine, elements, is_array, lines, parse_record, picture_paths

_log = logging.getLogger(__name__)
PAGE = "answers.html"
WIDTH = 480  # pixels of a picture on the page
KINDS = ("became right", "became wrong", "stayed right", "stayed wrong")
CURVES = ("reward", "accuracy", "well_formed", "readable", "distinct", "length", "truncated", "entropy")
TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Answers before and after</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .25em .8em; text-align: left; border-bottom: 1px solid #ddd; }
.asked { display: grid; grid-template-columns: 480px 1fr; gap: 1em; margin: 1.6em 0; border-top: 2px solid #ccc;
         padding-top: 1em; }
.asked img { width: 100%; } .question { color: #6b6b67; } .right { color: #0b7a53; } .wrong { color: #b3364a; }
pre { white-space: pre-wrap; font: inherit; margin: .2em 0; } img.plot { max-width: 100%; }
</style>
<h1>Answers before and after reinforcement</h1>
<table><tr><th></th><th>before</th><th>after</th></tr>
{% for name, one, other in figures %}<tr><td>{{ name }}</td><td>{{ one }}</td><td>{{ other }}</td></tr>{% endfor %}
</table>
<p>{% for kind, count in counts.items() %}{{ count }} {{ kind }}{{ ", " if not loop.last else "" }}{% endfor %}
of {{ total }} questions; {{ shown|length }} are shown, as evenly over these kinds as there are any.</p>
{% if plot %}<h2>Rewards over time</h2><img class="plot" src="{{ plot }}" alt="curves of the training">{% endif %}
{% for one in shown %}
<div class="asked"><img src="{{ one.picture }}" alt="what the model sees"><div>
<p class="question">{{ one.question }}</p><p>Driven: <b>{{ one.truth }}</b> ({{ one.kind }})</p>
{% for name in ("before", "after") %}{% set said = one[name] %}
<p><b>{{ name }}</b>: <span class="{{ "right" if said.correct else "wrong" }}">{{ said.answer }}</span>
{% if said.fault %}<i>({{ said.fault }})</i>{% endif %}</p><pre>{{ said.reasoning }}</pre>
{% endfor %}</div></div>
{% endfor %}</html>
"""


def read_answers(folder: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of answers.jsonl by (type, scene); raises MissingError or CorruptFile."""
    path = Path(folder) / "answers.jsonl"
    if not path.is_file():
        raise MissingError(f"{path} does not exist: give the output_dir of stage1_vlm.evaluate")
    rows = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[str(row["type"]), str(row["scene_id"])] = {key: row[key] for key in ("truth", "answer", "correct")}
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise CorruptFile(f"{path}, line {number} is no answer ({error!s:.80}): evaluate again") from error
    return rows


def read_questions_by_scene(mixture: str | Path) -> dict[tuple[str, str], tuple[Path, dict[str, Any]]]:
    """(picture root, record) by (type, scene)."""
    found = {}
    for entry in read_mixture(mixture):
        for _, content in elements(entry.annotation) if is_array(entry.annotation) else lines(entry.annotation):
            try:
                record = parse_record(content)
            except SkipLine:
                continue
            found[str(record.get("type", entry.name)), str(record.get("scene_id"))] = (entry.root, record)
    return found


def kind_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before["correct"] == after["correct"]:
        return "stayed right" if after["correct"] else "stayed wrong"
    return "became right" if after["correct"] else "became wrong"


def spread(by_kind: Mapping[str, Sequence[Any]], count: int) -> list[Any]:
    """At most ``count``, one of each kind in turn."""
    turns = zip_longest(*(by_kind[kind] for kind in KINDS))
    return [one for turn in turns for one in turn if one is not None][:count]


def picture_uri(path: Path) -> str:
    """A JPEG data URI, at most WIDTH wide."""
    picture = open_picture(path).convert("RGB")
    picture.thumbnail((WIDTH, WIDTH))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def write_page(
    before: str | Path, after: str | Path, mixture: str | Path, output_dir: str | Path, *, recorder: str | Path | None,
    count: int,
) -> Path:  # fmt: skip
    """Writes the page; raises DataError when the two folders answer other questions."""
    one, other = read_answers(before), read_answers(after)
    questions = read_questions_by_scene(mixture)
    both = [key for key in one if key in other and key in questions and picture_paths(questions[key][1])]
    if not both or len(one) != len(other):
        raise DataError(
            f"{before} answers {len(one)} questions, {after} {len(other)}, and {len(both)} of both are in {mixture}: "
            "evaluate both models on the same mixture"
        )
    by_kind: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for key in both:
        by_kind[kind_of(one[key], other[key])].append(key)
    shown = []
    for key in spread(by_kind, count):
        root, record = questions[key]
        human = next(turn["value"] for turn in record["conversations"] if turn["from"] != "system")
        shown.append({
            "picture": picture_uri(root / picture_paths(record)[0]),
            "question": human.replace(IMAGE_PLACEHOLDER, "").strip(),
            "truth": record.get("answer", one[key]["truth"]), "kind": kind_of(one[key], other[key]),
            "before": _said(one[key]), "after": _said(other[key]),
        })  # fmt: skip
    plot = ""
    if recorder is not None:
        table, _ = newest_csv(recorder, "rewards.csv")
        columns = [name for name in CURVES if name in table and table[name].notna().any()]
        plot = svg_uri(curves_plot(table, columns, "rollout"))
    counts = {kind: len(keys) for kind, keys in by_kind.items()}
    environment = jinja2.Environment(autoescape=True)
    text = environment.from_string(TEMPLATE).render(
        shown=shown, counts=counts, total=len(both), plot=plot, figures=_figures(before, after)
    )
    path = Path(output_dir) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


def _said(row: Mapping[str, Any]) -> dict[str, Any]:
    reply = read_reply(row["answer"])
    return {"answer": reply.answer or reply.text, "reasoning": reply.reasoning or "", "fault": reply.fault,
            "correct": row["correct"]}  # fmt: skip


def _figures(before: str | Path, after: str | Path) -> list[tuple[str, str, str]]:
    """Rows of the table: planning accuracy with its interval, form, F1 by action."""
    reports = [read_json(Path(folder) / "words.json").get("decisions", {}) for folder in (before, after)]
    if not all(reports):
        return []

    def accuracy(report: Mapping[str, Any]) -> str:
        found = report["planning_accuracy"]
        between = "" if found["low"] is None else f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
        return f"{100 * found['mean']:.1f}{between}"

    rows = [("planning accuracy %, 95 % over logs", *map(accuracy, reports))]
    rows += [(f"{name.replace('_', ' ')} %", *(f"{100 * report[name]:.1f}" for report in reports))
             for name in ("readable", "well_formed")]  # fmt: skip
    for action in (*SPEEDS, *PATHS):
        scores = [report["f1"].get(action, {}).get("f1") for report in reports]
        rows.append((f"F1 of {action} %", *("-" if score is None else f"{100 * score:.1f}" for score in scores)))
    return rows


@job("answers_page")
def main(cfg: DictConfig) -> None:
    path = write_page(
        cfg.before, cfg.after, cfg.mixture, cfg.output_dir, recorder=cfg.recorder, count=cfg.count
    )  # fmt: skip
    _log.info("%s", path)


if __name__ == "__main__":
    main()
