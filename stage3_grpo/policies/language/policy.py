"""A vision-language model as a policy: its decisions are the tokens of an answer.

Legend: S prompts, G answers of each, N = S G rows (prompt by prompt), K tokens of the longest answer.

    roll     encodes each prompt with its picture once, samples G answers of it, scores them by a reward of words
    decide   scores the same tokens again, prompts shared by their answers (or, with gradient checkpointing, packed)
    teacher  the data's own answers: cloning holds to the warm-up's data
    reference  the model that training starts from: its adapters switched off (LoRA), or a second copy

Policy, old and reference log-probabilities come from the same function, with the picture in each of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.questions.answers import decision_part
from navsim_ext.questions.meta_actions import action_weights, frequencies
from navsim_ext.runtime.not_finite import loss_not_finite
from navsim_ext.runtime.rng import derive_seed
from stage1_vlm import (
    AnswerSampling,
    AnswerScores,
    EncodedPrompt,
    LoraSettings,
    SampledAnswer,
    VisionLanguageBackbone,
    add_lora,
    encode_prompt,
    freeze,
    load_backbone,
    sample_answers,
    score_answers,
    score_conversations,
    trainable_summary,
    weights_digest,
)
from stage3_grpo.algorithm import Algorithm, AlgorithmError
from stage3_grpo.policies.language.data import AskedPrompt, PromptData, decisions_of
from stage3_grpo.policies.language.held_out import LanguageHeldOut
from stage3_grpo.policies.language.statistics import Judge, means_over_processes, reply_columns
from stage3_grpo.policy import DecisionScores, Key, Needs, PolicyRollout, RewardPart
from stage3_grpo.rewards.replies import Array, Replies
from stage3_grpo.rewards.word_reward import WordReward, WordScores
from stage3_grpo.update import taught_by

if TYPE_CHECKING:
    from navsim_ext.metric_cache.scorer import PdmScorer

log = logging.getLogger(__name__)
MODULE = "vlm"  # the model's name in checkpoints


@dataclass
class Answers:
    """What a rollout of words leaves besides its trace."""

    prompts: list[AskedPrompt]
    drawn: list[list[SampledAnswer]]
    replies: Replies
    scores: WordScores
    columns: dict[str, Array]
    seconds: dict[str, float]


class LanguagePolicy:
    """Trains the checkpoint folder ``init``; ``reference`` None: the model that training starts from.

    ``metric_cache``: for rewards that score trajectories. ``lora``: arguments of LoraSettings (dropout must be 0: a
    dropped weight would make old and new log-probabilities those of other policies), None: the parts that are not
    ``frozen`` learn whole. ``gradient_checkpointing`` encodes each prompt again with each of its answers.
    ``rows_at_once``: answers of one forward pass in the update (None: all): memory, not the result.
    """

    name = "language"

    def __init__(
        self,
        init: str,
        reward: WordReward,
        *,
        reference: str | None = None,
        metric_cache: str | None = None,
        sampling: AnswerSampling | None = None,
        lora: Mapping[str, Any] | None = None,
        frozen: Mapping[str, bool] | None = None,
        gradient_checkpointing: bool = False,
        rows_at_once: int | None = None,
        dtype: str = "float32",
        attention: str = "sdpa",
        max_image_tokens: int | None = None,
    ) -> None:
        self.init, self.reference_path = init, reference
        self.reward, self.metric_cache = reward, metric_cache
        self.scorer: PdmScorer | None = None
        self.sampling = sampling or AnswerSampling()
        if self.sampling.temperature == 0.0:
            raise DataError(
                "temperature 0 always takes the most probable token: there is nothing to explore; 1 was expected"
            )
        self.lora = LoraSettings(**lora) if lora else None
        if self.lora is not None and self.lora.dropout:
            raise DataError(f"lora.dropout is {self.lora.dropout}: in reinforcement it must be 0")
        self.frozen, self.gradient_checkpointing = dict(frozen or {}), gradient_checkpointing
        self.rows_at_once = rows_at_once
        self.dtype, self.attention, self.max_image_tokens = dtype, attention, max_image_tokens
        self.backbone: VisionLanguageBackbone | None = None
        self.second: VisionLanguageBackbone | None = None  # the reference, where it is a copy
        self.fingerprint: Fingerprint | None = None  # of the reference
        self.judge = Judge()
        self._device = torch.device("cpu")

    # ---- before the first step

    def build(self, datamodule: PromptData, algorithm: Algorithm, seed: int) -> Mapping[str, nn.Module]:
        if algorithm.needs_value:
            raise AlgorithmError(f"{algorithm.name} needs a value head, which words have not: take a group advantage")
        credits = {term.credit for term in self.reward.everything}
        if credits != {"all"} and not algorithm.by_part:
            raise AlgorithmError(
                f"the reward credits its terms to {sorted(credits)}, which only algorithm.by_part=true does: set it, "
                "or set the credit of every term to all"
            )
        if self.reward.needs_scorer != (self.metric_cache is not None):
            raise DataError(
                "the reward scores trajectories, which needs a metric cache: set policy.metric_cache"
                if self.reward.needs_scorer
                else "policy.metric_cache has no effect: the reward scores no trajectories; take reward=words_pdm or "
                "decision_and_drive, or set it to null"
            )
        if self.metric_cache is not None:
            from navsim_ext.metric_cache.scorer import PdmScorer  # loads the kernels

            self.scorer = PdmScorer(self.metric_cache)
        self.backbone = self._load(self.init)
        self.backbone.model.config.use_cache = True
        freeze(self.backbone, self.frozen)
        if self.lora is not None:
            self.backbone.adapter = add_lora(self.backbone, self.lora)
        if self.gradient_checkpointing:
            self.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        other = self.reference_path is not None and Path(self.reference_path).resolve() != Path(self.init).resolve()
        if self.lora is None or other:
            path = self.reference_path or self.init
            self.second = self._load(path)
            self.second.model.eval().requires_grad_(False)
            if self.second.processor.fingerprint_fields() != self.backbone.processor.fingerprint_fields():
                raise DataError(f"the reference {path} has other tokens or pictures than {self.init}: take the model "
                                "that training starts from")  # fmt: skip
        self.fingerprint = Fingerprint("vlm", {"weights": weights_digest(self.reference_path or self.init)})
        log.info("%s: %s", self.init, trainable_summary(self.backbone))
        return {MODULE: self.backbone.model}

    def _load(self, path: str) -> VisionLanguageBackbone:
        return load_backbone(
            path, dtype=self.dtype, attention=self.attention, max_image_tokens=self.max_image_tokens, exact=True
        )

    def parameters(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"policy": [weight for weight in self.backbone.model.parameters() if weight.requires_grad]}

    @property
    def lora_scaling(self) -> float:
        return 0.0 if self.lora is None else self.lora.alpha / self.lora.rank

    def begin(self, datamodule: PromptData, device: Any) -> None:
        """Weights of the actions, labels of all questions, coverage of the scorer, room in the context."""
        self._device = torch.device(device)
        if self.second is not None:
            self.second.model.to(device)
        prompts = datamodule.dataset("train")
        if self.reward.weighs_by_frequency:
            decisions = decisions_of(prompts)
            if not decisions:
                raise DataError("the reward weighs actions by their frequency, and no training question has a decision")
            counts = frequencies(decisions)
            log.info("actions of the training questions: %s", counts)
            if never := [action for action, count in counts.items() if count == 0]:
                log.warning("actions that no training question has: %s", ", ".join(never))
            self.reward = self.reward.with_frequencies(action_weights(counts))
        self.reward.require_labels(prompts.prompted)
        if self.scorer is not None:
            self.scorer.require_coverage([one.token for one in prompts.prompted])
        longest = datamodule.rules.max_sequence_length + self.sampling.max_new_tokens
        room = self.backbone.model.config.get_text_config().max_position_embeddings
        if longest > room:
            raise DataError(
                f"data.max_sequence_length {datamodule.rules.max_sequence_length} and policy.sampling.max_new_tokens "
                f"{self.sampling.max_new_tokens} exceed the model's context of {room} tokens: lower one of them"
            )

    # ---- answers

    @contextlib.contextmanager
    def _as(self, reference: bool) -> Iterator[VisionLanguageBackbone]:
        """The policy's or the reference's model."""
        if reference and self.second is not None:
            yield self.second
        elif reference:
            with self.backbone.adapter.disable_adapter():
                yield self.backbone
        else:
            yield self.backbone

    def _encoded(self, backbone: VisionLanguageBackbone, prompts: Sequence[AskedPrompt]) -> list[EncodedPrompt]:
        backbone.model.eval()  # keys and values are kept, which gradient checkpointing would not
        return [encode_prompt(backbone, prompt.example) for prompt in prompts]

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[AskedPrompt],
        keys: Sequence[Sequence[int]],
        sampling: AnswerSampling,
        *,
        reference: bool,
    ) -> list[list[SampledAnswer]]:
        with self._as(reference) as backbone:
            return sample_answers(backbone, self._encoded(backbone, prompts), keys, sampling)

    def replies(self, prompts: Sequence[AskedPrompt], drawn: Sequence[Sequence[SampledAnswer]]) -> Replies:
        """All answers as rewards see them, each prompt a group."""
        flat = [(place, answer) for place, row in enumerate(drawn) for answer in row]
        return Replies(
            [answer.text(self.backbone) for _, answer in flat],
            [prompts[place].prompted for place, _ in flat],
            np.array([place for place, _ in flat], dtype=np.int64),
            np.array([answer.truncated for _, answer in flat], dtype=bool),
        )

    def roll(self, batch: Sequence[AskedPrompt], group_size: int, key: Key, needs: Needs) -> PolicyRollout:
        prompts, start = list(batch), time.perf_counter()
        keys = [
            [derive_seed(key.seed, key.rollout, prompt.name, sample) for sample in range(group_size)]
            for prompt in prompts
        ]
        drawn = self.answers(prompts, keys, self.sampling, reference=False)
        sampled = time.perf_counter()
        replies = self.replies(prompts, drawn)
        pending = self.reward.submit(self.scorer, replies)  # scored beside the device's work
        tokens = [[answer.tokens for answer in row] for row in drawn]
        logp_old = logp_ref = None
        with torch.no_grad():
            if needs.old:
                logp_old = self._scores(prompts, tokens, reference=False).logp
            if needs.reference:
                logp_ref = self._scores(prompts, tokens, reference=True).logp
        referenced = time.perf_counter()
        scores = pending.result()
        lengths = [len(answer) for row in tokens for answer in row]
        columns = reply_columns(replies, lengths, scores, self.reward)
        columns["entropy"] = np.array([float(answer.entropy.mean()) for row in drawn for answer in row])
        seconds = {"sample": sampled - start, "reference": referenced - sampled}
        seconds["score_wait"] = time.perf_counter() - referenced
        own = Answers(prompts, drawn, replies, scores, columns, seconds)
        place = torch.as_tensor(replies.group, device=self._device)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        valid = torch.as_tensor(scores.valid, device=self._device)
        reward = torch.as_tensor(np.where(scores.valid, scores.reward, 0.0), dtype=torch.float32, device=self._device)
        taught = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p.reply), dtype=torch.bool) for p in prompts], True)
        return PolicyRollout(
            names=[prompt.name for prompt in prompts], start=place, group=place, mask=mask.to(self._device),
            reward=reward, valid=valid, own=own, logp_old=logp_old, logp_ref=logp_ref,
            parts=self._parts(scores, drawn, mask), taught=taught.to(self._device),
            teaches=torch.arange(len(prompts), device=self._device),
            reasons=[reason for reason in scores.reasons if reason],
        )  # fmt: skip

    def _parts(self, scores: WordScores, drawn: Sequence[Sequence[SampledAnswer]], mask: Tensor) -> tuple:
        """The summands of the reward with the tokens that each is credited to."""
        flat = [answer for row in drawn for answer in row]
        decision = torch.zeros_like(mask)
        if any(part.credit != "all" for part in scores.parts):
            for row, answer in enumerate(flat):
                decision[row, : self.decision_tokens(answer)] = True
        scopes = {"all": None, "decision": (decision & mask).to(self._device)}
        scopes["trajectory"] = (~decision & mask).to(self._device)
        return tuple(
            RewardPart(
                part.name, torch.as_tensor(part.value, dtype=torch.float32, device=self._device), part.weight,
                scopes[part.credit],
            )
            for part in scores.parts
        )  # fmt: skip

    def decision_tokens(self, answer: SampledAnswer) -> int:
        """How many tokens of an answer come before its trajectory; all where it writes none."""
        tokens = answer.tokens.tolist()
        decode = self.backbone.processor.tokenizer.decode
        text = decode(tokens, skip_special_tokens=True)
        end = len(decision_part(text))
        if end == len(text):
            return len(tokens)
        low, high = 0, len(tokens)  # the most tokens whose text ends before the trajectory begins
        while low < high:
            middle = (low + high + 1) // 2
            if len(decode(tokens[:middle], skip_special_tokens=True)) <= end:
                low = middle
            else:
                high = middle - 1
        return low

    def _scores(
        self, prompts: Sequence[AskedPrompt], tokens: Sequence[Sequence[Tensor]], *, reference: bool
    ) -> AnswerScores:
        scale = self.sampling.scale
        with self._as(reference) as backbone:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                backbone.model.train()  # checkpointing is for training; nothing here drops out
                examples = [prompt.example for prompt in prompts]
                return score_conversations(backbone, examples, tokens, temperature=scale)
            return score_answers(backbone, self._encoded(backbone, prompts), tokens, temperature=scale)

    def decide(self, rollout: PolicyRollout, rows: Tensor, *, teach: bool) -> DecisionScores:
        own: Answers = rollout.own
        flat = [answer.tokens for row in own.drawn for answer in row]
        groups: dict[int, list[int]] = {}
        for row in rows.tolist():
            groups.setdefault(int(rollout.start[row]), []).append(row)
        taught = taught_by(rollout, rows).tolist() if teach else []
        places = sorted(set(groups) | set(taught))
        tokens = [[flat[row] for row in groups.get(place, [])] for place in places]
        for place, row in zip(places, tokens, strict=True):
            row += [own.prompts[place].reply] if place in taught else []
        scores = self._scores([own.prompts[place] for place in places], tokens, reference=False)
        order, teachers, count = {}, {}, 0
        for place in places:
            for row in groups.get(place, []):
                order[row], count = count, count + 1
            if place in taught:
                teachers[place], count = count, count + 1
        chosen = torch.tensor([order[row] for row in rows.tolist()], dtype=torch.int64, device=scores.logp.device)
        steps = rollout.mask.shape[1]
        teacher = None
        if teach:
            picked = torch.tensor([teachers[place] for place in taught], dtype=torch.int64, device=scores.logp.device)
            teacher = _to_width(scores.logp[picked], rollout.taught.shape[1])
        return DecisionScores(_to_width(scores.logp[chosen], steps), None, teacher)

    # ---- records

    def statistics(self, rollout: PolicyRollout) -> dict[str, float]:
        own: Answers = rollout.own
        told = means_over_processes(own.columns | {"reward": own.scores.reward}, self._device)
        told |= self.judge.of(told.pop("reward"), told.get("accuracy", float("nan")))
        told |= {f"seconds_{name}": value for name, value in own.seconds.items()}
        return told | {"seconds_rollout": sum(own.seconds.values())}

    def after_update(self, updates: int) -> None:
        """The reference stays."""

    def held_out(self) -> LanguageHeldOut:
        return LanguageHeldOut(self)

    def not_finite(self, what: str, value: float, trainer: pl.Trainer, rollout: PolicyRollout) -> TriviumError:
        batch = {"questions": list(rollout.names), "replies": list(rollout.own.replies.texts)}
        return loss_not_finite(what, value, trainer, batch)

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        scorer = None if self.scorer is None else self.scorer.fingerprint.to_json()
        return {}, {"reference": self.fingerprint.to_json(), "scorer": scorer, "judge": self.judge.state_dict()}

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Continues only against the reference and the scorer that the run began with."""
        Fingerprint.from_json(state["reference"]).require_equal(
            self.fingerprint, mine="the reference of the checkpoint", theirs="the reference now",
            remedy="take the model that the run began with, or start afresh with resume=never",
        )  # fmt: skip
        if state["scorer"] is not None and self.scorer is not None:
            Fingerprint.from_json(state["scorer"]).require_equal(
                self.scorer.fingerprint, mine="the scorer of the checkpoint", theirs="the scorer now",
                remedy="use the metric cache that the run began with, or start afresh with resume=never",
            )  # fmt: skip
        self.judge.load_state_dict(state["judge"])


def _to_width(values: Tensor, width: int) -> Tensor:
    """[n,A] -> [n,width]: a part of the rows may be shorter than the longest of all, and the teacher's longer."""
    if values.shape[1] >= width:
        return values[:, :width]
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
