"""Reinforcement of an ego's planner: what a rollout holds, that choices are scored as they were drawn, that an update
makes what paid more probable, and that what was trained drives."""

import math

import numpy as np
import pytest
import torch
from closed_loop_worlds import Car, road

from navsim_ext.closed_loop.drive import drive_batch
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.errors import DataError
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from sim_agents import EgoReward, PathActor, TokenActor, load_path_planner, load_token_planner
from sim_agents.vocabulary import VerletVocabulary, save_vocabulary
from sim_agents.vocabulary.store import vocabulary_fingerprint
from stage3_grpo.algorithm import AlgorithmError
from stage3_grpo.policies.ego import EgoDriving
from stage3_grpo.policy import Key, Needs

ALL = Needs(old=True, reference=True, value=True, once=False)


def street(seed: int):
    rng = np.random.default_rng(seed)
    cars = [Car(0.0, -1.75, 0.0, float(rng.uniform(4, 9)), float(rng.uniform(-0.6, 0.6)))]
    cars += [Car(float(rng.uniform(8, 60)), float(rng.choice([-5.25, 1.75])), 0.0, float(rng.uniform(0, 8)))]
    return road(cars, id=f"street-{seed}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(scenes, checkpoint of a path planner, checkpoint of a token planner), trained for a moment."""
    folder = tmp_path_factory.mktemp("ego")
    scenes = folder / "scenes"
    write_scenes(scenes, (street(seed) for seed in range(6)), fingerprint_of({"test": "stage 3"}))
    quiet = ["callbacks.progress=null", "trainer.max_epochs=1", f"data.train={scenes}"]
    sizes = [f"module.network.{part}.{size}" for part in ("actor", "critic") for size in ("width=16", "layers=1")]
    path = run(compose("ego", ["experiment=path", f"output_dir={folder}/path", "datamodule.batch_size=6",
                               "datamodule.repeat=1", *sizes, *quiet]))  # fmt: skip
    save_vocabulary(folder / "v", VerletVocabulary(), vocabulary_fingerprint({"method": "verlet"}, None))
    small = ["datamodule.batch_size=6", "datamodule.bounds.pieces=32", "datamodule.window.future_s=4.0"]
    base = run(compose("sim_agents", [f"vocabulary={folder}/v", f"output_dir={folder}/bc", "network.width=16",
                                      "network.heads=2", "network.blocks=1", *small, *quiet]))  # fmt: skip
    token = run(compose("ego", ["experiment=token", f"module.base='{base['last']}'", f"output_dir={folder}/token",
                                "module.goal_s=[1.0,4.0]", *small, *quiet]))  # fmt: skip
    return str(scenes), path["last"], token["last"]


def driving(trained, kind: str, **options) -> EgoDriving:
    _, path, token = trained
    init, actor = (path, PathActor()) if kind == "path" else (token, TokenActor())
    policy = EgoDriving(init, actor, EgoReward(**options.pop("reward", {})), horizon_s=2.0, **options)
    policy.loaded = actor.load(init, critic=True)
    return policy


@pytest.mark.parametrize("kind", ["path", "token"])
def test_choices_are_scored_as_they_were_drawn_and_by_a_reference_that_is_equal_alike(trained, kind):
    policy = driving(trained, kind)
    rollout = policy.roll([street(0), street(1)], 3, Key(0, 0), ALL)
    assert rollout.mask.shape == (6, 4)
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(rollout.logp_old, rollout.logp_ref, atol=1e-5, rtol=1e-5)
    scores = policy.decide(rollout, torch.tensor([4, 1]), teach=False)
    torch.testing.assert_close(scores.logp, rollout.logp_old[[4, 1]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.value, rollout.value_old[[4, 1]], atol=1e-5, rtol=1e-5)
    assert scores.logp.requires_grad
    assert (rollout.logp_old.std(dim=0) > 0).all()  # the members of a group choose for themselves


@pytest.mark.parametrize("kind", ["path", "token"])
def test_a_drive_depends_on_its_key_and_scene_and_not_on_its_batch(trained, kind):
    policy = driving(trained, kind)
    whole = policy.roll([street(0), street(1)], 2, Key(0, 5), ALL)
    alone = policy.roll([street(1)], 2, Key(0, 5), ALL)
    other = policy.roll([street(1)], 2, Key(0, 6), ALL)
    torch.testing.assert_close(whole.logp_old[2:], alone.logp_old, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.reward[2:], alone.reward, atol=1e-4, rtol=1e-4)
    assert (alone.logp_old - other.logp_old).abs().max() > 1e-3


def test_rewards_are_semi_markov_and_nothing_counts_after_a_failure(trained):
    wall = road([Car(0, -1.75, 0.0, 8.0), Car(9.0, -1.75)], id="wall")
    policy = driving(trained, "path", reward={"failure": 2.0, "discount": 0.9})
    drives = policy.drive([wall], 1, 0, best=True)
    assert drives.failed.item()
    made = int(drives.mask.sum())
    assert made < 4
    assert drives.reward[0, made - 1].item() == pytest.approx(-2.0)
    free = policy.drive([road([Car(0, -1.75, 0.0, 6.0)], id="free")], 1, 0, best=True)
    assert not free.failed.item()
    powers = sum(0.9**j for j in range(5)) / 5
    assert (free.reward <= powers + 1e-5).all()
    assert free.reward[0, 0].item() > 0.5 * powers


def test_an_update_makes_what_paid_more_probable(trained):
    policy = driving(trained, "path")
    rollout = policy.roll([street(0)], 6, Key(0, 0), ALL)
    rows = torch.arange(6)
    paid = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    optimizer = torch.optim.SGD(policy.parameters()["policy"], lr=1e-4)
    loss = -(policy.decide(rollout, rows, teach=False).logp.sum(dim=1) * paid).mean()
    loss.backward()
    optimizer.step()
    gained = (policy.decide(rollout, rows, teach=False).logp - rollout.logp_old).sum(dim=1)
    assert gained[0] > gained[1]


def test_the_token_actor_leaves_the_base_model_alone(trained):
    policy = driving(trained, "token")
    names = {id(weight): name for name, weight in policy.actor.network.named_parameters()}
    learned = [names[id(weight)] for weight in policy.parameters()["policy"]]
    assert learned
    assert all(name.startswith("goal_") for name in learned)


def test_a_discount_that_is_not_the_decisions_and_senseless_options_are_refused(trained, tmp_path):
    scenes, path, _ = trained
    with pytest.raises(AlgorithmError, match="is discounted by"):
        run(compose("stage3", ["policy=ego_path", "algorithm=ego_ppo", f"init='{path}'", f"data.train={scenes}",
                               "advantage.gamma=0.99", f"output_dir={tmp_path}"]))  # fmt: skip
    with pytest.raises(DataError, match="temperature"):
        TokenActor(temperature=0.0)
    with pytest.raises(DataError, match="one of product"):
        EgoReward("fun")
    with pytest.raises(DataError, match="horizon_s"):
        EgoDriving(path, PathActor(), EgoReward(), horizon_s=0.0)


@pytest.mark.parametrize(("kind", "algorithm"), [("path", "ego_ppo"), ("token", "ego_dapo")])
def test_it_trains_and_its_checkpoint_drives(trained, tmp_path, kind, algorithm):
    scenes, path, token = trained
    init = path if kind == "path" else token
    result = run(
        compose("stage3", [
            f"experiment=ego_{kind}", f"algorithm={algorithm}", f"init='{init}'", f"data.train={scenes}",
            f"data.val={scenes}", f"output_dir={tmp_path}", "policy.horizon_s=1.0", "algorithm.group_size=2",
            "datamodule.batch_size=3", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1",
            "callbacks.progress=null",
        ])
    )  # fmt: skip
    assert math.isfinite(result["metrics"]["val/score"])
    planner = (load_path_planner if kind == "path" else load_token_planner)(result["last"])
    rows, _ = drive_batch([street(0)], planner, Replay(), 1.0)
    assert rows[0]["valid"]


def test_random_weights_begin_elsewhere(trained):
    _, path, _ = trained
    old, fresh = PathActor(), PathActor(fresh=True)
    old.load(path, critic=False)
    torch.manual_seed(1)
    fresh.load(path, critic=False)
    assert any(not torch.equal(a, b) for a, b in zip(old.network.parameters(), fresh.network.parameters(), strict=True))
