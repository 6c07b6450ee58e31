"""Vocabularies that others have published: read back from their format, and refused by name where they are not it."""

import pickle

import numpy as np
import pytest
import torch
from agent_scenes import street

from navsim_ext.closed_loop.kinematics import compose
from navsim_ext.errors import DataError
from navsim_ext.pickles import RefusedObject
from sim_agents.vocabulary.build import VocabularySettings, make_vocabulary
from sim_agents.vocabulary.motion import CLASS_NAMES, MATCHING_BOX_M
from sim_agents.vocabulary.published import CLASS_KEYS, published_tokens

SIGNS = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2  # front left, front right, rear right, rear left


def boxes_of(tokens: np.ndarray, side: tuple[float, float], start: np.ndarray) -> np.ndarray:
    """[V, 6, 4, 2] corners of tokens [V, 5, 3] that begin at the pose ``start``, as the published files have them."""
    first = torch.tensor(np.tile(start, (len(tokens), 1)), dtype=torch.float32)
    poses = np.concatenate([first.numpy()[:, None], compose(first, torch.tensor(tokens)).numpy()], axis=1)
    c, s = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    turn = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    return (turn[:, :, None] @ (SIGNS * side)[:, :, None])[..., 0] + poses[:, :, None, :2]


@pytest.fixture
def made(tmp_path):
    vocabulary, _ = make_vocabulary(VocabularySettings("k_disks", 30), [street(f"s{n}", seed=n) for n in range(4)])
    start = np.array([0.4, -0.3, 0.2])
    content = {"token_all": {}}
    for row, (key, side) in enumerate(zip(CLASS_KEYS, MATCHING_BOX_M, strict=True)):
        content["token_all"][key] = boxes_of(vocabulary.shapes[row, : vocabulary.counts[row]].numpy(), side, start)
    path = tmp_path / "tokens.pkl"
    path.write_bytes(pickle.dumps(content))
    return vocabulary, content, path


def test_tokens_come_back_from_their_boxes(made):
    vocabulary, _, path = made
    found, told = make_vocabulary(VocabularySettings("published", file=str(path)), [])
    assert torch.equal(found.counts, vocabulary.counts)
    torch.testing.assert_close(found.shapes, vocabulary.shapes, atol=2e-5, rtol=0)
    assert [told[name]["tokens"] for name in CLASS_NAMES] == vocabulary.counts.tolist()


def test_other_content_is_refused_by_name(made, tmp_path):
    path = made[2]

    def refused(change, match, error=DataError):
        changed = pickle.loads(path.read_bytes())
        change(changed["token_all"])
        (tmp_path / "other.pkl").write_bytes(pickle.dumps(changed))
        with pytest.raises(error, match=match):
            published_tokens(tmp_path / "other.pkl")

    refused(lambda one: one.pop("cyc"), "token_all of veh, ped, cyc")
    refused(lambda one: one.update(veh=one["veh"][:, :5]), r"\[V, 6, 4, 2\] was expected")
    refused(lambda one: one.update(veh=one["veh"] * 1.5), "length of 7.20")
    refused(lambda one: one["ped"].__setitem__((3, 0, 0, 0), np.nan), "not finite in token 3")
    refused(lambda one: one.update(veh=[1, 2]), "no array of numbers")
    refused(lambda one: one.update(veh=torch.device("cpu")), "device", RefusedObject)
    for wrong in ({"method": "published"}, {"method": "k_disks", "file": "a.pkl"}):
        with pytest.raises(DataError, match="needs a file, others take none"):
            VocabularySettings(**wrong)
