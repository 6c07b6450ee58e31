"""The token planner: without a goal it is the base model, with one it learns to go there; whole tokens and first
poses."""

import json
import math

import pytest
import torch
from closed_loop_worlds import Car, road
from ego_worlds import store, street

from navsim_ext.closed_loop.drive import drive_batch
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.scene import SceneBatch
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from sim_agents.data.dataset import Window, WindowDataset
from sim_agents.data.scene_tokens import Bounds, collate
from sim_agents.ego.open_loop import OpenLoop
from sim_agents.ego.path.policy import load_path_planner
from sim_agents.ego.surroundings import BadGoal
from sim_agents.ego.token.module import GoalModule, driven_way
from sim_agents.ego.token.network import GoalNetwork, GoalSettings, told
from sim_agents.ego.token.policy import TokenPlanner, load_token_planner
from sim_agents.model.network import NextTokenNetwork, agents_of
from sim_agents.model.sampling import Sampling
from sim_agents.model.settings import NetworkSettings
from sim_agents.policy import TokenPolicy
from sim_agents.vocabulary import ShapeVocabulary, VerletVocabulary, class_of, save_vocabulary
from sim_agents.vocabulary.store import vocabulary_fingerprint

VOCABULARY = VerletVocabulary()
BOUNDS = Bounds(pieces=64)
SIZES = NetworkSettings(VOCABULARY.size, width=16, heads=2, blocks=1)


def pair(condition: str = "both", *, trained: bool = True) -> tuple[NextTokenNetwork, GoalNetwork]:
    """A base network and the same with a goal; ``trained``: the goal's weights are no longer 0."""
    torch.manual_seed(0)
    base = NextTokenNetwork(SIZES, VOCABULARY).eval()
    network = GoalNetwork(SIZES, VOCABULARY, GoalSettings(condition, 8)).eval()
    network.load_state_dict({**network.state_dict(), **base.state_dict()})
    if trained:
        torch.nn.init.normal_(network.goal_logits.weight)
    return base, network


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    folder = store(tmp_path_factory.mktemp("tokens") / "s", 3)
    data = WindowDataset(folder, Window(1.0, 4.0), Bounds(pieces=48), random=False)
    return collate([data[i] for i in range(3)])


def everywhere(batch):
    """Class rows [S, N, K]."""
    return class_of(batch.kind)[..., None].expand_as(batch.valid)


def sides(network, batch, **values):
    return told(network.roadside(batch, 2), **values)


# -- the network


def test_told_nothing_it_is_the_base_network_bit_for_bit(batch):
    base, network = pair()
    agents = agents_of(batch)
    wanted = base.logits(base.features(base.roadside(batch, 2), agents), everywhere(batch))
    goal = torch.full((3, 2), torch.nan)
    way, count = torch.zeros(3, 4, 3), torch.zeros(3, dtype=torch.int64)
    for side in (network.roadside(batch, 2), sides(network, batch, goal=goal),
                 sides(network, batch, goal=goal, way=way, count=count)):  # fmt: skip
        assert torch.equal(network.logits(network.features(side, agents), everywhere(batch)), wanted)
    assert set(network.base_names()) == set(base.state_dict())


def test_an_untrained_goal_changes_nothing_and_a_trained_one_the_ego_alone(batch):
    base, fresh = pair(trained=False)
    agents, goal = agents_of(batch), torch.tensor([[20.0, 0.0]] * 3)
    wanted = base.logits(base.features(base.roadside(batch, 2), agents), everywhere(batch))
    assert torch.equal(fresh.logits(fresh.features(sides(fresh, batch, goal=goal), agents), everywhere(batch)), wanted)
    _, network = pair()
    found = network.logits(network.features(sides(network, batch, goal=goal), agents), everywhere(batch))
    ego = batch.ego
    assert torch.equal(found[~ego], wanted[~ego])
    assert (found[ego] - wanted[ego]).abs().max() > 0.01


def test_all_moments_at_once_and_one_after_another_give_the_same(batch):
    _, network = pair()
    goal, (way, count) = torch.tensor([[20.0, 1.0]] * 3), driven_way(batch.pose[:, 0], batch.valid[:, 0])
    side, agents = sides(network, batch, goal=goal, way=way, count=count), agents_of(batch)
    whole = network.logits(network.features(side, agents), everywhere(batch))
    last, _ = network.begin(side, agents)
    torch.testing.assert_close(network.logits(last, class_of(batch.kind)), whole[:, :, -1], atol=2e-5, rtol=1e-4)


