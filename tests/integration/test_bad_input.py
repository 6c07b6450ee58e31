"""Every command given what it cannot work with: the message names it and what to do, the exit code is not zero, and
nothing that was finished is touched."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import forked_commands
from rich.console import Console
from wod_worlds import sequences, write_files

from navsim_ext.dataset import SceneDataset
from navsim_ext.evaluation.score import score_planner
from navsim_ext.readers.wod_e2e import E2EFrame
from navsim_ext.runtime.config import compose
from navsim_ext.traffic.build import build
from navsim_ext.traffic.scene_v1 import read_scenes
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from navsim_ext.wod_e2e.unpack import FrameFiles
from navsim_ext.wod_e2e.unpack import fingerprint_of as fingerprint_of_frames
from sim_agents.vocabulary import VerletVocabulary, save_vocabulary
from sim_agents.vocabulary.store import vocabulary_fingerprint

ROOT = Path(__file__).resolve().parents[2]
ROLLOUTS = ROOT / "tests" / "golden" / "wosac"  # traffic scenes with rollouts of them
UNWRITABLE = "/sys/trivium"  # no user may make a folder there
NOWHERE = "no where/epoch=1-step=4 #2 (路径).ckpt"
OUTPUT = "out put=[1]/路径 #3"

INDEXED = [f"data.{part}.index={{index}}" for part in ("train", "val", "test")]

# command -> overrides with which it would work; {names} stand for what the fixtures made
COMMANDS: dict[str, list[str]] = {
    "navsim_ext.closed_loop.check": ["scenes={traffic}"],
    "navsim_ext.closed_loop.drive": ["scenes={traffic}", "planner=constant_velocity"],
    "navsim_ext.closed_loop.film": ["drives={traffic}", "scene=any", "output={output}/film.gif"],
    "navsim_ext.dataset": ["data.root={world}", "data.split=trainval", "data.cameras=[]", "check_pictures=false"],
    "navsim_ext.devkit.metric_cache_import": ["v1={world}", "v2={world}"],  # neither is one; v1 is read first
    "navsim_ext.devkit.submission": ["trajectories={trajectories}"],
    "navsim_ext.doctor": [],
    "navsim_ext.evaluation.closed_loop": ["drives=[{scores}]"],
    "navsim_ext.evaluation.compare": ["a={scores}", "b={scores}"],
    "navsim_ext.evaluation.rank": ["scenes={traffic}", "planners=panel"],
    "navsim_ext.evaluation.report": ["scores=[{scores}]", "data.root={world}", "data.split=trainval"],
    "navsim_ext.evaluation.score": [
        "data.index={index}", "metric_cache={metric_cache}", "planner=diffusion", "planner.checkpoint={planner}",
        "hidden=cached", "hidden.folder={hidden}",
    ],
    "navsim_ext.evaluation.score_file": [
        "trajectories={trajectories}", "metric_cache={metric_cache}", "output={output}/o.parquet",
    ],
    "navsim_ext.evaluation.show": ["scores=[{scores}]"],
    "navsim_ext.evaluation.watch": ["run={scores}", "score=[planner=diffusion,data.index={index}]", "until=once"],
    "navsim_ext.hidden_cache.merge": ["folder={hidden}"],
    "navsim_ext.hidden_cache.reencode": ["source={hidden}", "codec=int8_g32"],
    "navsim_ext.hidden_cache.stats": ["folder={hidden}"],
    "navsim_ext.hidden_cache.verify": ["folder={hidden}"],
    "navsim_ext.metric_cache.build": ["data.root={world}", "data.split=trainval", "workers=sequential"],
    "navsim_ext.realism.compare": ["scores={{a: [{rollouts}], b: [{rollouts}]}}"],
    "navsim_ext.realism.score": ["scenes={rollouts}", "rollouts={rollouts}", "workers=sequential"],
    "navsim_ext.realism.submission": ["scenes={rollouts}", "rollouts={rollouts}", "file={output}/file.tar.gz"],
    "navsim_ext.traffic.build": ["data.root={rollouts}", "data.source=npz", "workers=sequential"],
    "navsim_ext.traffic.picture": ["scenes={traffic}", "scene=any", "output={output}/scene.png"],
    "navsim_ext.traffic.report": ["scenes={traffic}"],
    "navsim_ext.traffic.womd_writer": ["scenes={traffic}", "output={output}/scenes.tfrecord"],
    "navsim_ext.wod_e2e.submission": ["frames={frames}", "trajectories={plans}", "file={output}/file.tar.gz"],
    "navsim_ext.wod_e2e.unpack": ["source={records}", "workers=sequential"],
    "sim_agents.ego.table": ["drives=[{traffic}]", "scenes={traffic}"],
    "sim_agents.ego.train": ["experiment=path", "data.train={traffic}"],
    "sim_agents.rollout": ["checkpoint={planner}", "scenes={traffic}", "workers=sequential"],
    "sim_agents.train": ["experiment=demo", "data.train={traffic}", "vocabulary={vocabulary}"],
    "sim_agents.vocabulary.build": ["scenes={traffic}"],
    "navsim_ext.synthetic.build": ["scenes=4"],
    "navsim_ext.synthetic.second_stage": ["data.root={world}"],
    "navsim_ext.questions.write": ["data.root={world}", "data.split=trainval"],
    "navsim_ext.rendering.render": ["data.root={world}", "data.split=trainval"],
    "navsim_ext.rendering.birds_eye": ["data.root={world}", "data.split=trainval"],
    "navsim_ext.synthetic.report": ["data.root={world}", "data.split=trainval", "metric_cache={metric_cache}"],
    "stage1_vlm.answers_page": ["before={scores}", "after={scores}", "mixture={mixture}"],  # neither is an evaluation
    "stage1_vlm.convert": ["source={vlm}"],
    "stage1_vlm.data.drivelm": ["source={mixture}"],
    "stage1_vlm.data.importer": ["source={mixture}"],
    "stage1_vlm.evaluate": ["experiment=demo", "model_path={vlm}", "mixture={mixture}"],
    "stage1_vlm.export": ["experiment=demo", "model_path={vlm}", "data.index={index}", "device=cpu"],
    "stage1_vlm.generate_qa": [
        "data.index={index}", "server.url=http://127.0.0.1:1/v1", "server.model=none", "server.tries=1",
        "server.pause_s=0", "give_up_after=1",
    ],
    "stage1_vlm.pretrained": ["model_path={vlm}", "curve={scores}"],  # the latter is none, and read first
    "stage1_vlm.train": ["experiment=demo", "data.mixture={mixture}"],
    "stage1_vlm.universal": ["checkpoint={planner}"],
    "stage2_dit.convert": ["source={planner}", "target={output}/out.ckpt"],
    "stage2_dit.experiment": [
        "experiment=demo", "data.root={world}", "data.hidden_cache={hidden}", "data.metric_cache={metric_cache}",
        "data.hidden_cache_test={hidden}", *INDEXED,
    ],
    "stage2_dit.plan": ["checkpoint={planner}", "token={token}", "data.root={world}", "hidden.folder={hidden}"],
    "stage2_dit.train": ["experiment=demo", "data.train={index}", "data.hidden_cache={hidden}"],
    "stage3_grpo.experiment": [
        "experiment=demo", "init={planner}", "data.root={world}", "data.hidden_cache={hidden}",
        "data.metric_cache={metric_cache}", "data.hidden_cache_test={hidden}",
        "data.metric_cache_test={metric_cache}", *INDEXED,
        'training=["experiment=demo","datamodule.batch_size=4"]',  # so few scenes would not fill the demo's batch
    ],
    "stage3_grpo.filter_flat": ["experiment=language_demo", "init={vlm}", "data.train={mixture}"],
    "stage3_grpo.train": [
        "experiment=demo", "init={planner}", "data.train={index}", "data.hidden_cache={hidden}",
        "data.metric_cache={metric_cache}",
    ],
}  # fmt: skip
READ = (
    "world|index|metric_cache|hidden|planner|vlm|mixture|trajectories|scores|traffic|rollouts|vocabulary|frames|plans|"
    "records"
)
PATH_KEY = re.compile(rf"^[^=]+=\[?\{{({READ})\}}")


def path_keys() -> list[tuple[str, str]]:
    """(command, key) of everything that a command reads."""
    unread = {("navsim_ext.devkit.metric_cache_import", "v2")}  # the first bad one ends the command
    unread |= {("stage1_vlm.answers_page", "after"), ("stage1_vlm.answers_page", "mixture")}  # before is read first
    unread |= {("stage1_vlm.pretrained", "model_path")}
    unread |= {(f"{stage}.experiment", "data.root") for stage in ("stage2_dit", "stage3_grpo")}  # INDEXED stands for it
    found = [
        (module, override.partition("=")[0])
        for module, overrides in COMMANDS.items()
        for override in overrides
        if PATH_KEY.match(override)
    ]
    return [pair for pair in found if pair not in unread]


def config_of(module: str) -> Path:
    """The folder with the command's configuration."""
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    return ROOT / "configs" / re.search(r'^@job\("([^"]+)"\)', source, re.MULTILINE)[1]


