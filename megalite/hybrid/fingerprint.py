"""Fingerprints of weights that do not depend on how they are laid out: equal values, equal fingerprints.

An element counts with its bits times a weight that follows from its place in the Hugging Face tensor, so it matters
neither which rank has it, nor in which parameter, nor in which order it lies in memory. Along the dimension that is
never cut the sum is one of 32 bits for each index, with odd weights: a single changed element always shows. These sums
are added along the other dimension modulo 2^62. A fingerprint is proof against accidents, not against malice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.weights.reshard_plan import Atom, Held
from megalite.weights.table import Range

BITS = 62
"""Bits of a fingerprint: int64 with room for the neutral elements of a minimum."""
MASK = (1 << BITS) - 1

_BITS_OF = {2: torch.int16, 4: torch.int32}
"""Integers as wide as a weight of so many bytes."""
_CACHED_ELEMENTS = 1 << 17
"""Elements that a CPU works on at once: they stay in its cache."""
_BYTES_PER_ELEMENT = 8
"""Most temporary memory for an element: itself in another dtype, and its bits as int32."""


@dataclass(frozen=True, slots=True)
class Covered:
    """The ranges that a parameter consists of along `dim`, in order, and the number of the atom that each is."""

    param: str
    dim: int
    ranges: tuple[Range, ...]
    atoms: tuple[int, ...]


def cover(atoms: Sequence[Atom], holders: Callable[[Atom], Sequence[Held]], rank: int) -> list[Covered]:
    """What each parameter of `rank` consists of. `holders`: those of an atom on the side that is meant."""
    found: dict[tuple[str, int], list[tuple[Range, int]]] = {}
    for number, atom in enumerate(atoms):
        for held in holders(atom):
            if rank in held.ranks:
                found.setdefault((held.range.piece.param, held.range.dim), []).append((held.range, number))
    return [
        Covered(param, dim, *zip(*sorted(mine, key=lambda one: one[0].start), strict=True))
        for (param, dim), mine in found.items()
    ]


class Fingerprinter:
    """Computes fingerprints on one device, with temporary memory of about `limit_bytes`.

    `largest`: size of any dim of any Hugging Face tensor.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, largest: int, limit_bytes: int):
        self.device = device
        self.dtype = dtype
        self.limit = max(1, limit_bytes // _BYTES_PER_ELEMENT)
        if device.type == "cpu":
            self.limit = min(self.limit, _CACHED_ELEMENTS)
        self.along = _odd(largest, 1, device)
        self.across = (_odd(largest, 1 << 32, device) & 0x7FFFFFFF).to(torch.int32)

    def of(self, param: Tensor, covered: Covered) -> Tensor:
        """int64 [ranges]: the fingerprint of each range of a parameter, as if it were of the dtype of all."""
        x = param.detach()
        sums = self._bits(x) if x.ndim == 1 else self._sums(x if covered.dim == 0 else x.t())
        place = torch.cat([self.along[one.lo : one.hi] for one in covered.ranges])
        total = torch.cumsum((sums.to(torch.int64) & 0xFFFFFFFF) * place, 0)  # wraps around, as its differences do
        last = [one.start + one.count - 1 for one in covered.ranges]
        return torch.diff(total[last], prepend=total.new_zeros(1)) & MASK

    def _sums(self, x: Tensor) -> Tensor:
        """[N, M] -> int32 [N], over M. Modulo 2^32, so either order of the loops gives the same."""
        count, size = x.shape
        across = self.across[:size]
        if x.stride(1) <= x.stride(0):
            step = max(1, self.limit // size)
            parts = (self._bits(x[lo : lo + step]).mul_(across) for lo in range(0, count, step))
            return torch.cat([part.sum(1, dtype=torch.int32) for part in parts])
        sums = torch.zeros(count, dtype=torch.int32, device=x.device)
        step = max(1, self.limit // count)
        for lo in range(0, size, step):
            part = self._bits(x[:, lo : lo + step].t())
            sums += part.mul_(across[lo : lo + step, None]).sum(0, dtype=torch.int32)
        return sums

    def _bits(self, x: Tensor) -> Tensor:
        """A copy, as int32."""
        return x.to(self.dtype).view(_BITS_OF[self.dtype.itemsize]).to(torch.int32, copy=True)


def _odd(count: int, salt: int, device: torch.device) -> Tensor:
    """int64 [count], odd and otherwise arbitrary: the output function of SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = (torch.arange(count, device=device) + salt) * -0x61C8864680B583EB
    z = (z ^ (z >> 30)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31) | 1
