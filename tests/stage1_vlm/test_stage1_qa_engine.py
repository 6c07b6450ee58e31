"""The question engine against a server of the test's own: it checks the bytes it gets and misbehaves on purpose."""

import base64
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.prompts import TemplateError
from navsim_ext.runtime import preflight as runtime_preflight
from navsim_ext.runtime.preflight import PreflightError
from navsim_ext.scene import SceneBatch
from stage1_vlm.data.line_index import LineRules, build_index
from stage1_vlm.data.mixture import read_mixture
from stage1_vlm.qa_engine import engine as engine_module
from stage1_vlm.qa_engine.client import Nonsense, ServerRefused, ServerSettings
from stage1_vlm.qa_engine.engine import QaEngine, ServerDown
from stage1_vlm.qa_engine.phases import PHASES, PromptSet, parse_judgement, parse_pairs
from stage1_vlm.qa_engine.reasoning import ReasoningEngine, decision_records, parse_explanation


class Scenes:
    """Stands for a scene index: four scenes with one picture each."""

    def __init__(self, root, make_picture, count=4):
        self.sensor_root = root
        self.tokens = [f"{i:016x}" for i in range(count)]
        self.fingerprint = Fingerprint("scenes", {"count": count})
        for i, token in enumerate(self.tokens):
            make_picture(i).save(root / f"{token}.jpg", quality=90)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        steps = torch.arange(1.0, 9.0)
        target = torch.stack([2 * steps, 0 * steps, 0 * steps], 1)[None]
        status = torch.tensor([[0.0, 1, 0, 0, 4.0, 0, 0, 0]])
        token = self.tokens[i]
        return SceneBatch([token], ["log"], torch.zeros(1, 4, 3), status, target, [{"CAM_F0": f"{token}.jpg"}])


