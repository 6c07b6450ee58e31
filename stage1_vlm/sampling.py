"""Sampled answers of a vision-language model, and the log-probabilities of given answers.

Legend: S prompts, G answers of each, N = S G rows (prompt by prompt), P prompt tokens, A answer tokens, V vocabulary.

    A prompt with its pictures is encoded once (:func:`encode_prompt`); its keys and values serve all its G answers,
    when they are sampled and when they are scored. Prompts of unequal length are joined padded on the left.
    Answers that have ended leave the batch, so that the rest does not wait for the longest.
    The token of row n at place a is the inverse of its distribution at u_na, u keyed by (key of the row): neither the
    batch, the process nor the order matters.

Temperature divides the logits, in sampling and in scoring; ``top_k`` and ``top_p`` bound what is drawn, and tokens that
stand for pictures are never drawn; neither changes what a token is scored with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from navsim_ext.errors import DataError
from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.collate import pack
from stage1_vlm.processor import Example

COMPACT_SHARE = 0.75  # fewer rows than this share go on: those that ended leave the batch


@dataclass(frozen=True)
class AnswerSampling:
    """``temperature`` 0: the most probable token. ``top_k`` 0 and ``top_p`` 1: from all tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise DataError(f"temperature is {self.temperature}; a number in [0, 100] was expected")
        if not 0.0 < self.top_p <= 1.0 or self.top_k < 0:
            raise DataError(f"top_k {self.top_k}, top_p {self.top_p}: top_k >= 0 and 0 < top_p <= 1 were expected")
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens is {self.max_new_tokens}; 1 or more was expected")

    @property
    def scale(self) -> float:
        """What logits are divided by when answers are scored; greedy answers are scored as they are."""
        return self.temperature or 1.0


@dataclass(frozen=True)
class EncodedPrompt:
    """Keys and values [1,heads,P,d] of each layer, the last hidden state [D], and the position that comes next."""

    layers: list[tuple[Tensor, Tensor]]
    last: Tensor
    next_position: int

    def __len__(self) -> int:
        return self.layers[0][0].shape[2]


@dataclass(frozen=True)
class SampledAnswer:
    """``tokens`` [A] with the one that ends the turn, unless ``truncated``; ``logp`` [A] of each, and ``entropy`` [A]
    (nats) of the whole softmax there."""

    tokens: Tensor
    logp: Tensor
    entropy: Tensor
    truncated: bool

    def text(self, backbone: VisionLanguageBackbone) -> str:
        return backbone.processor.tokenizer.decode(self.tokens.tolist(), skip_special_tokens=True).strip()


def encode_prompt(backbone: VisionLanguageBackbone, example: Example) -> EncodedPrompt:
    """Of one prompt with its pictures, with gradients where they are on."""
    batch = pack([[example]], backbone.processor.pad_token_id).to(backbone.model.device)
    inputs = backbone.model_inputs(batch)
    positions = backbone.position_ids(batch)
    out = backbone.model.model(**inputs, position_ids=positions, use_cache=True)
    layers = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    return EncodedPrompt(layers, out.last_hidden_state[0, -1], backbone.next_position(positions))