def test_each_condition_reads_what_it_names(batch):
    agents = agents_of(batch)
    way, count = driven_way(batch.pose[:, 0], batch.valid[:, 0])
    one = {"goal": torch.tensor([[20.0, 1.0]] * 3), "way": way, "count": count}
    other_goal = {**one, "goal": torch.tensor([[9.0, -4.0]] * 3)}
    other_way = {**one, "way": way + torch.tensor([0.0, 3.0, 0.0])}
    for condition, by_goal, by_way in (("goal", True, False), ("way", False, True), ("both", True, True)):
        _, network = pair(condition)
        logits = [network.logits(network.features(sides(network, batch, **told_), agents), everywhere(batch))
                  for told_ in (one, other_goal, other_way)]  # fmt: skip
        assert torch.equal(logits[0], logits[1]) != by_goal, condition
        assert torch.equal(logits[0], logits[2]) != by_way, condition
    with pytest.raises(DataError, match="condition one of"):
        GoalSettings("wish")
    with pytest.raises(DataError, match="go together"):
        told(network.roadside(batch, 2), None, way)


def test_a_goal_within_two_metres_is_none(batch):
    base, network = pair("goal")
    agents = agents_of(batch)
    here = batch.pose[:, 0, -1, :2]
    found = network.logits(network.features(sides(network, batch, goal=here + 1.0), agents), everywhere(batch))
    wanted = base.logits(base.features(base.roadside(batch, 2), agents), everywhere(batch))
    assert torch.equal(found[:, 0, -1], wanted[:, 0, -1])


def test_the_driven_way_lies_on_what_was_driven():
    t = torch.arange(9) * 0.5
    pose = torch.stack([4 * t, torch.zeros(9), torch.zeros(9)], dim=-1)[None]
    way, count = driven_way(pose, torch.ones(1, 9, dtype=torch.bool))
    assert count.item() == 17
    torch.testing.assert_close(way[0, :17, 0], torch.arange(17.0), atol=1e-4, rtol=0)
    valid = torch.ones(1, 9, dtype=torch.bool)
    valid[0, 4:] = False
    assert driven_way(pose, valid)[1].item() == 7  # up to the gap: 6 m
    assert driven_way(torch.zeros(1, 9, 3), valid)[1].item() == 0  # standing is no way


# -- driving


def planner(**options) -> TokenPlanner:
    return TokenPlanner(pair()[1], VOCABULARY, bounds=BOUNDS, **options)


def test_told_nothing_it_drives_as_the_base_model():
    base, network = pair()
    scenes = [street(0), street(1)]
    moves = []
    for policy in (
        TokenPolicy(base, VOCABULARY, sampling=Sampling(), seed=3, bounds=BOUNDS),
        TokenPlanner(network, VOCABULARY, sampling=Sampling(), seed=3, goal="none", way=False, bounds=BOUNDS),
    ):
        state = World(horizon_s=2.0).reset(scenes)
        policy.start(state, scenes)
        moves.append(policy.act(state))
    assert torch.equal(moves[0].values, moves[1].values)
    assert torch.equal(moves[0].log_probability, moves[1].log_probability)


