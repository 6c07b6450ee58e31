"""Compiled loops of the codecs on one core. bfloat16 travels as the uint16 of its bits.

A bfloat16 is the upper half of a float32, so ``bits << 16`` is its float32 and rounding to nearest even is
``(bits32 + 0x7FFF + ((bits32 >> 16) & 1)) >> 16``. Each loop is written so that LLVM vectorises it.
"""

from __future__ import annotations

import numba
import numpy as np

ROUNDING = np.float32(1.5 * 2**23)  # adding it leaves the rounded integer in the low bits of a float32
SMALLEST_SCALE = np.float32(2.0**-126)  # smallest normal float32: below it 1 / scale would overflow
EXPONENT = np.uint16(0x7F80)  # all ones: infinity or NaN
MAGNITUDE = np.uint16(0x7FFF)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def largest_magnitude(bits):
    """Largest |x| of flat bfloat16 bits, as bits: magnitudes order like integers, and >= 0x7F80 is not finite."""
    top = np.uint16(0)
    for i in range(bits.shape[0]):
        top = max(top, np.uint16(bits[i] & MAGNITUDE))
    return top


@numba.njit(nogil=True, cache=True, error_model="numpy")
def quantize(bits, group, codes, scales):
    """int8 codes and bfloat16 scales of consecutive groups of flat bits: x ~ code * scale, scale >= max|x| / 127.

    The scale is rounded up to bfloat16, so no code leaves [-127, 127]. A group whose scale is below the smallest
    normal float32 becomes zero.
    """
    for g in range(scales.shape[0]):
        x = bits[g * group : (g + 1) * group]
        q = codes[g * group : (g + 1) * group]
        top = np.uint16(0)
        for i in range(x.shape[0]):
            top = max(top, np.uint16(x[i] & MAGNITUDE))
        largest = np.uint32(np.uint32(top) << np.uint32(16)).view(np.float32)
        exact = np.float32(largest / np.float32(127)).view(np.uint32)
        rounded_up = np.uint32((exact + np.uint32(0xFFFF)) >> np.uint32(16))
        scale = np.uint32(rounded_up << np.uint32(16)).view(np.float32)
        inverse = np.float32(0)
        if scale >= SMALLEST_SCALE:
            inverse = np.float32(1) / scale
            scales[g] = rounded_up
        else:
            scales[g] = 0
        for i in range(x.shape[0]):
            value = np.uint32(np.uint32(x[i]) << np.uint32(16)).view(np.float32)
            q[i] = np.int8(np.float32(value * inverse + ROUNDING).view(np.int32))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def dequantize(codes, group, scales, out):
    """Flat bfloat16 bits of code * scale, rounded once to nearest even."""
    for g in range(scales.shape[0]):
        q = codes[g * group : (g + 1) * group]
        y = out[g * group : (g + 1) * group]
        scale = np.uint32(np.uint32(scales[g]) << np.uint32(16)).view(np.float32)
        for i in range(q.shape[0]):
            value = np.float32(np.float32(q[i]) * scale).view(np.uint32)
            y[i] = np.uint16((value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def look_up(codes, table, group, scales, out):
    """Flat bfloat16 bits of table[code] * scale, rounded once to nearest even; ``table`` is float32 [256]."""
    for g in range(scales.shape[0]):
        q = codes[g * group : (g + 1) * group]
        y = out[g * group : (g + 1) * group]
        scale = np.uint32(np.uint32(scales[g]) << np.uint32(16)).view(np.float32)
        for i in range(q.shape[0]):
            value = np.float32(table[q[i]] * scale).view(np.uint32)
            y[i] = np.uint16((value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def squared_norms(a, b, row):
    """(sum of (a - b)^2, sum of a^2) of flat bfloat16 bits, in float32 within a row of values, float64 across."""
    difference, norm = 0.0, 0.0
    for r in range(a.shape[0] // row):
        x, y = a[r * row : (r + 1) * row], b[r * row : (r + 1) * row]
        d, n = np.float32(0), np.float32(0)
        for i in range(x.shape[0]):
            u = np.uint32(np.uint32(x[i]) << np.uint32(16)).view(np.float32)
            v = np.uint32(np.uint32(y[i]) << np.uint32(16)).view(np.float32)
            d += (u - v) * (u - v)
            n += u * u
        difference += d
        norm += n
    return difference, norm
