"""The compiled loops of the world equal its tensor code, whatever the batch, the number of threads and the order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.closed_loop import events, kernels, kinematics, moves, world
from navsim_ext.closed_loop.contact import planes
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.world import World
from tests.navsim_ext.closed_loop_worlds import Car, crowd, road


def dense(seed: int, B: int = 3, N: int = 24, E: int = 13):
    """Boxes that turn and meet, some of whom are not there for a while: planes, size, there."""
    random = torch.Generator().manual_seed(seed)
    start = torch.rand(B, N, 1, 3, generator=random) * torch.tensor([30.0, 30.0, 6.3])
    step = torch.randn(B, N, E, 3, generator=random) * torch.tensor([0.8, 0.8, 0.2])
    size = 0.3 + torch.rand(B, N, 2, generator=random) * torch.tensor([7.0, 2.5])
    there = torch.rand(B, N, E, generator=random) < 0.97
    return planes(start + step.cumsum(dim=2)), size, there


def sorted_pairs(pairs):
    return sorted(map(tuple, pairs.tolist()))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_contacts_are_those_of_the_tensor_code(seed):
    boxes, size, there = dense(seed)
    fast, fast_pairs = events.contacts(boxes, size, there, 7)
    slow, slow_pairs = events.tensor_contacts(boxes, size, there, 7)
    assert torch.equal(fast.valid, slow.valid)
    assert slow.value.any()
    grown, _ = events.tensor_contacts(boxes, size + 1e-3, there, 7)
    shrunk, _ = events.tensor_contacts(boxes, size - 1e-3, there, 7)
    assert (fast.value <= grown.value).all()
    assert (fast.value >= shrunk.value).all()
    assert (fast.value != slow.value).float().mean() < 1e-3
    if torch.equal(fast.value, slow.value):
        assert sorted_pairs(fast_pairs) == sorted_pairs(slow_pairs)


def test_contacts_do_not_depend_on_batch_order_or_threads(monkeypatch):
    boxes, size, there = dense(5, B=4)
    whole, pairs = events.contacts(boxes, size, there, 0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    turned, _ = events.contacts(boxes.map(lambda p: p[:, order]), size[:, order], there[:, order], 0)
    assert torch.equal(turned.value, whole.value[:, order])
    for b in range(4):
        alone, own = events.contacts(boxes[b : b + 1], size[b : b + 1], there[b : b + 1], 0)
        assert torch.equal(alone.value[0], whole.value[b])
        assert sorted_pairs(own[:, 1:]) == sorted_pairs(pairs[pairs[:, 0] == b][:, 1:])
    assert sorted_pairs(pairs) == sorted_pairs(pairs[:, [0, 2, 1, 3]])
    for threads in (2, 3, 50):
        monkeypatch.setattr(events, "threads_for", lambda _, threads=threads: threads)
        monkeypatch.setattr(kernels.os, "cpu_count", lambda: 8)
        cut, cut_pairs = events.contacts(boxes, size, there, 0)
        assert torch.equal(cut.value, whole.value)
        assert torch.equal(cut.valid, whole.valid)
        assert sorted_pairs(cut_pairs) == sorted_pairs(pairs)


def test_more_contacts_than_fit_the_first_table_are_all_found():
    boxes = planes(torch.zeros(1, 40, 5, 3))
    _, pairs = events.contacts(boxes, torch.ones(1, 40, 2), torch.ones(1, 40, 5, dtype=torch.bool), 0)
    assert sorted_pairs(pairs) == [(0, i, j, k) for i in range(40) for j in range(40) if i != j for k in range(1, 6)]


def test_work_is_cut_into_parts_that_cover_it_once_in_order():
    for count, threads in ((0, 1), (1, 4), (7, 2), (7, 3), (8, 1)):
        parts = kernels.split(lambda begin, end: range(begin, end), count, threads)
        assert [k for part in parts for k in part] == list(range(count))
        assert len(parts) <= threads
    with pytest.raises(ZeroDivisionError):
        kernels.split(lambda begin, end: 1 // (begin - begin), 4, 2)


@pytest.mark.parametrize("areas", [False, True])
def test_edge_distances_are_those_of_the_tensor_code(areas, monkeypatch):
    cars = [Car(12.0 * k - 100, 3.0 * (k % 5) - 9.0, 0.4 * k, 8, size=(4.0 + 0.2 * k, 1.9, 1.6)) for k in range(16)]
    scenes = [road(cars, areas=areas), road([Car(0, 0), Car(260, 0), Car(30, -3.0)], half_length=100.0), crowd(1, 30)]
    state = World().reset(scenes)
    boxes, size = planes(state.poses), state.scenes.size[state.scene]
    wanted = state.there.clone()
    wanted[0, 3] = False
    fast = events.edge_distance(state, boxes, size, wanted)
    slow = events.tensor_edge_distance(state, boxes, size, wanted)
    assert torch.equal(fast.isnan(), slow.isnan())
    assert fast[0, 3].isnan().all()
    assert fast[1, 1].isnan().all()  # off the grid
    assert (fast < 0.0).any()
    assert (fast > 1.0).any()
    assert (fast - slow).abs().nan_to_num().max() < 1e-4
    broken = boxes.map(torch.clone)
    broken.x[0, 0, 2] = torch.nan
    assert events.edge_distance(state, broken, size, wanted)[0, 0, 2].isnan()
    monkeypatch.setattr(events, "threads_for", lambda _: 2)
    assert torch.equal(events.edge_distance(state, boxes, size, wanted).nan_to_num(), fast.nan_to_num())


def test_a_token_moves_everybody_as_the_tensor_code_does():
    scenes = WorldScenes.build([crowd(3, 20), crowd(4, 33)])
    random = torch.Generator().manual_seed(0)
    token = torch.randn(2, scenes.num_agents, 5, 3, generator=random) * torch.tensor([3.0, 0.5, 0.2])
    fast, slow = World().reset(scenes), World().reset(scenes)
    fast.present[0, 2] = slow.present[0, 2] = False
    World().step(fast, Moves.tokens(token))
    slow.speed = world.tensor_advance(slow, kinematics.compose(slow.pose, token))
    slow.step += 5
    assert torch.equal(fast.there, slow.there)
    assert not fast.poses[0, 2, fast.column - 4 : fast.column + 1].any()
    assert torch.allclose(fast.poses, slow.poses, atol=1e-5)
    assert torch.allclose(fast.speed, slow.speed, atol=1e-3)  # of positions to 1e-5 m over 0.1 s
    assert torch.equal(fast.poses[..., 2], slow.poses[..., 2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(bad):
    present = torch.ones(2, 3, dtype=torch.bool)
    present[1, 1] = False
    for place in np.ndindex(2, 3, 5, 3):
        values = torch.full((2, 3, 5, 3), 3e38)  # large is finite; so is a sum that is not
        values[place] = bad
        assert moves.all_finite(values, present) == (place[:2] == (1, 1))
