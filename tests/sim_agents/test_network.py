"""The next-token network: causality, geometry, equal ways to the same numbers, sampling, and driving in the world."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from agent_scenes import street, tiny_network

from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import PieceKind
from sim_agents.data.pieces import PIECE_POINTS, map_pieces
from sim_agents.data.scene_tokens import Bounds, collate, scene_tokens
from sim_agents.model.network import NextTokenNetwork, agents_of
from sim_agents.model.rolling import ClosestOfSampled, ClosestOfTop, Sampled, roll
from sim_agents.model.sampling import Sampling, keyed_uniform, text_key
from sim_agents.model.settings import NetworkSettings
from sim_agents.policy import TokenPolicy
from sim_agents.training.losses import SmoothedCrossEntropy
from sim_agents.vocabulary import VerletVocabulary, class_of

GEOMETRIES = ["relative", "scene"]


def batch(count: int = 2, **changes):
    made = [scene_tokens(street(f"s{number}", seed=number, **changes), Bounds(pieces=64)) for number in range(count)]
    return collate([tokens for tokens, _, _ in made]), made[0][1]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_moment_by_moment_gives_the_same_numbers_as_all_at_once(geometry):
    network, _ = tiny_network(geometry)
    scenes, now = batch(late=True)
    with torch.no_grad():
        whole = network(scenes, now)
        side, agents = network.roadside(scenes, now), agents_of(scenes)
        features, past = network.begin(side, agents.moments(0, 4))
        classes = class_of(scenes.kind)
        for k in range(4, whole.shape[2]):
            there = scenes.valid[:, :, k - 1]
            torch.testing.assert_close(
                network.logits(features, classes)[there], whole[:, :, k - 1][there], atol=2e-5, rtol=1e-4
            )
            features, past = network.advance(side, past, agents.moments(k, k + 1))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nothing_later_is_seen(geometry):
    network, _ = tiny_network(geometry)
    scenes, now = batch()
    changed = scenes.pose.clone()
    changed[:, :, 8:] += 3.0
    with torch.no_grad():
        before, after = network(scenes, now), network(scenes, now, changed)
    torch.testing.assert_close(before[:, :, :8], after[:, :, :8], atol=0, rtol=0)
    assert (before[:, :, 8:] - after[:, :, 8:]).abs().max() > 1e-3


def moved(pose: torch.Tensor, angle: float, dx: float, dy: float) -> torch.Tensor:
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y, heading = pose.unbind(dim=-1)
    return torch.stack([cosine * x - sine * y + dx, sine * x + cosine * y + dy, heading + angle], dim=-1)


def test_turning_and_moving_everything_changes_nothing_in_relative_geometry():
    network, _ = tiny_network()
    scenes, now = batch()
    names = ("pose", "piece_pose", "light_pose")
    other = replace(scenes, **{name: moved(getattr(scenes, name), 0.7, 13.0, -4.0) for name in names})
    with torch.no_grad():
        torch.testing.assert_close(network(scenes, now), network(other, now), atol=2e-4, rtol=1e-3)
        in_scene, _ = tiny_network("scene")
        assert (in_scene(scenes, now) - in_scene(other, now)).abs().max() > 1e-2


@pytest.mark.parametrize("field", ["piece_pose", "light_state", "pose", "size", "kind", "ego"])
def test_everything_that_is_told_is_looked_at(field):
    """Map, lights, others, size, class and ego each change somebody's logits."""
    network, _ = tiny_network()
    scenes, now = batch()
    value = getattr(scenes, field).clone()
    if field == "pose":
        value[:, 1] += 2.0  # another road user
    elif field == "light_state":
        value[...] = 3 - value
    elif value.dtype == torch.bool:
        value = ~value
    else:
        value = (value + 1) % 3 if field == "kind" else value + 1.5
    with torch.no_grad():
        change = (network(scenes, now) - network(replace(scenes, **{field: value}), now))[:, 0]
    assert change.abs().max() > 1e-5


def test_order_of_road_users_does_not_matter():
    network, _ = tiny_network()
    scenes, now = batch(1)
    order = torch.tensor([3, 1, 4, 0, 2])
    names = ("pose", "valid", "displacement", "kind", "size", "ego", "scored", "row")
    shuffled = replace(scenes, **{name: getattr(scenes, name)[:, order] for name in names})
    with torch.no_grad():
        torch.testing.assert_close(network(shuffled, now), network(scenes, now)[:, order], atol=1e-5, rtol=1e-4)


