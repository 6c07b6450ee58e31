"""Runs the phases and the judge over many scenes at once; every finished scene is safe on disk.

<output_dir>/journal.jsonl      one line per finished scene, appended and flushed: the truth a resume reads
<output_dir>/trajectories.jsonl trajectory questions with the driven answers (no server needed)
<output_dir>/qa.jsonl           pairs with a score above the threshold, as conversations
<output_dir>/rejected.jsonl     pairs at or below it, with score and reason
<output_dir>/failed.jsonl       scenes that got no usable answer, with the reasons; tried again next time
<output_dir>/mixture.json       meta JSON of the two data sets, ready for stage 1
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import TriviumError
from navsim_ext.files import atomic_stream, write_atomic, write_json_atomic
from navsim_ext.fingerprint import Fingerprint, digest_tokens
from navsim_ext.pictures import picture_size
from navsim_ext.prompts import IMAGE_PLACEHOLDER, format_trajectory, prompt_digest, trajectory_prompt
from navsim_ext.runtime.checksums import CHECKSUM_KEY, checked_line, checked_lines, file_checksums
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.preflight import preflight
from navsim_ext.runtime.progress import track
from navsim_ext.scene import SceneBatch
from stage1_vlm.qa_engine.client import ChatClient, NoUsableAnswer, ServerSettings
from stage1_vlm.qa_engine.phases import (
    PHASES,
    Judgement,
    PromptSet,
    QaPair,
    judge_messages,
    parse_judgement,
    parse_pairs,
    phase_messages,
    picture_parts,
    scene_facts,
)

log = logging.getLogger(__name__)

JOURNAL, FAILED = "journal.jsonl", "failed.jsonl"


class ServerDown(TriviumError):
    """So many scenes in a row failed that the server, not the scenes, must be the reason."""


class QaEngine:
    """Generates questions and answers for the scenes of an index (which must hold the driven future)."""

    def __init__(
        self,
        scenes: SceneDataset,
        output_dir: str | Path,
        server: ServerSettings,
        judge: ServerSettings,
        *,
        cameras: Sequence[str] = ("CAM_F0",),
        prompts: str | Path | None = None,
        template: str | Path | None = None,
        pairs_per_phase: int = 3,
        keep_above: int = 7,
        scenes_at_once: int = 8,
        give_up_after: int = 20,
    ) -> None:
        self.scenes, self.output_dir = scenes, Path(output_dir)
        self.server, self.judge = server, judge
        self.cameras, self.prompts, self.template = tuple(cameras), self.prompt_set(prompts), template
        self.pairs_per_phase, self.keep_above = pairs_per_phase, keep_above
        self.scenes_at_once, self.give_up_after = scenes_at_once, give_up_after
        self.counts: Counter[str] = Counter()
        self._in_a_row = 0  # failed scenes

    def prompt_set(self, folder: str | Path | None) -> PromptSet:
        return PromptSet(folder)

    def run(self) -> dict[str, int]:
        """Generates what is missing, then writes the data sets; returns counts of scenes, pairs and requests.

        The first ``scenes_at_once`` scenes are the measured slice of the preflight: their pairs are kept, and what the
        others will cost is said before they are asked. Raises PreflightError (missing pictures before anything is
        asked), FolderBusy, FingerprintMismatch (other prompts or models began this folder), ServerRefused, ServerDown
        (``give_up_after`` scenes in a row failed, or all of them).
        """
        with FolderLock(self.output_dir):
            self._claim()
            done = self._done()
            todo = [place for place, token in enumerate(self.scenes.tokens) if token not in done]
            pictures = [path for place in todo for path in self._pictures(place).values()]
            if not all(path.is_file() for path in pictures):
                preflight(output_dir=self.output_dir, items=len(todo), files=pictures, title="driving questions")
            failures: list[dict[str, str]] = []
            with open(self.output_dir / JOURNAL, "a", encoding="utf-8") as journal:
                start, begun = time.perf_counter(), journal.tell()
                first, rest = todo[: self.scenes_at_once], todo[self.scenes_at_once :]
                self._keep(self._outcomes(first), journal, failures)
                if rest and len(failures) < len(first):
                    seconds = (time.perf_counter() - start) / len(first)
                    stored = (journal.tell() - begun) / (len(first) - len(failures))
                    tokens = sum(count for name, count in self.counts.items() if name.endswith("_tokens")) / len(first)
                    self._say_cost(rest, seconds, stored, tokens, pictures)
                known = len(self.scenes) - len(rest)
                outcomes = track(self._outcomes(rest), "driving questions", total=len(self.scenes), done=known)
                self._keep(outcomes, journal, failures)
            self._write_lines(FAILED, failures)
            if failures and len(failures) == len(todo):
                raise ServerDown(f"all {len(todo)} scenes failed; the last: {failures[-1]['failed']}")
            return self._publish(len(failures))

    def _keep(self, outcomes: Iterable[dict[str, Any]], journal: TextIO, failures: list[dict[str, str]]) -> None:
        """Journals finished scenes and collects failed ones; raises ServerDown after too many in a row."""
        for outcome in outcomes:
            if "failed" in outcome:
                failures.append(outcome)
                self._in_a_row += 1
                if self._in_a_row >= self.give_up_after:
                    self._write_lines(FAILED, failures)
                    raise ServerDown(f"{self._in_a_row} scenes in a row failed; the last: {outcome['failed']}")
                continue
            self._in_a_row = 0
            journal.write(checked_line(outcome))
            journal.flush()
            os.fsync(journal.fileno())

    def _say_cost(
        self, rest: Sequence[int], seconds: float, stored: float, tokens: float, pictures: Sequence[Path]
    ) -> None:
        """Of the scenes after the measured slice, from its seconds, journal bytes and tokens (0: not told) a scene.

        A pair is stored twice, in the journal and in its data set; publication holds all of them in memory.
        """
        trajectory_bytes = len(json.dumps(self.trajectory_record(self.scenes[rest[0]])))
        bytes_per_scene = 2 * stored + trajectory_bytes
        payload = 4 / 3 * sum(path.stat().st_size for path in self._pictures(rest[0]).values())
        requests = self.server.concurrency + self.judge.concurrency
        told = f"{tokens:,.0f} tokens each, {tokens * len(rest):,.0f} in all" if tokens else "tokens not told"
        preflight(
            output_dir=self.output_dir,
            items=len(rest),
            bytes_per_item=bytes_per_scene,
            memory_bytes=len(self.scenes) * bytes_per_scene + requests * payload,
            seconds_per_item=seconds,
            files=pictures,
            title=f"driving questions of {len(rest):,} scenes, {told}",
        )

    def _pictures(self, place: int) -> dict[str, Path]:
        """By camera."""
        scene = self.scenes[place]
        return {camera: self.scenes.sensor_root / scene.cameras[0][camera] for camera in self.cameras}

    def trajectory_record(self, scene: SceneBatch) -> dict[str, Any]:
        """The trajectory task of one scene as a conversation in InternVL's form."""
        prompt = trajectory_prompt(
            scene.history[0].numpy(), int(scene.status[0, :4].argmax()), self.cameras, self.template
        )
        return self._record(
            scene,
            [{"from": "system", "value": prompt.system}],
            prompt.user,
            format_trajectory(scene.target[0].numpy()),
            "trajectory",
        )

    # ---- one scene

    async def _scene(self, client: ChatClient, judge: ChatClient, place: int) -> dict[str, Any]:
        scene = self.scenes[place]
        facts = scene_facts(scene, 0, self.pairs_per_phase)
        pictures = picture_parts(self._pictures(place))
        earlier: list[str] = []
        pairs: list[QaPair] = []
        for phase in PHASES:
            raw, found = await client.complete(
                phase_messages(self.prompts, phase, facts, pictures, earlier),
                lambda text, phase=phase: (text, parse_pairs(phase, text)),
            )
            earlier.append(raw)
            pairs += found
        questions = [judge_messages(self.prompts, pair, facts, pictures) for pair in pairs]
        judgements: list[Judgement] = await asyncio.gather(
            *(judge.complete(question, parse_judgement, temperature=0.0) for question in questions)
        )
        scored = [{**vars(pair), **vars(judgement)} for pair, judgement in zip(pairs, judgements)]
        return {"token": scene.token[0], "pairs": scored}

    def _outcomes(self, todo: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Finished scenes in the order they finish; an error that is not a scene's own ends the iteration."""
        loop = asyncio.new_event_loop()
        queue: asyncio.Queue = asyncio.Queue()
        task = loop.create_task(self._all(todo, queue))
        try:
            for _ in todo:
                outcome = loop.run_until_complete(queue.get())
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
            loop.run_until_complete(task)
        finally:
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            loop.close()

    async def _all(self, todo: Sequence[int], queue: asyncio.Queue) -> None:
        remaining = iter(todo)
        async with ChatClient(self.server) as client, ChatClient(self.judge) as judge:

            async def work() -> None:
                for place in remaining:
                    try:
                        await queue.put(await self._scene(client, judge, place))
                    except NoUsableAnswer as error:
                        await queue.put({"token": self.scenes.tokens[place], "failed": str(error)})

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.scenes_at_once):
                        group.create_task(work())
            except* TriviumError as errors:
                await queue.put(errors.exceptions[0])
            finally:
                self.counts.update({f"server_{name}": count for name, count in client.counts.items()})
                self.counts.update({f"judge_{name}": count for name, count in judge.counts.items()})

    # ---- files

    def task_fields(self) -> dict[str, Any]:
        """What a task of its own adds to the fingerprint."""
        return {}

    def _claim(self) -> None:
        fields = {
            "prompts": self.prompts.digest,
            "trajectory_prompt": prompt_digest(self.template, self.cameras),
            "model": self.server.model,
            "judge": self.judge.model,
            "pairs_per_phase": self.pairs_per_phase,
            "tokens": digest_tokens(self.scenes.tokens),
            **self.task_fields(),
        }
        mine = Fingerprint("driving_qa", fields, parents={"scenes": self.scenes.fingerprint})
        if (self.output_dir / "fingerprint.json").is_file():
            mine.require_equal(
                Fingerprint.load(self.output_dir),
                mine="this run",
                theirs=f"what {self.output_dir} was begun with",
                remedy="Choose another output_dir, or set prompts, models and scenes back.",
            )
        else:
            mine.save(self.output_dir)

    def _done(self) -> set[str]:
        """Tokens in the journal; lines that are damaged or cut short are dropped from the file: asked again."""
        path = self.output_dir / JOURNAL
        if not path.is_file():
            return set()
        content = path.read_bytes()
        lines = checked_lines(content, required=False)  # answers of an earlier version were paid for
        intact = [line for _, line in lines if line is not None]
        whole = "".join(map(checked_line, intact)).encode()
        if whole != content:
            log.warning("%s: brought into order; scenes whose lines were damaged or cut short are asked again", path)
            write_atomic(path, whole)
        return {line["token"] for line in intact}

    def _publish(self, failed: int) -> dict[str, int]:
        """Writes the data sets in the order of the index, whatever order the scenes finished in."""
        lines = [line for _, line in checked_lines((self.output_dir / JOURNAL).read_bytes()) if line is not None]
        by_token = {line["token"]: line["pairs"] for line in lines}
        kept, rejected, trajectories = [], [], []
        for place, token in enumerate(self.scenes.tokens):
            scene = self.scenes[place]
            trajectories.append(self.trajectory_record(scene))
            for pair in by_token.get(token, ()):
                record = self._record(scene, [], self._with_pictures(pair["question"]), pair["answer"], pair["phase"])
                record |= {"score": pair["score"], "reason": pair["reason"]}
                (kept if pair["score"] > self.keep_above else rejected).append(record)
        for name, records in (("trajectories", trajectories), ("qa", kept), ("rejected", rejected)):
            self._write_lines(f"{name}.jsonl", records)
        mixture = {
            name: {
                "root": str(self.scenes.sensor_root.resolve()),
                "annotation": f"{file}.jsonl",
                "repeat_time": repeat,
                "data_augment": False,
                "length": len(records),
                CHECKSUM_KEY: file_checksums(self.output_dir, [f"{file}.jsonl"])[f"{file}.jsonl"],
            }
            for name, file, repeat, records in (
                ("Navsim", "trajectories", 2, trajectories),
                ("Navsim_QA", "qa", 1, kept),
            )
            if records
        }
        write_json_atomic(self.output_dir / "mixture.json", mixture)
        numbers = {"scenes": len(by_token), "failed": failed, "kept": len(kept), "rejected": len(rejected)}
        return {**numbers, "trajectories": len(trajectories), **self.counts}

    def _with_pictures(self, question: str) -> str:
        return "\n".join([IMAGE_PLACEHOLDER] * len(self.cameras)) + "\n" + question.replace(IMAGE_PLACEHOLDER, "")

    def _record(
        self, scene: SceneBatch, before: list[dict[str, str]], question: str, answer: str, kind: str
    ) -> dict[str, Any]:
        paths = [scene.cameras[0][camera] for camera in self.cameras]
        sizes = [list(picture_size(self.scenes.sensor_root / path)) for path in paths]
        turns = [*before, {"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {
            "image": paths[0] if len(paths) == 1 else paths,
            "image_size": sizes[0] if len(paths) == 1 else sizes,
            "scene_id": scene.token[0],
            "type": kind,
            "conversations": turns,
        }

    def _write_lines(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        with atomic_stream(self.output_dir / name) as stream:
            stream.writelines(f"{json.dumps(record, ensure_ascii=False)}\n".encode() for record in records)
