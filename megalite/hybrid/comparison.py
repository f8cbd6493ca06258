"""Whether all ranks that should hold the same weights do: fingerprints, one reduction, and the names of what differs.

It compares source with target and replicas with each other, so it also finds copies that drifted apart in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.agreement import reduce
from megalite.core.parallel_state import run_track
from megalite.errors import MegaliteError
from megalite.hybrid.fingerprint import BITS, Covered, Fingerprinter
from megalite.monitor.words import format_count
from megalite.weights.reshard import Gathered
from megalite.weights.reshard_plan import Atom

_NAMED = 2
"""Ranges that a message names; the others are counted."""
_LISTED = 4
"""Ranks that a message names of each kind."""
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
        self.atoms = [number for names in batches for name in names for number in self.covered[name].atoms]

    def fingerprints(self, make: Fingerprinter) -> Tensor:
        """int64 [atoms], in their order."""
        found = [torch.empty(0, dtype=torch.int64, device=make.device)]
        for names in self.batches:
            with self.gathered(names):
                found += [make.of(self.params[name], self.covered[name]) for name in names]
        return torch.cat(found)


class Comparison:
    """Compares all ranks' copies of `atoms`. Collective over the run."""

    def __init__(self, atoms: Sequence[Atom], source: Side, target: Side, make: Fingerprinter):
        self.atoms = atoms
        self.sides = source, target
        self.make = make

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
        found = torch.full((len(self.atoms),), _ABSENT, dtype=torch.int64)
        found[side.atoms] = side.fingerprints(self.make).cpu()
        return found

    def _message(self, version: int, different: list[int], mine: Tensor) -> str:
        named = mine[different[:_NAMED]].contiguous()
        ranks = [named]
        if dist.is_initialized():
            ranks = [torch.empty_like(named) for _ in range(dist.get_world_size())]
            with run_track().entering("all_gather"):
                dist.all_gather(ranks, named)
        values = torch.stack(ranks, 1).tolist()  # [named, rank, side]
        tensors = len({self.atoms[number].range.piece.hf for number in different})
        lines = [
            f"weights of version {version}: ranks that should hold the same differ in "
            f"{format_count(len(different), 'range')} of {format_count(tensors, 'tensor')}; run the job again, "
            "it goes on from its last checkpoint"
        ]
        for number, found in zip(different, values, strict=False):
            lines.append(f"  {self.atoms[number].range}: {describe(found)}")
        return "\n".join(lines)


def describe(found: Sequence[Sequence[int]]) -> str:
    """Which ranks differ from which, by the fingerprints [rank][source, target] of one atom.

    What most of the training ranks hold is taken to be right.
    """
    held = [
        (f"rank {rank} ({role})", role, sides[side])
        for side, role in enumerate(("training", "generating"))
        for rank, sides in enumerate(found)
        if sides[side] != _ABSENT
    ]
    [(right, _)] = Counter(value for _, role, value in held if role == "training").most_common(1)
    wrong = [name for name, _, value in held if value != right]
    return f"{_listed(wrong)} has other values than {_listed([name for name, _, value in held if value == right])}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def lowest(values: Tensor) -> Tensor:
    """The minimum over all ranks of the run, element by element, in place. On the CPU: ranks without a decoder take
    part, and every run has gloo."""
    return reduce(values, dist.ReduceOp.MIN)
