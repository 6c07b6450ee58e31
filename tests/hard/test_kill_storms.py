"""Every long command, killed with -9 at 20 random moments and given again each time, ends as an undisturbed one.

    python -m pytest tests/hard/test_kill_storms.py -m slow -s        (-k NAME for one command)
    TRIVIUM_STORM_KILLS=5 ...                                         fewer kills, for a first look

Names, contents and leftovers of the output folder are compared. A run that was not killed in time is compared too, its
folder is removed, and the storm goes on with a new one, until all kills have fallen. Half of the kills hit the command
alone, as the kernel does when memory is short, and half its workers too, as a scheduler does. The moments are drawn
from a seed; where in the work they fall depends on the machine.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_bad_input
from commands import Ended, Runner, forked_commands
from folders import contents, differences
from test_bad_input import overrides_of, places  # noqa: F401  (a fixture)

sys.path.insert(0, str(Path(__file__).parents[1] / "stage1_vlm"))
sys.path.insert(0, str(Path(__file__).parents[1] / "stage3_grpo"))
from test_stage1_qa_engine import Server
from words_world import build_model, write_questions

KILLS = int(os.environ.get("TRIVIUM_STORM_KILLS", "20"))
REAL_KILLS = 2  # of processes that start from nothing
NEVER = 400  # more tries in a row without a kill or an end mean that it gets nowhere
TRAINING = ["callbacks.checkpoint.every_n_steps=1"]
# command -> overrides beside those of test_bad_input; ~KEY: without that one
STORMS: dict[str, list[str]] = {
    "navsim_ext.closed_loop.drive": ["horizon_s=3", "batch_size=1"],
    "navsim_ext.dataset": [],
    "navsim_ext.evaluation.score": [],
    "navsim_ext.evaluation.score_file": [],
    "navsim_ext.hidden_cache.reencode": ["codec=int8_token"],
    "navsim_ext.metric_cache.build": [],
    "navsim_ext.questions.write": ["data.root={seen}"],
    "navsim_ext.realism.score": [],
    "navsim_ext.rendering.render": ["image_size=[64,36]"],
    "navsim_ext.synthetic.build": ["recipe.cameras=[]", "recipe.qa=false", "recipe.val_share=0"],
    "navsim_ext.traffic.build": [],
    "navsim_ext.evaluation.watch": [
        "run={output}", "tensorboard=false", "patience_s=0",
        "score=[planner=diffusion,hidden=cached,hidden.folder={hidden},data.index={index},metric_cache={metric_cache}]",
    ],
    "navsim_ext.wod_e2e.unpack": [],
    "sim_agents.rollout": ["checkpoint={agents}", "rollouts=4", "horizon_s=1"],
    "sim_agents.train": ["trainer.max_epochs=2", "network.width=16", "network.heads=2", "network.blocks=1",
                         "datamodule.batch_size=1", "datamodule.bounds.pieces=48", *TRAINING],
    "sim_agents.vocabulary.build": ["tokens=16"],
    "stage1_vlm.evaluate": [],
    "stage1_vlm.export": ["batch_size=2"],
    "stage1_vlm.generate_qa": ["server.url={server}", "scenes_at_once=1"],
    "stage1_vlm.train": ["~experiment", "trainer=cpu", "strategy=ddp", "model_path='${{output_dir}}/initial'",
                         "tiny={{width: 16, layers: 1, heads: 2, vision_width: 16, vision_layers: 1, vision_heads: 2, "
                         "tile: 224, patch: 28, max_tiles: 1, vocabulary: 400}}", "data.num_workers=0",
                         "data.index_workers=0", "data.batch_size=4", "data.max_image_tokens=16",
                         "global_batch_size=8", "module.gradient_checkpointing=false", "trainer.max_epochs=100",
                         "trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=2"],
    "navsim_ext.evaluation.rank": ["panel=[idm_0,idm_1,idm_2]", "agents=[constant_velocity]", "truth=replay",
                                   "horizon_s=3"],
    "navsim_ext.synthetic.second_stage": ["data.root={output}", "groups=3", "pairs=1"],
    "sim_agents.ego.train": ["trainer.max_steps=4", "datamodule.batch_size=8", *TRAINING],
    "stage2_dit.plan": [],
    "stage3_grpo.filter_flat": ["init={words_model}", "data.train={words}", "policy.sampling.max_new_tokens=4",
                                "filter.samples=3", "filter.range=1"],
    "stage2_dit.train": ["trainer.max_epochs=3", "data.val={index}", "trainer.check_val_every_n_epoch=1",
                         "datamodule.batch_size=4", "planner.num_layers=2", "planner.encoder_width=32", *TRAINING],
    "stage3_grpo.train": ["trainer.max_epochs=2", "datamodule.batch_size=4", "algorithm.group_size=4", *TRAINING],
}  # fmt: skip
BEGINS_WITH = {  # commands that write into the folder that they read
    "navsim_ext.evaluation.watch": "trained", "navsim_ext.synthetic.second_stage": "seen",
}  # fmt: skip
ENDS_WITH = {"stage3_grpo.filter_flat": 2}  # the model knows nothing: no question is kept, which is said
TIMED = {"stage3_grpo.train"}  # its flight recorder's sums, times among them, are in its checkpoints
SHORT = {  # commands of test_bad_input that are done in a moment, or only read
    "navsim_ext.closed_loop.check", "navsim_ext.closed_loop.film", "navsim_ext.devkit.metric_cache_import",
    "navsim_ext.devkit.submission", "navsim_ext.doctor", "navsim_ext.evaluation.compare",
    "navsim_ext.evaluation.report", "navsim_ext.evaluation.show", "navsim_ext.hidden_cache.merge",
    "navsim_ext.hidden_cache.stats", "navsim_ext.hidden_cache.verify", "navsim_ext.realism.submission",
    "navsim_ext.rendering.birds_eye", "navsim_ext.synthetic.report", "navsim_ext.traffic.picture",
    "navsim_ext.traffic.report", "navsim_ext.traffic.womd_writer", "navsim_ext.wod_e2e.submission",
    "stage1_vlm.convert",
    "navsim_ext.evaluation.closed_loop", "navsim_ext.realism.compare", "sim_agents.ego.table",
    "stage1_vlm.answers_page", "stage1_vlm.data.drivelm", "stage1_vlm.data.importer", "stage1_vlm.universal",
    "stage1_vlm.pretrained", "stage2_dit.convert",
    "stage2_dit.experiment", "stage3_grpo.experiment",  # chains of the commands above
}  # fmt: skip


def test_every_command_is_stormed_or_short():
    assert set(test_bad_input.COMMANDS) == STORMS.keys() | SHORT
    assert not STORMS.keys() & SHORT


@pytest.fixture(scope="module")
def commands() -> Iterator[Runner]:
    with forked_commands(STORMS) as run:
        yield run


@pytest.fixture(scope="module")
def made(places, commands, tmp_path_factory) -> Iterator[dict[str, str]]:  # noqa: F811
    """What the commands are given: the places of test_bad_input, a traffic model, a server that answers."""
    folder = tmp_path_factory.mktemp("agents")
    options = overrides_of("sim_agents.train", places, folder) + STORMS["sim_agents.train"]
    ended = commands("sim_agents.train", *options, "trainer.max_steps=1")
    assert ended.code == 0, ended.out + ended.err
    server = Server()
    agents = f"'{folder}/version_0/checkpoints/last.ckpt'"
    seen = tmp_path_factory.mktemp("seen")
    options = [
        "scenes=12", "recipe.scenes_per_log=2", "recipe.image_size=[64,36]", "recipe.qa=false", "recipe.val_share=0",
        "recipe.test_share=0.5", f"output_dir={seen}",
    ]  # fmt: skip
    ended = commands("navsim_ext.synthetic.build", *options)
    assert ended.code == 0, ended.out + ended.err
    words = tmp_path_factory.mktemp("words")
    trained = tmp_path_factory.mktemp("trained")
    options = overrides_of("stage2_dit.train", places, trained) + STORMS["stage2_dit.train"]
    options = [each.format(**places, output=trained) for each in options]
    ended = commands("stage2_dit.train", *options, "trainer.max_steps=2")
    assert ended.code == 0, ended.out + ended.err
    known = {"words": str(write_questions(words / "questions", 6)), "words_model": str(build_model(words / "model"))}
    known["trained"] = str(trained)
    yield {**places, **known, "agents": agents, "server": server.url, "seen": str(seen)}
    server.shutdown()
    server.server_close()


class Storm:
    """A command, its folder, and what an undisturbed run leaves there."""

    def __init__(self, module: str, made: dict[str, str], folder: Path, run: Runner) -> None:
        self.module, self.output, self.run = module, folder / "output", run
        self.begins_with = made.get(BEGINS_WITH.get(module, ""))
        extra = [each.format(**made, output=self.output) for each in STORMS[module]]
        replaced = {each.partition("=")[0].lstrip("~") for each in extra}
        usual = [
            each for each in overrides_of(module, made, self.output) if each.partition("=")[0] not in replaced
        ]
        self.overrides = [*usual, *(each for each in extra if not each.startswith("~"))]
        self.begin()
        start = time.monotonic()
        self.check_end(run(module, *self.overrides))
        self.seconds = time.monotonic() - start
        self.expected = self.found()
        assert self.expected
        self.begin()

    def begin(self) -> None:
        """As before the first run."""
        shutil.rmtree(self.output, ignore_errors=True)
        if self.begins_with is not None:
            shutil.copytree(self.begins_with, self.output)

    def found(self) -> dict[str, str]:
        return contents(self.output, timed=self.module in TIMED)

    def check_end(self, ended: Ended) -> None:
        text = f"exit code {ended.code}\n{ended.out[-1500:]}\n{ended.err[-3000:]}"
        assert ended.code == ENDS_WITH.get(self.module, 0), text

    def check(self, ended: Ended) -> None:
        """After an end: all is as without a kill; and the command given once more changes nothing."""
        self.check_end(ended)
        wrong = differences(self.found(), self.expected)
        assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("module", STORMS)
def test_a_storm_of_kills(commands, made, tmp_path, module):
    storm = Storm(module, made, tmp_path, commands)
    draw = random.Random(module)
    kills = ends = tries = 0
    while kills < KILLS:
        tries += 1
        assert tries - kills - ends < NEVER
        start = time.monotonic()
        ended = commands(module, *storm.overrides, kill_after=draw.uniform(0.0, storm.seconds),
                         family=draw.random() < 0.5)  # fmt: skip
        if ended.code == -9:
            kills += 1
            continue
        storm.check(ended)
        ends += 1
        storm.seconds = min(storm.seconds, 1.2 * (time.monotonic() - start))  # the first run also compiles
        storm.begin()
    storm.check(commands(module, *storm.overrides))
    storm.check(commands(module, *storm.overrides))  # once more: all is done, nothing changes
    print(f"\n{module}: {storm.seconds:.1f} s, {kills} kills, {ends + 1} ends")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["navsim_ext.metric_cache.build", "stage2_dit.train"])
def test_processes_that_start_from_nothing(commands, made, tmp_path, module):
    storm = Storm(module, made, tmp_path, commands)
    command = [sys.executable, "-m", module, *storm.overrides]
    draw = random.Random(module)

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    kills = 0
    while kills < REAL_KILLS:
        process = start()
        while not storm.output.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, storm.seconds))
        process.kill()
        said = process.communicate()[0]
        kills += process.returncode == -9
        if process.returncode != -9:
            storm.check(Ended(process.returncode, said, ""))
            storm.begin()
    process = start()
    said = process.communicate()[0]
    storm.check(Ended(process.returncode, said, ""))
