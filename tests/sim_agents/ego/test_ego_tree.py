"""The tree planner: its templates, rewards, training drives, and that it trains, drives and plans any horizon."""

import math

import numpy as np
import pytest
import torch
from closed_loop_worlds import Car, road
from ego_worlds import reset, store, street

from navsim_ext.closed_loop.drive import drive_batch
from navsim_ext.closed_loop.policies import ConstantVelocity, Replay
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from sim_agents.ego.encoder import EncoderSettings
from sim_agents.ego.motion import play
from sim_agents.ego.observation import Sight
from sim_agents.ego.recorded import EgoDataset
from sim_agents.ego.reward import EVENTS, outcome, semi_markov
from sim_agents.ego.surroundings import EgoSurroundings
from sim_agents.ego.tree.module import Explorer, TreeModule, discounted
from sim_agents.ego.tree.network import TreeNetwork, TreeSettings
from sim_agents.ego.tree.policy import TreePolicy, load_tree_planner
from sim_agents.ego.tree.search import SearchSettings
from sim_agents.ego.tree.templates import (
    BadTemplates,
    Segments,
    coverage,
    ego_segments,
    make_templates,
    reached,
    require_drivable,
)

TINY = TreeSettings(Sight(others=4, pieces=8), EncoderSettings(16, 2, 1))
ACTIONS = torch.tensor([[0.0, 0.0], [-3.0, 0.0], [1.5, 0.0], [0.0, 0.05], [0.0, -0.05], [-6.0, 0.0]])


def tiny(seed: int = 0) -> TreeNetwork:
    torch.manual_seed(seed)
    return TreeNetwork(TINY, ACTIONS)


# -- templates


def made_up(n: int = 400, seed: int = 0) -> Segments:
    """Half seconds that bicycles have driven, a tenth of them standing."""
    torch.manual_seed(seed)
    speed = torch.rand(n) * 10
    action = torch.stack([torch.randn(n), torch.randn(n) * 0.02], dim=-1)
    speed[: n // 10], action[: n // 10] = 0.0, 0.0
    length = torch.full((n,), 4.8)
    poses, _ = play(torch.zeros(n, 3), speed, length, action)
    return Segments(speed, poses[:, -1], length)


def test_templates_cover_what_they_are_made_from_and_standing_still():
    segments = made_up()
    actions, radius = make_templates(segments, 40, share=0.97)
    told = coverage(segments, require_drivable(actions))
    assert len(actions) <= 40
    assert (reached(segments, actions).amin(dim=1) <= radius + 1e-5).float().mean() >= 0.97
    assert told["standing"] == 1.0
    assert told["within_0.25_m"] > 0.9
    more, finer = make_templates(segments, 120, share=0.97)
    assert finer < radius
    assert reached(segments, more).amin(dim=1).mean() < reached(segments, actions).amin(dim=1).mean()


def test_segments_are_what_the_ego_was_recorded_to_do():
    scene = road([Car(0, -1.75, 0.3, 6.0, 1.0), Car(30, 1.75)])
    found = ego_segments([scene], mirror=False)
    first = found.end[0]
    assert found.speed[0].item() == pytest.approx(6.0 - 0.95, abs=0.02)  # at -0.95 s
    assert first[1].abs() < 1e-3
    assert len(ego_segments([scene])) == 2 * len(found)
    with pytest.raises(DataError, match="templates need steps"):
        ego_segments([road([Car(0, 0)], dt=0.5, steps=20)])
    with pytest.raises(DataError, match="nothing to make"):
        ego_segments([])


def test_template_sets_that_no_car_can_be_driven_with_are_refused():
    with pytest.raises(BadTemplates, match="standing car"):
        require_drivable(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    with pytest.raises(BadTemplates, match="hardest braking"):
        require_drivable(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    with pytest.raises(BadTemplates, match="finite"):
        require_drivable(torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))
    with pytest.raises(DataError, match="at least 3"):
        make_templates(made_up(), 2)


# -- rewards


def test_semi_markov_discounting_is_the_sum_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0, 4.0]])
    total, after = semi_markov(rewards, 0.9)
    by_hand = [1.0 + 0.9 * 2.0 - 0.9**3 + 0.9**4 * 0.5, 0.9**4 * 4.0]
    torch.testing.assert_close(total, torch.tensor(by_hand))
    assert after == pytest.approx(0.9**5)
    # Two tokens one after the other are worth what their ten steps are.
    whole, _ = semi_markov(rewards.flatten()[None], 0.9)
    assert (total[0] + after * total[1]).item() == pytest.approx(whole.item(), abs=1e-6)
    with pytest.raises(DataError, match="discount"):
        semi_markov(rewards, 0.0)


