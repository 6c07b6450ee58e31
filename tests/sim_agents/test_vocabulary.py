"""Motion vocabularies: round trips, exact cases, what a rolling match promises, and what is stored."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from agent_scenes import street

from navsim_ext.errors import DataError
from navsim_ext.shards import CorruptShard
from sim_agents.vocabulary import (
    MotionState,
    ShapeVocabulary,
    VerletVocabulary,
    class_of,
    closest_tokens,
    encode,
    load_vocabulary,
    save_vocabulary,
)
from sim_agents.vocabulary.build import VocabularySettings, make_vocabulary, reconstruction
from sim_agents.vocabulary.grid import GridCells, grid
from sim_agents.vocabulary.k_disks import cover, k_disks
from sim_agents.vocabulary.motion import MATCHING_BOX_M, corner_distance
from sim_agents.vocabulary.segments import segments_of
from sim_agents.vocabulary.store import vocabulary_fingerprint


def scenes(count: int = 6):
    return [street(f"s{number}", seed=number) for number in range(count)]


@pytest.fixture(scope="module")
def disks() -> ShapeVocabulary:
    return make_vocabulary(VocabularySettings("k_disks", 400), scenes(8))[0]


def test_corner_distance_is_the_mean_of_four_corners():
    rng = np.random.default_rng(0)
    one, other = (torch.tensor(rng.normal(0, 2, (50, 3)), dtype=torch.float32) for _ in range(2))
    box = torch.tensor([4.8, 2.0])

    def corners(pose):
        signs = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2 * box
        cosine, sine = torch.cos(pose[:, 2, None]), torch.sin(pose[:, 2, None])
        x = pose[:, 0, None] + cosine * signs[:, 0] - sine * signs[:, 1]
        y = pose[:, 1, None] + sine * signs[:, 0] + cosine * signs[:, 1]
        return torch.stack([x, y], dim=-1)

    naive = (corners(one) - corners(other)).norm(dim=-1).mean(dim=-1)
    torch.testing.assert_close(corner_distance(one, other, box), naive, atol=1e-5, rtol=1e-5)
    assert corner_distance(one, one, box).max() == 0


def test_the_compiled_search_finds_the_token_that_all_distances_name(disks):
    torch.manual_seed(2)
    classes = torch.randint(0, 3, (600,))
    state = MotionState(torch.randn(600, 3) * 10, torch.zeros(600, 2))
    tokens = (torch.rand(600) * disks.counts[classes]).long()
    target = disks.play(state, classes, tokens)[1].pose + torch.randn(600, 3) * torch.tensor([0.5, 0.3, 0.3])
    boxes = torch.tensor(MATCHING_BOX_M)[classes][:, None]
    distance = corner_distance(disks.ends(state, classes), target[:, None], boxes)
    distance[torch.arange(disks.size) >= disks.counts[classes][:, None]] = torch.inf
    found = closest_tokens(disks, state, classes, target)
    least, others = distance.gather(1, found[:, None])[:, 0], distance.amin(dim=1)
    torch.testing.assert_close(least, others, atol=1e-5, rtol=0)
    assert (found == distance.argmin(dim=1)).float().mean() > 0.99
    assert (found != tokens).any()


@pytest.mark.parametrize("kind", ["disks", "verlet"])
def test_ends_are_where_play_leads(disks, kind):
    vocabulary = disks if kind == "disks" else VerletVocabulary()
    rng = np.random.default_rng(1)
    state = MotionState(torch.tensor(rng.normal(0, 3, (3, 3))).float(), torch.tensor(rng.normal(0, 2, (3, 2))).float())
    classes = torch.tensor([0, 1, 2])
    ends = vocabulary.ends(state, classes)
    for token in (0, 3, int(vocabulary.counts.min()) - 1):
        poses, after = vocabulary.play(state, classes, torch.full((3,), token))
        turn = (poses[:, -1, 2] - ends[:, token, 2] + np.pi) % (2 * np.pi) - np.pi
        torch.testing.assert_close(poses[:, -1, :2], ends[:, token, :2], atol=1e-5, rtol=1e-5)
        assert turn.abs().max() < 1e-5
        torch.testing.assert_close(after.displacement, poses[:, -1, :2] - state.pose[:, :2])


@pytest.mark.parametrize("kind", ["disks", "verlet"])
def test_what_was_played_is_found_again(disks, kind):
    """Decode, encode, and the same tokens come back, to the last one."""
    vocabulary = disks if kind == "disks" else VerletVocabulary()
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([0, 1, 2, 0])
    state = MotionState(torch.zeros(4, 3), torch.tensor([[3.0, 0.0]] * 4))
    poses, displacement, tokens = [state.pose], [state.displacement], []
    for _ in range(6):
        limit = vocabulary.counts[classes]
        middle = vocabulary.size // 2 if kind == "verlet" else 0
        token = (torch.randint(0, 1 << 30, (4,), generator=generator) % limit) if kind == "disks" else torch.tensor(
            [middle, middle + 1, middle + 13, middle - 13]
        )
        _, state = vocabulary.play(state, classes, token)
        tokens.append(token)
        poses.append(state.pose)
        displacement.append(state.displacement)
    recorded = torch.ones(4, 7, dtype=torch.bool)
    found = encode(vocabulary, classes, torch.stack(poses, 1), recorded, torch.stack(displacement, 1))
    assert found.error.max() < 1e-4
    assert torch.equal(found.tokens, torch.stack(tokens, 1))


def test_errors_do_not_add_up_and_gaps_restart_from_the_recording(disks):
    scene = street(seed=2)  # one of those that the vocabulary was made from: no speed is out of its reach
    poses, valid = torch.tensor(scene.pose[:, ::5]), torch.tensor(scene.valid[:, ::5]).clone()
    valid[0, 7] = False
    classes = class_of(torch.tensor(scene.kind))
    found = encode(disks, classes, poses, valid)
    assert not found.valid[0, 6]
    assert not found.valid[0, 7]
    assert found.tokens[0, 6] == -1
    torch.testing.assert_close(found.poses[0, 8], poses[0, 8])
    early, late = found.error[1:, 1:6], found.error[1:, -6:]
    assert late.mean() < early.mean() + 0.1


def test_noise_stays_among_the_nearest_and_needs_its_generator(disks):
    scene = street(seed=5)
    poses, valid = torch.tensor(scene.pose[:, ::5]), torch.tensor(scene.valid[:, ::5])
    classes = class_of(torch.tensor(scene.kind))
    one, again, other = (
        encode(disks, classes, poses, valid, nearest=5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    assert one.error.mean() > encode(disks, classes, poses, valid).error.mean()


def test_closest_tokens_are_the_best_of_all(disks):
    rng = np.random.default_rng(3)
    state = MotionState(torch.zeros(8, 3), torch.zeros(8, 2))
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    target = torch.tensor(rng.normal(0, 1, (8, 3))).float()
    chosen = closest_tokens(disks, state, classes, target)
    ends = disks.ends(state, classes)
    for row in range(8):
        box = torch.tensor(MATCHING_BOX_M[int(classes[row])])
        distances = corner_distance(ends[row, : disks.counts[classes[row]]], target[row], box)
        assert distances[chosen[row]] == distances.min()


def test_discs_cover_all_and_share_nothing():
    segments = segments_of(scenes(3), mirror=True)["vehicle"]
    discs = cover(segments, MATCHING_BOX_M[0], 0.2, 10_000, seed=0)
    rows = np.concatenate(discs)
    assert np.array_equal(np.sort(rows), np.arange(len(segments)))
    tokens, radius = k_disks(segments, MATCHING_BOX_M[0], 40)
    assert len(tokens) <= 40
    assert radius < 4.0
    more, finer = k_disks(segments, MATCHING_BOX_M[0], 160)
    assert finer < radius
    assert len(more) > len(tokens)


def test_mirroring_makes_a_vocabulary_even():
    segments = segments_of(scenes(4), mirror=True)["vehicle"]
    cells = GridCells((-5.0, 20.0, 50), (-2.5, 2.5, 20), 4, 6)
    tokens = grid(segments, cells)
    ends = {tuple(np.round(end, 3)) for end in tokens[:, -1, :2].tolist()}
    mirrored = {(x, round(-y, 3) + 0.0) for x, y in ends}
    common = len({(x, round(y, 3) + 0.0) for x, y in ends} & mirrored)
    assert common > 0.9 * len(ends)


def test_a_grid_can_stand_still_and_fills_its_holes():
    segments = segments_of(scenes(4), mirror=True)["vehicle"]
    cells = GridCells((-5.0, 20.0, 50), (-2.5, 2.5, 20), 4, 6)
    standing = np.zeros((30, 5, 3), np.float32)
    tokens = grid(np.concatenate([segments, standing]), cells)
    assert np.abs(tokens[:, -1, :2]).sum(axis=-1).min() < 0.3
    with pytest.raises(DataError, match="no cell of the grid"):
        grid(segments[:3], cells)


def test_reconstruction_of_held_out_motion_is_told(disks):
    told = reconstruction(disks, [street("held out", seed=77)])
    assert told["vehicle"]["half_seconds"] == 2 * 18
    assert told["vehicle"]["mean_error_m"] < 0.5
    many = make_vocabulary(VocabularySettings("k_disks", 40), scenes(8))[0]
    coarse, fine = (reconstruction(one, scenes(8))["vehicle"]["mean_error_m"] for one in (many, disks))
    assert fine < coarse


def test_a_store_gives_back_what_was_put_in_and_names_what_does_not_fit(disks, tmp_path):
    fingerprint = vocabulary_fingerprint({"method": "k_disks"}, None)
    save_vocabulary(tmp_path / "a", disks, fingerprint)
    loaded, found = load_vocabulary(tmp_path / "a")
    assert torch.equal(loaded.shapes, disks.shapes)
    assert torch.equal(loaded.counts, disks.counts)
    assert found.digest == fingerprint.digest
    save_vocabulary(tmp_path / "v", VerletVocabulary(), vocabulary_fingerprint({"method": "verlet"}, None))
    assert load_vocabulary(tmp_path / "v")[0] == VerletVocabulary()
    other = vocabulary_fingerprint({"method": "k_disks"}, None)
    fields = dict(other.fields) | {"interval_s": 0.1}
    save_vocabulary(tmp_path / "b", disks, type(other)(other.kind, fields))
    with pytest.raises(DataError, match=r"interval_s is 0\.1, 0\.5 is needed"):
        load_vocabulary(tmp_path / "b")
    (shard,) = (tmp_path / "a").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptShard):
        load_vocabulary(tmp_path / "a")


def test_a_class_that_never_moves_stands_still_and_slow_scenes_are_refused():
    only_cars = [street(f"s{number}", seed=number, agents=1) for number in range(2)]
    vocabulary, told = make_vocabulary(VocabularySettings("k_disks", 16), only_cars)
    assert told["cyclist"] == {"segments": 0, "tokens": 1}
    assert vocabulary.counts.tolist()[1:] == [1, 1]
    with pytest.raises(DataError, match=r"one of k_disks, grid, verlet"):
        VocabularySettings("words")


def test_stretched_motions_give_tokens_to_who_is_faster_than_anybody_recorded():
    """A runner among walkers: without stretching there is no token that follows, with it there is."""

    def at_speed(scene, factor):
        first = scene.pose[:, :1, :2]
        xy = first + factor * (scene.pose[..., :2] - first)
        return replace(scene, pose=np.concatenate([xy, scene.pose[..., 2:]], axis=-1))

    def way(scene):
        return np.hypot(*(scene.pose[2, -1, :2] - scene.pose[2, 0, :2]))

    walkers = [at_speed(scene, 0.15) for scene in scenes(6)]
    runner = at_speed(max(scenes(6), key=way), 0.15 * 2.8)
    error = {}
    for name, stretch in (("plain", None), ("stretched", {"pedestrian": [1.0, 1.4, 2.0, 2.8]})):
        vocabulary, told = make_vocabulary(VocabularySettings("k_disks", 200, stretch=stretch), walkers)
        error[name] = reconstruction(vocabulary, [runner])["pedestrian"]["mean_error_m"]
        assert told["pedestrian"]["segments"] == (1 if stretch is None else 4) * told["vehicle"]["segments"] // 2
    assert error["stretched"] < 0.25
    assert error["plain"] > 3 * error["stretched"], error
    with pytest.raises(DataError, match=r"stretch\.horse"):
        VocabularySettings(stretch={"horse": [2.0]})
    with pytest.raises(DataError, match=r"stretch\.pedestrian"):
        VocabularySettings(stretch={"pedestrian": [0.0]})
