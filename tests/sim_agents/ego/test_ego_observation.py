"""What the ego sees: it does not depend on where the scene lies, nor on the order of road users."""

import numpy as np
import pytest
import torch
from closed_loop_worlds import Car, road
from ego_worlds import close, permuted, reset, street

from navsim_ext.closed_loop.kinematics import TOKEN_S
from navsim_ext.closed_loop.policies import ConstantVelocity
from navsim_ext.errors import DataError
from sim_agents.ego.observation import PLACE_M, Sight, flat_size, observe
from sim_agents.ego.surroundings import BadGoal, EgoSurroundings

SIGHT = Sight(others=4, pieces=12)


def seen(scene, steps: int = 1, goal: str = "log", sight: Sight = SIGHT):
    world, state = reset(scene)
    around = EgoSurroundings.build(state.scenes, goal)
    policy = ConstantVelocity()
    policy.start(state, [scene])
    for _ in range(steps):
        world.step(state, policy.act(state))
    return observe(state, around, sight)


def test_turning_and_moving_the_scene_changes_nothing():
    # Pieces at equal distances would be told apart by rounding: all of the map is seen.
    sight = Sight(others=4, pieces=420, reach_m=1000.0)
    here, there = seen(street(3), sight=sight), seen(street(3, move=(120.0, -80.0, 2.0)), sight=sight)
    assert here.pieces_valid.sum() > 200
    exact = "donot_use_mm_for_euclid_dist"
    apart = torch.cdist(here.pieces[0], there.pieces[0], compute_mode=exact)  # equally far ones stand in any order
    assert apart.amin(dim=0).max() < 3e-3
    assert apart.amin(dim=1).max() < 3e-3
    here.pieces[:] = there.pieces
    close(here, there, atol=3e-3)


def test_the_order_of_road_users_changes_nothing():
    scene = street(4, others=9)
    order = np.random.default_rng(0).permutation(scene.num_agents)
    close(seen(scene), seen(permuted(scene, order)))


def test_a_neighbour_is_where_it_is():
    scene = road([Car(0, -1.75, 0.0, 5.0), Car(12.0, 1.75, np.pi / 2, 3.0, size=(4.0, 1.6, 1.5))])
    one = seen(scene, steps=0)
    x, y, cos, sin, vx, vy, dx, dy, length, width = one.others[0, 0, :10].tolist()
    assert (x * PLACE_M, y * PLACE_M) == (pytest.approx(12.0, abs=1e-3), pytest.approx(3.5, abs=1e-3))
    assert (cos, sin) == (pytest.approx(0.0, abs=1e-4), pytest.approx(1.0, abs=1e-4))
    assert (vx * 10, vy * 10) == (pytest.approx(0.0, abs=1e-2), pytest.approx(3.0, abs=2e-2))
    assert (dx * 5, dy * 5) == (pytest.approx(0.0, abs=1e-2), pytest.approx(3.0 * TOKEN_S, abs=2e-2))
    assert (length * 5, width * 5) == (pytest.approx(4.0), pytest.approx(1.6))
    assert one.others_valid[0].tolist() == [True, False, False, False]
    assert float(one.ego[0, 0]) == pytest.approx(0.5, abs=1e-3)
    assert one.past[0, 0, 0] * PLACE_M == pytest.approx(-2.5, abs=1e-2)


def test_the_way_runs_along_the_lane_and_the_goal_is_the_end_of_the_record():
    scene = road([Car(0, -1.75, 0.0, 5.0)])
    one = seen(scene, steps=0)
    x = one.way[0, :, 0] * PLACE_M
    torch.testing.assert_close(x, torch.arange(10) * 5.0, atol=0.6, rtol=0)
    assert one.way_valid.all()
    assert one.way[0, :, 1].abs().max() < 1e-3
    assert one.goal_valid[0]
    assert float(one.goal[0, 0] * PLACE_M) == pytest.approx(40.0, abs=1e-2)


def test_a_goal_that_was_reached_is_none():
    scene = road([Car(0, -1.75, 0.0, 5.0)], steps=31)  # 2 s after now: 10 m
    assert seen(scene, steps=2).goal_valid[0]
    assert not seen(scene, steps=5).goal_valid[0]
    assert not seen(scene, steps=0, goal="none").goal_valid[0]


def test_the_light_that_is_red_and_scenes_without_neighbours_lights_or_lanes():
    red = seen(road([Car(0, -1.75, 0.0, 5.0)], red=True), steps=0)
    assert red.lights_valid[0].tolist() == [True, False, False, False]
    assert red.lights[0, 0, 0] * PLACE_M == pytest.approx(40.0, abs=1e-2)
    assert red.lights[0, 0, 4] == 1.0
    alone = seen(road([Car(0, -1.75, 0.0, 5.0)]), steps=0)
    assert not alone.others_valid.any()
    assert not alone.lights_valid.any()
    off = seen(road([Car(0, 60.0, 0.3, 5.0)]), steps=0)  # no lane where it stands
    assert not off.way_valid.any()
    assert all(torch.isfinite(values).all() for values in vars(off).values())


def test_flat_holds_every_number_once():
    one = seen(street(1))
    assert one.flat().shape == (1, flat_size(SIGHT))
    assert torch.isfinite(one.flat()).all()


def test_goals_off_the_map_and_infinite_ones_are_refused():
    for goal, words in (((0.0, 90.0), "nearest lane"), ((np.inf, 0.0), "finite")):
        scene = road([Car(0, -1.75, 0.0, 5.0)])
        object.__setattr__(scene, "goal", np.array([goal], np.float32))
        _, state = reset(scene)
        with pytest.raises(BadGoal, match=words):
            EgoSurroundings.build(state.scenes, "scene")
    _, state = reset(road([Car(0, -1.75, 0.0, 5.0)], goal=np.array([[-30.0, -1.75]])))
    assert torch.isfinite(EgoSurroundings.build(state.scenes, "scene").goal).all()  # behind, and on a lane
    with pytest.raises(DataError, match="one of log"):
        EgoSurroundings.build(state.scenes, "nowhere")


def test_senseless_sights_are_refused():
    for values in ({"others": 0}, {"reach_m": 0.0}, {"reach_m": float("nan")}):
        with pytest.raises(DataError, match="at least 1"):
            Sight(**values)