def test_returns_of_tokens_go_on_with_the_value_reached():
    returns = discounted(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([10.0]), 0.5)
    assert returns[0].tolist() == [1.0 + 0.25 * 2 + 0.125 * 10, 0.5 * 2 + 0.25 * 10, 2 + 0.5 * 10]


def driven(scene, values, form="product"):
    """Outcome of one token in which the ego takes an (acceleration, curvature)."""
    world = World(horizon_s=4.0, events=EVENTS)
    state = world.reset([scene])
    around = EgoSurroundings.build(state.scenes)
    policy = ConstantVelocity()
    policy.start(state, [scene])
    moves = policy.act(state).resolve(state)
    _, ego = state.ego_index()
    poses = moves.values.clone()
    here, speed = state.pose[:, ego[0]], state.speed[:, ego[0]]
    poses[0, ego[0]] = play(here, speed, torch.tensor([4.6]), torch.tensor([values]))[0]
    world.step(state, type(moves).poses(poses))
    return outcome(world, state, around, form)


def test_driving_as_recorded_earns_everything_and_running_into_somebody_nothing():
    free = road([Car(0, -1.75, 0.0, 6.0)])
    assert driven(free, (0.0, 0.0)).reward.item() == pytest.approx(1.0, abs=1e-3)
    slower = driven(free, (-4.0, 0.0)).reward.item()
    assert slower == pytest.approx((5 * 2.5 / 3.0 + 5 + 2) / 12, abs=0.02)
    wall = driven(road([Car(0, -1.75, 0.0, 8.0), Car(6.0, -1.75)]), (0.0, 0.0))
    assert wall.failed.item()
    assert wall.reward.item() == 0.0
    near = driven(road([Car(0, -1.75, 0.0, 8.0), Car(12.0, -1.75)]), (0.0, 0.0))
    assert not near.failed.item()
    assert near.reward.item() < 0.7  # less than 0.95 s to contact


def test_a_goal_pays_once_and_failures_cost():
    scene = road([Car(0, -1.75, 0.0, 6.0)], steps=16)  # ends 3 m ahead, half a second from now
    first = driven(scene, (0.0, 0.0), "goal")
    assert first.reached.item()
    assert first.reward.item() == 1.0
    # 3 m at 6 m/s: within 2 m of the goal after 1 m, two steps; what it is worth is discounted to then.
    assert first.steps[0].nonzero().flatten().tolist() == [1]
    assert semi_markov(first.steps, 0.9)[0].item() == pytest.approx(0.9)
    wall = driven(road([Car(0, -1.75, 0.0, 8.0), Car(6.0, -1.75)]), (0.0, 0.0), "goal")
    assert wall.reward.item() == -1.0
    with pytest.raises(DataError, match="one of product"):
        driven(scene, (0.0, 0.0), "fun")


# -- network and policy


def test_templates_that_bend_more_than_the_speed_allows_cannot_be_done():
    network = tiny()
    possible = network.possible(torch.tensor([1.0, 12.0]))
    assert possible[0].all()
    assert possible[1].tolist() == [True, True, True, False, False, True]


@pytest.mark.parametrize("method", [None, "puct", "gumbel"])
def test_it_drives_and_plans_any_horizon_along_what_a_bicycle_can(method):
    search = None if method is None else SearchSettings(simulations=6, method=method)
    policy = TreePolicy(tiny(), search=search)
    _, state = reset(street(0), street(1))
    policy.start(state, state.scenes.sources)
    moves = policy.act(state)
    worlds, ego = state.ego_index()
    pose, speed = state.pose[worlds, ego], state.speed[worlds, ego]
    ends = play(pose[:, None].expand(2, 6, 3), speed[:, None].expand(2, 6), torch.full((2, 6), 4.6),
                ACTIONS.expand(2, 6, 2))[0]  # fmt: skip
    for b in range(2):
        assert any(torch.allclose(moves.values[b, ego[b]], one, atol=1e-4) for one in ends[b])
    for poses in (1, 8, 13):
        plan = policy.plan(state, poses)
        assert plan.shape == (2, poses, 3)
        assert torch.isfinite(plan).all()
    first = moves.values[worlds, ego][:, -1, :2] - pose[:, :2]
    torch.testing.assert_close(policy.plan(state)[:, 0, :2].norm(dim=-1), first.norm(dim=-1), atol=1e-3, rtol=1e-3)
    rows, _ = drive_batch([street(0)], policy, Replay(), 1.0)
    assert rows[0]["valid"]


