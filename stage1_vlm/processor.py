"""From a conversation with pictures to what a vision-language model eats, and the contract every family fulfils.

Legend: L tokens of one conversation, T picture tiles (or patches), each picture stands for ``image_tokens`` tokens.
The chat form is ChatML for both families: InternVL 2.5's template (``internvl2_5``) and Qwen's are the same turns
with different system messages and different tokens around the picture. transformers' own InternVLProcessor needs
torchvision even for still pictures, so this thin processor stands on the PIL image processors alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import digest_json
from navsim_ext.prompts import IMAGE_PLACEHOLDER, Prompt

IGNORED_LABEL = -100  # torch's and transformers' value for "no loss here"


@dataclass(frozen=True)
class Turn:
    """One message; ``role`` is system, user or assistant. Pictures are ``<image>`` in a user's text."""

    role: str
    text: str


@dataclass
class Example:
    """One encoded conversation: ``input_ids`` [L], ``labels`` [L] (-100 outside answers), ``pixels`` by model input."""

    input_ids: Tensor
    labels: Tensor
    pixels: dict[str, Tensor] = field(default_factory=dict)
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


class ChatProcessor(ABC):
    """Tokeniser, picture preprocessing and chat form of one model family."""

    default_system: ClassVar[str]
    image_start: ClassVar[str]
    image_token: ClassVar[str]
    image_end: ClassVar[str]

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_processor: Any) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        known = tokenizer.get_vocab()
        missing = [t for t in (self.image_start, self.image_token, self.image_end, "<|im_end|>") if t not in known]
        if missing:
            raise DataError(f"tokenizer {tokenizer.name_or_path!r} lacks the special tokens {missing}: wrong family?")
        self.image_token_id: int = known[self.image_token]
        self.end_of_turn_id: int = known["<|im_end|>"]

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.end_of_turn_id if pad is None else pad

    @abstractmethod
    def image_tokens(self, width: int, height: int, pictures: int = 1) -> int:
        """Context tokens of one picture of that size [pixels] in a conversation with ``pictures`` pictures."""

    @abstractmethod
    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The model's picture inputs; every tensor can be concatenated along axis 0 over conversations."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything about pictures that changes what the model sees: part of the fingerprint."""

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(str(folder))
        self.image_processor.save_pretrained(str(folder))

    def token_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize(
        self, turns: Sequence[Turn], image_counts: Sequence[int], *, generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation whose pictures take ``image_counts`` tokens.

        Each turn is ``<|im_start|>role\\n text <|im_end|>\\n``. Labels equal the ids on the assistant's text and its
        ``<|im_end|>`` (that is how the model learns to stop) and are -100 elsewhere. Without a system turn the
        family's own system message comes first; with ``generation_prompt`` the opened assistant turn comes last.
        Raises DataError when ``<image>`` and pictures differ in number or a text contains the context token.
        """
        if not turns or turns[0].role != "system":
            turns = [Turn("system", self.default_system), *turns]
        placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
        if placeholders != len(image_counts):
            raise DataError(f"{placeholders} {IMAGE_PLACEHOLDER} in the text, {len(image_counts)} pictures beside it")
        remaining = iter(image_counts)
        ids: list[int] = []
        labels: list[int] = []
        for turn in turns:
            opening = self.token_ids(f"<|im_start|>{turn.role}\n")
            if turn.role == "assistant":
                body = [*self.token_ids(turn.text), self.end_of_turn_id]
                self._refuse_context_token(body, turn)
                targets = body
            else:
                body = []
                chunks = turn.text.split(IMAGE_PLACEHOLDER) if turn.role == "user" else [turn.text]
                for position, chunk in enumerate(chunks):
                    if position:
                        body += self._picture_ids(next(remaining))
                    text_ids = self.token_ids(chunk) if chunk else []
                    self._refuse_context_token(text_ids, turn)
                    body += text_ids
                body.append(self.end_of_turn_id)
                targets = [IGNORED_LABEL] * len(body)
            closing = self.token_ids("\n")
            ids += opening + body + closing
            labels += [IGNORED_LABEL] * len(opening) + targets + [IGNORED_LABEL] * len(closing)
        if generation_prompt:
            opening = self.token_ids("<|im_start|>assistant\n")
            ids += opening
            labels += [IGNORED_LABEL] * len(opening)
        return ids, labels

    def encode(
        self, turns: Sequence[Turn], pictures: Sequence[Image.Image], *, generation_prompt: bool = False, name: str = ""
    ) -> Example:
        """Tokens, labels and pixels of one conversation."""
        counts = [self.image_tokens(*picture.size, pictures=len(pictures)) for picture in pictures]
        ids, labels = self.tokenize(turns, counts, generation_prompt=generation_prompt)
        pixels = self.pixels(pictures) if pictures else {}
        return Example(torch.tensor(ids), torch.tensor(labels), pixels, name)

    def encode_prompt(self, prompt: Prompt, pictures: Sequence[Image.Image], name: str = "") -> Example:
        """A question that waits for its answer: what the export and the text planner feed."""
        turns = [Turn("system", prompt.system), Turn("user", prompt.user)]
        return self.encode(turns, pictures, generation_prompt=True, name=name)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Picture settings and a digest of the vocabulary, as JSON."""
        return {**self.settings(), "vocabulary": digest_json(self.tokenizer.get_vocab())}

    def _picture_ids(self, count: int) -> list[int]:
        start, end = self.tokenizer.convert_tokens_to_ids([self.image_start, self.image_end])
        return [start, *[self.image_token_id] * count, end]

    def _refuse_context_token(self, ids: Sequence[int], turn: Turn) -> None:
        if self.image_token_id in ids:
            raise DataError(f"the {turn.role}'s text contains the reserved token {self.image_token}")


def turns_from_conversation(conversations: Sequence[Mapping[str, str]]) -> list[Turn]:
    """InternVL's ``[{"from": "human", "value": ...}, {"from": "gpt", ...}]`` as turns; raises DataError when malformed.

    An ``<image>`` is followed by a line break in that format; it stays in the text.
    """
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    turns = []
    for message in conversations:
        if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
            raise DataError(f"a message must be {{'from': ..., 'value': text}}, not {message!r:.200}")
        if not isinstance(message.get("from"), str) or message["from"] not in roles:
            raise DataError(f"unknown speaker {message.get('from')!r}; there are {sorted(roles)}")
        try:
            message["value"].encode()
        except UnicodeEncodeError as error:
            raise DataError(f"a text with half a character (a lone surrogate): {error!s:.100}") from error
        turns.append(Turn(roles[message["from"]], message["value"].strip()))
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError("a system message may only come first")
    if not spoken or [turn.role for turn in spoken] != ["user", "assistant"] * (len(spoken) // 2):
        raise DataError(f"human and gpt must take turns, human first: {[turn.role for turn in turns]}")
    if any(turn.role == "assistant" and not turn.text for turn in turns):
        raise DataError("empty answer")
    return turns
