"""Executes a reshard plan on one rank: local copies, then rounds of one message to and from each other rank.

    source parameters --pack--> [ outgoing | incoming ] --unpack--> target parameters
                                   one buffer, in the target's dtype

It decides nothing: what goes where in which round is `reshard_plan.plan` and `reshard_plan.buckets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.progress import here
from megalite.errors import maybe_fault
from megalite.weights.reshard_plan import Transfer
from megalite.weights.table import Range

Gathered = Callable[[Sequence[str]], AbstractContextManager[None]]
"""Context in which the named source parameters are whole on this rank. All replicas enter it alike."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A transfer and where its elements begin in the buffer; local copies have no place in it."""

    transfer: Transfer
    start: int = 0


@dataclass(frozen=True, slots=True)
class Gather:
    """Source parameters that are made whole together, and what is read from them meanwhile."""

    names: tuple[str, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """What this rank does in a round. Its buffer holds what goes out, then what comes in, ordered by the other rank."""

    packing: tuple[Gather, ...]
    outgoing: tuple[Slot, ...]
    incoming: tuple[Slot, ...]

    @property
    def sent(self) -> int:
        """Number of elements sent."""
        return sum(slot.transfer.elements for slot in self.outgoing)

    @property
    def received(self) -> int:
        return sum(slot.transfer.elements for slot in self.incoming)


class RoundBuilder:
    """Makes a rank's rounds and gathers.

    `peers`: the replicas of this rank in the source layout, itself included; what any of them reads, all make whole.
    `sizes`: bytes of each whole source parameter. A gather is at most `bucket_bytes` large, or one parameter.
    """

    def __init__(self, rank: int, peers: Sequence[int], sizes: Mapping[str, int], bucket_bytes: int):
        self.rank = rank
        self.peers = peers
        self.sizes = sizes
        self.bucket_bytes = bucket_bytes

    def round(self, transfers: Sequence[Transfer]) -> Round:
        outgoing = sorted((one for one in transfers if one.sender == self.rank), key=lambda one: one.receiver)
        incoming = sorted((one for one in transfers if one.receiver == self.rank), key=lambda one: one.sender)
        slots, end = [], 0
        for transfer in (*outgoing, *incoming):
            slots.append(Slot(transfer, end))
            end += transfer.elements
        packed = slots[: len(outgoing)]
        return Round(self.gathers(transfers, packed), tuple(packed), tuple(slots[len(outgoing) :]))

    def gathers(self, transfers: Iterable[Transfer], slots: Iterable[Slot]) -> tuple[Gather, ...]:
        """Batches for `slots` of this rank, which are some of `transfers`, those of all ranks."""
        by_name: dict[str, list[Slot]] = {}
        for transfer in transfers:
            if transfer.sender in self.peers:
                by_name.setdefault(transfer.source.piece.param, [])
        for slot in slots:
            by_name[slot.transfer.source.piece.param].append(slot)
        return tuple(
            Gather(tuple(names), tuple(slot for name in names for slot in by_name[name])) for names in self.fit(by_name)
        )

    def fit(self, names: Iterable[str]) -> list[list[str]]:
        """The names in order, cut where the whole parameters would be more than a bucket."""
        gathers: list[list[str]] = []
        room = -1
        for name in names:
            room -= self.sizes[name]
            if room < 0:
                gathers.append([])
                room = self.bucket_bytes - self.sizes[name]
            gathers[-1].append(name)
        return gathers


class Executor:
    """Copies from `source` to `target` parameters of this rank and exchanges messages with the others.

    gloo cannot send CUDA tensors (it aborts the process): then `transport` is the CPU, and messages pass through a
    second buffer there.
    """

    def __init__(
        self,
        rank: int,
        source: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        gathered: Gathered,
        *,
        dtype: torch.dtype,
        device: torch.device,
        transport: torch.device,
    ):
        self.rank = rank
        self.source = source
        self.target = target
        self.gathered = gathered
        self.dtype = dtype
        self.device = device
        self.transport = transport
        self.track = here.track("weights", tuple(range(dist.get_world_size() if dist.is_initialized() else 1)))
        """Counts the rounds, which all ranks of the run go through, for the watch."""

    def copy(self, gathers: Iterable[Gather]) -> None:
        """Perform the local copies, between parameters of any memory layout."""
        for gather in gathers:
            with self.gathered(gather.names):
                for slot in gather.slots:
                    _view(self.target, slot.transfer.target).copy_(_view(self.source, slot.transfer.source))

    def exchange(self, rounds: Sequence[Round]) -> None:
        """Perform the rounds, in order. Their buffer is freed at the end."""
        size = max((one.sent + one.received for one in rounds), default=0)
        buffer = torch.empty(size, dtype=self.dtype, device=self.device)
        wire = buffer if self.transport == self.device else torch.empty_like(buffer, device=self.transport)
        for one in rounds:
            self._pack(one, buffer)
            sent, end = one.sent, one.sent + one.received
            if wire is not buffer:
                wire[:sent].copy_(buffer[:sent])
            self._send(one, wire)
            if wire is not buffer:
                buffer[sent:end].copy_(wire[sent:end])
            self._unpack(one, buffer)

    def _pack(self, one: Round, buffer: Tensor) -> None:
        for gather in one.packing:
            with self.gathered(gather.names):
                for slot in gather.slots:
                    source = _view(self.source, slot.transfer.source)
                    _segment(buffer, slot, source).copy_(source)  # rounds, where the target has another dtype

    def _send(self, one: Round, wire: Tensor) -> None:
        work = [dist.P2POp(dist.irecv, *message) for message in _messages(one.incoming, wire, lambda it: it.sender)]
        work += [dist.P2POp(dist.isend, *message) for message in _messages(one.outgoing, wire, lambda it: it.receiver)]
        with self.track.entering("exchange"):
            for request in dist.batch_isend_irecv(work) if work else ():
                request.wait()

    def _unpack(self, one: Round, buffer: Tensor) -> None:
        if not one.incoming:
            return
        fault = maybe_fault("sync.bucket", self.rank, offers=("skip", "corrupt"))
        if fault == "skip":
            return
        if fault == "corrupt":
            start = one.incoming[0].start
            buffer[start : start + 1].view(torch.uint8)[0] ^= 1
        for slot in one.incoming:
            target = _view(self.target, slot.transfer.target)
            target.copy_(_segment(buffer, slot, target))


def _view(params: Mapping[str, Tensor], one: Range) -> Tensor:
    return params[one.piece.param].detach().narrow(one.dim, one.start, one.count)


def _segment(buffer: Tensor, slot: Slot, like: Tensor) -> Tensor:
    return buffer[slot.start : slot.start + like.numel()].view(like.shape)


def _messages(slots: Iterable[Slot], wire: Tensor, peer: Callable[[Transfer], int]) -> Iterator[tuple[Tensor, int]]:
    """What goes to or comes from each other rank, and that rank; its slots lie one after another."""
    for other, mine in groupby(slots, key=lambda slot: peer(slot.transfer)):
        first, *rest = mine
        last = rest[-1] if rest else first
        yield wire[first.start : last.start + last.transfer.elements], other
