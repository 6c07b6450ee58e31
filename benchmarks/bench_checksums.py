"""What checksums cost: opening a scene index and a store of 100,000 samples, and all that a job leaves.

    python benchmarks/bench_checksums.py --output benchmarks/results/checksums.json
    python benchmarks/bench_checksums.py --demo demo --demo-seconds 900     also a finished demo's share of what it took

The baseline is the same code in the same process with the comparisons switched off, measured in turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_dataset import grow, write_logs
from benchmarks.environment import report, row
from navsim_ext.dataset import SceneDataset, build_index
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.readers import NavsimLogs
from navsim_ext.runtime import checksums
from navsim_ext.runtime.checksums import CheckedFiles, file_checksums
from navsim_ext.shards import ShardStore, ShardWriter
from navsim_ext.shards.shard import Shard

SAMPLES = 100_000
READINGS = 10  # how often the commands of a job read one file; the demo's read most of theirs two or three times


def _nothing(*_: object, **__: object) -> None:  # a Mock would cost more than what it stands for
    return None


def _path(files: CheckedFiles, name: str) -> Path:
    return files.folder / name


@contextmanager
def without_comparing() -> Iterator[None]:
    """Everything as it is, but no byte is hashed."""
    with (
        mock.patch.object(checksums.CheckedArray, "_check_bytes", _nothing),
        mock.patch.object(CheckedFiles, "check", _path),
        mock.patch.object(checksums, "_check_stamp", _nothing),
        mock.patch.object(Shard, "check", _nothing),
    ):
        yield


def paired(work: Callable[[], object], turns: int) -> tuple[float, float, float]:
    """(least seconds with, without, share that comparing adds to the least), in turns, so that load meets both."""
    with_s, without_s = [], []
    for _ in range(turns):
        with_s.append(seconds(work))
        with without_comparing():
            without_s.append(seconds(work))
    return min(with_s), min(without_s), min(with_s) / min(without_s) - 1.0


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, its waiting for the disk's cache included, other programs' work not."""
    start = time.process_time()
    work()
    return time.process_time() - start


def fill_store(folder: Path) -> None:
    values = np.random.default_rng(0).random(64).astype(np.float32)
    with ShardWriter(folder, Fingerprint("bench", {})) as writer:
        for i in range(SAMPLES):
            writer.put(f"{i:016x}", {"states": values})


def measure(root: Path, turns: int, demo: Path | None, demo_seconds: float | None) -> list[dict]:
    write_logs(root, 2, 213, 4)
    build_index(NavsimLogs(root, "mini"), root / "index", cameras=("CAM_F0",))
    grow(root / "index", root / "large", SAMPLES)
    fill_store(root / "store")
    rows = []
    works = {
        f"scene index of {SAMPLES:,} samples: opening it and reading the last": lambda: SceneDataset(root / "large")[
            SAMPLES - 1
        ],
        f"store of {SAMPLES:,} records: opening it and reading the last": lambda: ShardStore(root / "store").get(
            f"{SAMPLES - 1:016x}"
        ),
    }
    for name, work in works.items():
        work()
        with_s, without_s, share = paired(work, turns)
        rows.append(row(name, with_s * 1e3, f"ms ({without_s * 1e3:.3g} without comparing)"))
        rows.append(row(f"{name}: what comparing adds", share * 100.0, "%", "<= 10"))
    block = np.random.default_rng(1).bytes(1 << 26)
    rows.append(row("XXH3 of bytes in memory", len(block) / seconds(lambda: xxhash.xxh3_64(block)) / 1e9, "GB/s"))
    if demo is not None and demo_seconds is not None:
        rows += demo_rows(demo, demo_seconds)
    return rows


def demo_rows(demo: Path, demo_seconds: float) -> list[dict]:
    """The checksums of every file of a finished demo: written once, compared ``READINGS`` times."""
    files = [path for path in demo.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size]
    names = [str(path.relative_to(demo)) for path in files]
    write_s = seconds(lambda: file_checksums(demo, names))
    stored = CheckedFiles(demo, file_checksums(demo, names), "")
    check_s = min(seconds(stored.check_all) for _ in range(3))
    size = sum(path.stat().st_size for path in files) / 1e6
    total = write_s + READINGS * check_s
    return [
        row(f"demo: checksums of all {len(files)} files, once", write_s, f"s ({size:.0f} MB)"),
        row("demo: comparing all of them, once", check_s, "s"),
        row(f"demo: written once and compared {READINGS} times, of its {demo_seconds:.0f} s",
            100.0 * total / demo_seconds, "%", "<= 3"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--demo", type=Path, help="DEMO_DIR of a finished scripts/demo.sh")
    parser.add_argument("--demo-seconds", type=float, help="what that demo took")
    arguments = parser.parse_args()
    if (arguments.demo is None) != (arguments.demo_seconds is None):
        parser.error("--demo and --demo-seconds belong together: the share is of what that demo took")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.turns, arguments.demo, arguments.demo_seconds)
    baseline = "the same code in the same process without comparing, in turns"
    report("Checksums", rows, baseline=baseline, output=arguments.output)


if __name__ == "__main__":
    main()
