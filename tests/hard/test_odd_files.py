"""What a path may lead to: nothing, a folder, a link to itself, an empty file, text of another encoding, JSON of any
form or depth, another kind of file. Every reader of one file names it, or reads it where it has a meaning."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from navsim_ext import pickles
from navsim_ext.devkit.cache_pickle import read_cache
from navsim_ext.devkit.submission import read_tokens
from navsim_ext.errors import TriviumError
from navsim_ext.evaluation.submission_file import check_submission, read_submission
from navsim_ext.evaluation.table import read_scores
from navsim_ext.evaluation.trajectory_file import read_trajectories
from navsim_ext.evaluation.two_stage_file import read_planners
from navsim_ext.files import read_json
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import CachedHiddenStates
from navsim_ext.maps.nuplan_gpkg import read_gpkg
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pictures import open_picture, picture_size
from navsim_ext.prompts import load_template
from navsim_ext.readers.hidden_scenes import read_hidden_scene
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.second_stage import read_scene as read_second_stage
from navsim_ext.readers.split_config import read_split
from navsim_ext.runtime.checkpoint_file import load_checkpoint, load_weights
from navsim_ext.runtime.parquet import read_frame
from navsim_ext.scene_index import SceneIndex
from navsim_ext.traffic import gpudrive, scene_v1
from navsim_ext.traffic.tfrecord import read_records
from sim_agents.training.checkpoint import load_agents
from sim_agents.vocabulary.store import load_vocabulary
from stage1_vlm.answers_page import read_answers
from stage1_vlm.convert import read_weights
from stage1_vlm.data.drivelm import convert_drivelm
from stage1_vlm.data.mixture import read_mixture
from stage1_vlm.folder import load_config, load_tokenizer, read_settings
from stage2_dit.checkpoint import load_planner
from stage2_dit.convert import read_published
from stage3_grpo.policies.language.data import read_token_list

DEEP = 5_000


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def saved(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


CONTENTS = {
    "empty": b"", "zeros": bytes(64), "no text": bytes(range(256)), "utf-16": '{"a": 1}'.encode("utf-16"),
    "with a mark": b"\xef\xbb\xbf{}", "latin-1": "stra\xdfe: 1\n".encode("latin-1"), "null": b"null", "true": b"true",
    "number": b"1e999", "no number": b"NaN", "string": b'"x"', "list": b"[]", "lists": b"[[[]], [{}]]",
    "mapping": b"{}", "mappings": b'{"a": {"b": null}, "": []}', "list of numbers": b"[1, 2, 3]",
    "twice": b'{"a": 1}{"a": 1}',
    "deep lists": b"[" * DEEP, "deep mappings": b'{"a":' * DEEP, "deep and closed": b"[" * DEEP + b"]" * DEEP,
    "large number": b'{"a": ' + b"9" * 5000 + b"}", "half a letter": b'{"a": "\xe8\xb7', "surrogate": b'"\\ud800"',
    "yaml that makes objects": b"!!python/object/apply:os.getpid []\n", "yaml of itself": b"&a [*a]\n",
    "yaml laughs": b"a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b]\n",
    "zip of nothing": zipped(), "zip of another": zipped(a=b"1"), "npz of objects": saved(a=np.array([{}, None])),
    "npz of nothing": saved(), "npz of scalars": saved(tokens=np.array(3), mapping=np.array(1.5)),
    "checkpoint of nothing": zipped(archive__data__pkl=b"N."), "gzip": gzip.compress(b"{}"),
    "pickle of none": pickle.dumps(None), "pickle of a list": pickle.dumps([1, "a", {}]),
    "pickle of a mapping": pickle.dumps({"a": [None], 3: b"x"}), "safetensors of nothing": b"\x02\0\0\0\0\0\0\0{}",
    "safetensors too long": b"\xff" * 8 + b"{}", "parquet without a foot": b"PAR1" + bytes(20) + b"PAR1",
    "png without pixels": b"\x89PNG\r\n\x1a\n", "sqlite of nothing": b"SQLite format 3\0" + bytes(84),
    "csv": b"token,score\na,1\n", "a long line": b"x" * 100_000,
}  # fmt: skip


def all_records(path: Path) -> None:
    for _, found in read_records(path):
        if isinstance(found, Exception):
            raise found


def exhausted(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: list(read(path))


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pickle": ("a.pkl", pickles.load), "devkit cache": ("a.pkl", read_cache), "submission": ("a.pkl", read_submission),
    "checked submission": ("a.pkl", check_submission), "second stage": ("a.pkl", read_second_stage),
    "hidden scene": ("a.pkl", lambda path: read_hidden_scene(path, 3)),
    "trajectories": ("a.parquet", read_trajectories), "trajectories of planners": ("a.pkl", read_planners),
    "planners of a table": ("a.parquet", read_planners),
    "table": ("a.parquet", lambda path: read_frame(path, "make it again")), "scores": ("a.parquet", read_scores),
    "tokens": ("a.txt", read_tokens), "tokens of json": ("a.json", read_tokens),
    "token list": ("a.txt", read_token_list), "json": ("a.json", read_json), "split": ("a.yaml", read_split),
    "filter": ("a.yaml", SceneFilter.from_yaml), "template": ("a.yaml", load_template),
    "map": ("map.gpkg", lambda path: read_gpkg(path, "boston")), "golden": ("a.npz", MemoryMetricCache.load_npz),
    "picture": ("a.png", open_picture), "size": ("a.jpg", picture_size), "checkpoint": ("a.ckpt", load_checkpoint),
    "weights": ("a.ckpt", load_weights), "planner": ("a.safetensors", load_planner),
    "planner of a run": ("a.ckpt", load_planner), "published": ("a.ckpt", read_published),
    "published tensors": ("a.safetensors", read_published), "agents": ("a.ckpt", load_agents),
    "gpudrive": ("a.json", gpudrive.read_scene), "scene": ("a.npz", scene_v1.read_scene),
    "records": ("a.tfrecord", all_records), "mixture": ("a.json", read_mixture),
    "drivelm": ("a.json", lambda path: convert_drivelm(path, path.parent / "out")),
    "fingerprint": ("fingerprint.json", lambda path: Fingerprint.load(path.parent)),
    "index": ("index.json", lambda path: SceneIndex.open(path.parent)),
    "store": ("store.json", lambda path: CachedHiddenStates(path.parent)),
    "metric cache": ("store.json", lambda path: MetricCache(path.parent)),
    "vocabulary": ("fingerprint.json", lambda path: load_vocabulary(path.parent)),
    "settings": ("config.json", lambda path: read_settings(path.parent)),
    "model": ("config.json", lambda path: load_config(path.parent)),
    "tokeniser": ("tokenizer.json", lambda path: load_tokenizer(path.parent)),
    "model's weights": ("model.safetensors", exhausted(lambda path: read_weights(path.parent))),
    "shards": ("model.safetensors.index.json", exhausted(lambda path: read_weights(path.parent))),
    "answers": ("answers.jsonl", lambda path: read_answers(path.parent)),
}  # fmt: skip


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "a").touch()


PLACES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None, "a folder": make_folder, "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_whatever_lies_there_is_named(name, tmp_path):
    file, read = FILES[name]
    raw, refused = [], 0
    makers = {**PLACES, **{kind: lambda path, content=content: path.write_bytes(content)
                           for kind, content in CONTENTS.items()}}  # fmt: skip
    for number, (kind, make) in enumerate(makers.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / file)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(folder / file)
        except TriviumError as error:
            refused += 1
            if str(folder) not in str(error):
                raw.append(f"{kind}: the message does not name the file: {error!s:.200}")
        except Exception as error:  # noqa: BLE001  (the verdict is made of what came through)
            raw.append(f"{kind}: {type(error).__name__}: {error!s:.200}")
    assert not raw, "\n".join(raw)
    assert refused > len(PLACES), f"{refused} of {len(makers)} were refused"


def test_json_is_as_deep_as_it_looks():
    with pytest.raises(RecursionError):
        json.loads(CONTENTS["deep and closed"])
