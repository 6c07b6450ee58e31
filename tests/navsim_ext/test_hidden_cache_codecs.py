"""Codecs, pooling and compression: laws on numbers, without files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from navsim_ext.errors import DataError
from navsim_ext.hidden_cache import PackedHiddenBatch, kernels
from navsim_ext.hidden_cache.codecs import CODECS, bits_to_states, codec_named, relative_error, states_to_bits
from navsim_ext.hidden_cache.compression import compress, decompress
from navsim_ext.hidden_cache.pooling import pool_image_tokens
from navsim_ext.hidden_cache.record import encode_with_error


def with_outliers(tokens: int, width: int, seed: int = 0, scale: float = 30.0) -> torch.Tensor:
    """bf16 [L,D]: standard normal, and 1 % of the channels ``scale`` times as large in every token."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, width, generator=generator)
    states[:, torch.randperm(width, generator=generator)[: max(1, width // 100)]] *= scale
    return states.bfloat16()


def decode(codec, parts) -> np.ndarray:
    out = np.empty(parts[next(iter(codec.parts))].shape, np.uint16)
    codec.decode_into(parts, out)
    return out


@pytest.mark.parametrize("name", CODECS)
def test_compiled_and_torch_decoding_agree_bit_by_bit(name):
    codec, bits = CODECS[name], states_to_bits(with_outliers(37, 256))
    parts = codec.encode(bits)
    by_torch = codec.decode({key: torch.from_numpy(part) for key, part in parts.items()})
    assert torch.equal(by_torch, bits_to_states(decode(codec, parts)))
    batched = codec.decode({key: torch.from_numpy(part).expand(3, *part.shape) for key, part in parts.items()})
    assert torch.equal(batched[2], by_torch)
    assert {key: part.dtype.type for key, part in parts.items()} == dict(codec.parts)


def test_bf16_is_lossless_for_every_finite_value():
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & kernels.MAGNITUDE) < kernels.EXPONENT]
    bits = bits[: len(bits) // 64 * 64].reshape(-1, 64)
    assert np.array_equal(decode(CODECS["bf16"], CODECS["bf16"].encode(bits)), bits)
    assert np.array_equal(states_to_bits(bits_to_states(bits)), bits)


@pytest.mark.parametrize("name", ["int8_token", "int8_g128", "int8_g32"])
def test_int8_errs_by_half_a_step_at_most(name):
    states = with_outliers(64, 256, seed=3)
    codec = CODECS[name]
    parts = codec.encode(states_to_bits(states))
    group = codec.group or 256
    assert np.abs(parts["int8"].astype(int)).max() == 127  # each group's largest value uses the range
    scales = bits_to_states(parts["scale"]).float().numpy()
    largest = states.float().abs().unflatten(1, (-1, group)).amax(-1).numpy()
    assert (scales * 127 >= largest).all()
    assert (scales * 127 <= largest * (1 + 2**-7)).all()
    error = np.abs(bits_to_states(decode(codec, parts)).float().numpy() - states.float().numpy())
    rounding = 2**-8 * np.abs(states.float().numpy())  # of the decoded value to bfloat16
    assert (error <= np.repeat(scales, group, 1) * 0.5001 + rounding).all()


def test_int8_equals_a_plain_quantiser():
    """Fast == naive: numpy in float64, rounding half to even, on groups of 32."""
    states = with_outliers(20, 64, seed=5)
    parts = CODECS["int8_g32"].encode(states_to_bits(states))
    scales = bits_to_states(parts["scale"]).double().numpy()
    inverse = (1 / scales.astype(np.float32)).astype(np.float32)
    product = states.float().numpy().reshape(20, 2, 32) * inverse[..., None]
    assert np.array_equal(parts["int8"].reshape(20, 2, 32), np.rint(product).astype(np.int8))


@pytest.mark.parametrize(
    ("name", "bound"), [("int8_token", 0.3), ("int8_g128", 0.025), ("int8_g32", 0.02), ("fp8", 0.04)]
)
def test_error_on_states_with_outlier_channels(name, bound):
    """Groups keep an outlier channel from spoiling its token: error falls from token to 128 to 32."""
    bits = states_to_bits(with_outliers(100, 1536))
    parts, error = encode_with_error(bits, name)
    exact = bits_to_states(bits).double()
    expected = ((exact - bits_to_states(decode(CODECS[name], parts)).double()).norm() / exact.norm()).item()
    assert error == pytest.approx(expected, rel=1e-4)
    assert 0 < error < bound


def test_smaller_groups_err_less():
    bits = states_to_bits(with_outliers(100, 1536))
    errors = [encode_with_error(bits, name)[1] for name in ("int8_token", "int8_g128", "int8_g32")]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [0.0, 1e-40, -3e38, 2.0**-126, 1.0])
def test_extreme_groups_stay_finite(name, value):
    """Zeros, subnormals and the largest magnitudes: no NaN, no overflow, zero stays zero."""
    bits = states_to_bits(torch.full((3, 128), value))
    decoded = bits_to_states(decode(CODECS[name], CODECS[name].encode(bits))).float()
    assert torch.isfinite(decoded).all()
    assert (decoded - bits_to_states(bits).float()).abs().max() <= max(abs(value) * 0.05, 2e-36)


def test_relative_error_of_known_states():
    bits = states_to_bits(torch.full((2, 8), 4.0))
    assert relative_error(bits, states_to_bits(torch.full((2, 8), 3.0))) == pytest.approx(0.25)
    assert relative_error(states_to_bits(torch.zeros(2, 8)), bits) == 0.0


def test_unknown_names_and_widths_are_refused():
    with pytest.raises(DataError, match=r"int8_g128.*int8_g32"):
        codec_named("int4")
    with pytest.raises(DataError, match="width 100 is not a multiple of 32"):
        CODECS["int8_g32"].encode(np.zeros((2, 100), np.uint16))


@pytest.mark.parametrize("name", CODECS)
def test_zstd_changes_nothing_but_the_size(name):
    bits = states_to_bits(with_outliers(50, 128))
    parts = CODECS[name].encode(bits)
    stored = compress(parts)
    found = decompress(stored, CODECS[name].parts)
    for key, part in parts.items():
        np.testing.assert_array_equal(found[key], part, strict=True)
    assert sum(array.nbytes for array in stored.values()) < sum(part.nbytes for part in parts.values())


def test_pooling_means_squares_of_the_patch_grid():
    """A ramp over row and column of each tile: the mean of each 2x2 square is its centre."""
    side, width = 16, 3
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    tile = torch.stack([row, column, row * 0], -1).reshape(-1, width)
    text = torch.full((5, width), 7.0)
    states = torch.cat([text, tile, tile + 100, text[:2]])
    pooled = pool_image_tokens(states, [(5, 5 + 2 * side**2)])
    assert pooled.shape == (5 + 2 * 64 + 2, width)
    assert torch.equal(pooled[:5], text)
    assert torch.equal(pooled[-2:], text[:2])
    expected = torch.stack(torch.meshgrid(torch.arange(8) * 2 + 0.5, torch.arange(8) * 2 + 0.5, indexing="ij"), -1)
    assert torch.equal(pooled[5 : 5 + 64, :2], expected.reshape(-1, 2))
    assert torch.equal(pooled[5 + 64 : 5 + 128], pooled[5 : 5 + 64] + 100)


@pytest.mark.parametrize("spans", [[(0, 100)], [(10, 266), (200, 456)], [(300, 556)], [(5, 5)]])
def test_misplaced_image_spans_are_refused(spans):
    with pytest.raises(DataError, match="whole tiles"):
        pool_image_tokens(torch.zeros(500, 4), spans)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CODECS)
def test_decoding_on_the_gpu_gives_the_same_bits(name):
    bits = states_to_bits(with_outliers(200, 1536))
    parts = {key: torch.from_numpy(part)[None] for key, part in CODECS[name].encode(bits).items()}
    packed = PackedHiddenBatch(name, parts, torch.ones(1, 200, dtype=torch.bool)).pin_memory()
    on_gpu = packed.to("cuda", non_blocking=True)
    assert on_gpu.hidden.device.type == "cuda"
    assert torch.equal(on_gpu.hidden.cpu(), packed.decode().hidden)