def with_experiments() -> list[str]:
    return [module for module in COMMANDS if (config_of(module) / "experiment" / "demo.yaml").is_file()]


@pytest.fixture(scope="module")
def places(world, artefacts, tmp_path_factory) -> dict[str, str]:
    scenes = SceneDataset(artefacts.index)
    trajectories = tmp_path_factory.mktemp("trajectories") / "planned.parquet"
    rows = [scenes[i].target.double().reshape(-1).numpy() for i in range(len(scenes))]
    pd.DataFrame({"token": scenes.tokens, "name": "human", "poses": rows}).to_parquet(trajectories)
    found = {name: str(getattr(artefacts, name)) for name in ("index", "mixture", "vlm", "hidden", "planner")}
    found |= {"world": str(world.root), "metric_cache": str(world.metric_cache), "token": scenes.tokens[0]}
    scores = tmp_path_factory.mktemp("scores")
    options = [
        "planner=human", f"data.index={world.index}", "data.cameras=[]", f"metric_cache={world.metric_cache}",
        f"output_dir={scores}",
    ]  # fmt: skip
    score_planner(compose("score", options), Console(quiet=True))
    traffic = tmp_path_factory.mktemp("traffic")
    write_scenes(traffic / "scenes", read_scenes(ROLLOUTS), fingerprint_of({"made of": "the committed scenes"}))
    vocabulary = vocabulary_fingerprint({"method": "verlet"}, None)
    save_vocabulary(traffic / "vocabulary", VerletVocabulary(), vocabulary)
    found |= {"traffic": str(traffic / "scenes"), "vocabulary": str(traffic / "vocabulary"), "rollouts": str(ROLLOUTS)}
    found |= {"trajectories": str(trajectories), "scores": str(scores)}
    return found | wod_places(tmp_path_factory.mktemp("wod_e2e"))


