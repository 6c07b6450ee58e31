"""A chat model's opinion of free answers, beside the references of the data."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from navsim_ext.prompts import IMAGE_PLACEHOLDER
from stage1_vlm.qa_engine.client import ChatClient, NoUsableAnswer, ServerSettings
from stage1_vlm.qa_engine.phases import PromptSet, one_question, parse_judgement

TEXT = "answer_judge"


def judge_answers(
    answers: Sequence[tuple[str, Sequence[str], str]], server: ServerSettings
) -> list[int | None]:
    """Score 1 to 10 of each (question, references, answer); None where the server gave no usable one after all tries.

    Raises ServerRefused when the server will not answer at all.
    """
    return asyncio.run(_judge_all(answers, server))


async def _judge_all(
    answers: Sequence[tuple[str, Sequence[str], str]], server: ServerSettings
) -> list[int | None]:
    prompts = PromptSet(None, (TEXT,))

    async def one(client: ChatClient, question: str, references: Sequence[str], answer: str) -> int | None:
        facts = {
            "question": question.replace(IMAGE_PLACEHOLDER, "").strip(),
            "references": " | ".join(references),
            "answer": answer or "(no answer)",
        }
        try:
            judged = await client.complete(one_question(prompts, TEXT, facts, []), parse_judgement, temperature=0.0)
        except NoUsableAnswer:
            return None
        return judged.score

    async with ChatClient(server) as client:
        return list(await asyncio.gather(*(one(client, *entry) for entry in answers)))
