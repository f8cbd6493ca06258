"""Weights in the formats of `core.formats` as matrices: the reference, which all else is held against.

A stacked parameter holds several matrices, `segments` rows of each, whose codes and scales lie one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megalite.core.formats import ALL, Awq, Elementwise, Gptq, Mxfp4, Packed, WeightFormat
from megalite.kernels.codes import LEAST_BLOCK, block_of, in_bytes

SCALED_BLOCK = 128
"""Rows and columns that share a scale where cuBLAS multiplies by blocks."""
FP8_MAX = 448.0
"""The largest number of float8 e4m3."""
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of each of eight rows, the place of its code in their int32."""
_STRAIGHT = tuple(range(8))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of float e2m1 by their codes; those from 8 on are the same, negative."""


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
        elif isinstance(format, Mxfp4):
            made.append(_microscaled(mine["blocks"], mine["scales"]))
        else:
            made.append(codes_of(format, mine, rows, columns).matrix())
    if not made:  # of a rank without experts
        return torch.empty(0, columns, device=stored[format.parts[0].name].device)
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


def _microscaled(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Codes [N, K / 2], the lower half of a byte first, and exponents [N, K / 32] -> float32 [N, K]."""
    numbers = torch.tensor([*E2M1, *(-x for x in E2M1)], device=blocks.device)
    weight: Tensor = numbers[_nibbles(blocks).int()].unflatten(1, (-1, 32)).mul_(_powers(exponents)[:, :, None])
    return weight.flatten(1)


def _nibbles(blocks: Tensor) -> Tensor:
    """Codes of 4 bits, two in a byte, the lower half first [N, K / 2] -> uint8 [N, K]."""
    return torch.stack([blocks & 15, blocks >> 4], -1).flatten(1)


def _powers(exponents: Tensor) -> Tensor:
    """e8m0 -> float32: 2^(exponent - 127), and NaN for 255 (OCP MX 1.0, section 5.4.1)."""
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)
    return powers.masked_fill_(exponents == 255, torch.nan)


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
        offsets = format.zero_offset * sum(1 << shift for shift in range(0, 32, format.bits))
        zeros = _unpack(stored["qzeros"] + offsets, format.bits, 0)
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


def coded(
    format: WeightFormat, stored: Mapping[str, Tensor], segments: Sequence[int], columns: int
) -> tuple[str, dict[str, Tensor]] | None:
    """A weight's codes as the kernels of `kernels.codes` take them: their kind; codes, scales and zeros; `order`,
    the columns in the order of their groups, where it is not their own; and `blocks`, the scales of fp8 by blocks of
    SCALED_BLOCK rows and columns.

    None where groups are not as long as each other, or too short, or a code is not a number; and of nothing.
    """
    if not sum(segments) or not columns:
        return None
    mine = list(_segments(format, stored, segments, columns))
    if isinstance(format, Elementwise):
        return _coded_elements(format, mine, columns)
    if isinstance(format, Mxfp4):  # halves of whole numbers, which is what the kernel makes of codes
        scales = torch.cat([_powers(tensors["scales"]) for _, tensors in mine]) / 2
        codes = torch.cat([in_bytes(_nibbles(tensors["blocks"]), 4, 32) for _, tensors in mine])
        return "fp4", {"codes": codes, "scales": _shortest(scales)}
    made = [codes_of(format, tensors, rows, columns) for rows, tensors in mine]
    groups = made[0].groups
    order = torch.argsort(groups, stable=True)
    scales, zeros = torch.cat([one.scales for one in made]), torch.cat([one.zeros for one in made])
    count = scales.shape[1]
    even = columns % count == 0 and block_of(columns // count) >= LEAST_BLOCK
    there = torch.arange(columns, device=order.device)
    if not even or not torch.equal(groups[order], there // (columns // count)):
        return None
    if any(not torch.equal(one.groups, groups) for one in made):
        return None
    found = {"scales": _shortest(scales), "zeros": zeros.half()}
    if not torch.equal(order, there):
        found["order"] = order
    codes = torch.cat([one.codes[:, order] for one in made])
    return f"int{format.bits}", {"codes": in_bytes(codes, format.bits, columns // count), **found}


def _coded_elements(
    format: Elementwise, segments: Sequence[tuple[int, dict[str, Tensor]]], columns: int
) -> tuple[str, dict[str, Tensor]] | None:
    width = format.block[1] if format.block is not None else ALL
    group = width or columns
    if columns % group or block_of(group) < LEAST_BLOCK:
        return None
    tall = None if format.block is None else replace(format, block=(format.block[0], ALL))
    scales = []
    for rows, mine in segments:
        own = mine[format.scale_name]
        scales.append(own.expand(rows, 1) if tall is None else element_scales(tall, own, rows, columns))
    found = {"scales": torch.cat(scales).float().contiguous()}
    if format.block == (SCALED_BLOCK, SCALED_BLOCK) and not any(rows % SCALED_BLOCK for rows, _ in segments):
        found["blocks"] = torch.cat([mine[format.scale_name] for _, mine in segments]).float()
    codes = torch.cat([mine["weight"] for _, mine in segments])
    if format.dtype == "F8_E4M3":
        return None if has_nan(codes) else ("fp8", {"codes": in_bytes(codes.view(torch.uint8), 8, group), **found})
    zeros = torch.full_like(found["scales"], 128, dtype=torch.float16)
    return "int8", {"codes": in_bytes((codes.to(torch.int16) + 128).to(torch.uint8), 8, group), "zeros": zeros, **found}


def has_nan(codes: Tensor) -> bool:
    """Whether a code of float8 e4m3 is not a number, of which the kernels know nothing."""
    return bool((codes.view(torch.uint8) & 127 == 127).any())


def _shortest(scales: Tensor) -> Tensor:
    """In float16 or bfloat16, where that changes nothing."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    return scales


def _unpack(packed: Tensor, bits: int, dim: int, places: Sequence[int] = _STRAIGHT) -> Tensor:
    """Codes of so many bits in int32 along a dim of a matrix -> uint8; `places`: where in its int32 each code is."""
    per = 32 // bits
    shifts = torch.tensor(places[:per], dtype=torch.int32, device=packed.device) * bits
    if dim == 0:
        wide = packed[:, None, :] >> shifts[None, :, None]
        return (wide & ((1 << bits) - 1)).to(torch.uint8).flatten(0, 1)
    wide = packed[:, :, None] >> shifts
    return (wide & ((1 << bits) - 1)).to(torch.uint8).flatten(1, 2)


def largest_of(weight: Tensor) -> Tensor:
    """The greatest magnitude of each row, [N, 1]; 0 of rows without columns."""
    return weight.abs().amax(1, keepdim=True) if weight.shape[1] else weight.new_zeros(weight.shape[0], 1)


def to_fp8(weight: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] -> codes float8 e4m3 [N, K] and scales float32 [N, 1], a row each.

    `largest` [N, 1]: the greatest magnitude of each row, if rows are longer than they are here.
    """
    largest = largest_of(weight) if largest is None else largest
    scales = (largest.float() / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (weight.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes, scales
