"""Matrix products, and the formats in which weights are stored."""

from dataclasses import dataclass
from typing import Any

import numpy as np

GROUP = {"int8": 64, "int4": 32, "fp8": 64}  # columns that share a scale
QMAX = {"int8": 127, "int4": 7, "fp8": 448}


def round_e4m3(x: Any) -> np.ndarray:
    """The nearest e4m3 numbers, ties to even, as float32: three bits of fraction, exponents down
    to -6 and subnormals of 2^-9 below, at most 448 either way."""
    x = np.asarray(x, np.float32)
    step = np.exp2(np.maximum(np.frexp(x)[1] - 1, -6) - 3).astype(np.float32)
    return np.clip(np.rint(x / step) * step, np.float32(-448), np.float32(448))


def round_bf16(x: Any) -> np.ndarray:
    """The nearest bfloat16 values, ties to even, as float32: the upper half of a float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [..., out, in] as csrc/base/weight.h stores it.

    data: float32 values (f32, bf16); int8 [..., out, groups * 64] (int8); uint8
    [..., out, groups * 16], two columns a byte (int4); float32 values that are exact in e4m3,
    [..., out, groups * 64] (fp8). scales: float32 values that are exact in
    bfloat16, [..., out, groups], or None. The last group is padded with zeros.
    """

    format: str
    shape: tuple[int, ...]
    data: np.ndarray
    scales: np.ndarray | None = None

    def dequantize(self) -> np.ndarray:
        """The matrix this stands for, float32 [..., out, in]; q * scale is exact."""
        if self.scales is None:
            return self.data
        q = _unpack(self.data) if self.format == "int4" else self.data
        q = q.reshape(*self.scales.shape, GROUP[self.format]).astype(np.float32)
        w = (q * self.scales[..., None]).reshape(*self.shape[:-1], -1)
        return w[..., : self.shape[-1]]


def _pack(q):
    """int4: byte i of a group of 32 holds columns i (low) and i + 16 (high), each as q + 8."""
    groups = (q + 8).astype(np.uint8).reshape(*q.shape[:-1], -1, 2, 16)
    return (groups[..., 0, :] | groups[..., 1, :] << 4).reshape(*q.shape[:-1], -1)


def _unpack(data):
    groups = data.reshape(*data.shape[:-1], -1, 1, 16)
    halves = np.concatenate([groups & 15, groups >> 4], axis=-2)
    return halves.astype(np.int8).reshape(*data.shape[:-1], -1) - 8


def quantize(w: Any, dtype: str) -> QuantizedWeight:
    """Store w [..., out, in] in a weight format: "f32", "bf16", "int8", "int4", "fp8".

    int8 and fp8 have a scale for every 64 columns of a row, int4 for every 32:
        scale = bf16(max|w| / qmax),   q = clamp(round(w / scale), -qmax, qmax)
    with qmax 127, 7 or 448, in float32 arithmetic, rounding ties to even (fp8: to an e4m3
    number); a group of zeros has scale 0. |w - dequantized| <= scale / 2 up to the clamp, in fp8
    <= max(|w| / 16, scale / 1024). Raises ValueError for another dtype.
    """
    w = np.asarray(w, np.float32)
    if dtype == "f32":
        return QuantizedWeight(dtype, w.shape, w)
    if dtype == "bf16":
        return QuantizedWeight(dtype, w.shape, round_bf16(w))
    if dtype not in GROUP:
        raise ValueError(f"dtype must be 'f32', 'bf16', 'int8', 'int4' or 'fp8', got {dtype!r}")
    pad = -w.shape[-1] % GROUP[dtype]
    padded = np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, pad)])
    groups = padded.reshape(*w.shape[:-1], -1, GROUP[dtype])
    qmax = np.float32(QMAX[dtype])
    scales = round_bf16(np.abs(groups).max(axis=-1) / qmax)
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    ratios = np.where(scales[..., None] == 0, np.float32(0), groups / divisor)
    if dtype == "fp8":
        q = round_e4m3(ratios)
    else:
        q = np.clip(np.rint(ratios), -qmax, qmax).astype(np.int8)
    q = q.reshape(*w.shape[:-1], -1)
    data = _pack(q) if dtype == "int4" else q
    return QuantizedWeight(dtype, w.shape, data, scales)


def dense(w: Any) -> np.ndarray:
    """A weight of any format as a float64 matrix."""
    return np.asarray(w.dequantize() if hasattr(w, "dequantize") else w, np.float64)


def linear(x: Any, w: Any) -> np.ndarray:
    """x w^T. x [..., in]; w [out, in], an array or a packed weight. Returns [..., out]."""
    return np.asarray(x, np.float64) @ dense(w).T
