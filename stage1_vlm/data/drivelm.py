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
from PIL import Image

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import write_json_atomic
from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.runtime.checksums import CHECKSUM_KEY, file_checksums
from navsim_ext.runtime.config import job

_log = logging.getLogger(__name__)
_TAG = re.compile(r"<c\d+,(CAM_[A-Z_]+),")
FRONT = "CAM_FRONT"


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
    with open(output_dir / "drivelm.jsonl", "w", encoding="utf-8") as stream:
        for scene_token, scene in json.loads(source.read_text(encoding="utf-8")).items():
            for frame_token, frame in scene["key_frames"].items():
                for group, questions in frame["QA"].items():
                    for question in questions:
                        record = _record(question, frame["image_paths"], cameras, root, sizes)
                        record |= {"scene_id": frame_token, "scene": scene_token, "type": group}
                        stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                        counts[group] += 1
    mixture = {"DriveLM": {"root": str(root.resolve()), "annotation": "drivelm.jsonl", "repeat_time": 1}}
    checksum = file_checksums(output_dir, ["drivelm.jsonl"])["drivelm.jsonl"]
    mixture["DriveLM"] |= {"data_augment": False, "length": sum(counts.values()), CHECKSUM_KEY: checksum}
    write_json_atomic(output_dir / "mixture.json", mixture)
    return dict(counts)


def _record(
    question: dict[str, Any], pictures: dict[str, str], cameras: str, root: Path, sizes: dict[str, list[int]]
) -> dict[str, Any]:
    named = list(dict.fromkeys(_TAG.findall(f"{question['Q']} {question['A']}")))
    chosen = list(pictures) if cameras == "all" else [name for name in named if name in pictures] or [FRONT]
    paths = [pictures[name] for name in chosen]
    for path in paths:
        if path not in sizes and (root / path).is_file():
            with Image.open(root / path) as picture:
                sizes[path] = list(picture.size)
    views = "\n".join(f"{name}: {IMAGE_PLACEHOLDER}" for name in chosen)
    record: dict[str, Any] = {
        "image": paths,
        "conversations": [
            {"from": "human", "value": f"{views}\n{question['Q']}"},
            {"from": "gpt", "value": question["A"] or ""},
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