def test_pieces_of_the_map_lie_on_it():
    scene = street()
    pieces = map_pieces(scene, np.array([3.0, -2.0, 0.4]))
    assert pieces.shape.shape == (len(pieces), PIECE_POINTS, 2)
    assert len(pieces) == 3 * 24
    back = moved(torch.tensor(pieces.pose), 0.4, 3.0, -2.0)[:, :2].numpy()
    assert np.abs(np.min(np.abs(back[:, 1:] - [0.0, 4.0, -3.0]), axis=1)).max() < 1e-4
    np.testing.assert_allclose(pieces.shape[:, -1], np.array([[5.0, 0.0]] * len(pieces)), atol=1e-4)


def test_bounds_keep_the_ego_and_those_that_are_scored():
    tokens, now, dropped = scene_tokens(street(agents=12), Bounds(agents=4))
    assert dropped == 8
    assert tokens.ego.sum() == 1
    assert tokens.scored.sum() == 3
    assert tokens.pose[tokens.ego, now].abs().max() < 1e-6


# -- losses and sampling


def test_smoothing_adds_up_prefers_neighbours_and_never_leaves_the_class():
    vocabulary = VerletVocabulary()
    loss = SmoothedCrossEntropy(vocabulary, smoothing="spatial", epsilon=0.1)
    torch.testing.assert_close(loss.smooth.sum(dim=-1), torch.ones(3, vocabulary.size))
    middle = vocabulary.size // 2
    assert loss.smooth[0, middle, middle] == 0
    assert loss.smooth[0, middle, middle + 1] > 20 * loss.smooth[0, middle, 0]
    logits, targets = torch.zeros(2, vocabulary.size), torch.tensor([middle, 0])
    classes = torch.tensor([0, 1])
    uniform = np.log(vocabulary.size)
    for smoothing in ("spatial", "uniform", "none"):
        found = SmoothedCrossEntropy(vocabulary, smoothing=smoothing)(logits, targets, classes)
        torch.testing.assert_close(found, torch.full((2,), uniform, dtype=torch.float32))
    sharp = torch.zeros(1, vocabulary.size)
    sharp[0, middle] = 50.0
    hard = SmoothedCrossEntropy(vocabulary, smoothing="none")(sharp, targets[:1], classes[:1])
    assert hard < 1e-6
    assert loss(sharp, targets[:1], classes[:1]) == pytest.approx(0.1 * 50.0, rel=1e-3)
    with pytest.raises(DataError, match="one of spatial, uniform, none"):
        SmoothedCrossEntropy(vocabulary, smoothing="some")


def test_keyed_numbers_are_uniform_independent_and_belong_to_their_key():
    first = keyed_uniform(3, text_key("scene"), torch.arange(40_000), 5)
    second = keyed_uniform(3, text_key("scene"), torch.arange(40_000), 6)
    assert ((first >= 0) & (first < 1)).all()
    assert abs(float(first.mean()) - 0.5) < 0.01
    assert abs(float(first.var()) - 1 / 12) < 0.003
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02
    assert torch.equal(first[100:200], keyed_uniform(3, text_key("scene"), torch.arange(100, 200), 5))


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [(Sampling(), 4), (Sampling(top_k=2), 2), (Sampling(top_p=0.6), 1), (Sampling(temperature=0), 1)],
)
def test_samples_follow_the_distribution(sampling, allowed):
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0])
    uniform = keyed_uniform(0, torch.arange(60_000))
    tokens, logp = sampling.sample(logits.expand(60_000, 4), uniform)
    expected = sampling.log_probabilities(logits).exp()
    assert int((expected > 0).sum()) == allowed
    share = torch.bincount(tokens, minlength=4) / 60_000
    torch.testing.assert_close(share, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logp, expected.log()[tokens])


def test_settings_out_of_range_are_named():
    for wrong in ({"width": 15}, {"blocks": 0}, {"geometry": "flat"}, {"latents": 3}, {"dropout": 1.0}):
        with pytest.raises(DataError):
            NetworkSettings(169, **wrong)
    with pytest.raises(DataError):
        Sampling(top_p=0.0)