def test_weights_that_are_not_finite_make_drives_invalid():
    network = tiny()
    network.prior[-1].weight.data.fill_(math.nan)
    rows, _ = drive_batch([street(0)], TreePolicy(network, search=SearchSettings(simulations=2)), Replay(), 1.0)
    assert not rows[0]["valid"]
    assert "not finite" in rows[0]["reason"]


# -- training


@pytest.fixture
def module(tmp_path):
    module = TreeModule(TINY, unroll=4)
    torch.manual_seed(0)
    module.build(ACTIONS, {})
    data = EgoDataset(store(tmp_path / "s", 4), future_s=2.0, random=False)
    return module, [data[i] for i in range(4)]


def test_the_teacher_keeps_to_the_record_and_the_explorer_does_not(module):
    module, batch = module
    actions, _ = make_templates(ego_segments(one.part.scene for one in batch), 30, share=0.9)
    module.build(actions, {})
    taught = module.drives(batch, disturbance=None, explorer=None)
    ego = [example.part.pose[example.part.scene.ego] for example in batch]
    moved = np.array([np.linalg.norm(p[e.part.now + 20, :2] - p[e.part.now, :2]) for p, e in zip(ego, batch)])
    assert np.abs(taught.poses[:, -1, :2].norm(dim=-1).numpy() - moved).max() < 1.0
    assert taught.taught.all()
    generator = torch.Generator().manual_seed(0)
    astray = module.drives(batch, disturbance=None, explorer=Explorer(1.0, 3.0, 0.1), generator=generator)
    assert not astray.taught.any()
    assert (astray.poses - taught.poses)[:, -1, :2].norm(dim=-1).mean() > 0.5


def test_nothing_is_worth_anything_after_a_failure(module):
    module, batch = module
    module.build(torch.tensor([[4.0, 0.1], [4.0, -0.1], [4.0, 0.0], [-8.0, 0.0]]), {})
    drive = module.drives(batch, disturbance=None, explorer=Explorer(1.0, 30.0, 1.0),
                          generator=torch.Generator().manual_seed(3))  # fmt: skip
    assert (drive.rewards[~drive.alive] == 0.0).all()
    assert (drive.alive[:, 1:] <= drive.alive[:, :-1]).all()


def test_a_batch_is_learned_by_heart(module):
    module, batch = module
    drive = module.drives(batch, disturbance=None, explorer=None)
    optimizer = torch.optim.Adam(module.network.parameters(), lr=5e-3)
    first = None
    for _ in range(60):
        terms = module.losses(drive)
        loss = terms["prior"] + terms["reward"] + 0.25 * terms["value"] + terms["pose"]
        first = first or {name: value.item() for name, value in terms.items()}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["right"] >= 0.9
    for name in ("prior", "value", "pose"):
        assert terms[name] < 0.3 * first[name], name


def test_searched_drives_teach_what_the_search_found(module):
    module, batch = module
    search = SearchSettings(simulations=4)
    drive = module.drives(batch, disturbance=None, explorer=None, searched=search)
    torch.testing.assert_close(drive.prior.sum(dim=-1), torch.ones(4, 4))
    assert ((drive.prior * 4).round() - drive.prior * 4).abs().max() < 1e-4  # shares of four visits
    assert (drive.prior.gather(2, drive.actions[..., None])[..., 0] == drive.prior.amax(dim=-1)).all()


def test_it_trains_reinforces_and_drives(tmp_path):
    scenes = store(tmp_path / "scenes", 6)
    common = [
        f"data.train={scenes}", f"data.val={scenes}", "datamodule.batch_size=6", "datamodule.future_s=2.0",
        "module.network.encoder.width=16", "module.network.encoder.layers=1", "module.unroll=3",
        "module.templates.count=24", "module.templates.share=0.9", "trainer.max_epochs=1", "datamodule.repeat=1",
        "callbacks.progress=null", "callbacks.throughput=null", "trainer.check_val_every_n_epoch=1",
    ]  # fmt: skip
    result = run(compose("ego", ["experiment=tree", f"output_dir={tmp_path}/tree", *common]))
    assert math.isfinite(result["metrics"]["val/prior"])
    again = run(compose("ego", ["experiment=tree_searched", f"output_dir={tmp_path}/searched", *common,
                                f"module.init_from='{result['last']}'", "module.searched.simulations=2"]))  # fmt: skip
    policy = load_tree_planner(again["last"], search=SearchSettings(simulations=2))
    rows, _ = drive_batch([street(0)], policy, Replay(), 1.0)
    assert rows[0]["valid"]
    with pytest.raises(DataError, match="not the discount"):
        TreeModule(TINY, searched=SearchSettings(discount=0.5))
