"""Rewards of words: tables computed by hand, and what tries to earn without being right earns nothing."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.errors import DataError
from navsim_ext.prompts import format_trajectory
from navsim_ext.questions.meta_actions import PAIRS, PATHS, SPEEDS, Decision, LaneAhead
from stage3_grpo.rewards.replies import Prompted, Replies
from stage3_grpo.rewards.terms import PdmTerm
from stage3_grpo.rewards.word_reward import WordReward, WordsPdm
from stage3_grpo.rewards.word_terms import (
    DecisionAgreement,
    PlanningAccuracy,
    PlanningQuality,
    ReleasedQuality,
    WellFormed,
    diversity,
)

ROAD = LaneAhead(np.array([[0.0, 0.0], [90.0, 0.0]]), np.zeros(2, bool), True)
CRUISE = np.stack([np.arange(1, 9) * 4.0, np.zeros(8), np.zeros(8)], axis=1)  # 8 m/s, straight on
STANDING = np.zeros((8, 3))


def reply(answer: str, think: str = "why") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def replies(texts, true="KEEP, STRAIGHT", group=None, cut=None) -> Replies:
    """One group unless told otherwise; ``true`` None: no label."""
    prompt = Prompted("token", Decision.parse(true) if true else None, 8.0, ROAD)
    count = len(texts)
    return Replies(
        list(texts), [prompt] * count, np.zeros(count, np.int64) if group is None else np.asarray(group),
        np.zeros(count, bool) if cut is None else np.asarray(cut),
    )  # fmt: skip


def alphadrive() -> WordReward:
    return WordReward({"speed": PlanningQuality("speed"), "path": PlanningQuality("path"), "format": WellFormed()})


def earned(reward: WordReward, asked: Replies, scorer=None) -> np.ndarray:
    return reward.submit(scorer, asked).result().reward


# ---- the paper's form, by hand


def test_alphadrive_by_hand():
    """Weights 0.8 and 1, group of 4: D = 1 - 0.2 (c - 1) / 3."""
    asked = replies([
        reply("KEEP, STRAIGHT"),            # speed set {KEEP} twice, path {STRAIGHT} three times
        reply("KEEP, STOP, STRAIGHT"),      # F1 = 2/3, W = 0.9, alone
        "KEEP, STRAIGHT",                   # right, but not in the form
        reply("STOP, LEFT_TURN"),           # wrong
    ])  # fmt: skip
    two, three = 1 - 0.2 / 3, 1 - 0.4 / 3
    np.testing.assert_allclose(earned(alphadrive(), asked), [
        0.8 * two + 0.8 * three + 1.0,
        2 / 3 * 0.9 + 0.8 * three + 1.0,
        0.8 * two + 0.8 * three,
        1.0,
    ])  # fmt: skip


def test_rare_actions_weigh_more():
    asked = replies([reply("STOP, LEFT_TURN"), reply("KEEP, STRAIGHT")], true="STOP, LEFT_TURN")
    np.testing.assert_allclose(earned(alphadrive(), asked), [3.0, 1.0])


def test_diversity_by_hand():
    keep, stop, none = frozenset({"KEEP"}), frozenset({"STOP"}), frozenset()
    np.testing.assert_allclose(diversity([keep] * 4, [0] * 4, 0.2), [0.8] * 4)
    np.testing.assert_allclose(diversity([keep, keep, stop, none], [0] * 4, 0.2), [1 - 0.2 / 3] * 2 + [1.0] * 2)
    np.testing.assert_allclose(diversity([keep, keep, keep], [0, 1, 1], 0.2), [1.0, 0.8, 0.8])  # a group of one


def test_frequency_weights_are_put_in_and_not_guessed():
    reward = WordReward({"speed": PlanningQuality("speed", weights="frequency")})
    with pytest.raises(DataError, match="frequency"):
        earned(reward, replies([reply("KEEP, STRAIGHT")]))
    weights = dict.fromkeys((*SPEEDS, *PATHS), 0.9)
    assert earned(reward.with_frequencies(weights), replies([reply("KEEP, STRAIGHT")]))[0] == pytest.approx(0.9)
    with pytest.raises(DataError, match="naming"):
        reward.with_frequencies(weights | {"KEEP": 0.2})
    with pytest.raises(DataError, match="weights"):
        PlanningQuality("speed", weights="rare")


# ---- hacks

ALL_ACTIONS = reply(", ".join(SPEEDS + PATHS))
EMPTY = ["", " ", reply(""), "<think></think><answer></answer>", "<answer></answer>", "<think>a</think>"]
TAGS = ["<think><answer></answer></think>", "<think></think>" * 3, "<answer><answer>KEEP, STRAIGHT</answer></answer>",
        reply("KEEP, STRAIGHT") * 2]  # fmt: skip


@pytest.mark.parametrize("true", PAIRS)
def test_listing_all_actions_earns_less_than_being_right_however_the_group_answers(true):
    alone = earned(alphadrive(), replies([ALL_ACTIONS, *[reply(true)] * 7], true=true))
    assert alone[0] < alone[1]
    for more in (*SPEEDS, *PATHS):
        if more not in true:
            hedged = earned(alphadrive(), replies([reply(f"{true}, {more}"), *[reply(true)] * 7], true=true))
            assert hedged[0] < hedged[1]


words = st.sampled_from([*SPEEDS, *PATHS, "maybe", "TURN", "<think>", "</think>", "<answer>", "</answer>", ",", "停车"])
anything = st.lists(words, max_size=12).map(" ".join) | st.sampled_from([reply(pair) for pair in PAIRS])


@given(st.lists(anything, min_size=1, max_size=8), st.sampled_from(PAIRS), st.sampled_from(EMPTY))
@settings(max_examples=150, deadline=None)
def test_an_empty_answer_never_earns_more_than_any_other(texts, true, empty):
    values = earned(alphadrive(), replies([*texts, empty], true=true))
    assert (values[-1] <= values + 1e-12).all()
    assert values[-1] == 0.0


@given(st.lists(anything, min_size=2, max_size=6), st.sampled_from(PAIRS), st.randoms())
@settings(max_examples=80, deadline=None)
def test_the_order_of_the_samples_never_matters(texts, true, random):
    order = list(range(len(texts)))
    random.shuffle(order)
    values = earned(alphadrive(), replies(texts, true=true))
    shuffled = earned(alphadrive(), replies([texts[i] for i in order], true=true))
    np.testing.assert_allclose(shuffled, values[order], atol=1e-12)


def test_swapped_words_count_alike_and_tags_alone_nothing():
    values = earned(alphadrive(), replies([reply("KEEP, STRAIGHT"), reply("STRAIGHT, KEEP")]))
    assert values[0] == values[1]
    for text in TAGS:
        assert earned(alphadrive(), replies([text]))[0] == 0.0
    wrong_place = reply("STOP, LEFT_TURN", think="KEEP, STRAIGHT")
    assert earned(alphadrive(), replies([wrong_place]))[0] == 1.0  # the form, nothing else


def test_the_reward_is_highest_for_the_right_pair_in_the_right_form():
    for true, said in itertools.product(PAIRS[::3], PAIRS):
        if said != true:
            values = earned(alphadrive(), replies([reply(said), reply(true)], true=true))
            assert values[0] < values[1]


# ---- the released form, with its faults


def test_the_released_form_pays_an_empty_answer_and_depends_on_the_order():
    released = WordReward({"speed": ReleasedQuality("speed"), "path": ReleasedQuality("path")})
    said = ["KEEP, STRAIGHT", "KEEP, STRAIGHT", ""]
    forward = earned(released, replies([reply(text) for text in said]))
    np.testing.assert_allclose(forward, [0.8 + 0.4 + 0.8 + 0.4, 0.8 - 0.4 + 0.8 - 0.4, 0.4 + 0.4])
    wrong = earned(released, replies([reply("STOP, LEFT_TURN"), reply("STOP, LEFT_TURN"), reply("")]))
    assert wrong[2] > wrong[1]  # the fault
    back = earned(released, replies([reply(text) for text in said[::-1]]))
    assert back[::-1].tolist() != forward.tolist()
    dotted = earned(released, replies([reply("KEEP, STRAIGHT.")]))
    np.testing.assert_allclose(dotted, [0.8 + 0.4 + 0.4])  # STRAIGHT. is no word


# ---- trajectories in words


@dataclass
class Columns:
    columns: dict
    valid: np.ndarray
    reason: np.ndarray

    def __getitem__(self, name):
        return self.columns[name]


class FakeScorer:
    """PDMS 0.5 for each trajectory, of unknown scenes none."""

    def __init__(self, unknown=()) -> None:
        self.unknown, self.asked = set(unknown), []

    def submit(self, tokens, trajectories, reward=None, **scoring):
        self.asked.append(np.asarray(trajectories))
        valid = np.array([token not in self.unknown for token in tokens])
        values = np.where(valid, 0.5, np.nan)

        columns = {"reward": values, "pdms_v1": values, "epdms_v2_no_ec_nofilter": values * 0.9}
        done = Future()
        done.set_result(Columns(columns, valid, np.where(valid, "", "no metric cache")))
        return done


def words_pdm(penalty=-0.1) -> WordReward:
    return WordReward(pdm=WordsPdm(PdmTerm(), penalty))


def test_a_trajectory_in_words_gets_its_score_and_an_unreadable_one_the_penalty():
    scorer = FakeScorer()
    texts = [format_trajectory(CRUISE), reply(format_trajectory(CRUISE)), "I drive on", ""]
    scores = words_pdm().submit(scorer, replies(texts)).result()
    np.testing.assert_allclose(scores.reward, [0.5, 0.5, -0.1, -0.1])
    assert scores.valid.all()
    assert np.isnan(scores.columns["pdms_v1"][2:]).all()  # counted as unreadable, never as a score
    np.testing.assert_allclose(scores.columns["judge"][:2], 0.45)
    np.testing.assert_allclose(scorer.asked[0][0], CRUISE)


def test_scenes_that_cannot_be_scored_are_invalid_not_punished():
    texts = [format_trajectory(CRUISE), "nothing"]
    scores = words_pdm().submit(FakeScorer(unknown={"token"}), replies(texts)).result()
    assert scores.valid.tolist() == [False, True]
    assert np.isnan(scores.reward[0])
    assert scores.reasons[0] == "no metric cache"


def test_an_answer_that_was_cut_off_does_not_go_on_by_itself():
    text = format_trajectory(CRUISE)[:120]  # five points, which would be continued
    whole, cut = earned(words_pdm(), replies([text, text], cut=[False, True]), FakeScorer())
    assert (whole, cut) == (0.5, -0.1)


def test_no_trajectory_at_all_needs_no_scorer_run():
    scorer = FakeScorer()
    assert earned(words_pdm(), replies(["a", "b"]), scorer).tolist() == [-0.1, -0.1]
    assert scorer.asked == []


def test_the_penalty_is_never_more_than_a_crash():
    for penalty in (0.1, float("nan")):
        with pytest.raises(DataError, match="penalty"):
            words_pdm(penalty)


def test_agreement_by_hand():
    drive, stand = format_trajectory(CRUISE), format_trajectory(STANDING)
    texts = [reply(f"KEEP, STRAIGHT {drive}"), reply(f"STOP, STRAIGHT {drive}"), reply(f"STOP, STRAIGHT {stand}"),
             reply("KEEP, STRAIGHT"), reply(drive), reply(f"KEEP, STOP, STRAIGHT {drive}"), ""]  # fmt: skip
    reward = WordReward({"agreement": DecisionAgreement()})
    assert earned(reward, replies(texts, true=None)).tolist() == [1, 0, 1, 0, 0, 0, 0]


def test_decision_and_trajectory_are_credited_apart():
    reward = WordReward(
        {"accuracy": PlanningAccuracy(credit="decision"), "agreement": DecisionAgreement(credit="trajectory")},
        WordsPdm(PdmTerm(), -0.1, weight=2.0, credit="trajectory"),
    )
    texts = [reply(f"KEEP, STRAIGHT {format_trajectory(CRUISE)}"), reply("STOP, STRAIGHT")]
    scores = reward.submit(FakeScorer(), replies(texts)).result()
    assert [(part.name, part.credit, part.weight) for part in scores.parts] == [
        ("accuracy", "decision", 1.0), ("agreement", "trajectory", 1.0), ("pdm", "trajectory", 2.0),
    ]  # fmt: skip
    np.testing.assert_allclose(scores.reward, [1.0 + 1.0 + 2 * 0.5, -0.2])


# ---- what is refused


def test_what_cannot_be_rewarded_is_named():
    with pytest.raises(DataError, match=r"decision.*token"):
        earned(alphadrive(), replies([reply("KEEP, STRAIGHT")], true=None))
    with pytest.raises(DataError, match="metric cache"):
        words_pdm().submit(None, replies([""]))
    lost = Replies(["a"], [Prompted("scene7")], np.zeros(1, np.int64), np.zeros(1, bool))
    with pytest.raises(DataError, match="scene7"):
        earned(WordReward({"agreement": DecisionAgreement()}), lost)
    with pytest.raises(DataError, match="at least one"):
        WordReward({"a": None})
    with pytest.raises(DataError, match="weight"):
        WordReward({"a": WellFormed(weight=0.0)})
    with pytest.raises(DataError, match="credit"):
        WordReward({"a": WellFormed(credit="some")})
    with pytest.raises(DataError, match="unequal"):
        Replies(["a"], [], np.zeros(1, np.int64), np.zeros(1, bool))


def test_a_term_that_is_nan_makes_the_row_invalid():
    class Odd:
        weight, credit = 1.0, "all"

        def value(self, asked):
            return np.array([np.nan, 1.0])

    scores = WordReward({"odd": Odd()}).submit(None, replies(["a", "b"])).result()
    assert scores.valid.tolist() == [False, True]
    assert "odd" in scores.reasons[0]