def wod_places(folder: Path) -> dict[str, str]:
    """Records of WOD-E2E, their frames, and plans for them."""
    records, frames, plans = write_files(folder / "records"), folder / "root" / "val", folder / "plans.parquet"
    files = FrameFiles(str(records), ["CAM_F0"], 1)
    build(files, frames, encode=E2EFrame.to_arrays, fingerprint=fingerprint_of_frames, what="frames")
    tokens = [frame.id for frame in sequences()]
    pd.DataFrame({"token": tokens, "name": "none", "poses": [np.zeros(24)] * len(tokens)}).to_parquet(plans)
    return {"records": str(records), "frames": str(frames), "plans": str(plans)}


@pytest.fixture(scope="module")
def commands(places):
    """Runs commands; when all is done, what they read is as it was."""
    before = contents(places)
    with forked_commands(COMMANDS) as run:
        yield run
    assert contents(places) == before


def contents(places: dict[str, str]) -> dict[str, str]:
    """Digest of every file that a command was given, the locks of readers aside."""
    files = [
        path for place in places.values() if Path(place).exists() for path in [Path(place), *Path(place).rglob("*")]
    ]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and not path.name.startswith(".lock")
    }


def overrides_of(module: str, places: dict[str, str], output: Path, **replaced: str) -> list[str]:
    """The working overrides, some keys with other values, and where the output goes."""
    made = []
    for override in COMMANDS[module]:
        key, _, value = override.partition("=")
        other = replaced.get(key)
        value = value if other is None else f"[{other}]" if value.startswith("[") else other
        made.append(f"{key}={value}".format(**places, output=output))
    takes_output = re.search("^output_dir:", (config_of(module) / "config.yaml").read_text(), re.MULTILINE)
    return [*made, f"output_dir={output}"] if takes_output else made


def check(ended, *words: str) -> None:
    """Ended in a message of its own that has the words, not in a traceback, and not as if all were well."""
    text = ended.out + ended.err
    assert ended.code not in (0, 1), f"exit code {ended.code}\n{text[-3000:]}"
    assert "Traceback" not in text, text[-3000:]
    for word in words:
        assert word in text, f"{word!r} is not in:\n{text[-3000:]}"


def test_every_command_is_here():
    packages = ("navsim_ext", "stage1_vlm", "stage2_dit", "sim_agents", "stage3_grpo")
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^@job\(", path.read_text(), re.MULTILINE)
    }
    assert found == set(COMMANDS)


