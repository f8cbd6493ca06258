"""Whether all ranks that should hold the same weights do: fingerprints, one reduction, and the names of what differs.

It compares source with target and replicas with each other, so it also finds copies that drifted apart in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.errors import MegaliteError
from megalite.hybrid.fingerprint import BITS, Covered, Fingerprinter
from megalite.hybrid.mover import Gathered
from megalite.weights.exchange import Atom

_NAMED = 2
"""Ranges that a message names; the others are counted."""
_ABSENT = -1
"""Instead of the fingerprint of what a rank does not hold."""


class Side:
    """The source's or the target's parameters on this rank, empty if it has none, and the atoms they consist of.

    `batches`: names of parameters that are made whole together, by `gathered`.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        covered: Sequence[Covered],
        batches: Sequence[Sequence[str]],
        gathered: Gathered,
    ):
        self.params = params
        self.covered = {one.param: one for one in covered}
        self.batches = batches
        self.gathered = gathered
        self.atoms = [part.atom for names in batches for name in names for part in self.covered[name].ranges]

    def fingerprints(self, make: Fingerprinter) -> Tensor:
        """int64 [atoms], in their order."""
        found = [torch.empty(0, dtype=torch.int64, device=make.device)]
        for names in self.batches:
            with self.gathered(names):
                found += [make.of(self.params[name], self.covered[name]) for name in names]
        return torch.cat(found)


class Comparison:
    """Compares all ranks' copies of `atoms`. Collective over the run."""

    def __init__(
        self, atoms: Sequence[Atom], source: Side, target: Side, make: Fingerprinter, *, transport: torch.device
    ):
        self.atoms = atoms
        self.sides = source, target
        self.make = make
        self.transport = transport

    def check(self, version: int) -> None:
        """MegaliteError, the same on every rank, that names what differs and where. `version`: of the weights."""
        mine = torch.stack([self._spread(side) for side in self.sides])
        low = mine.where(mine != _ABSENT, 1 << BITS).amin(0)
        low, minus_high = lowest(torch.stack([low, -mine.amax(0)]))
        different = (low != -minus_high).nonzero().flatten().tolist()
        if different:
            raise MegaliteError(self._message(version, different, mine.t()))

    def _spread(self, side: Side) -> Tensor:
        """int64 [all atoms]: this rank's fingerprints, or _ABSENT."""
        found = torch.full((len(self.atoms),), _ABSENT, dtype=torch.int64, device=self.transport)
        found[side.atoms] = side.fingerprints(self.make).to(self.transport)
        return found

    def _message(self, version: int, different: list[int], mine: Tensor) -> str:
        named = mine[different[:_NAMED]].contiguous()
        ranks = [named]
        if dist.is_initialized():
            ranks = [torch.empty_like(named) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, named)
        values = torch.stack(ranks, 1).tolist()  # [named, rank, side]
        tensors = len({self.atoms[number].hf for number in different})
        count = (
            f"{_count(len(different), 'range')} of {_count(tensors, 'tensor')} {'is' if len(different) == 1 else 'are'}"
        )
        lines = [f"weights of version {version}: {count} not the same on all ranks that should hold the same"]
        for number, found in zip(different, values, strict=False):
            lines.append(f"  {self.atoms[number]}: {describe(found)}")
        return "\n".join(lines)


def describe(found: Sequence[Sequence[int]]) -> str:
    """Who differs from whom, from the fingerprints [rank][source, target] of one atom.

    What most of the training ranks hold is taken to be right.
    """
    held = [
        (rank, role, value)
        for role, side in (("training", 0), ("generating", 1))
        for rank, value in enumerate(sides[side] for sides in found)
        if value != _ABSENT
    ]
    [(right, _)] = Counter(value for _, role, value in held if role == "training").most_common(1)
    words = {
        same: ", ".join(f"rank {rank} ({role})" for rank, role, value in held if (value == right) == same)
        for same in (True, False)
    }
    return f"{words[False]} has other values than {words[True]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def lowest(values: Tensor) -> Tensor:
    """The minimum over all ranks of the run, element by element, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return values
