"""The client against a real OpenAI-compatible server: ``transformers serve`` with a tiny text model, on CPU."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from transformers import Qwen2ForCausalLM

from stage1_vlm.qa_engine.client import ChatClient, Nonsense, NoUsableAnswer, ServerSettings
from stage1_vlm.tiny import TinySizes, text_config, train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture
def served(tmp_path):
    """URL and model of a running server; skips where its packages (transformers[serving]) are not installed."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    tokenizer = train_tokenizer(["Is the light red? yes. no."] * 20, [], vocabulary=400)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    Qwen2ForCausalLM(text_config(tokenizer, TinySizes(width=32, layers=2, heads=2))).save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [command, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except httpx.TransportError:
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1", str(tmp_path / "model")
    process.terminate()
    process.wait(timeout=30)


@pytest.mark.slow
def test_answers_arrive_and_nonsense_is_given_up(served):
    url, model = served
    settings = ServerSettings(url, model, tries=2, pause_s=0.05, max_tokens=8, temperature=0.0, concurrency=2)
    question = [{"role": "user", "content": "Is the light red?"}]

    def refuse(text: str) -> str:
        raise Nonsense("never satisfied")

    async def ask():
        async with ChatClient(settings) as client:
            both = await asyncio.gather(*(client.complete(question, str) for _ in range(2)))
            with pytest.raises(NoUsableAnswer, match="never satisfied"):
                await client.complete(question, refuse)
            return both, dict(client.counts)

    answers, counts = asyncio.run(ask())
    assert answers[0] == answers[1] != ""
    assert counts["answered"] == 2
    assert counts["nonsense"] == 2
