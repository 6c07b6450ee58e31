"""The hidden cache: what is written comes back, padded with its mask, under the right fingerprint."""

from __future__ import annotations

import gc
import logging
import pickle
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.hidden_cache import (
    CachedHiddenStates,
    HiddenBatch,
    HiddenCacheWriter,
    LiveHiddenStates,
    PackedHiddenBatch,
    require_states,
    states_fingerprint,
)
from navsim_ext.hidden_cache.buffers import BufferPool
from navsim_ext.hidden_cache.codecs import CODECS
from navsim_ext.hidden_cache.read_ahead import ReadAhead, WarnWhenStorageLimits
from navsim_ext.runtime.config import config_root
from navsim_ext.shards import DuplicateToken, ShardWriter, WriterLocked

VLM = Fingerprint("vlm", {"weights": "abc", "prompt": "def"})
WIDTH = 128


def states_of(i: int, width: int = WIDTH) -> torch.Tensor:
    """bf16 [5 + 3i, D]."""
    return torch.randn(5 + 3 * i, width, generator=torch.Generator().manual_seed(i)).bfloat16()


def write(folder: Path, count: int = 6, **options) -> list[str]:
    with HiddenCacheWriter(folder, VLM, **options) as writer:
        for i in range(count):
            writer.put(f"{i:016x}", states_of(i))
    return [f"{i:016x}" for i in range(count)]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("codec", CODECS)
def test_batches_are_the_states_padded_on_the_right(tmp_path, codec, compression):
    tokens = write(tmp_path, codec=codec, compression=compression)
    cache = CachedHiddenStates(tmp_path)
    batch = cache.fetch([tokens[4], tokens[1], tokens[4]]).validate()
    assert batch.hidden.shape == (3, 17, WIDTH)
    assert batch.hidden.dtype == torch.bfloat16
    assert batch.lengths.tolist() == [17, 8, 17]
    assert not batch.hidden[~batch.mask].any()
    for row, i in enumerate((4, 1, 4)):
        expected = states_of(i).float()
        found = batch.hidden[row][batch.mask[row]].float()
        assert (found - expected).norm() <= {"bf16": 0.0, "fp8": 0.04}.get(codec, 0.02) * expected.norm()
    assert cache.shape(tokens[4]) == (17, WIDTH)
    assert len(cache) == 6
    assert tokens[2] in cache


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shared", [False, True])
def test_decoding_on_the_device_gives_the_same_batch(tmp_path, codec, shared):
    tokens = write(tmp_path, codec=codec, prefix=states_of(1) if shared else None)
    on_host = CachedHiddenStates(tmp_path).fetch(tokens)
    packed = CachedHiddenStates(tmp_path, decode="device").fetch(tokens)
    assert isinstance(packed, PackedHiddenBatch)
    on_device = packed.to("cpu")
    assert isinstance(on_device, HiddenBatch)
    assert torch.equal(on_device.hidden, on_host.hidden)
    assert torch.equal(on_device.mask, on_host.mask)
    encoded = sum(part.nbytes for part in packed.parts.values())
    assert encoded < on_host.hidden.nbytes or codec == "bf16"


def test_a_shared_prefix_stands_before_every_sample(tmp_path):
    prefix = states_of(2)
    tokens = write(tmp_path, prefix=prefix)
    cache = CachedHiddenStates(tmp_path)
    batch = cache.fetch(tokens[:3]).validate()
    for row in range(3):
        assert torch.equal(batch.hidden[row][batch.mask[row]], torch.cat([prefix, states_of(row)]))
    assert cache.shape(tokens[0]) == (len(prefix) + 5, WIDTH)
    unshared = tmp_path / "unshared"
    write(unshared)
    assert cache.fingerprint.digest == CachedHiddenStates(unshared).fingerprint.digest  # the values are the same
    saved = CachedHiddenStates(unshared).store.record_bytes(tokens[0]) - cache.store.record_bytes(tokens[0])
    assert saved == 0  # the states after the prefix alone are stored
    with pytest.raises(FingerprintMismatch, match="prefix"):
        HiddenCacheWriter(tmp_path, VLM, prefix=states_of(3))
    (tmp_path / "prefix.safetensors").unlink()
    with pytest.raises(MissingError, match="shares a prompt prefix"):
        CachedHiddenStates(tmp_path)


def test_pooling_by_name_makes_a_lite_cache(tmp_path):
    states = torch.randn(20 + 512 + 10, WIDTH).bfloat16()
    with HiddenCacheWriter(tmp_path, VLM, pooling="image_2x2") as writer:
        writer.put("a", states, image_spans=[(20, 532)])
        with pytest.raises(DataError, match="needs image_spans"):
            writer.put("b", states)
    batch = CachedHiddenStates(tmp_path).fetch(["a"])
    assert batch.hidden.shape[1] == 20 + 128 + 10
    assert torch.equal(batch.hidden[0, :20], states[:20])
    first_square = states[20:532].float()[[0, 1, 16, 17]].mean(0)
    torch.testing.assert_close(batch.hidden[0, 20].float(), first_square.bfloat16().float())


