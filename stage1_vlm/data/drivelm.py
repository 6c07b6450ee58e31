"""DriveLM's questions as conversations: ``python -m stage1_vlm.data.drivelm source=train.json output_dir=DIR``.

One line a question, with the pictures that the question needs: those of the cameras that its object tags name
(``<c1,CAM_BACK,1088.3,497.5>``), the front camera without a tag, all six with ``cameras=all``.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import atomic_stream, read_json, write_json_atomic
from navsim_ext.pictures import picture_size
from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.runtime.checksums import CHECKSUM_KEY, file_checksums
from navsim_ext.runtime.config import job

_log = logging.getLogger(__name__)
_TAG = re.compile(r"<c\d+,(CAM_[A-Z_]+),")
FRONT = "CAM_FRONT"
FORM = (
    "DriveLM's form {scene: {key_frames: {frame: {image_paths: {camera: path}, QA: {group: [{Q, A}]}}}}} was expected: "
    "give train.json of DriveLM-nuScenes (a list of conversations needs no conversion)"
)


def convert_drivelm(
    source: str | Path, output_dir: str | Path, *, root: str | Path | None = None, cameras: str = "named"
) -> dict[str, int]:
    """Writes ``drivelm.jsonl`` and ``mixture.json``; returns counts by question group.

    ``root``: folder that the picture paths start at (default: the source's). ``cameras``: ``named`` or ``all``.
    Questions without an answer are written too: the index counts and lists them.
    """
    source, output_dir = Path(source), Path(output_dir)
    root = source.parent if root is None else Path(root)
    if not source.is_file():
        raise MissingError(f"{source} does not exist: give DriveLM's JSON file")
    if cameras not in ("named", "all"):
        raise DataError(f"cameras={cameras!r}; choose named or all")
    output_dir.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    sizes: dict[str, list[int]] = {}
    with atomic_stream(output_dir / "drivelm.jsonl") as stream:
        for scene_token, scene in _part(read_json(source), dict, f"{source}").items():
            where = f"{source}, scene {scene_token}"
            for frame_token, frame in _part(scene, dict, where, "key_frames").items():
                place = f"{where}, frame {frame_token}"
                pictures = _part(frame, dict, place, "image_paths")
                for group, questions in _part(frame, dict, place, "QA").items():
                    for question in _part(questions, list, f"{place}, {group}"):
                        record = _record(question, pictures, cameras, root, sizes, f"{place}, {group}")
                        record |= {"scene_id": frame_token, "scene": scene_token, "type": group}
                        stream.write((json.dumps(record) + "\n").encode())
                        counts[group] += 1
        if not counts:
            raise DataError(f"{source} holds no question: {FORM}")
    mixture = {"DriveLM": {"root": str(root.resolve()), "annotation": "drivelm.jsonl", "repeat_time": 1}}
    checksum = file_checksums(output_dir, ["drivelm.jsonl"])["drivelm.jsonl"]
    mixture["DriveLM"] |= {"data_augment": False, "length": sum(counts.values()), CHECKSUM_KEY: checksum}
    write_json_atomic(output_dir / "mixture.json", mixture)
    return dict(counts)


def _part(holder: Any, kind: type, where: str, key: str | None = None) -> Any:
    """``holder``, or its value under ``key``, of the type that DriveLM's form has there."""
    if key is not None:
        holder = _part(holder, dict, where).get(key)
        where = f"{where}: {key}"
    if not isinstance(holder, kind):
        raise DataError(f"{where} is {holder!r:.80}; {FORM}")
    return holder


def _record(
    question: Any, pictures: dict[str, str], cameras: str, root: Path, sizes: dict[str, list[int]], where: str
) -> dict[str, Any]:
    asked, answer = _part(question, dict, where).get("Q"), question.get("A") or ""
    if not isinstance(asked, str) or not isinstance(answer, str):
        raise DataError(f"{where}: Q is {asked!r:.80}, A is {answer!r:.80}; {FORM}")
    named = list(dict.fromkeys(_TAG.findall(f"{asked} {answer}")))
    chosen = list(pictures) if cameras == "all" else [name for name in named if name in pictures] or [FRONT]
    paths = [pictures.get(name) for name in chosen]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise DataError(
            f"{where}: image_paths {pictures!r:.200} without a path for {', '.join(chosen) or 'any'}; {FORM}"
        )
    for path in paths:
        if path not in sizes and (root / path).is_file():
            sizes[path] = list(picture_size(root / path))
    views = "\n".join(f"{name}: {IMAGE_PLACEHOLDER}" for name in chosen)
    record: dict[str, Any] = {
        "image": paths,
        "conversations": [
            {"from": "human", "value": f"{views}\n{asked}"},
            {"from": "gpt", "value": answer},
        ],
    }
    if all(path in sizes for path in paths):
        record["image_size"] = [sizes[path] for path in paths]
    return record


@job("drivelm")
def main(cfg: DictConfig) -> None:
    _log.info("%s", convert_drivelm(cfg.source, cfg.output_dir, root=cfg.root, cameras=cfg.cameras))


if __name__ == "__main__":
    main()