def test_pieces_are_cut_all_at_once_as_line_by_line():
    """A line of one place, a closed one, a sharp bend, repeated points: each against the rule written out."""
    lines = [
        np.array([[0, 0], [0, 0], [12.4, 0.0]]),
        np.array([[5.0, 5.0], [5.0, 5.0]]),
        np.array([[0, 0], [7, 0], [7, 9], [0, 9.0]]),
        np.stack([np.linspace(0, 33, 40), np.sin(np.linspace(0, 6, 40)) * 4], axis=-1),
        np.array([[1.0, 2.0], [1.3, 2.4]]),
    ]
    closed = np.array([False, False, True, False, False])
    base = street("a")
    scene = replace(
        base, points=np.concatenate(lines).astype(np.float32),
        piece_start=np.cumsum([0, *map(len, lines)]).astype(np.int32),
        piece_kind=np.array([PieceKind.LANE, PieceKind.LANE, PieceKind.CROSSWALK, PieceKind.ROAD_EDGE, PieceKind.LANE],
                            np.uint8),
        piece_closed=closed,
    )  # fmt: skip
    expected, sources = [], []
    for row, line in enumerate(lines):
        points = np.float32(line).astype(float)
        points = np.concatenate([points, points[:1]]) if closed[row] else points
        steps = np.hypot(*np.diff(points, axis=0).T)
        points = points[np.concatenate([[True], steps > 1e-3])]
        cuts = [0]
        for i in range(1, len(points) - 1):
            a, b = points[i] - points[i - 1], points[i + 1] - points[i]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            cuts += [i] if np.arccos(np.clip(cosine, -1, 1)) > np.pi / 4 else []
        for low, high in itertools.pairwise([*cuts, len(points) - 1]):
            along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points[low : high + 1], axis=0).T))])
            if along[-1] == 0:
                continue
            count = max(1, round(along[-1] / 5))
            s = np.linspace(0, along[-1], count * 10 + 1)
            whole = np.stack([np.interp(s, along, points[low : high + 1, axis]) for axis in (0, 1)], axis=-1)
            expected += [whole[10 * i : 10 * i + 11] for i in range(count)]
            sources += [row] * count
    frame = np.array([3.0, -2.0, 0.7])
    found = map_pieces(scene, frame)
    assert found.source.tolist() == sources
    turn = lambda points, a: points @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])  # noqa: E731
    for pose, shape, points in zip(found.pose, found.shape, expected, strict=True):
        world = turn(turn(shape, pose[2]) + pose[:2], frame[2]) + frame[:2]
        np.testing.assert_allclose(world, points, atol=2e-5)
        assert np.abs(shape[1, 1]) < 1e-5
        assert shape[1, 0] > 0
    near = found.nearest(np.array([[0.0, 0.0], [10.0, 3.0]]), 4)
    distance = np.hypot(*(found.pose[:, None, :2] - np.array([[0.0, 0.0], [10.0, 3.0]])).transpose(2, 0, 1)).min(axis=1)
    assert np.sort(np.hypot(*(near.pose[:, None, :2] - np.array([[0.0, 0.0], [10.0, 3.0]])).transpose(2, 0, 1)).min(1)
                   ).tolist() == np.sort(distance)[:4].tolist()  # fmt: skip


# -- driving


def drive(scenes, *, rollouts: int = 3, first: int = 0, seed: int = 0, **options):
    network, vocabulary = tiny_network()
    world = World(rollouts=rollouts, horizon_s=3.0, enter="never")
    state = world.reset(scenes)
    policy = TokenPolicy(network, vocabulary, seed=seed, first_rollout=first, bounds=Bounds(pieces=64), **options)
    policy.start(state, scenes)
    while state.steps_left > 0:
        state = world.step(state, policy.act(state))
    return state


def test_a_scene_alone_drives_as_in_a_batch_and_chunks_as_the_whole():
    scenes = [street("a", seed=1), street("b", seed=2)]
    together, alone, chunk = drive(scenes), drive(scenes[1:]), drive(scenes, rollouts=1, first=2)
    agents = scenes[1].num_agents
    torch.testing.assert_close(together.poses[3:, :agents], alone.poses[:, :agents], atol=1e-4, rtol=0)
    torch.testing.assert_close(together.poses[[2, 5]], chunk.poses, atol=1e-4, rtol=0)
    assert (together.poses[0] - together.poses[1]).abs().max() > 0.1
    assert (drive(scenes, seed=1).poses - together.poses).abs().max() > 0.1


