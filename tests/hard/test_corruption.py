"""600 damaged files, given to the commands that read them: each is named in an error, or has no effect on the result.

    python -m pytest tests/hard/test_corruption.py -m slow        (-k NAME for one kind of file)
    TRIVIUM_CORRUPTION_SHARE=0.1 ...                              a tenth of the cases, for a first look

Bits are flipped and files are cut short, one file at a time, seeded. A command that reads a damaged file either ends
with an exit code that is neither 0 nor 1 and a message that names the file or its folder, or gives what it gives
without the damage. No traceback, no crash, no other result.

What others write carries no checksum (scene filters, downloaded logs, maps, pictures, question files) and cannot be
compared: such files are not counted here. That they end in named errors where they cannot be read is tested with their
readers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Ended, forked_commands
from damage import damages

from navsim_ext.metric_cache.build import build
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.runtime.checksums import file_checksums
from navsim_ext.runtime.parquet import read_frame
from navsim_ext.shards import ShardStore
from stage2_dit import load_planner
from stage2_dit.checkpoint import planner_record

SCORE, SCORE_FILE, COMPARE = (f"navsim_ext.evaluation.{name}" for name in ("score", "score_file", "compare"))
BUILD, INDEX = "navsim_ext.metric_cache.build", "navsim_ext.dataset"
EXPORT, EVALUATE = "stage1_vlm.export", "stage1_vlm.evaluate"
MODULES = (SCORE, SCORE_FILE, COMPARE, BUILD, INDEX, EXPORT, EVALUATE)
SHARE = float(os.environ.get("TRIVIUM_CORRUPTION_SHARE", "1"))
LOCKS = {".lock", ".lock.json", "locks"}


@dataclass(frozen=True)
class Kind:
    """A kind of file: ``overrides`` with which ``module`` reads what lies in ``{case}``, and what its result is.

    ``resumes``: the folder is also where the command writes, so each run gets a copy of it.
    """

    module: str
    overrides: list[str]
    result: Callable[[Path, Ended], object]  # of the output folder
    cases: int
    resumes: bool = False
    patterns: tuple[str, ...] = ("*",)
    unread: set[str] = field(default_factory=set)  # names of files that no result rests on: damage must have no effect


def table_of(output: Path, _: Ended) -> object:
    """Every value of a score folder."""
    scores, poses = read_frame(output / "scores.parquet", ""), read_frame(output / "trajectories.parquet", "")
    return scores.to_json(), np.stack(poses.pop("poses").tolist()).tobytes(), poses.to_json()


def scored_file(output: Path, _: Ended) -> object:
    return read_frame(output / "out.parquet", "").to_json()


def records_of(output: Path, _: Ended) -> object:
    """Every record of a store by token."""
    store = ShardStore(output)
    arrays = {token: store.get(token) for token in sorted(store.tokens)}
    return [(token, name, value.tobytes()) for token, found in arrays.items() for name, value in sorted(found.items())]


def files_of(output: Path, _: Ended) -> object:
    """The bytes of every file but locks, logs and where something lies."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and not LOCKS & set(path.parts)]
    return [
        (str(path.relative_to(output)), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
        if path.suffix not in (".log", ".yaml")
    ]


def accuracy_of(output: Path, _: Ended) -> object:
    return (output / "accuracy.json").read_text(), (output / "answers.jsonl").read_text()


def printed(_: Path, ended: Ended) -> object:
    return ended.out


PLANNED = ["planner=diffusion", "hidden=cached", "data.cameras=[]"]
KINDS: dict[str, Kind] = {
    "index": Kind(SCORE, ["data.index={case}", "metric_cache={metric_cache}", "hidden.folder={hidden}",
                          "planner.checkpoint={planner}", *PLANNED], table_of, 90, unread={"plan.json"}),
    "hidden_cache": Kind(SCORE, ["data.index={index}", "metric_cache={metric_cache}", "hidden.folder={case}",
                                 "planner.checkpoint={planner}", *PLANNED], table_of, 50),
    "metric_cache": Kind(SCORE, ["data.index={index}", "metric_cache={case}", "hidden.folder={hidden}",
                                 "planner.checkpoint={planner}", *PLANNED], table_of, 100, unread={"logs.jsonl"}),
    "planner_safetensors": Kind(SCORE, ["data.index={index}", "metric_cache={metric_cache}", "hidden.folder={hidden}",
                                        "planner.checkpoint={case}/planner.safetensors", *PLANNED], table_of, 40),
    "planner_checkpoint": Kind(SCORE, ["data.index={index}", "metric_cache={metric_cache}", "hidden.folder={hidden}",
                                       "planner.checkpoint={case}/last.ckpt", *PLANNED], table_of, 40),
    "planned_parts": Kind(SCORE, ["data.index={index}", "metric_cache={metric_cache}", "hidden.folder={hidden}",
                                  "planner.checkpoint={planner}", *PLANNED], table_of, 40, resumes=True,
                          patterns=("planned/*",)),
    "trajectories": Kind(SCORE_FILE, ["trajectories={case}/trajectories.parquet", "metric_cache={metric_cache}",
                                      "output={output}/out.parquet"], scored_file, 40,
                         patterns=("trajectories.parquet",)),
    "scores": Kind(COMPARE, ["a={case}", "b={scores}"], printed, 40, patterns=("scores.parquet", "fingerprint.json")),
    "vision_language_model": Kind(EXPORT, ["experiment=demo", "model_path={case}", "data.index={index}", "device=cpu",
                                           "num_workers=0"], records_of, 70),
    "questions": Kind(EVALUATE, ["experiment=demo", "model_path={vlm}", "mixture={case}/mixture.json", "device=cpu"],
                      accuracy_of, 30, patterns=("questions.jsonl",)),
    "killed_metric_cache": Kind(BUILD, ["data.root={world}", "data.split=trainval", "workers=sequential"], files_of, 40,
                                resumes=True),
    "killed_index": Kind(INDEX, ["data.root={world}", "data.split=trainval", "data.cameras=[]", "check_pictures=false"],
                         files_of, 20, resumes=True),
}  # fmt: skip


def test_there_are_600_cases_over_every_kind():
    assert sum(kind.cases for kind in KINDS.values()) == 600


@pytest.fixture(scope="module")
def places(world, artefacts, commands, tmp_path_factory) -> dict[str, Path]:
    """What the commands read, by name."""
    root = tmp_path_factory.mktemp("places")
    found = {name: Path(getattr(artefacts, name)) for name in ("index", "vlm", "hidden", "planner")}
    found |= {"world": world.root, "metric_cache": world.metric_cache, "questions": artefacts.mixture.parent}
    found["scores"] = root / "scores"
    values = found | {"case": found["index"]}
    ended = commands(SCORE, *(each.format(**values) for each in KINDS["index"].overrides), f"output_dir={root}/scores")
    assert ended.code == 0, ended.err
    return found


@pytest.fixture(scope="module")
def commands():
    with forked_commands(MODULES) as run:
        yield run


def case_folder(name: str, places: dict[str, Path], folder: Path) -> Path:
    """A copy of what is to be damaged."""
    copies = {"index": "index", "hidden_cache": "hidden", "metric_cache": "metric_cache", "planned_parts": "scores",
              "trajectories": "scores", "scores": "scores", "vision_language_model": "vlm"}  # fmt: skip
    case = folder / "case"
    if name in copies:
        shutil.copytree(places[copies[name]], case)
        return case
    case.mkdir()
    if name == "planner_safetensors":
        shutil.copy(places["planner"], case / "planner.safetensors")
    elif name == "planner_checkpoint":
        planner = load_planner(places["planner"])
        state = {f"planner.{key}": value for key, value in planner.planner.state_dict().items()}
        torch.save(
            {"planner": planner_record(planner.planner, planner.hidden), "state_dict": state, "callbacks": {}},
            case / "last.ckpt",
        )
    elif name == "questions":
        shutil.copy(places["questions"] / "questions.jsonl", case)
        mixture = json.loads((places["questions"] / "mixture.json").read_text())
        mixture["speed"]["checksum"] = file_checksums(case, ["questions.jsonl"])["questions.jsonl"]
        (case / "mixture.json").write_text(json.dumps(mixture))
    elif name == "killed_metric_cache":
        kill(lambda: build(BuildSettings(str(places["world"]), "trainval", str(case))), "metric_cache.build.merge")
    elif name == "killed_index":
        kill(lambda: index_world(places["world"], case), "scene_index._merge")
    return case


def index_world(root: Path, folder: Path) -> None:
    from navsim_ext.dataset import build_index
    from navsim_ext.readers import open_source

    build_index(open_source(root, "trainval"), folder, cameras=())


def kill(work: Callable[[], object], before: str) -> None:
    """Does the work up to the function ``before`` of navsim_ext, where a kill is played."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"navsim_ext.{before}", die)
        with pytest.raises(KeyboardInterrupt):
            work()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_named_or_without_effect(name, places, commands, tmp_path):
    kind = KINDS[name]
    case = case_folder(name, places, tmp_path)
    rng = np.random.default_rng(sum(name.encode()))
    files = sorted({
        path for pattern in kind.patterns for path in case.rglob(pattern)
        if path.is_file() and path.stat().st_size and not LOCKS & set(path.parts) and path.suffix != ".log"
    })  # fmt: skip
    assert files

    def run(number: int) -> tuple[Ended, object, Path]:
        output = tmp_path / f"output-{number}"
        folder = case
        if kind.resumes:
            folder = output
            shutil.copytree(case, output)
        output.mkdir(exist_ok=True)
        overrides = [each.format(**{**places, "case": folder, "output": output}) for each in kind.overrides]
        where = [] if kind.module in (SCORE_FILE, COMPARE) else [f"output_dir={output}"]
        ended = commands(kind.module, *overrides, *where)
        found = kind.result(output, ended) if ended.code == 0 else None
        shutil.rmtree(output)
        return ended, found, folder

    ended, whole, _ = run(0)
    assert ended.code == 0, ended.out + ended.err
    verdicts: Counter[str] = Counter()
    bad: list[str] = []
    cases = max(round(SHARE * kind.cases), 1)
    shares = [cases // len(files) + (i < cases % len(files)) for i in rng.permutation(len(files))]
    number = 0
    for path, share in zip(files, shares, strict=True):
        content = path.read_bytes()
        for damaged in damages(content, rng, share):
            number += 1
            path.write_bytes(damaged)
            ended, found, folder = run(number)
            verdict = judge(ended, found, whole, path, folder, kind)
            verdicts[verdict] += 1
            if verdict not in ("named", "without effect"):
                text = (ended.out + ended.err)[-1500:]
                bad.append(f"{verdict}: {path.relative_to(case)} (exit code {ended.code})\n{text}")
        path.write_bytes(content)
    print(f"\n{name}: {cases} cases over {len(files)} files: {dict(verdicts)}")
    assert not bad, f"{dict(verdicts)}\n" + "\n".join(bad[:5])
    assert sum(verdicts.values()) == cases


def judge(ended: Ended, found: object, whole: object, path: Path, folder: Path, kind: Kind) -> str:
    text = ended.out + ended.err
    if ended.code == 0:
        return "without effect" if found == whole else "SILENT"
    if ended.code < 0:
        return "CRASH"
    if ended.code == 1 or "Traceback (most recent call last)" in text:
        return "RAW"
    flat = "".join(text.split())  # messages are wrapped at the width of the terminal
    return "named" if any("".join(str(each).split()) in flat for each in (path.name, folder)) else "UNNAMED"
