"""Words as a policy: what is scored has seen the picture, the reference is where the policy began, credit goes where it
belongs, and a run that was cut goes on as if it had not been."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from words_world import CRUISE, build_model, write_questions

from navsim_ext.errors import DataError, MissingError
from navsim_ext.prompts import format_trajectory
from navsim_ext.questions.catalogue import with_reasoning
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from stage1_vlm.loading import load_backbone
from stage1_vlm.sampling import AnswerSampling, SampledAnswer
from stage3_grpo.algorithm import Algorithm, AlgorithmError, GroupStandardised
from stage3_grpo.credit import assign_credit
from stage3_grpo.policies.language import LanguagePolicy, PromptData
from stage3_grpo.policies.language.statistics import BASELINE_ROLLOUTS, Judge
from stage3_grpo.policy import Key, Needs
from stage3_grpo.rewards.word_reward import WordReward
from stage3_grpo.rewards.word_terms import PlanningAccuracy, PlanningQuality, WellFormed

EVERYTHING = Needs(old=True, reference=True, value=False, once=True)
LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "save": []}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {family: str(build_model(tmp_path_factory.mktemp(family), family)) for family in ("internvl", "qwen")}


def reward() -> WordReward:
    return WordReward({"speed": PlanningQuality("speed"), "format": WellFormed()})


def make(models, questions, family="internvl", *, by_part=False, given=None, **options):
    """(policy, its prompts, algorithm)."""
    init = models[family]
    data = PromptData(str(questions), None, init, types=["decision", "decision_trajectory"], max_image_tokens=16)
    options = {"sampling": AnswerSampling(max_new_tokens=7), "max_image_tokens": 16} | options
    policy = LanguagePolicy(init, given or reward(), **options)
    algorithm = Algorithm("test", group_size=3, advantage=GroupStandardised(), by_part=by_part)
    policy.build(data, algorithm, 0)
    policy.begin(data, "cpu")
    return policy, data.dataset("train"), algorithm


@pytest.mark.parametrize("options", [{"lora": LORA}, {"lora": None}])
@pytest.mark.parametrize("family", ["internvl", "qwen"])
def test_the_reference_is_where_the_policy_begins_and_the_picture_reaches_all_of_them(
    models, questions, family, options
):
    policy, prompts, _ = make(models, questions, family, **options)
    batch = [prompts[0], prompts[1]]
    rollout = policy.roll(batch, 3, Key(0, 0), EVERYTHING)
    now = policy.decide(rollout, torch.arange(6), teach=False).logp
    mask = rollout.mask
    torch.testing.assert_close(now[mask], rollout.logp_old[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.logp_ref[mask], rollout.logp_old[mask], atol=1e-6, rtol=0)  # KL 0 at step 0
    sampled = torch.cat([answer.logp for row in rollout.own.drawn for answer in row])
    torch.testing.assert_close(sampled, now[mask].detach(), atol=1e-4, rtol=0)
    # the same tokens beside the other picture
    tokens = [[answer.tokens for answer in row] for row in rollout.own.drawn]
    swapped = [replace(one, example=replace(one.example, pixels=other.example.pixels))
               for one, other in zip(batch, batch[::-1])]  # fmt: skip
    for reference in (False, True):
        with torch.no_grad():
            own, other = (policy._scores(each, tokens, reference=reference) for each in (batch, swapped))
        assert ((own.logp - other.logp).abs()[own.mask] > 1e-7).all()


def test_the_reference_stays_while_the_policy_learns(models, questions):
    for options in ({"lora": LORA}, {"lora": None}):
        policy, prompts, _ = make(models, questions, **options)
        rollout = policy.roll([prompts[0]], 3, Key(0, 0), EVERYTHING)
        with torch.no_grad():
            for weight in policy.parameters()["policy"]:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
            tokens = [[answer.tokens for answer in row] for row in rollout.own.drawn]
            again = policy._scores(rollout.own.prompts, tokens, reference=True).logp
            moved = policy._scores(rollout.own.prompts, tokens, reference=False).logp
        torch.testing.assert_close(again[rollout.mask], rollout.logp_ref[rollout.mask])
        assert (moved - again)[rollout.mask].abs().max() > 1e-3


def test_rows_of_a_minibatch_are_scored_as_in_the_whole_and_checkpointing_changes_nothing(models, questions):
    policy, prompts, _ = make(models, questions)
    rollout = policy.roll([prompts[i] for i in range(3)], 3, Key(0, 4), EVERYTHING)
    whole = policy.decide(rollout, torch.arange(9), teach=True)
    rows = torch.tensor([7, 3, 8])
    part = policy.decide(rollout, rows, teach=False).logp
    mask = rollout.mask[rows]
    torch.testing.assert_close(part[mask], whole.logp[rows][mask], atol=1e-5, rtol=0)
    assert whole.teacher_logp.shape == rollout.taught.shape
    assert (whole.teacher_logp[rollout.taught] < 0).all()
    packed, _, _ = make(models, questions, gradient_checkpointing=True)
    again = packed.decide(rollout, torch.arange(9), teach=True)
    torch.testing.assert_close(again.logp[rollout.mask], whole.logp[rollout.mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(again.teacher_logp, whole.teacher_logp, atol=1e-5, rtol=0)
    gradients = []
    for one, scores in ((policy, whole), (packed, again)):
        scores.logp[rollout.mask].sum().backward()
        gradients.append([weight.grad for weight in one.parameters()["policy"]])
    for mine, theirs in zip(*gradients):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_rollouts_depend_on_seed_number_and_question_alone(models, questions):
    policy, prompts, _ = make(models, questions)
    both = policy.roll([prompts[0], prompts[1]], 3, Key(0, 2), EVERYTHING)
    turned = policy.roll([prompts[1], prompts[0]], 3, Key(0, 2), EVERYTHING)
    assert both.own.replies.texts[:3] == turned.own.replies.texts[3:]
    other = policy.roll([prompts[0], prompts[1]], 3, Key(0, 3), EVERYTHING)
    assert other.own.replies.texts != both.own.replies.texts


def spoken(policy, text: str) -> SampledAnswer:
    ids = [*policy.backbone.processor.token_ids(text), policy.backbone.processor.end_of_turn_id]
    return SampledAnswer(torch.tensor(ids), *torch.zeros(2, len(ids)), False)


def test_decision_and_trajectory_tokens_are_told_apart(models, questions):
    policy, _, _ = make(models, questions)
    drive = format_trajectory(CRUISE)
    answer = spoken(policy, with_reasoning("Free.", f"KEEP, STRAIGHT {drive}"))
    count = policy.decision_tokens(answer)
    decode = policy.backbone.processor.tokenizer.decode
    assert "PT" not in decode(answer.tokens[:count].tolist())
    assert "KEEP, STRAIGHT" in decode(answer.tokens[:count].tolist())
    assert decode(answer.tokens[count:].tolist(), skip_special_tokens=True).strip().startswith("[PT")
    plain = spoken(policy, with_reasoning("Free.", "KEEP, STRAIGHT"))
    assert policy.decision_tokens(plain) == len(plain.tokens)


def test_credit_goes_to_the_tokens_of_its_part(models, questions):
    split = WordReward({"accuracy": PlanningAccuracy(credit="decision"), "form": WellFormed(credit="trajectory")})
    policy, prompts, algorithm = make(models, questions, given=split, by_part=True)
    rollout = policy.roll([prompts[0]], 3, Key(0, 0), EVERYTHING)
    names = [part.name for part in rollout.parts]
    assert names == ["accuracy", "form"]
    decision, trajectory = (part.scope for part in rollout.parts)
    assert not (decision & trajectory).any()
    assert ((decision | trajectory) == rollout.mask).all()
    rewarded = replace(rollout, parts=tuple(part._replace(reward=torch.tensor([1.0, 0.0, 0.0]))
                                            for part in rollout.parts[:1]))  # fmt: skip
    credit = assign_credit(algorithm, rewarded)
    assert credit.advantage[0][decision[0]].min() > 0 > credit.advantage[1][decision[1]].max()
    assert not credit.advantage[trajectory].any()


def test_what_does_not_fit_together_is_refused(models, questions, tmp_path):
    with pytest.raises(AlgorithmError, match="by_part"):
        make(models, questions, given=WordReward({"a": PlanningAccuracy(credit="decision")}))
    with pytest.raises(DataError, match="dropout"):
        make(models, questions, lora=LORA | {"dropout": 0.1})
    with pytest.raises(DataError, match="temperature"):
        make(models, questions, sampling=AnswerSampling(temperature=0.0))
    with pytest.raises(DataError, match="metric_cache has no effect"):
        make(models, questions, metric_cache="x")
    with pytest.raises(DataError, match="context"):
        make(models, questions, sampling=AnswerSampling(max_new_tokens=32_768))
    with pytest.raises(DataError, match="other tokens or pictures"):
        make(models, questions, reference=str(build_model(tmp_path / "m", "qwen")))
    with pytest.raises(DataError, match="types"):
        PromptData(str(questions), None, models["internvl"], types=["other"], max_image_tokens=16).dataset("train")


@pytest.mark.parametrize(("changes", "message"), [
    ({"answer": "FLY, STRAIGHT"}, "states no decision"), ({"road": {"centre": 1}}, "road"),
    ({"speed_mps": -1}, "speed"),
])  # fmt: skip
def test_records_that_lie_are_named(models, tmp_path, changes, message):
    mixture = write_questions(tmp_path / "q", 3, **changes)
    with pytest.raises(DataError, match=message):
        PromptData(str(mixture), None, models["internvl"], types=["decision"], max_image_tokens=16).dataset("train")


def test_only_listed_scenes_are_trained_on(models, questions, tmp_path):
    def data(content):
        (tmp_path / "tokens.json").write_text(content)
        return PromptData(str(questions), str(questions), models["internvl"], types=["decision"],
                          tokens=str(tmp_path / "tokens.json"), max_image_tokens=16)  # fmt: skip

    kept = data(json.dumps({"tokens": [f"c{1:015x}", f"c{5:015x}"]}))
    assert len(kept.dataset("train")) == 2
    assert len(kept.dataset("val")) == 12  # a filter is for training
    for bad in ("{", "[]", '{"tokens": [1]}'):
        with pytest.raises(DataError):
            data(bad)
    with pytest.raises(DataError, match="listed scenes"):
        data('{"tokens": ["x"]}').dataset("train")
    with pytest.raises(MissingError):
        PromptData(str(questions), None, models["internvl"], types=["decision"], tokens=str(tmp_path / "absent"))


def test_the_judge_sees_reward_and_accuracy_part():
    judge = Judge()
    for _ in range(BASELINE_ROLLOUTS):
        told = judge.of(1.0, 0.5)
    assert told == {"reward_gain": 0.0, "accuracy_gain": 0.0, "divergence": 0.0}
    assert judge.of(1.2, 0.4)["divergence"] == pytest.approx(0.3)
    assert judge.of(1.2, 0.6)["divergence"] == 0.0
    assert judge.of(math.nan, 0.6) == {}
    again = Judge()
    again.load_state_dict(judge.state_dict())
    assert again.of(1.2, 0.4)["divergence"] == pytest.approx(0.3)


# ---- whole runs


def config(models, questions, output, *overrides):
    return compose("stage3", [
        "experiment=language_demo", f"init={models['internvl']}", f"data.train={questions}", f"data.val={questions}",
        f"output_dir={output}", "data.eval_limit=3", "policy.sampling.max_new_tokens=6", "algorithm.group_size=2",
        "algorithm.bc_weight.start=0.5", "keep=all", "callbacks.checkpoint.every_n_steps=1", "logger=csv", *overrides,
    ])  # fmt: skip


class Cut(BaseException):
    """As if the process had been killed."""


def test_a_run_that_was_cut_ends_with_the_same_weights_and_leaves_a_model(models, questions, tmp_path, monkeypatch):
    whole = run(config(models, questions, tmp_path / "whole"))
    roll = LanguagePolicy.roll

    def cut(self, batch, group_size, key, needs):
        if key.rollout == 2:
            raise Cut
        return roll(self, batch, group_size, key, needs)

    monkeypatch.setattr(LanguagePolicy, "roll", cut)
    with pytest.raises(Cut):
        run(config(models, questions, tmp_path / "cut"))
    monkeypatch.setattr(LanguagePolicy, "roll", roll)
    resumed = run(config(models, questions, tmp_path / "cut"))
    assert resumed["resumed_from"] is not None
    assert resumed["global_step"] == whole["global_step"] == 3
    mine, theirs = (result["module"].state_dict() for result in (resumed, whole))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    for folder in ("whole", "cut"):
        model = load_backbone(tmp_path / folder / "model")
        saved = model.model.state_dict()
        assert np.isfinite([float(value.float().sum()) for value in saved.values()]).all()
    table = (tmp_path / "cut" / "version_0" / "rewards.csv").read_text().splitlines()
    assert len(table) == 4
    for column in ("accuracy", "well_formed", "readable", "distinct", "length", "truncated", "part_format", "entropy"):
        assert column in table[0].split(",")


def test_a_second_run_against_another_reference_is_refused(models, questions, tmp_path):
    run(config(models, questions, tmp_path / "out", "trainer.max_steps=1"))
    other = build_model(tmp_path / "other")
    weights = load_backbone(other)
    with torch.no_grad():
        weights.model.lm_head.weight.add_(0.1)
    weights.save_pretrained(other)
    with pytest.raises(Exception, match="reference"):
        run(config(models, questions, tmp_path / "out", f"reference={other}",
                   "resume_ignore=[module.policy.reference,trainer.max_steps]"))  # fmt: skip


@pytest.mark.parametrize("name", ["alphadrive", "alphadrive_released"])
def test_rewards_compose(name):
    from hydra.utils import instantiate

    made = instantiate(compose("stage3", [f"reward={name}"]).reward)
    assert isinstance(made, WordReward)
    assert not made.needs_scorer


def test_rewards_of_trajectories_compose():
    from hydra.utils import instantiate

    for name, credit in (("words_pdm", "all"), ("decision_and_drive", "trajectory")):
        made = instantiate(compose("stage3", [f"reward={name}"]).reward)
        assert (made.needs_scorer, made.pdm.credit) == (True, credit)
