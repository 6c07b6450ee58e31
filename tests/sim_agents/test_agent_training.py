"""Training of traffic models: it learns, resumes exactly, fine-tunes in closed loop, and what it made can drive and
be scored."""

import copy
import json

import numpy as np
import pytest
import torch
from agent_scenes import street

from navsim_ext.errors import DataError, MissingError
from navsim_ext.realism.metric import realism
from navsim_ext.realism.rollouts import RolloutFolder, world_states
from navsim_ext.realism.scenario import scenario_of
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.traffic.store import TrafficStore, fingerprint_of, write_scenes
from sim_agents.data.dataset import Window, WindowDataset, mirrored
from sim_agents.data.scene_tokens import Bounds, collate
from sim_agents.model.rolling import ClosestOfSampled, Sampled
from sim_agents.rollout import RULES, RolloutSettings, roll_out
from sim_agents.training.checkpoint import RECORD, load_agents
from sim_agents.training.closed_loop import ClosedLoop, figures
from sim_agents.training.module import AgentModule
from sim_agents.vocabulary import MotionState, class_of, save_vocabulary
from sim_agents.vocabulary.build import VocabularySettings, make_vocabulary
from sim_agents.vocabulary.store import vocabulary_fingerprint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with traffic scenes and a vocabulary of them."""
    folder = tmp_path_factory.mktemp("agents")
    scenes = [street(f"s{number:02d}", seed=number, late=number % 2 == 0) for number in range(8)]
    write_scenes(folder / "scenes", iter(scenes), fingerprint_of({"test": 1}))
    vocabulary, _ = make_vocabulary(VocabularySettings("k_disks", 24), scenes)
    save_vocabulary(folder / "vocabulary", vocabulary, vocabulary_fingerprint({"method": "k_disks"}, None))
    return folder


def configured(world, output, *overrides):
    return compose(
        "sim_agents",
        [
            f"data.train={world}/scenes", f"data.val={world}/scenes", f"vocabulary={world}/vocabulary",
            f"output_dir={output}", "network.width=16", "network.heads=2", "network.blocks=1",
            "datamodule.batch_size=4", "datamodule.bounds.pieces=48", "callbacks.progress=null",
            "module.closed_loop.scenes=3", "module.closed_loop.rollouts=3", "module.closed_loop.chunk=2", *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def cloned(world):
    output = world / "bc"
    options = ("trainer.max_epochs=40", "trainer.check_val_every_n_epoch=40", "module.optimizer.lr=5e-3")
    result = run(configured(world, output, *options))
    return result, output


def test_cloning_lowers_the_likelihood_of_the_recording_far_below_chance(cloned, world):
    result, _ = cloned
    assert result["metrics"]["val/nll"] < 0.8 * np.log(24)
    assert 1.5 / 24 < result["metrics"]["val/accuracy"] <= 1
    assert 0 < result["metrics"]["val/realism"] < 1
    assert 0 <= result["metrics"]["val/contact"] <= 1
    assert 0 < result["metrics"]["val/min_ade"] < 20


def test_a_killed_run_ends_as_an_undisturbed_one(cloned, world, tmp_path):
    options = ("trainer.max_epochs=2", "callbacks.checkpoint.every_n_steps=1", "trainer.check_val_every_n_epoch=2")
    whole = run(configured(world, tmp_path / "whole", *options))
    cut = configured(world, tmp_path / "cut", *options)

    class Killed(Exception):
        pass

    step = AgentModule.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 3:
            raise Killed
        return step(self, batch, batch_idx)

    AgentModule.training_step = dies
    try:
        with pytest.raises(Killed):
            run(copy.deepcopy(cut))
    finally:
        AgentModule.training_step = step
    again = run(copy.deepcopy(cut))
    one, other = (torch.load(result["last"], weights_only=True)["state_dict"] for result in (whole, again))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_closest_token_fine_tuning_starts_from_the_clone_and_trains_only_attention(cloned, world, tmp_path):
    result, _ = cloned
    choice = "module.choice={_target_: sim_agents.model.rolling.ClosestOfTop, top: 8}"
    tuned = run(
        configured(world, tmp_path, "trainer.max_epochs=1", choice, f"module.init_from='{result['last']}'",
                   "module.train_only_attention=true", "module.smoothing=none")
    )  # fmt: skip
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (result["last"], tuned["last"]))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("network.blocks.", "network.head.")) for name in changed)
    assert np.isfinite(tuned["metrics"]["val/nll"])


def test_own_rollouts_as_demonstrations_learn_what_was_driven(cloned, world, tmp_path):
    result, _ = cloned
    module = AgentModule(str(world / "vocabulary"), {"width": 16, "heads": 2, "blocks": 1},
                         init_from=str(result["last"]), choice=ClosestOfSampled(4))  # fmt: skip
    dataset = WindowDataset(world / "scenes", Window(), Bounds(pieces=48), random=False)
    batch, now = collate([dataset[0], dataset[1]]), Window().now
    own = module.driven(batch, now, 5)
    module.choice = Sampled()
    corrected = module.driven(batch, now, 5)
    assert own.counts.any()
    rolled = own.targets[own.counts]
    assert (rolled >= 0).all()
    state = MotionState(own.pose[:, :, now].flatten(0, 1), batch.displacement[:, :, now].flatten(0, 1))
    tokens = own.targets[:, :, now].flatten().clamp_min(0)
    _, after = module.vocabulary.play(state, class_of(batch.kind).flatten(), tokens)
    drives = batch.valid[:, :, now].flatten()
    torch.testing.assert_close(
        after.pose[drives, :2], own.pose[:, :, now + 1].flatten(0, 1)[drives, :2], atol=1e-4, rtol=0
    )
    assert not torch.equal(own.targets, corrected.targets)


def test_crowded_scenes_are_counted_and_said(world, caplog):
    dataset = WindowDataset(world / "scenes", Window(), Bounds(agents=3), random=False)
    with caplog.at_level("INFO"):
        assert dataset.tell_crowded() == (8, 16)
    assert "8 of 8 scenes have more than 3 road users; 16 of the farthest are left out" in caplog.text
    kept = dataset[0]
    assert kept.valid.shape[0] == 3
    assert kept.ego.any()
    assert WindowDataset(world / "scenes", Window(), Bounds(), random=False).tell_crowded() == (0, 0)


def test_another_network_or_vocabulary_is_refused(cloned, world, tmp_path):
    result, _ = cloned
    with pytest.raises(DataError, match="has the network"):
        run(configured(world, tmp_path, f"module.init_from='{result['last']}'", "network.blocks=2"))
    with pytest.raises(DataError, match="nothing to be kept"):
        run(configured(world, tmp_path / "b", "module.train_only_attention=true"))


def test_rollouts_are_what_the_metric_takes_and_the_same_in_any_chunks(cloned, world, tmp_path):
    result, _ = cloned
    scenes = str(world / "scenes")
    settings = RolloutSettings(str(result["last"]), scenes, rollouts=4, chunk=4)
    assert roll_out(settings, str(tmp_path / "a")) == 8
    roll_out(RolloutSettings(str(result["last"]), scenes, rollouts=4, chunk=3), str(tmp_path / "b"))
    one, other, store = RolloutFolder(tmp_path / "a"), RolloutFolder(tmp_path / "b"), TrafficStore(scenes)
    for name in store.ids:
        scene = store.load(name)
        world_states(scenario_of(scene), scene, one.get(name), 4)  # refuses what breaks a rule
        np.testing.assert_allclose(one.get(name).pose, other.get(name).pose, atol=1e-4)
        rows = [int(np.flatnonzero(scene.agent_id == agent)[0]) for agent in one.get(name).ids]
        apart = np.linalg.norm(one.get(name).pose[:, :, 0, :2] - scene.pose[rows, scene.now + 1, :2], axis=-1)
        assert apart.max() < 2.5  # the first step leads on from where everybody stands
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.safetensors")}
    roll_out(settings, str(tmp_path / "a"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.safetensors")}


def test_validation_drives_what_the_rollout_command_and_the_metric_say(cloned, world, tmp_path):
    """The closed-loop figures against the stored rollouts of the same scenes, in other chunks."""
    result, _ = cloned
    scenes, agents = str(world / "scenes"), load_agents(result["last"])
    store, settings = TrafficStore(scenes), ClosedLoop(scenes=3, rollouts=4, chunk=3)
    ids = settings.chosen(store.ids)
    assert len(ids) == 3
    assert settings.chosen(store.ids) == ids
    total = settings.measure(lambda first: agents.policy(first_rollout=first), store, ids)
    assert total[:, 1].tolist() == [3, 3, 3]
    roll_out(RolloutSettings(str(result["last"]), scenes, rollouts=4), str(tmp_path))
    stored = RolloutFolder(tmp_path)
    scored = [realism(store.load(name), stored.get(name), expected=None).metrics for name in ids]
    found = figures(total)
    assert found["realism"] == pytest.approx(np.mean([one["metametric"] for one in scored]), abs=1e-3)
    assert found["min_ade"] > 0
    whole = ClosedLoop(scenes=3, rollouts=4, chunk=4).measure(
        lambda first: agents.policy(first_rollout=first), store, ids
    )
    np.testing.assert_allclose(whole, total, atol=1e-3)


def test_rules_drive_without_a_checkpoint(world, tmp_path):
    """The recording replayed has no displacement and the best figure; one rollout stands for all."""
    scenes = str(world / "scenes")
    store, ade = TrafficStore(scenes), {}
    for driver in RULES:
        roll_out(RolloutSettings(None, scenes, driver, rollouts=3), str(tmp_path / driver))
        stored = RolloutFolder(tmp_path / driver)
        assert stored.get(store.ids[0]).pose.shape[0] == 3
        assert np.ptp(stored.get(store.ids[0]).pose, axis=0).max() == 0
        ade[driver] = realism(store.load("s01"), stored.get("s01"), expected=3).metrics["average_displacement_error"]
    assert ade["replay"] < 1e-3 < ade["constant_velocity"]
    for wrong in ((None, scenes), ("a.ckpt", scenes, "idm"), (None, scenes, "nobody")):
        with pytest.raises(DataError, match="driver="):
            RolloutSettings(*wrong)


def test_a_checkpoint_carries_its_vocabulary_and_names_what_it_is_not(cloned, tmp_path):
    result, _ = cloned
    agents = load_agents(result["last"])
    assert agents.vocabulary.size == agents.network.settings.tokens == 24
    checkpoint = torch.load(result["last"], weights_only=True)
    record = json.loads(checkpoint[RECORD])
    assert record["scenes"]["kind"] == "traffic-scenes"
    with pytest.raises(MissingError, match="does not exist"):
        load_agents(tmp_path / "nowhere.ckpt")
    other = {key: value for key, value in checkpoint.items() if key != RECORD}
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match=r"no checkpoint of sim_agents\.train"):
        load_agents(tmp_path / "other.ckpt")
    del checkpoint["state_dict"]["network.head.query.weight"]
    torch.save(checkpoint, tmp_path / "hole.ckpt")
    with pytest.raises(DataError, match=r"head\.query\.weight"):
        load_agents(tmp_path / "hole.ckpt")


def test_windows_that_do_not_fit_are_named(world):
    with pytest.raises(DataError, match=r"multiple of the 0\.5 s"):
        Window(future_s=7.7)
    dataset = WindowDataset(world / "scenes", Window(1.0, 9.0), Bounds(), random=True)
    with pytest.raises(DataError, match="has no window of 1 s before and 9 s after"):
        dataset[0]


def test_a_mirrored_scene_mirrored_is_the_scene(world):
    tokens = WindowDataset(world / "scenes", Window(), Bounds(), random=False)[0]
    twice, once = mirrored(mirrored(tokens)), mirrored(tokens)
    for name in ("pose", "displacement", "piece_pose", "piece_shape", "light_pose"):
        assert torch.equal(getattr(twice, name), getattr(tokens, name))
    assert torch.equal(once.pose[..., 0], tokens.pose[..., 0])
    assert torch.equal(once.pose[..., 1:], -tokens.pose[..., 1:])
