"""What a tiny model learns in three minutes: accuracy on image-dependent questions in the held-out town.

    OMP_NUM_THREADS=2 python benchmarks/bench_stage1_answers.py --output benchmarks/results/stage1_answers.json

Builds the synthetic world (or takes --world), writes its image-dependent questions, trains a tiny InternVL from random
weights (``experiment=demo init=random``, 16 tokens a picture) with two threads and evaluates it. Baseline of the same
run: the most frequent answer of each question type among the very questions asked; control: the same model and
questions with pictures swapped between scenes. ``meta_action`` is left out: its text holds the ego's past, from which
much of the answer can be guessed, and that gain would stay when pictures are swapped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import report, row

from navsim_ext.questions.catalogue import QUESTIONS
from navsim_ext.questions.write import write_qa
from navsim_ext.readers import SceneFilter, open_source
from navsim_ext.runtime.config import compose
from navsim_ext.synthetic.build import build, recipe_of
from stage1_vlm.evaluate import evaluate

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH = ["global_batch_size=32", "data.batch_size=32"]
TYPES = tuple(
    kind
    for kind, question in QUESTIONS.items()
    if question.image_dependent and question.standard and kind != "trajectory" and not question.decides
)


def children_cpu() -> float:
    """Processor seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def questions(world: Path, folder: Path, name: str, split: str) -> Path:
    """Meta JSON of one split's image-dependent questions."""
    scene_filter = SceneFilter.from_yaml(world / "train_test_split" / "scene_filter" / f"{name}.yaml")
    source = open_source(world, split, maps_root=world / "maps", scene_filter=scene_filter)
    write_qa(source, folder, name=name, types=TYPES)
    return folder / f"{name}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--world", type=Path, help="a built synthetic world")
    parser.add_argument("--scenes", type=int, default=4400, help="of the world that is built")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", action="append", default=[], help="of the training configuration")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        world = arguments.world
        if world is None:
            world = work / "world"
            cfg = compose("synthetic", ["experiment=demo", f"scenes={arguments.scenes}", f"output_dir={world}"])
            build(world, recipe_of(cfg), workers=2)
        mixture = questions(world, work / "qa", "train", "trainval")
        held_out = questions(world, work / "qa", "test", "test")
        start, start_cpu = time.perf_counter(), children_cpu()
        subprocess.run(
            ["bash", "scripts/torchrun.sh", "stage1_vlm.train", "experiment=demo", f"output_dir={work / 'run'}",
             f"data.mixture={mixture}", "datamodule.repeat=null", f"trainer.max_steps={arguments.steps}",
             f"seed={arguments.seed}", "init=random", *BATCH, *arguments.override],
            check=True, cwd=REPOSITORY, env=os.environ | {"NPROC_PER_NODE": "1", "PYTHON_BIN": sys.executable},
        )  # fmt: skip
        elapsed, cpu = time.perf_counter() - start, children_cpu() - start_cpu
        metrics = json.loads((work / "run" / "metrics.json").read_text())
        asked = compose("stage1_eval", [
            f"model_path={work / 'run'}", f"mixture={held_out}", f"output_dir={work / 'eval'}", "dtype=float32",
            "max_image_tokens=16", "max_new_tokens=8",
        ])  # fmt: skip
        result = evaluate(asked)
        found = result["image-dependent"]
        rows = [
            row("training", elapsed, "s", "<= 180"),
            row("training, processor time of its processes", cpu, "s"),
            row("optimizer steps", metrics["global_step"], "steps"),
            row("questions in the held-out town", found["accuracy"].count, "questions"),
            row("gain over the most frequent answer per type", 100 * found["gain"].mean, "points", ">= 5"),
            row("gain with pictures swapped", 100 * found["gain_swapped"].mean, "points", "< 5"),
        ]
        names = ("accuracy", "majority", "swapped", "gain", "gain_swapped")
        rows += [row(f"{key}, mean and 95 % interval over logs", found[key].format(), "%") for key in names]
        for kind in filter(QUESTIONS.__contains__, result):
            one = result[kind]
            rows.append(row(f"accuracy, {kind}", f"{one['accuracy'].format()} against {one['majority'].format()}", "%"))
        baseline = "the most frequent answer of each type among the same questions"
        report("stage1_answers", baseline=baseline, rows=rows, output=arguments.output)


if __name__ == "__main__":
    main()
