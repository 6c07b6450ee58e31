"""Which container for many small records: the sharded store against other well-kept ones.

    python benchmarks/bench_shards.py --output benchmarks/results/shards.json

Records like those of a metric cache: 30 arrays of 3 to 120 float64 rows of 2, about 25 KB. For each container: bytes
over the arrays' own, time to open it, time to get all arrays of a random record (warm page cache, one core; the
smallest of several repeats taken in turns). Opening is also measured at 100,000 tokens.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from environment import report, row
from safetensors import safe_open
from safetensors.numpy import save_file

from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards import ShardStore, ShardWriter, merge, verify

ARRAYS = 30
Records = Mapping[str, Mapping[str, np.ndarray]]
Getter = Callable[[str], Any]


def records_of(count: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        f"{i:016x}": {f"array_{j:02d}": rng.normal(size=(int(rng.integers(3, 120)), 2)) for j in range(ARRAYS)}
        for i in range(count)
    }


def write_shards(path: Path, records: Records) -> None:
    with ShardWriter(path, Fingerprint("benchmark", {})) as writer:
        for token, arrays in records.items():
            writer.put(token, arrays)


def open_shards(path: Path) -> Getter:
    return ShardStore(path).get


def write_safetensors(path: Path, records: Records) -> None:
    save_file({f"{token}/{name}": array for token, arrays in records.items() for name, array in arrays.items()}, path)


def open_safetensors(path: Path) -> Getter:
    file = safe_open(path, "np")
    names = [f"array_{j:02d}" for j in range(ARRAYS)]
    return lambda token: {name: file.get_tensor(f"{token}/{name}") for name in names}


def write_arrow(path: Path, records: Records) -> None:
    names = next(iter(records.values())).keys()
    columns: dict[str, Any] = {"token": pa.array(list(records))}
    for name in names:
        columns[name] = pa.array([arrays[name].tobytes() for arrays in records.values()], pa.large_binary())
        columns[name + "_rows"] = pa.array([len(arrays[name]) for arrays in records.values()], pa.int64())
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def open_arrow(path: Path) -> Getter:
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    rows = {token: i for i, token in enumerate(table["token"].to_pylist())}
    names = [f"array_{j:02d}" for j in range(ARRAYS)]
    values = {name: table[name].chunk(0) for name in names}
    counts = {name: table[name + "_rows"].chunk(0).to_numpy() for name in names}

    def get(token: str) -> dict[str, np.ndarray]:
        i = rows[token]
        return {n: np.frombuffer(values[n][i].as_buffer(), np.float64).reshape(counts[n][i], 2) for n in names}

    return get


def write_npz(path: Path, records: Records) -> None:
    path.mkdir()
    for token, arrays in records.items():
        np.savez(path / f"{token}.npz", **arrays)


def open_npz(path: Path) -> Getter:
    def get(token: str) -> dict[str, np.ndarray]:
        with np.load(path / f"{token}.npz") as file:
            return {name: file[name] for name in file.files}

    return get


CONTAINERS = {
    "sharded store (safetensors, columnar index)": (write_shards, open_shards),
    "safetensors, one tensor per array": (write_safetensors, open_safetensors),
    "Arrow IPC, one column per array": (write_arrow, open_arrow),
    "npz, one file per token": (write_npz, open_npz),
}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="also write the JSON here")
    parser.add_argument("--records", type=int, default=4000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_shards_"))
    try:
        rows = [*compare(folder, records_of(arguments.records)), *many_tokens(folder), *checksums(), *upkeep(folder)]
    finally:
        shutil.rmtree(folder)
    report("shards", rows, baseline="the same records in other containers", output=arguments.output)


def compare(folder: Path, records: Records, repeats: int = 5) -> list[dict[str, Any]]:
    own_bytes = sum(array.nbytes for arrays in records.values() for array in arrays.values())
    writing, opening, getting, getters = {}, {}, {}, {}
    for number, (name, (write, open_)) in enumerate(CONTAINERS.items()):
        path = folder / str(number)
        writing[name] = seconds(partial(write, path, records))
        opening[name] = min(seconds(partial(open_, path)) for _ in range(3))
        getters[name] = open_(path)
        getting[name] = np.inf
    tokens = list(records)
    rng = np.random.default_rng(1)
    for _ in range(repeats):
        order = [tokens[i] for i in rng.permutation(len(tokens))[:1000]]
        for name, get in getters.items():
            getting[name] = min(getting[name], seconds(partial(get_all, get, order)) / len(order))
    rows = []
    for number, name in enumerate(CONTAINERS):
        ours = number == 0
        size = sum(
            path.stat().st_size for path in [folder / str(number), *(folder / str(number)).rglob("*")] if path.is_file()
        )
        rows += [
            row(f"{name}: bytes over the arrays' own", 100 * (size / own_bytes - 1), "%"),
            row(f"{name}: write a record", writing[name] / len(records) * 1e3, "ms"),
            row(f"{name}: open {len(records):,} records", opening[name] * 1e3, "ms"),
            row(f"{name}: get a random record", getting[name] * 1e3, "ms", "< 0.1" if ours else None),
        ]
    return rows


def get_all(get: Getter, tokens: list[str]) -> None:
    for token in tokens:
        get(token)


def many_tokens(folder: Path, count: int = 100_000) -> list[dict[str, Any]]:
    """Opening at 100,000 tokens of 30 tiny arrays: what the index alone costs."""
    arrays = {f"array_{j:02d}": np.zeros(1) for j in range(ARRAYS)}
    with ShardWriter(folder / "many", Fingerprint("benchmark", {}), shard_bytes=64 << 20) as writer:
        taken = seconds(lambda: [writer.put(f"{i:016x}", arrays) for i in range(count)])
    names = [f"{i:016x}" for i in range(count // 10)]
    save_file(
        {f"{token}/{name}": array for token in names for name, array in arrays.items()}, folder / "many.safetensors"
    )
    ours = min(seconds(lambda: ShardStore(folder / "many")) for _ in range(3))
    plain = min(seconds(lambda: safe_open(folder / "many.safetensors", "np")) for _ in range(3))
    return [
        row(f"sharded store: put at {count:,} tokens", taken / count * 1e3, "ms"),
        row(f"sharded store: open {count:,} tokens x {ARRAYS} arrays, indices checked", ours * 1e3, "ms"),
        row(f"safetensors, one tensor per array: open {count // 10:,} tokens x {ARRAYS} arrays", plain * 1e3, "ms"),
    ]


def checksums() -> list[dict[str, Any]]:
    """What comparing the checksum of an 8.5 MB record costs."""
    import zlib

    data = np.random.default_rng(0).integers(0, 256, 8_524_800, dtype=np.uint8)
    kinds = {"XXH3-64 (chosen)": xxhash.xxh3_64_intdigest, "CRC-32 (zlib)": zlib.crc32}
    return [
        row(f"checksum of 8.5 MB: {name}", min(seconds(partial(f, data)) for _ in range(10)) * 1e3, "ms")
        for name, f in kinds.items()
    ]


def upkeep(folder: Path) -> list[dict[str, Any]]:
    """verify and merge of the compared store, in bytes of records per second."""
    path = folder / "0"
    size = ShardStore(path).stats().data_bytes
    merging = seconds(lambda: merge(path))
    checking = min(seconds(lambda: verify(path).require_ok()) for _ in range(3))
    return [
        row("verify, small records", size / checking / 1e9, "GB/s"),
        row("merge, small records, synced", size / merging / 1e9, "GB/s"),
    ]


if __name__ == "__main__":
    main()