def test_the_map_is_encoded_once_whatever_the_number_of_rollouts(monkeypatch):
    calls = []
    forward = NextTokenNetwork.roadside

    def counted(self, scenes, now):
        calls.append(len(scenes.valid))
        return forward(self, scenes, now)

    monkeypatch.setattr(NextTokenNetwork, "roadside", counted)
    drive([street("a"), street("b")], rollouts=8)
    assert calls == [2]


def test_the_policy_tells_the_probability_of_its_choice():
    scenes = [street("a")]
    network, vocabulary = tiny_network()
    world = World(rollouts=2, horizon_s=1.0)
    state = world.reset(scenes)
    policy = TokenPolicy(network, vocabulary, bounds=Bounds(pieces=64))
    policy.start(state, scenes)
    moves = policy.act(state)
    tokens, now, _ = scene_tokens(scenes[0], Bounds(agents=8, pieces=64))
    logits = network(collate([tokens]), now)[0, :, now]
    expected = logits.log_softmax(dim=-1)
    for rollout in range(2):
        chosen = policy.last_tokens[rollout, : len(expected)]
        mine = expected.gather(-1, chosen[:, None])[:, 0]
        torch.testing.assert_close(moves.log_probability[rollout, : len(expected)], mine, atol=1e-4, rtol=1e-4)


def test_rolling_without_the_world_drives_as_the_policy_does():
    scenes = [street("a", seed=3), street("b", seed=4)]
    made = [scene_tokens(scene, Bounds(agents=8, pieces=64)) for scene in scenes]
    tokens, now = collate([one for one, _, _ in made]), made[0][1]
    network, vocabulary = tiny_network()
    present = torch.ones(3, vocabulary.size, dtype=torch.bool)
    uniform = torch.zeros(*tokens.valid.shape[:2], tokens.valid.shape[2] - 1)
    rolled = roll(network, vocabulary, present, tokens, now, Sampled(Sampling(temperature=0)), uniform)
    state = drive(scenes, rollouts=1, sampling=Sampling(temperature=0))
    driven = state.poses[:, :5, 10::5]
    torch.testing.assert_close(rolled.pose[:, :, now : now + driven.shape[2], :2], driven[..., :2], atol=1e-3, rtol=0)


def test_the_closest_of_sampled_tokens_is_one_of_them_and_leads_nearer_the_more_there_are():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 40, generator=generator)
    logits[:, 7] = -torch.inf
    ends = torch.randn(400, 40, 3, generator=generator) * torch.tensor([3.0, 1.0, 0.1])
    target, classes = torch.zeros(400, 3), torch.zeros(400, dtype=torch.int64)
    known, uniform = torch.arange(400) % 4 > 0, torch.rand(400, generator=generator)
    apart = []
    for samples in (1, 4, 32):
        chosen = ClosestOfSampled(samples)(logits, ends, target, known, classes, uniform)
        assert (chosen != 7).all()
        plain = Sampled()(logits, ends, target, known, classes, uniform)
        assert torch.equal(chosen[~known], plain[~known])  # without a recording it is a sampled one
        assert samples > 1 or torch.equal(chosen, plain)
        apart.append(float(ends[torch.arange(400), chosen][known, :2].norm(dim=-1).mean()))
    assert apart[0] > apart[1] > apart[2]
    with pytest.raises(DataError, match="samples=0"):
        ClosestOfSampled(0)


def test_the_closest_of_all_tokens_keeps_to_the_recording():
    tokens, now = batch(2, late=True)
    network, vocabulary = tiny_network()
    present = torch.ones(3, vocabulary.size, dtype=torch.bool)
    uniform = torch.full((*tokens.valid.shape[:2], tokens.valid.shape[2] - 1), 0.5)
    near = roll(network, vocabulary, present, tokens, now, ClosestOfTop(vocabulary.size), uniform)
    far = roll(network, vocabulary, present, tokens, now, Sampled(), uniform)

    def error(rolled):
        both = rolled.valid & tokens.valid
        return (rolled.pose - tokens.pose)[..., :2].norm(dim=-1)[both].mean()

    assert error(near) < 0.3
    assert error(far) > 3 * error(near)
    assert torch.equal(near.pose[:, :, : now + 1], tokens.pose[:, :, : now + 1])
    late = ~tokens.valid[:, :, now] & tokens.valid[:, :, -1]
    assert late.any()
    first = tokens.valid[late].int().argmax(dim=-1)
    for row, step in zip(near.pose[late], first, strict=True):
        assert row[step].abs().sum() > 0
    assert (near.tokens[late][:, : int(first.min())] == -1).all()