@dataclass
class _Joined:
    """Prompts side by side: cache, mask [N,P] of what is no padding, last hidden states [N,D], next positions [N]."""

    cache: DynamicCache
    mask: Tensor
    last: Tensor
    position: Tensor

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt], repeats: Sequence[int]) -> _Joined:
        longest = max(map(len, prompts))
        device = prompts[0].last.device
        counts = torch.tensor(list(repeats), device=device)
        cache = DynamicCache()
        for number in range(len(prompts[0].layers)):
            for_layer = []
            for side in (0, 1):
                rows = [torch.nn.functional.pad(prompt.layers[number][side], (0, 0, longest - len(prompt), 0))
                        for prompt in prompts]  # fmt: skip
                for_layer.append(torch.cat(rows).repeat_interleave(counts, dim=0))
            cache.update(*for_layer, number)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
        position = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        last = torch.stack([prompt.last for prompt in prompts])
        return cls(cache, *(each.repeat_interleave(counts, dim=0) for each in (mask, last, position)))

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def feed(self, backbone: VisionLanguageBackbone, tokens: Tensor, valid: Tensor) -> Tensor:
        """Hidden states [N,A,D] of tokens [N,A] that come next; ``valid`` [N,A] False: padding behind them."""
        self.mask = torch.cat([self.mask, valid], dim=1)
        positions = self.position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.position = self.position + tokens.shape[1]
        out = backbone.text_model(
            input_ids=tokens, attention_mask=self.mask.long(), position_ids=backbone.text_positions(positions),
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        return out.last_hidden_state


@torch.no_grad()
def sample_answers(
    backbone: VisionLanguageBackbone,
    prompts: Sequence[EncodedPrompt],
    keys: Sequence[Sequence[int]],
    sampling: AnswerSampling,
) -> list[list[SampledAnswer]]:
    """As many answers to each prompt as it has ``keys`` (seeds of the rows' random numbers)."""
    flat = [key for row in keys for key in row]
    if not flat or len(keys) != len(prompts):
        raise DataError(f"{len(prompts)} prompts, {len(keys)} lists of keys, {len(flat)} answers: one list each")
    device = prompts[0].last.device
    uniform = torch.stack([_uniform(key, sampling.max_new_tokens) for key in flat]).to(device)
    joined = _Joined.of(prompts, [len(row) for row in keys])
    forbidden = forbidden_tokens(backbone).to(device)
    end = backbone.processor.end_of_turn_id
    hidden, rows = joined.last, torch.arange(len(flat), device=device)
    tokens = torch.full((len(flat), sampling.max_new_tokens), end, device=device)
    logp, entropy = (torch.zeros(tokens.shape, device=device) for _ in range(2))
    lengths = torch.full((len(flat),), sampling.max_new_tokens, device=device)
    ended = torch.zeros(len(flat), dtype=torch.bool, device=device)
    active = torch.ones(len(rows), dtype=torch.bool, device=device)
    for place in range(sampling.max_new_tokens):
        logits = backbone.logits(hidden).float()
        chosen, chosen_logp, spread = _draw(logits, uniform[rows, place], forbidden, sampling)
        here = rows[active]
        tokens[here, place], logp[here, place] = chosen[active], chosen_logp[active]
        entropy[here, place] = spread[active]
        stops = active & (chosen == end)
        ended[rows[stops]] = True
        lengths[rows[stops]] = place + 1
        active = active & ~stops
        left = int(active.sum())
        if not left or place + 1 == sampling.max_new_tokens:
            break
        if left < COMPACT_SHARE * len(rows):
            kept = active.nonzero()[:, 0]
            joined.keep(kept)
            rows, chosen, active = rows[kept], chosen[kept], active[kept]
        valid = torch.ones(len(rows), 1, dtype=torch.bool, device=device)
        hidden = joined.feed(backbone, chosen[:, None], valid)[:, 0]
    answers = [
        SampledAnswer(*(each[row, :length].cpu() for each in (tokens, logp, entropy)), not bool(ended[row]))
        for row, length in enumerate(lengths.tolist())
    ]
    places = iter(answers)
    return [[next(places) for _ in row] for row in keys]


def _uniform(key: int, count: int) -> Tensor:
    """[count] float64 in [0, 1), on the CPU: the same on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def _draw(
    logits: Tensor, uniform: Tensor, forbidden: Tensor, sampling: AnswerSampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N] drawn from logits [N,V] at ``uniform`` [N], their log-probabilities (of the whole softmax), and its
    entropy."""
    logp = (logits / sampling.scale).log_softmax(dim=-1)
    allowed = logp.masked_fill(forbidden, -torch.inf)
    if sampling.temperature == 0.0:
        chosen = allowed.argmax(dim=-1)
    else:
        if sampling.top_k and sampling.top_k < allowed.shape[-1]:
            least = allowed.topk(sampling.top_k, dim=-1).values[:, -1:]
            allowed = allowed.masked_fill(allowed < least, -torch.inf)
        probability = allowed.double().softmax(dim=-1)
        if sampling.top_p < 1.0:
            ordered, order = probability.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            kept = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < sampling.top_p)
            probability = probability.masked_fill(~kept, 0.0)
        total = probability.cumsum(dim=-1)
        # the first token whose cumulated probability exceeds u; one of probability 0 never is
        chosen = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)[:, 0]
        last = (probability > 0).long().cumsum(dim=-1).argmax(dim=-1)  # u rounded up to the end
        chosen = torch.minimum(chosen, last)
    return chosen, logp.gather(-1, chosen[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)


def forbidden_tokens(backbone: VisionLanguageBackbone) -> Tensor:
    """[V] bool: tokens that an answer cannot hold: those for pictures and turns, and rows without a token.

    A sampled picture token would ask for a picture that is not there.
    """
    processor = backbone.processor
    size = backbone.model.lm_head.weight.shape[0]
    special = set(processor.tokenizer.all_special_ids) | set(processor.tokenizer.get_added_vocab().values())
    special.discard(processor.end_of_turn_id)
    forbidden = torch.zeros(size, dtype=torch.bool)
    forbidden[[token for token in special if token < size]] = True
    forbidden[len(processor.tokenizer) :] = True
    return forbidden


@dataclass(frozen=True)
class AnswerScores:
    """``logp`` [N,A] of the tokens of N answers; ``mask`` [N,A] False: padding."""

    logp: Tensor
    mask: Tensor


def score_answers(
    backbone: VisionLanguageBackbone,
    prompts: Sequence[EncodedPrompt],
    answers: Sequence[Sequence[Tensor]],
    *,
    temperature: float = 1.0,
) -> AnswerScores:
    """Log-probabilities of the tokens of ``answers`` (of each prompt, [A_i] each), prompts shared; with gradients."""
    flat = [tokens for row in answers for tokens in row]
    device = prompts[0].last.device
    tokens, mask = padded_answers(flat, backbone.processor.pad_token_id, device)
    joined = _Joined.of(prompts, [len(row) for row in answers])
    hidden = joined.last[:, None]
    if tokens.shape[1] > 1:
        hidden = torch.cat([hidden, joined.feed(backbone, tokens[:, :-1], mask[:, 1:])], dim=1)
    return _scores(backbone, hidden, tokens, mask, temperature)


def score_conversations(
    backbone: VisionLanguageBackbone,
    examples: Sequence[Example],
    answers: Sequence[Sequence[Tensor]],
    *,
    temperature: float = 1.0,
) -> AnswerScores:
    """The same without sharing: each prompt is encoded again with each of its answers, conversations packed in one row
    each. Slower; what gradient checkpointing needs, which keeps no keys and values."""
    rows, flat = [], []
    for example, group in zip(examples, answers, strict=True):
        for tokens in group:
            ids = torch.cat([example.input_ids, tokens.to(example.input_ids.device)])
            rows.append(Example(ids, ids, example.pixels, example.name))
            flat.append(tokens)
    device = backbone.model.device
    tokens, mask = padded_answers(flat, backbone.processor.pad_token_id, device)
    hidden = []
    for row, answer in zip(rows, flat, strict=True):
        batch = pack([[row]], backbone.processor.pad_token_id).to(device)
        states = backbone.last_hidden_states(batch)[0, -len(answer) - 1 : -1]
        hidden.append(torch.nn.functional.pad(states, (0, 0, 0, tokens.shape[1] - len(answer))))
    return _scores(backbone, torch.stack(hidden), tokens, mask, temperature)


def padded_answers(flat: Sequence[Tensor], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask [N,A], padded behind. Raises DataError for an answer without a token."""
    lengths = torch.tensor([len(tokens) for tokens in flat], device=device)
    if not len(flat) or int(lengths.min()) == 0:
        raise DataError(f"{len(flat)} answers, one without a token: an answer has at least the token that ends it")
    tokens = torch.nn.utils.rnn.pad_sequence(list(flat), batch_first=True, padding_value=pad).to(device)
    return tokens, torch.arange(tokens.shape[1], device=device) < lengths[:, None]


def _scores(
    backbone: VisionLanguageBackbone, hidden: Tensor, tokens: Tensor, mask: Tensor, temperature: float
) -> AnswerScores:
    """The head runs on answer tokens only; ln p = log_softmax(logits / temperature)."""
    logits = backbone.logits(hidden[mask]).float() / temperature
    table = logits.log_softmax(dim=-1)
    chosen = table.gather(-1, tokens[mask][:, None])[:, 0]
    return AnswerScores(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, chosen), mask)
