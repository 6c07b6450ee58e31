"""A patient client of an OpenAI-compatible chat server (vLLM, SGLang, ...).

Many requests run at once, starts are spaced to a rate, and what may pass is tried again after a growing pause: 429
(its Retry-After is honoured), 5xx, time-outs, broken connections, and answers that the caller's parser rejects.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from omegaconf import DictConfig, OmegaConf

from navsim_ext.errors import TriviumError

Parsed = TypeVar("Parsed")
PASSING = frozenset({408, 409, 425, 429})  # and all of 5xx: worth another try


class ServerRefused(TriviumError):
    """The server will not answer such a request however often it is asked (wrong key, model or payload)."""


class NoUsableAnswer(TriviumError):
    """All tries failed; the message lists why, in order."""


class Nonsense(ValueError):
    """An answer that arrived but does not say what was asked."""


@dataclass(frozen=True)
class ServerSettings:
    """``url`` ends in /v1. ``api_key`` may be None. Times in seconds; ``requests_per_minute`` 0 means no limit."""

    url: str
    model: str
    api_key: str | None = None
    timeout_s: float = 120.0
    concurrency: int = 16
    requests_per_minute: float = 0.0
    tries: int = 6
    pause_s: float = 1.0  # before the second try; doubles each time
    max_pause_s: float = 60.0
    max_tokens: int = 2048
    temperature: float = 0.7


def server_settings(node: DictConfig) -> ServerSettings:
    """Settings of a server; its key is read from the environment variable ``api_key_variable``, never from a file."""
    options: dict[str, Any] = OmegaConf.to_container(node, resolve=True)
    variable = options.pop("api_key_variable")
    return ServerSettings(**options, api_key=os.environ.get(variable) if variable else None)


class ChatClient:
    """Use as ``async with ChatClient(settings) as client``; ``counts`` says what happened to the requests.

    Among them the tokens that the server says it has read and written, where it says so.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._gate = asyncio.Lock()
        self._next_start_s = 0.0
        self._jitter = random.Random(0)  # spreads retries; no result depends on it

    async def __aenter__(self) -> ChatClient:
        key = self.settings.api_key
        limits = httpx.Limits(max_connections=self.settings.concurrency)
        self._http = httpx.AsyncClient(
            base_url=self.settings.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.settings.timeout_s,
            limits=limits,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()

    async def complete(
        self, messages: Sequence[Mapping[str, Any]], parse: Callable[[str], Parsed], *, temperature: float | None = None
    ) -> Parsed:
        """The parsed answer; ``parse`` raises Nonsense to have the question asked again.

        Raises ServerRefused at once for 4xx other than 408, 409, 425, 429; NoUsableAnswer after all tries.
        """
        settings = self.settings
        reasons: list[str] = []
        for attempt in range(settings.tries):
            if attempt:
                await asyncio.sleep(self._pause_s(attempt, reasons[-1]))
            async with self._slots:
                await self._wait_for_turn()
                self.counts["requests"] += 1
                try:
                    text = await self._ask(messages, settings.temperature if temperature is None else temperature)
                    answer = parse(text)
                except httpx.HTTPError as error:
                    reasons.append(f"{type(error).__name__} {error}".strip())
                except _TryAgain as error:
                    reasons.append(str(error))
                except Nonsense as error:
                    self.counts["nonsense"] += 1
                    reasons.append(f"nonsense: {error}")
                else:
                    self.counts["answered"] += 1
                    return answer
            self.counts["retries"] += attempt + 1 < settings.tries
        self.counts["given_up"] += 1
        raise NoUsableAnswer(f"{settings.url}: no usable answer in {settings.tries} tries: {'; '.join(reasons)}")

    async def _ask(self, messages: Sequence[Mapping[str, Any]], temperature: float) -> str:
        settings = self.settings
        body = {
            "model": settings.model,
            "messages": list(messages),
            "max_tokens": settings.max_tokens,
            "temperature": temperature,
        }
        response = await self._http.post("chat/completions", json=body)
        if response.status_code in PASSING or response.status_code >= 500:
            self.counts[str(response.status_code)] += 1
            raise _TryAgain(response)
        if response.status_code >= 400:
            raise ServerRefused(
                f"{settings.url} answers {response.status_code} for model {settings.model!r}: {response.text[:300]}; "
                "check server.url, server.model and the key"
            )
        try:
            completion = response.json()
            content = completion["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Nonsense(f"not a chat completion: {response.text[:120]!r}") from error
        if not isinstance(content, str) or not content.strip():
            raise Nonsense("an empty answer")
        usage = completion.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage, dict) and isinstance(usage.get(name), int):
                self.counts[name] += usage[name]
        return content

    async def _wait_for_turn(self) -> None:
        """Spaces the starts of requests 60 / requests_per_minute seconds apart."""
        if self.settings.requests_per_minute <= 0:
            return
        async with self._gate:
            now = asyncio.get_running_loop().time()
            wait = self._next_start_s - now
            self._next_start_s = max(now, self._next_start_s) + 60.0 / self.settings.requests_per_minute
            if wait > 0:
                await asyncio.sleep(wait)

    def _pause_s(self, attempt: int, reason: str) -> float:
        stated = reason.partition("retry after ")[2].split(" ")[0]
        growing = self.settings.pause_s * 2 ** (attempt - 1) * self._jitter.uniform(0.75, 1.25)
        return min(max(growing, float(stated) if stated else 0.0), self.settings.max_pause_s)


class _TryAgain(Exception):
    def __init__(self, response: httpx.Response) -> None:
        header = response.headers.get("retry-after", "")
        seconds = header if header.replace(".", "", 1).isdigit() else ""
        super().__init__(f"status {response.status_code}" + (f", retry after {seconds} s" if seconds else ""))
