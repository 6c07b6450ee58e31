"""How a record's states [L,D] become bytes: bf16 without loss, int8 with scales per token or group, fp8.

    int8:  code = round(x / s),  x ~ code * s,  s = max|x| / 127 of the group, rounded up to bfloat16
    fp8:   code = e4m3(x / s),   x ~ code * s,  s = max|x| / 448 of the token, rounded up to bfloat16

An outlier channel makes s large for all that share it: groups of 128 or 32 channels keep it from the others.
``decode_into`` (compiled, one core) and ``decode`` (torch, any device) give the same bits: the product is exact in
float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.hidden_cache import kernels

FP8_LARGEST = 448.0  # of float8 e4m3fn
FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


class Codec(Protocol):
    """Encoding of states; ``bits`` are bfloat16 as uint16 [L,D], every part has L rows."""

    name: str
    lossless: bool
    parts: Mapping[str, type]  # numpy type of each part, the one with D columns first

    def encode(self, bits: np.ndarray) -> dict[str, np.ndarray]:
        """The parts to store."""

    def decode_into(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        """Writes the decoded bits into ``out`` [L,D] uint16 (C order)."""

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """bfloat16 [..., L, D] on the device of the parts [..., L, *]."""


@dataclass(frozen=True)
class Bf16:
    """The states as they are: without loss for a VLM that runs in bfloat16."""

    name: str = "bf16"
    lossless: bool = True
    parts: Mapping[str, type] = field(default_factory=lambda: {"bf16": np.uint16})

    def encode(self, bits: np.ndarray) -> dict[str, np.ndarray]:
        return {"bf16": bits}

    def decode_into(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        np.copyto(out, parts["bf16"])

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["bf16"].view(torch.bfloat16)


@dataclass(frozen=True)
class Int8:
    """int8 with one bfloat16 scale per ``group`` channels of a token (None: per token)."""

    name: str
    group: int | None
    lossless: bool = False
    parts: Mapping[str, type] = field(default_factory=lambda: {"int8": np.int8, "scale": np.uint16})

    def encode(self, bits: np.ndarray) -> dict[str, np.ndarray]:
        group = group_size(self, bits.shape[1])
        codes = np.empty(bits.shape, np.int8)
        scales = np.empty((len(bits), bits.shape[1] // group), np.uint16)
        kernels.quantize(bits.reshape(-1), group, codes.reshape(-1), scales.reshape(-1))
        return {"int8": codes, "scale": scales}

    def decode_into(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        codes, scales = parts["int8"], parts["scale"]
        group = codes.shape[1] // scales.shape[1]
        kernels.dequantize(codes.reshape(-1), group, scales.reshape(-1), out.reshape(-1))

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes, scales = parts["int8"], parts["scale"].view(torch.bfloat16)
        grouped = codes.unflatten(-1, (scales.shape[-1], -1))
        return torch.mul(grouped, scales[..., None]).flatten(-2)


@dataclass(frozen=True)
class Fp8:
    """float8 e4m3fn with one bfloat16 scale per token."""

    name: str = "fp8"
    lossless: bool = False
    parts: Mapping[str, type] = field(default_factory=lambda: {"fp8": np.uint8, "scale": np.uint16})

    def encode(self, bits: np.ndarray) -> dict[str, np.ndarray]:
        states = bits_to_states(bits).float()
        exact = (states.abs().amax(1, keepdim=True) / FP8_LARGEST).view(torch.int32)
        scales = ((exact + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
        scales = torch.where(scales.float() >= float(kernels.SMALLEST_SCALE), scales, torch.zeros_like(scales))
        inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
        codes = (states * inverse).clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
        return {"fp8": codes.view(torch.uint8).numpy(), "scale": scales.view(torch.uint16).numpy()}

    def decode_into(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        codes, scales = parts["fp8"], parts["scale"]
        kernels.look_up(codes.reshape(-1), FP8_VALUES, codes.shape[1], scales.reshape(-1), out.reshape(-1))

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["fp8"].view(torch.float8_e4m3fn).to(torch.bfloat16)
        return codes * parts["scale"].view(torch.bfloat16)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (Bf16(), Int8("int8_token", None), Int8("int8_g128", 128), Int8("int8_g32", 32), Fp8())
}


def codec_named(name: str) -> Codec:
    """Raises DataError for an unknown name, listing those that there are."""
    if name not in CODECS:
        raise DataError(f"codec {name!r} does not exist; choose one of {', '.join(CODECS)}")
    return CODECS[name]


def group_size(codec: Int8, width: int) -> int:
    """Channels per scale; raises DataError when the width is not a multiple of the group."""
    group = codec.group or width
    if width % group:
        raise DataError(f"codec {codec.name}: width {width} is not a multiple of {group}; choose another codec")
    return group


def states_to_bits(states: Tensor | np.ndarray) -> np.ndarray:
    """uint16 bits [L,D] of the states as bfloat16 (rounded to nearest even if they are not that already)."""
    tensor = torch.as_tensor(states).detach().to("cpu", torch.bfloat16).contiguous()
    return tensor.view(torch.uint16).numpy()


def bits_to_states(bits: np.ndarray) -> Tensor:
    """bfloat16 [L,D] of the uint16 bits (a copy where the bits are read-only)."""
    return torch.from_numpy(bits if bits.flags.writeable else bits.copy()).view(torch.bfloat16)


def relative_error(bits: np.ndarray, decoded: np.ndarray) -> float:
    """||x - y|| / ||x|| (Frobenius) of bfloat16 bits [L,D]; 0 for states that are all zero."""
    difference, norm = kernels.squared_norms(bits.reshape(-1), decoded.reshape(-1), bits.shape[1])
    return float(np.sqrt(difference / norm)) if norm else 0.0
