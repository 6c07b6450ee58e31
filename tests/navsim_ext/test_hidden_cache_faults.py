"""The hidden cache under faults, and its commands: verify, stats, merge, reencode."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import forked
import pytest
import torch
from damage import kill_storm

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import CachedHiddenStates, HiddenCacheWriter
from navsim_ext.hidden_cache.merge import merge
from navsim_ext.hidden_cache.reencode import reencode
from navsim_ext.hidden_cache.stats import stats
from navsim_ext.hidden_cache.verify import verify
from navsim_ext.runtime.config import compose
from navsim_ext.shards import CorruptShard, ShardWriter, StorageFull

VLM = Fingerprint("vlm", {"weights": "abc", "prompt": "def"})
COMMANDS = ("verify", "stats", "merge", "reencode")


def states_of(i: int, width: int = 128) -> torch.Tensor:
    return torch.randn(5 + i % 7, width, generator=torch.Generator().manual_seed(i)).bfloat16()


def write(folder: Path, tokens=range(6), **options) -> list[str]:
    with HiddenCacheWriter(folder, VLM, **options) as writer:
        for i in tokens:
            writer.put(f"{i:016x}", states_of(i))
    return [f"{i:016x}" for i in tokens]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("codec", ["bf16", "int8_g32"])
def test_every_flipped_byte_of_a_cache_is_detected_and_never_read(tmp_path, codec):
    """A random bit of every byte of the prefix and identity files, and of every 7th byte of the shard."""
    with HiddenCacheWriter(tmp_path, VLM, codec=codec, prefix=torch.randn(2, 32)) as writer:
        for i in range(3):
            writer.put(f"{i:016x}", states_of(i, 32))
    assert verify(tmp_path).require_ok().records == 3
    tokens = CachedHiddenStates(tmp_path).tokens
    rng = random.Random(1)
    for path in (tmp_path / "prefix.safetensors", tmp_path / "store.json", *tmp_path.glob("*.safetensors")):
        step = 7 if path.name.startswith("shard") else 1
        for position in range(rng.randrange(step), path.stat().st_size, step):
            content = bytearray(path.read_bytes())
            content[position] ^= 1 << rng.randrange(8)
            original = path.read_bytes()
            path.write_bytes(content)
            assert not verify(tmp_path).ok, f"byte {position} of {path.name}"
            with pytest.raises(TriviumError):
                CachedHiddenStates(tmp_path).fetch(tokens)
            path.write_bytes(original)
    assert verify(tmp_path).ok


def test_verify_names_a_width_that_differs(tmp_path):
    """Two ranks with different models under one fingerprint: each writer alone is consistent."""
    first = HiddenCacheWriter(tmp_path, VLM, writer="a")
    second = HiddenCacheWriter(tmp_path, VLM, writer="b")
    first.put("x", states_of(1, 64))
    second.put("y", states_of(2, 96))
    first.close()
    second.close()
    (problem,) = verify(tmp_path).problems
    assert "64 (token x), 96 (token y)" in problem
    with pytest.raises(DataError, match=r"widths \[64, 96\]"):
        CachedHiddenStates(tmp_path).fetch(["x", "y"])


def test_stats_count_tokens_bytes_and_errors(tmp_path):
    tokens = write(tmp_path / "bf16", range(10), prefix=torch.randn(4, 128))
    found = stats(tmp_path / "bf16", sample=5)
    assert (found.samples, found.width, found.prefix_tokens) == (10, 128, 4)
    assert (found.tokens_min, found.tokens_max) == (4 + 5, 4 + 11)
    assert found.codecs["bf16"].error_max == 0
    assert set(found.codecs) == {"bf16", "int8_token", "int8_g128", "int8_g32", "fp8"}
    assert 0 < found.codecs["int8_g32"].error_mean < found.codecs["fp8"].error_mean < 0.04
    reencode(tmp_path / "bf16", tmp_path / "int8", codec="int8_g32")
    own = stats(tmp_path / "int8", sample=100)
    assert own.sampled == 10
    cached = CachedHiddenStates(tmp_path / "int8")
    for token in tokens:
        exact = states_of(int(token, 16)).float()
        error = (cached.fetch([token]).hidden[0, 4:].float() - exact).norm() / exact.norm()
        assert float(cached.store.get(token)["error"]) == pytest.approx(error.item(), rel=1e-3)
    assert own.codecs["int8_g32"].error_max >= own.codecs["int8_g32"].error_mean > 0
    HiddenCacheWriter(tmp_path / "empty", VLM).close()
    with pytest.raises(DataError, match="no finished record"):
        stats(tmp_path / "empty")


def test_reencoding_equals_writing_with_those_settings(tmp_path):
    write(tmp_path / "bf16")
    for codec, compression in (("int8_g128", None), ("fp8", "zstd"), ("bf16", "zstd")):
        name = f"{codec}-{compression}"
        write(tmp_path / f"direct-{name}", codec=codec, compression=compression)
        written = reencode(tmp_path / "bf16", tmp_path / name, codec=codec, compression=compression)
        assert written == 6
        assert contents(tmp_path / name) == contents(tmp_path / f"direct-{name}")
        assert reencode(tmp_path / "bf16", tmp_path / name, codec=codec, compression=compression) == 0
    reencode(tmp_path / "bf16-zstd", tmp_path / "back", codec="bf16")
    assert contents(tmp_path / "back") == contents(tmp_path / "bf16")
    reencode(tmp_path / "fp8-zstd", tmp_path / "fp8", codec="fp8")
    plain, packed = CachedHiddenStates(tmp_path / "fp8"), CachedHiddenStates(tmp_path / "fp8-zstd")
    assert torch.equal(plain.fetch(plain.tokens).hidden, packed.fetch(plain.tokens).hidden)
    with pytest.raises(DataError, match="start from the bf16 cache"):
        reencode(tmp_path / "fp8", tmp_path / "twice", codec="int8_g128")


def test_reencoding_pools_where_the_image_tokens_are_known(tmp_path):
    states = torch.randn(300, 64).bfloat16()
    for name, options in (("full", {}), ("direct", {"pooling": "image_2x2"})):
        with HiddenCacheWriter(tmp_path / name, VLM, **options) as writer:
            writer.put("a", states, image_spans=[(10, 266)])
    reencode(tmp_path / "full", tmp_path / "lite", codec="bf16", pooling="image_2x2")
    assert contents(tmp_path / "lite") == contents(tmp_path / "direct")
    write(tmp_path / "text")
    with pytest.raises(DataError, match="needs image_spans"):
        reencode(tmp_path / "text", tmp_path / "pooled", codec="bf16", pooling="image_2x2")


def test_merge_brings_the_prefix_along(tmp_path):
    prefix = torch.randn(3, 128)
    for name, tokens in (("a", range(4)), ("b", range(3, 8))):
        write(tmp_path / name, tokens, prefix=prefix, writer=name)
    report = merge(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    assert (report.records, report.identical_duplicates) == (8, 1)
    assert verify(tmp_path / "all").ok
    batch = CachedHiddenStates(tmp_path / "all").fetch([f"{7:016x}"])
    assert torch.equal(batch.hidden[0], torch.cat([prefix.bfloat16(), states_of(7)]))


def test_a_full_disk_during_reencoding_is_resumed(tmp_path, monkeypatch):
    write(tmp_path / "bf16")
    real, calls = ShardWriter.put, []

    def put(self, token, arrays):
        calls.append(token)
        if len(calls) == 4:
            monkeypatch.setattr(os, "pwritev", full)
        real(self, token, arrays)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "put", put)
    with pytest.raises(StorageFull, match="3 records are kept"):
        reencode(tmp_path / "bf16", tmp_path / "fp8", codec="fp8")
    monkeypatch.undo()
    assert reencode(tmp_path / "bf16", tmp_path / "fp8", codec="fp8") == 3
    write(tmp_path / "direct", codec="fp8")
    for folder in ("fp8", "direct"):
        merge(tmp_path / folder)
    assert contents(tmp_path / "fp8") == contents(tmp_path / "direct")


WRITE = """
import sys, torch
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import HiddenCacheWriter
torch.set_num_threads(1)
folder, writer, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
prefix = torch.randn(3, 128, generator=torch.Generator().manual_seed(99))
vlm = Fingerprint("vlm", {"weights": "abc"})
with HiddenCacheWriter(folder, vlm, codec="int8_g32", prefix=prefix, writer=writer, shard_bytes=60_000) as out:
    print("ready", flush=True)
    for i in range(count):
        token = f"{i:016x}"
        if token not in out.done:
            states = torch.randn(20 + i % 30, 128, generator=torch.Generator().manual_seed(i))
            if out.put(token, states):
                print(token, flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_9_storm_ends_in_the_undisturbed_cache(tmp_path, kills):
    """Exporters are killed at random moments; what they acknowledged is there, and the end is the calm one's bytes."""
    count = 150 * kills
    script, storm, calm = tmp_path / "write.py", tmp_path / "storm", tmp_path / "calm"
    script.write_text(WRITE)
    promised = kill_storm(script, storm, kills, count, (1, 90)) - {"ready"}
    assert 0 < len(promised) < count
    for folder in (storm, calm):
        assert forked.run(script, folder, 2, count).returncode == 0
        merge(folder)
        assert verify(folder).require_ok().records == count
    assert promised <= set(CachedHiddenStates(storm).tokens)
    assert contents(storm) == contents(calm)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_configurations_compose(command):
    assert compose(f"hidden_cache/{command}")


def test_the_commands_run_and_fail_as_told(tmp_path):
    """Each entry point called as the shell would, in the folder that its relative paths mean."""
    write(tmp_path / "cache")
    calls = [
        ("verify", ["folder=cache"]),
        ("stats", ["folder=cache"]),
        ("reencode", ["source=cache", "output_dir=small", "codec=int8_g128", "compression=zstd"]),
        ("merge", ["folder=small"]),
        ("verify", ["folder=small"]),
    ]
    said = ""
    for name, options in calls:
        done = forked.run("-m", f"navsim_ext.hidden_cache.{name}", *options, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert said.count("every byte is as written") == 2
    assert "int8_g32" in said
    assert "6 records written" in said
    shard = next((tmp_path / "cache").glob("*.safetensors"))
    os.truncate(shard, 5000)
    failed = forked.run("-m", "navsim_ext.hidden_cache.verify", "folder=cache", folder=tmp_path)
    assert failed.returncode == 2
    assert shard.name in failed.stderr
    with pytest.raises(CorruptShard):
        verify(tmp_path / "cache").require_ok()