@pytest.mark.parametrize(("module", "key"), path_keys())
def test_wrong_path(commands, places, tmp_path, module, key):
    """Names with everything that a grammar could part, seen from a folder of such a name: only they are used."""
    here = tmp_path / "called from=[here] #1"
    here.mkdir()
    overrides = overrides_of(module, places, Path(OUTPUT), **{key: NOWHERE})
    check(commands(module, *overrides, folder=here), NOWHERE)
    assert {path.name for path in here.iterdir()} <= {OUTPUT.partition("/")[0]}
    assert {path.name for path in tmp_path.iterdir()} == {here.name}
    assert not list(tmp_path.rglob("*.ckpt")), "it was trained before the path was looked at"


@pytest.mark.parametrize("module", COMMANDS)
def test_no_value_misspelt_key_and_folder_that_takes_no_file(commands, places, tmp_path, module):
    needs = "???" in (config_of(module) / "config.yaml").read_text()
    if needs:
        check(commands(module), "has no value: give ")
    good = overrides_of(module, places, tmp_path)
    check(commands(module, *good, "wrokers=2"), "there is no key wrokers")
    if good and good[-1].startswith("output_dir="):
        check(commands(module, *good[:-1], f"output_dir={UNWRITABLE}"), UNWRITABLE, "choose another output_dir")


@pytest.mark.parametrize("module", with_experiments())
def test_misspelt_experiment(commands, module):
    check(commands(module, "experiment=demmo"), "did you mean experiment=demo?")


def test_missing_weights(commands, places, tmp_path):
    shutil.copytree(places["vlm"], tmp_path / "vlm")
    (tmp_path / "vlm" / "model.safetensors").unlink()
    for module in ("stage1_vlm.export", "stage1_vlm.evaluate"):
        check(commands(module, *overrides_of(module, places, tmp_path / "output", model_path=str(tmp_path / "vlm"))),
              str(tmp_path / "vlm"), "safetensors")  # fmt: skip


def test_half_written_planner(commands, places, tmp_path):
    half = tmp_path / "half.safetensors"
    half.write_bytes(Path(places["planner"]).read_bytes()[:5000])
    for module, key in (("navsim_ext.evaluation.score", "planner.checkpoint"), ("stage3_grpo.train", "init")):
        check(commands(module, *overrides_of(module, places, tmp_path / "output", **{key: str(half)})), str(half))


@pytest.mark.parametrize(
    ("module", "key", "kind"),
    [
        ("stage2_dit.train", "data.train", "index"),
        ("navsim_ext.evaluation.score", "data.index", "index"),
        ("navsim_ext.evaluation.score", "metric_cache", "metric_cache"),
        ("navsim_ext.evaluation.score", "hidden.folder", "hidden"),
        ("stage2_dit.train", "data.hidden_cache", "hidden"),
        ("stage3_grpo.train", "data.metric_cache", "metric_cache"),
    ],
)
def test_half_finished_cache(commands, places, tmp_path, module, key, kind):
    """Where a build was killed: the last file, written when all else is there, is missing."""
    half = tmp_path / kind
    shutil.copytree(places[kind], half)
    patterns = ("index.json",) if kind == "index" else ("*.safetensors",)
    removed = [file for pattern in patterns for file in half.glob(pattern)]
    assert removed, sorted(file.name for file in half.iterdir())
    for file in removed:
        file.unlink()
    check(commands(module, *overrides_of(module, places, tmp_path / "output", **{key: str(half)})), str(half))


def test_a_dead_server_is_a_failure_however_few_the_scenes(commands, places, tmp_path):
    """Fewer scenes than give_up_after: nothing was generated, and the command says so."""
    overrides = overrides_of("stage1_vlm.generate_qa", places, tmp_path / "qa", give_up_after="1000")
    check(commands("stage1_vlm.generate_qa", *overrides), "scenes failed")


def test_an_interrupted_step_is_finished_by_the_same_command(commands, places, tmp_path):
    """Half an index (its last file gone) is not used, and building it again keeps nothing wrong."""
    overrides = overrides_of("navsim_ext.dataset", places, tmp_path / "index")
    assert commands("navsim_ext.dataset", *overrides).code == 0
    whole = (tmp_path / "index" / "tokens.npy").read_bytes()
    (tmp_path / "index" / "index.json").unlink()
    assert commands("navsim_ext.dataset", *overrides).code == 0
    assert (tmp_path / "index" / "tokens.npy").read_bytes() == whole
