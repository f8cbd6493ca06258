"""Weights in the formats of `core.formats` as matrices: the reference, which all else is held against.

A stacked parameter holds several matrices, `segments` rows of each, whose codes and scales lie one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.core.formats import ALL, Awq, Elementwise, Gptq, Packed, WeightFormat

FP8_MAX = 448.0
"""The largest number of float8 e4m3."""
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of each of eight rows, the place of its code in their int32."""
_STRAIGHT = tuple(range(8))


@dataclass(frozen=True, slots=True)
class Codes:
    """weight[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], with g = groups[k]."""

    codes: Tensor
    """uint8 [N, K]."""
    zeros: Tensor
    """float32 [N, G]."""
    scales: Tensor
    """float32 [N, G]."""
    groups: Tensor
    """int64 [K]."""

    def matrix(self) -> Tensor:
        """float32 [N, K]."""
        return (self.codes - self.zeros[:, self.groups]).mul_(self.scales[:, self.groups])


def dequantize(format: WeightFormat, stored: Mapping[str, Tensor], segments: Sequence[int], columns: int) -> Tensor:
    """The weight float32 [sum of segments, columns] that stored tensors make."""
    made = []
    for rows, mine in _segments(format, stored, segments, columns):
        if isinstance(format, Elementwise):
            made.append(mine["weight"].float() * element_scales(format, mine[format.scale_name], rows, columns))
        else:
            made.append(codes_of(format, mine, rows, columns).matrix())
    return made[0] if len(made) == 1 else torch.cat(made)


def _segments(
    format: WeightFormat, stored: Mapping[str, Tensor], segments: Sequence[int], columns: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Rows and stored tensors of each of the matrices that are stacked."""
    at = dict.fromkeys((part.name for part in format.parts), 0)
    for rows in segments:
        mine = {}
        for part in format.parts:
            count = part.width(columns) if part.rows is None else part.height(rows)
            mine[part.name] = stored[part.name][at[part.name] : at[part.name] + count]
            at[part.name] += count
        yield rows, mine


def element_scales(format: Elementwise, scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales as stored -> what multiplies a matrix [rows, columns]: [1], [rows, 1] or [rows, columns]."""
    if format.block is None:
        return scales
    height, width = format.block
    if height != 1:
        scales = scales.repeat_interleave(rows if height == ALL else height, 0)[:rows]
    return scales if width == ALL else scales.repeat_interleave(width, 1)[:, :columns]


def codes_of(format: WeightFormat, stored: Mapping[str, Tensor], rows: int, columns: int) -> Codes:
    """One matrix of a format with groups. Under `act_order` scales are of all groups, else of those of its columns."""
    if isinstance(format, Gptq):
        zeros = _unpack(stored["qzeros"], format.bits, 0) + float(format.zero_offset)
        codes = _unpack(stored["qweight"], format.bits, 1)
        groups = stored["g_idx"].long() if format.act_order else None
        return _codes(codes, zeros, stored["scales"], groups, format.group, rows, columns)
    if isinstance(format, Awq):
        codes = _unpack(stored["qweight"], 4, 0, AWQ_NIBBLE)
        zeros = _unpack(stored["qzeros"], 4, 0, AWQ_NIBBLE).float()
        return _codes(codes, zeros, stored["scales"], None, format.group, rows, columns)
    assert isinstance(format, Packed), format
    codes, scales = _unpack(stored["weight_packed"], format.bits, 1), stored["weight_scale"]
    zeros = torch.full_like(scales, float(1 << (format.bits - 1)))
    if not format.symmetric:
        zeros = _unpack(stored["weight_zero_point"], format.bits, 0).float()
    groups = stored["weight_g_idx"].long() if format.act_order else None
    return _codes(codes, zeros, scales, groups, format.group, rows, columns)


def _codes(
    codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None, group: int, rows: int, columns: int
) -> Codes:
    if groups is None:
        groups = torch.arange(columns, device=codes.device) // (group or columns)
    return Codes(codes[:rows, :columns], zeros[:rows].float(), scales.float(), groups)


def _unpack(packed: Tensor, bits: int, dim: int, places: Sequence[int] = _STRAIGHT) -> Tensor:
    """Codes of so many bits in int32 along a dim of a matrix -> uint8; `places`: where in its int32 each code is."""
    per = 32 // bits
    shifts = torch.tensor(places[:per], dtype=torch.int32, device=packed.device) * bits
    if dim == 0:
        wide = packed[:, None, :] >> shifts[None, :, None]
        return (wide & ((1 << bits) - 1)).to(torch.uint8).reshape(-1, packed.shape[1])
    wide = packed[:, :, None] >> shifts
    return (wide & ((1 << bits) - 1)).to(torch.uint8).reshape(packed.shape[0], -1)


def to_fp8(weight: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] -> codes float8 e4m3 [N, K] and scales float32 [N, 1], a row each.

    `largest` [N, 1]: the greatest magnitude of each row, if rows are longer than they are here.
    """
    if largest is None:
        largest = weight.abs().amax(1, keepdim=True)
    scales = (largest.float() / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (weight.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes, scales