class Server(ThreadingHTTPServer):
    """OpenAI-compatible enough; ``plan(count)`` may return (status, headers, body) in place of the good answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.pictures: set[bytes] = set()
        self.plan = lambda number: None
        self.score = lambda question: 9
        self.explain = lambda question: "The light is red, so we stop."
        self.number = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that hung up is expected here."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.number += 1
            special = server.plan(server.number)
        if special == "silence":
            self.close_connection = True
            return None
        if special is not None:
            status, headers, content = special
            return self.reply(status, headers, content)
        assert self.path == "/v1/chat/completions"
        messages = body["messages"]
        parts = messages[0]["content"]
        picture = next(part for part in parts if part["type"] == "image_url")["image_url"]["url"]
        assert picture.startswith("data:image/jpeg;base64,")
        judged = "Give a score" in parts[-1]["text"]
        explains = "The right decision is known" in parts[-1]["text"]
        with server.lock:
            server.pictures.add(base64.b64decode(picture.partition(",")[2], validate=True))
            server.asked["judge" if judged else "explanation" if explains else PHASES[len(messages) // 2]] += 1
        if judged:
            content = json.dumps({"score": server.score(parts[-1]["text"]), "reason": "seen"})
        elif explains:
            content = server.explain(parts[-1]["text"])
        else:
            # each phase's conversation holds the answers of the phases before it
            assert [m["role"] for m in messages] == (["user", "assistant"] * 4)[: len(messages)]
            pairs = [{"question": f"{PHASES[len(messages) // 2]} {i}?", "answer": f"answer {i}"} for i in range(2)]
            content = f"Sure:\n```json\n{json.dumps(pairs)}\n```"
        answer = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        return self.reply(200, {}, json.dumps(answer | {"usage": {"prompt_tokens": 100, "completion_tokens": 7}}))

    def reply(self, status, headers, content):
        data = content.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def scenes(tmp_path, make_picture):
    (tmp_path / "sensors").mkdir()
    return Scenes(tmp_path / "sensors", make_picture)


def engine(scenes, server, folder, **options):
    client = {"tries": 4, "pause_s": 0.01, "timeout_s": 20.0, "concurrency": 4} | options.pop("client", {})
    settings = ServerSettings(server.url, "model", **client)
    return QaEngine(scenes, folder, settings, settings, pairs_per_phase=2, **options)


def test_four_phases_and_a_judge_make_a_mixture_that_stage_1_reads(scenes, server, tmp_path, tiny_internvl):
    server.score = lambda question: 8 if "answer 0" in question else 7
    counts = engine(scenes, server, tmp_path / "qa").run()
    assert server.asked == {**dict.fromkeys(PHASES, 4), "judge": 32}
    assert (counts["scenes"], counts["failed"], counts["kept"], counts["rejected"]) == (4, 0, 16, 16)
    sent = {(scenes.sensor_root / f"{token}.jpg").read_bytes() for token in scenes.tokens}
    assert server.pictures == sent  # the very bytes of the files
    from stage1_vlm.loading import load_processor

    processor = load_processor(tiny_internvl, max_image_tokens=16)
    entries = {one.name: one for one in read_mixture(tmp_path / "qa" / "mixture.json")}
    assert float(entries["Navsim"].repeat_time) == 2
    indices = {name: build_index(one, processor, LineRules(4000)) for name, one in entries.items()}
    assert {name: len(index) for name, index in indices.items()} == {"Navsim": 4, "Navsim_QA": 16}
    record = indices["Navsim"].record(0)
    assert record["conversations"][-1]["value"].startswith("[PT, (+2.00, +0.00, +0.00), (+4.00")
    assert indices["Navsim_QA"].record(0)["score"] == 8
    rejected = [json.loads(line) for line in (tmp_path / "qa" / "rejected.jsonl").read_text().splitlines()]
    assert {line["score"] for line in rejected} == {7}


def test_429_500_nonsense_and_silence_are_tried_again(scenes, server, tmp_path):
    troubles = {
        1: (429, {"Retry-After": "0.02"}, "slow down"),
        3: (500, {}, "oops"),
        5: (200, {}, "this is not JSON"),
        7: (200, {}, json.dumps({"choices": []})),
        9: "silence",
        11: (200, {}, json.dumps({"choices": [{"message": {"content": "I cannot see a picture."}}]})),
        13: (503, {}, ""),
        15: (200, {}, json.dumps({"choices": [{"message": {"content": ""}}]})),
    }
    server.plan = troubles.get
    counts = engine(scenes, server, tmp_path / "qa").run()
    assert (counts["scenes"], counts["failed"]) == (4, 0)
    assert counts["server_retries"] + counts.get("judge_retries", 0) == len(troubles)  # which of them is a race
    assert counts["server_429"] == 1
    assert server.number == 4 * 4 + 32 + len(troubles)


def test_a_scene_without_usable_answers_is_listed_and_tried_again_later(scenes, server, tmp_path):
    bad = (200, {}, json.dumps({"choices": [{"message": {"content": "no"}}]}))
    server.plan = lambda number: bad if number <= 4 else None  # all tries of the first scene
    one_at_a_time = {"scenes_at_once": 1, "client": {"concurrency": 1}}
    counts = engine(scenes, server, tmp_path / "qa", **one_at_a_time).run()
    assert (counts["scenes"], counts["failed"]) == (3, 1)
    failed = [json.loads(line) for line in (tmp_path / "qa" / "failed.jsonl").read_text().splitlines()]
    assert failed[0]["token"] == scenes.tokens[0]
    assert "4 tries" in failed[0]["failed"]
    before = server.number
    counts = engine(scenes, server, tmp_path / "qa", **one_at_a_time).run()
    assert (counts["scenes"], counts["failed"], server.number - before) == (4, 0, 4 + 8)
    assert (tmp_path / "qa" / "failed.jsonl").read_text() == ""


def test_finished_scenes_survive_a_cut_and_order_does_not_matter(scenes, server, tmp_path):
    engine(scenes, server, tmp_path / "whole").run()
    engine(scenes, server, tmp_path / "cut").run()
    journal = tmp_path / "cut" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[2] + lines[0] + lines[1][:40])  # killed while writing the third
    before = server.number
    engine(scenes, server, tmp_path / "cut").run()
    assert server.number - before == 2 * (4 + 8)
    for name in ("qa.jsonl", "trajectories.jsonl", "mixture.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(FingerprintMismatch, match=r"pairs_per_phase|model"):
        QaEngine(
            scenes, tmp_path / "cut", ServerSettings(server.url, "other"), ServerSettings(server.url, "other")
        ).run()


def test_a_refusal_or_a_dead_server_ends_the_run_with_its_reason(scenes, server, tmp_path):
    server.plan = lambda number: (401, {}, "wrong key")
    with pytest.raises(ServerRefused, match=r"401.*wrong key"):
        engine(scenes, server, tmp_path / "refused").run()
    dead = ServerSettings("http://127.0.0.1:9/v1", "model", tries=2, pause_s=0.01)
    with pytest.raises(ServerDown, match=r"3 scenes in a row.*ConnectError"):
        QaEngine(scenes, tmp_path / "dead", dead, dead, give_up_after=3).run()
    assert len((tmp_path / "dead" / "failed.jsonl").read_text().splitlines()) == 3


def test_the_first_scenes_are_measured_and_kept_and_the_cost_of_the_others_said(scenes, server, tmp_path, monkeypatch):
    told = []
    real = engine_module.preflight
    monkeypatch.setattr(
        engine_module, "preflight", lambda **given: (told.append((server.number, given)), real(**given))
    )
    counts = engine(scenes, server, tmp_path / "qa", scenes_at_once=1).run()
    [(asked_before, given)] = told
    assert asked_before == 4 + 8  # of one scene
    assert given["items"] == 3
    assert given["seconds_per_item"] > 0
    assert "1,284 tokens each, 3,852 in all" in given["title"]  # (4 + 8) x 107
    assert (counts["server_prompt_tokens"], counts["judge_completion_tokens"]) == (4 * 400, 4 * 8 * 7)
    assert server.number == 4 * (4 + 8)  # nothing is asked twice
    files = [path for path in (tmp_path / "qa").iterdir() if path.name in {"journal.jsonl", "qa.jsonl"}]
    stored = sum(path.stat().st_size for path in files) + (tmp_path / "qa" / "trajectories.jsonl").stat().st_size
    assert stored / 4 == pytest.approx(given["bytes_per_item"], rel=0.6)
    monkeypatch.setattr(runtime_preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(PreflightError, match="make room"):
        engine(scenes, server, tmp_path / "full", scenes_at_once=1).run()
    assert len((tmp_path / "full" / "journal.jsonl").read_text().splitlines()) == 1


def test_missing_pictures_are_all_named_before_anything_is_asked(scenes, server, tmp_path):
    for token in scenes.tokens[1:3]:
        (scenes.sensor_root / f"{token}.jpg").unlink()
    with pytest.raises(PreflightError, match="2 of 4 input files are missing"):
        engine(scenes, server, tmp_path / "qa").run()
    assert server.number == 0


def test_requests_keep_to_the_rate(scenes, server, tmp_path):
    import time

    scenes.tokens = scenes.tokens[:1]
    start = time.monotonic()
    engine(scenes, server, tmp_path / "qa", client={"requests_per_minute": 1200.0}).run()
    assert time.monotonic() - start > 7 * 0.05  # the last of 8 judgements waits for 7 others


@pytest.mark.parametrize("text", ["", "[]", '[{"question": "a"}]', "{", '{"question": 1}', "[1, 2]"])
def test_nonsense_is_no_pair(text):
    with pytest.raises(Nonsense):
        parse_pairs("perception", text)


def test_pairs_and_scores_are_read_from_talk():
    assert [p.answer for p in parse_pairs("p", 'So [see]: [{"question": "q", "answer": "a"}] and more')] == ["a"]
    assert parse_pairs("p", '{"question": "q", "answer": "a"}')[0].question == "q"
    assert parse_judgement('Thinking...\n{"score": "8/10", "reason": "ok"}').score == 8
    for bad in ('{"score": 11}', '{"score": 7.5}', '{"score": true}', '{"rating": 3}', "8"):
        with pytest.raises(Nonsense):
            parse_judgement(bad)


def test_prompts_can_be_replaced_and_mistakes_are_named(tmp_path):
    own = PromptSet()
    for name, text in own.texts.items():
        (tmp_path / f"{name}.txt").write_text(text.template)
    assert PromptSet(tmp_path).digest == own.digest
    (tmp_path / "decision.txt").write_text("Use $weather")
    changed = PromptSet(tmp_path)
    assert changed.digest != own.digest
    with pytest.raises(TemplateError, match="weather"):
        changed.fill("decision", {"speed": "3"})
    assert np.all([name in own.texts for name in PHASES])


def decisions(scenes) -> dict:
    turns = [{"from": "human", "value": "<image>\nSpeed 4.0 m/s. Decide."}, {"from": "gpt", "value": "x"}]
    return {
        token: {"image": f"{token}.jpg", "scene_id": token, "type": "decision", "conversations": turns,
                "answer": "STOP, STRAIGHT" if i % 2 else "KEEP, STRAIGHT"}
        for i, token in enumerate(scenes.tokens)
    }  # fmt: skip


def test_known_decisions_are_explained_judged_and_resumed(scenes, server, tmp_path):
    settings = ServerSettings(server.url, "explainer", tries=3, pause_s=0.0)
    server.score = lambda question: 3 if "KEEP" in question else 9
    server.explain = lambda question: "<think>tags</think>" if server.number == 1 else "The light is red, so we stop."

    def run():
        return ReasoningEngine(decisions(scenes), scenes, tmp_path / "out", settings, settings, scenes_at_once=1).run()

    told = run()
    assert (told["kept"], told["rejected"], told["server_nonsense"]) == (2, 2, 1)
    kept = [json.loads(line) for line in (tmp_path / "out" / "decision.jsonl").read_text().splitlines()]
    for record in kept:
        reply = record["conversations"][-1]["value"]
        assert reply == "<think>The light is red, so we stop.</think><answer>STOP, STRAIGHT</answer>"
        assert record["reasoning_source"] == "explainer"
    asked = sum(server.asked.values())
    assert run()["kept"] == 2
    assert sum(server.asked.values()) == asked  # nothing is asked twice
    (entry,) = read_mixture(tmp_path / "out" / "mixture.json")
    assert entry.length == 2


@pytest.mark.parametrize("text", ["", "...", "<answer>KEEP</answer>", "A. B. C. D is a list. E.", "word " * 200, "[1]"])
def test_what_is_no_explanation_is_asked_again(text):
    with pytest.raises(Nonsense):
        parse_explanation(text)


def test_decisions_are_found_in_a_mixture(tmp_path):
    good = {"type": "decision", "scene_id": "a", "answer": "KEEP, STRAIGHT", "conversations": []}
    rows = [good, good | {"type": "other", "scene_id": "b"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    (tmp_path / "m.json").write_text(json.dumps({"q": {"root": ".", "annotation": "q.jsonl"}}))
    assert list(decision_records(tmp_path / "m.json")) == ["a"]
    (tmp_path / "q.jsonl").write_text(json.dumps(good | {"answer": "FLY, STRAIGHT"}))
    with pytest.raises(DataError, match="FLY"):
        decision_records(tmp_path / "m.json")