def test_whole_tokens_are_the_vocabularys_and_first_poses_begin_as_they_do():
    scenes = [street(0), street(1)]
    found = {}
    for execute in ("token", "first"):
        policy = planner(execute=execute)
        state = World(horizon_s=2.0).reset(scenes)
        policy.start(state, scenes)
        worlds, ego = state.ego_index()
        found[execute] = policy.act(state).values[worlds, ego]
    # The first pose is that of the same token; then the first version asks again.
    torch.testing.assert_close(found["token"][:, 0], found["first"][:, 0], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(found["first"]).all()
    steps = (found["first"][:, 1:, :2] - found["first"][:, :-1, :2]).norm(dim=-1)
    assert steps.max() < 2.5  # 0.1 s
    rows, _ = drive_batch(scenes, planner(execute="first"), Replay(), 1.0)
    assert all(row["valid"] for row in rows)


def test_a_plan_is_eight_tokens_and_leaves_the_drive_as_it_was():
    scenes = [street(0)]
    policy, other = planner(), planner()
    state = World(horizon_s=4.0).reset(scenes)
    policy.start(state, scenes)
    other.start(state, scenes)
    plan = policy.plan(state)
    assert plan.shape == (1, 8, 3)
    first = policy.act(state).values[0, 0]
    assert torch.equal(first, other.act(state).values[0, 0])
    torch.testing.assert_close(plan[0, 0, :2], (first[-1] - state.pose[0, 0])[:2], atol=1e-4, rtol=1e-4)


def test_in_open_loop_a_log_at_2_hz_is_planned_from_its_past_alone(tmp_path):
    frames = tuple(f"{step:016x}" for step in range(21))
    logs = []
    for name, bend in (("one", 0.0), ("other", 3.0)):  # equal up to frame 8, then not
        scene = road([Car(0, -1.75, 0.0, 6.0), Car(20, -5.25, 0.0, 4.0)], dt=0.5, steps=21, now=3, id=name)
        scene.pose[:, 9:, 1] += bend
        object.__setattr__(scene, "frame_tokens", frames)
        write_scenes(tmp_path / name, iter([scene]), fingerprint_of({"log": name}))
        policy = planner(goal="none")
        policy.fingerprint = fingerprint_of({"planner": 1})
        batch = SceneBatch([frames[8]], ["log"], torch.zeros(1, 4, 3), torch.zeros(1, 8))
        logs.append(OpenLoop(policy, tmp_path / name).plan(batch))
    assert logs[0].shape == (1, 8, 3)
    assert torch.isfinite(logs[0]).all()
    assert torch.equal(*logs)


def test_weights_that_are_not_finite_make_drives_invalid():
    policy = planner()
    policy.network.goal_logits.weight.data.fill_(math.nan)
    rows, _ = drive_batch([street(0)], policy, Replay(), 1.0)
    assert not rows[0]["valid"]
    assert "without a probability" in rows[0]["reason"]


def test_a_vocabulary_too_slow_for_the_goal_is_refused_and_senseless_options_too():
    shapes = torch.zeros(3, 2, 5, 3)
    shapes[:, 1, :, 0] = torch.linspace(0.1, 0.5, 5)  # 1 m/s
    slow = ShapeVocabulary(shapes, torch.tensor([2, 2, 2]))
    network = GoalNetwork(NetworkSettings(2, width=16, heads=2, blocks=1), slow, GoalSettings())
    policy = TokenPlanner(network, slow, bounds=BOUNDS)
    state = World(horizon_s=2.0).reset([road([Car(0, -1.75, 0.0, 8.0)])])
    with pytest.raises(BadGoal, match="fastest token"):
        policy.start(state, state.scenes.sources)
    with pytest.raises(DataError, match="execute"):
        planner(execute="half")


# -- training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model, trained for a moment."""
    folder = tmp_path_factory.mktemp("base")
    scenes = store(folder / "scenes", 6)
    save_vocabulary(folder / "vocabulary", VOCABULARY, vocabulary_fingerprint({"method": "verlet"}, None))
    result = run(
        compose("sim_agents", [
            f"data.train={scenes}", f"vocabulary={folder}/vocabulary", f"output_dir={folder}/bc", "network.width=16",
            "network.heads=2", "network.blocks=1", "datamodule.batch_size=6", "datamodule.bounds.pieces=32",
            "datamodule.window.future_s=4.0", "trainer.max_epochs=1", "callbacks.progress=null",
        ])
    )  # fmt: skip
    return scenes, result["last"]


def test_the_goal_stage_keeps_the_base_model_and_its_checkpoint_drives(base, tmp_path):
    scenes, checkpoint = base
    result = run(
        compose("ego", [
            "experiment=token", f"data.train={scenes}", f"data.val={scenes}", f"module.base='{checkpoint}'",
            f"output_dir={tmp_path}", "datamodule.batch_size=6", "datamodule.bounds.pieces=32",
            "datamodule.window.future_s=4.0", "module.goal_s=[1.0,4.0]", "trainer.max_epochs=2",
            "trainer.check_val_every_n_epoch=2", "callbacks.progress=null", "callbacks.throughput=null",
        ])
    )  # fmt: skip
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (checkpoint, result["last"]))
    for name, value in before.items():
        if name.startswith("network."):
            assert torch.equal(value, after[name]), name
    assert after["network.goal_logits.weight"].abs().max() > 0
    assert set(result["metrics"]) >= {"val/nll", "val/nll_told_nothing"}
    policy = load_token_planner(result["last"])
    rows, _ = drive_batch([street(0)], policy, Replay(), 1.0)
    assert rows[0]["valid"]
    record = json.loads(torch.load(result["last"], weights_only=True)["ego_planner"])
    assert record["base"]["fields"]["weights"]
    with pytest.raises(DataError, match="planner, not of a path planner"):
        load_path_planner(result["last"])


def test_a_goal_makes_the_recorded_tokens_more_probable(base):
    """Learned by heart: what the ego did, told where it went, against told nothing."""
    scenes, checkpoint = base
    data = WindowDataset(scenes, Window(1.0, 4.0), Bounds(pieces=32), random=False)
    batch = collate([data[i] for i in range(6)])
    torch.manual_seed(0)
    module = GoalModule(checkpoint, smoothing="none")
    module.eval()
    ends, hidden = torch.full((6,), 10), torch.zeros(2, 6, dtype=torch.bool)
    optimizer = torch.optim.Adam([w for w in module.network.parameters() if w.requires_grad], lr=1e-2)
    nll = []
    for _ in range(60):
        logits, targets, classes = module._decisions(batch, 2, ends, hidden)
        loss = module.loss(logits, targets, classes).mean()
        nll.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nothing = module._decisions(batch, 2, ends, hidden, nothing=True)
    assert nll[-1] < 0.5 * nll[0]
    assert nll[-1] < 0.5 * module.loss(*nothing).mean()
    assert len(targets) == 6 * 8  # from the present to the goal