def test_the_published_layout_keeps_its_padding_visible(tmp_path):
    """Published weights saw pad_to rows, left padding included and unmasked; longer prompts keep their length."""
    with HiddenCacheWriter(tmp_path, VLM, pad_to=40) as writer:
        for token, rows, padding in (("short", 40, 7), ("long", 43, 0)):
            writer.put(token, torch.randn(rows, WIDTH), padding=padding)
        with pytest.raises(DataError, match="pad_to=40"):
            writer.put("unpadded", torch.randn(33, WIDTH))
    assert CachedHiddenStates(tmp_path).fetch(["short", "long"]).mask.sum(1).tolist() == [40, 43]
    hiding = CachedHiddenStates(tmp_path, mask_padding=True).fetch(["short", "long"])
    assert not hiding.mask[0, :7].any()
    assert hiding.mask[0, 7:40].all()
    assert hiding.lengths.tolist() == [33, 43]
    assert hiding.hidden[0, :7].any()
    with pytest.raises(DataError, match="neither with pooling nor"):
        HiddenCacheWriter(tmp_path / "b", VLM, pad_to=40, prefix=states_of(1))
    write(tmp_path / "unpadded")
    with (
        pytest.raises(DataError, match="rows of padding in an unpadded cache"),
        HiddenCacheWriter(tmp_path / "unpadded", VLM) as writer,
    ):
        writer.put("x", states_of(1), padding=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_states_that_are_not_finite_are_named_or_listed(tmp_path, bad):
    states = states_of(3).float()
    states[4, 7] = bad
    with HiddenCacheWriter(tmp_path, VLM) as writer, pytest.raises(DataError, match=r"token x.*1 of 14 rows.*row 4"):
        writer.put("x", states)
    with HiddenCacheWriter(tmp_path, VLM, skip_bad=True) as writer:
        assert not writer.put("x", states)
        assert writer.put("y", states_of(1))
        assert "row 4" in writer.rejected["x"]
    assert "row 4" in (tmp_path / "rejected-0.json").read_text()
    assert CachedHiddenStates(tmp_path).tokens == ["y"]


def test_a_width_that_differs_is_refused_also_after_a_restart(tmp_path):
    write(tmp_path, 2)
    with HiddenCacheWriter(tmp_path, VLM) as writer:
        with pytest.raises(DataError, match="width 64, this cache has 128"):
            writer.put("narrow", states_of(1, 64))
        with pytest.raises(DataError, match="must be"):
            writer.put("flat", torch.zeros(5))
        with pytest.raises(DataError, match="must be"):
            writer.put("empty", torch.zeros(0, WIDTH))


def test_tokens_twice_unknown_tokens_and_second_writers(tmp_path):
    tokens = write(tmp_path)
    with HiddenCacheWriter(tmp_path, VLM) as writer:
        assert writer.done == set(tokens)
        with pytest.raises(DuplicateToken, match=tokens[0]):
            writer.put(tokens[0], states_of(0))
        with pytest.raises(WriterLocked):
            HiddenCacheWriter(tmp_path, VLM)
    with pytest.raises(MissingError, match="no record of token 'unknown'"):
        CachedHiddenStates(tmp_path).fetch(["unknown"])
    with ShardWriter(tmp_path / "other", VLM) as other:
        other.put("a", {"x": np.zeros(3)})
    with pytest.raises(DataError, match="not a hidden-state cache"):
        CachedHiddenStates(tmp_path / "other")


def test_fingerprints_say_what_changes_values_and_nothing_else(tmp_path):
    write(tmp_path / "bf16")
    write(tmp_path / "zstd", compression="zstd")
    write(tmp_path / "int8", codec="int8_g128")
    bf16, zstd, int8 = (CachedHiddenStates(tmp_path / name).fingerprint for name in ("bf16", "zstd", "int8"))
    live = LiveHiddenStates(lambda tokens: [states_of(int(token, 16)) for token in tokens], VLM)
    require_states(bf16, zstd)
    require_states(bf16, live.fingerprint)
    assert bf16 == states_fingerprint(VLM)
    with pytest.raises(FingerprintMismatch, match=r"fields.codec: 'bf16' \| 'int8_g128'"):
        require_states(bf16, int8)
    with pytest.raises(FingerprintMismatch, match=r"vlm.fields.weights: 'abc' \| 'other'"):
        require_states(bf16, states_fingerprint(Fingerprint("vlm", {"weights": "other", "prompt": "def"})))
    with pytest.warns(UserWarning, match="allow_hidden_mismatch"):
        require_states(bf16, int8, allow_other=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_states(bf16, live.fingerprint, allow_other=True)
    with pytest.raises(FingerprintMismatch, match="codec"):
        HiddenCacheWriter(tmp_path / "bf16", VLM, codec="fp8")


def test_live_states_equal_a_bf16_cache_of_them(tmp_path):
    tokens = write(tmp_path)
    live = LiveHiddenStates(lambda asked: [states_of(int(token, 16)).float() for token in asked], VLM, dtype="float32")
    computed, cached = live.fetch(tokens), CachedHiddenStates(tmp_path, dtype="float32").fetch(tokens)
    assert computed.hidden.dtype == torch.float32
    assert torch.equal(computed.hidden, cached.hidden)
    assert torch.equal(computed.mask, cached.mask)
    with pytest.raises(DataError, match="gave 1 samples for 2"):
        LiveHiddenStates(lambda asked: [states_of(1)], VLM).fetch(["a", "b"])


def test_a_batch_that_breaks_its_contract_is_refused():
    hidden, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    HiddenBatch(hidden, mask).validate()
    for broken in (
        HiddenBatch(hidden[0], mask),
        HiddenBatch(hidden, mask[:, :2]),
        HiddenBatch(hidden, mask.float()),
        HiddenBatch(hidden, mask & torch.tensor([[True], [False]])),
        HiddenBatch(hidden / 0, mask),
    ):
        with pytest.raises(DataError):
            broken.validate()


@pytest.mark.parametrize("decode", ["host", "device"])
@pytest.mark.parametrize("workers", [0, 2])
def test_through_the_dataloader(tmp_path, decode, workers):
    tokens = write(tmp_path, codec="int8_g32")
    cache = CachedHiddenStates(tmp_path, decode=decode, read_ahead=True, threads=2)
    cache.fetch(tokens)  # its threads run before the loader forks
    loader = DataLoader(tokens, batch_size=2, collate_fn=cache.fetch, num_workers=workers)
    for start, batch in zip(range(0, 6, 2), loader, strict=True):
        expected = CachedHiddenStates(tmp_path).fetch(tokens[start : start + 2])
        assert torch.equal(batch.to("cpu").hidden, expected.hidden)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.fetch(tokens).to("cpu").hidden, cache.fetch(tokens).to("cpu").hidden)


def test_buffers_return_only_when_nothing_refers_to_them():
    pool = BufferPool()
    first = pool.take((4, 5), np.uint16)
    address = first.ctypes.data
    view = torch.from_numpy(first).view(torch.bfloat16)[1:, :2]
    del first
    gc.collect()
    second = pool.take((4, 5), np.uint16)
    assert second.ctypes.data != address  # the tensor's view still holds the memory
    del view
    gc.collect()
    assert pool.take((3, 5), np.uint16).ctypes.data == address


def test_a_batch_that_is_kept_is_not_overwritten(tmp_path):
    tokens = write(tmp_path)
    cache = CachedHiddenStates(tmp_path)
    kept = cache.fetch(tokens[:2])
    copy = kept.hidden.clone()
    for _ in range(5):
        cache.fetch(tokens[3:5])
    assert torch.equal(kept.hidden, copy)


def test_reading_ahead_keeps_order_raises_and_measures():
    def slow(items):
        for item in items:
            time.sleep(0.002)
            yield item

    reader = ReadAhead(slow(range(20)), depth=3)
    assert list(reader) == list(range(20))
    assert reader.wait.share > 0.5  # nothing was done with the items

    def failing():
        yield 1
        raise MissingError("gone")

    iterator = iter(ReadAhead(failing()))
    assert next(iterator) == 1
    with pytest.raises(MissingError, match="gone"):
        next(iterator)
    endless = iter(ReadAhead(iter(int, 1)))
    next(endless)
    endless.close()  # leaving early ends the thread
    with pytest.raises(DataError):
        ReadAhead([], depth=0)


def test_the_callback_is_configurable():
    watch = instantiate(OmegaConf.load(config_root() / "shared" / "callbacks" / "storage.yaml").storage)
    assert isinstance(watch, WarnWhenStorageLimits)
    with pytest.raises(DataError, match="threshold"):
        WarnWhenStorageLimits(threshold=1.5)


class Idle(LightningModule):
    """A module whose step does ``work``."""

    def __init__(self, work) -> None:
        super().__init__()
        self.weight, self.work = torch.nn.Parameter(torch.zeros(1)), work

    def training_step(self, batch, index):
        self.work()
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("load_s", "step_s", "expected"), [(0.004, 0.0, True), (0.0, 0.004, False)])
def test_training_that_waits_for_storage_says_so_once(tmp_path, caplog, monkeypatch, load_s, step_s, expected):
    clock = SimpleNamespace(now=0.0)  # so that what the machine does beside does not count
    monkeypatch.setattr("navsim_ext.hidden_cache.read_ahead.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def load(items):
        clock.now += load_s
        return torch.zeros(1)

    def work():
        clock.now += step_s

    watch = WarnWhenStorageLimits(threshold=0.5, window=5, warm_up=2)
    trainer = Trainer(
        max_steps=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[watch], default_root_dir=tmp_path,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="navsim_ext.hidden_cache.read_ahead"):
        trainer.fit(Idle(work), DataLoader(range(20), collate_fn=load))
    told = [record for record in caplog.records if "waits for data" in record.message]
    assert len(told) == int(expected)
    assert watch.warned == expected
    assert (watch.share > 0.5) == expected
