"""Performs a plan of transfers on one rank: local copies, then rounds of one message to and from each other rank.

    source parameters --pack--> [ outgoing | incoming ] --unpack--> target parameters
                                   one buffer, in the target's dtype

It decides nothing: what goes where in which round is `exchange.plan` and `exchange.buckets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.errors import maybe_fault
from megalite.weights.reshard_plan import Parcel, Place, Transfer, parcels

Gathered = Callable[[Sequence[str]], AbstractContextManager[None]]
"""Makes the named source parameters whole on this rank while it lasts. All replicas enter it alike."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A transfer and where its elements are in the buffer; local copies have no place in it."""

    transfer: Transfer
    start: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Source parameters that are made whole together, and what is read from them meanwhile."""

    names: tuple[str, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """Elements lo..hi of the buffer, to or from a peer."""

    peer: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class Round:
    """What this rank does in a round. The buffer holds what goes out, then what comes in."""

    outgoing: tuple[Message, ...]
    incoming: tuple[Message, ...]
    packing: tuple[Batch, ...]
    unpacking: tuple[Slot, ...]

    @property
    def elements(self) -> int:
        return max((message.hi for message in (*self.outgoing, *self.incoming)), default=0)


class RoundBuilder:
    """Makes a rank's rounds and batches.

    `peers`: the replicas of this rank in the source layout, itself included; what any of them reads, all make whole.
    `sizes`: bytes of each whole source parameter. A batch is at most `bucket_bytes` large, or one parameter.
    """

    def __init__(self, rank: int, peers: Sequence[int], sizes: Mapping[str, int], bucket_bytes: int):
        self.rank = rank
        self.peers = peers
        self.sizes = sizes
        self.bucket_bytes = bucket_bytes

    def round(self, transfers: Sequence[Transfer]) -> Round:
        outgoing, incoming = parcels(transfers, self.rank)
        sent, packing, end = _lay_out(outgoing, 0)
        got, unpacking, _ = _lay_out(incoming, end)
        return Round(sent, got, self.batches(transfers, packing), unpacking)

    def batches(self, transfers: Iterable[Transfer], slots: Iterable[Slot]) -> tuple[Batch, ...]:
        """Batches for `slots` of this rank, which are some of `transfers`, those of all ranks."""
        by_name: dict[str, list[Slot]] = {}
        for transfer in transfers:
            if transfer.source.rank in self.peers:
                by_name.setdefault(transfer.source.param, [])
        for slot in slots:
            by_name[slot.transfer.source.param].append(slot)
        return tuple(
            Batch(tuple(names), tuple(slot for name in names for slot in by_name[name])) for names in self.fit(by_name)
        )

    def fit(self, names: Iterable[str]) -> list[list[str]]:
        """The names in order, cut where the whole parameters would be more than a bucket."""
        batches: list[list[str]] = []
        room = -1
        for name in names:
            room -= self.sizes[name]
            if room < 0:
                batches.append([])
                room = self.bucket_bytes - self.sizes[name]
            batches[-1].append(name)
        return batches


def _lay_out(mine: Sequence[Parcel], start: int) -> tuple[tuple[Message, ...], tuple[Slot, ...], int]:
    """Messages and slots one after another from element `start` of the buffer, and where they end."""
    messages, slots = [], []
    for parcel in mine:
        lo = start
        for transfer in parcel.transfers:
            slots.append(Slot(transfer, start))
            start += transfer.elements
        messages.append(Message(parcel.peer, lo, start))
    return tuple(messages), tuple(slots), start


class Mover:
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

    def copy(self, batches: Iterable[Batch]) -> None:
        """From parameter to parameter, whatever the order in which either lies in memory."""
        for batch in batches:
            with self.gathered(batch.names):
                for slot in batch.slots:
                    transfer = slot.transfer
                    source = _region(self.source, transfer.source, transfer.count)
                    _region(self.target, transfer.target, transfer.count).copy_(source)

    def exchange(self, rounds: Sequence[Round]) -> None:
        """The rounds in order. Their buffer is given back at the end."""
        size = max((one.elements for one in rounds), default=0)
        buffer = torch.empty(size, dtype=self.dtype, device=self.device)
        wire = buffer if self.transport == self.device else torch.empty_like(buffer, device=self.transport)
        for one in rounds:
            self._pack(one, buffer)
            if wire is not buffer:
                _copy_messages(one.outgoing, wire, buffer)
            self._send(one, wire)
            if wire is not buffer:
                _copy_messages(one.incoming, buffer, wire)
            self._unpack(one, buffer)

    def _pack(self, one: Round, buffer: Tensor) -> None:
        for batch in one.packing:
            with self.gathered(batch.names):
                for slot in batch.slots:
                    source = _region(self.source, slot.transfer.source, slot.transfer.count)
                    _segment(buffer, slot, source).copy_(source)  # rounds, where the target has another dtype

    def _send(self, one: Round, wire: Tensor) -> None:
        work = [dist.P2POp(dist.irecv, wire[m.lo : m.hi], m.peer) for m in one.incoming]
        work += [dist.P2POp(dist.isend, wire[m.lo : m.hi], m.peer) for m in one.outgoing]
        for request in dist.batch_isend_irecv(work) if work else ():
            request.wait()

    def _unpack(self, one: Round, buffer: Tensor) -> None:
        if not one.unpacking:
            return
        fault = maybe_fault("sync.bucket", self.rank, offers=("skip", "corrupt"))
        if fault == "skip":
            return
        if fault == "corrupt":
            start = one.unpacking[0].start
            buffer[start : start + 1].view(torch.uint8)[0] ^= 1
        for slot in one.unpacking:
            target = _region(self.target, slot.transfer.target, slot.transfer.count)
            target.copy_(_segment(buffer, slot, target))


def _region(params: Mapping[str, Tensor], place: Place, count: int) -> Tensor:
    return params[place.param].detach().narrow(place.dim, place.start, count)


def _segment(buffer: Tensor, slot: Slot, like: Tensor) -> Tensor:
    return buffer[slot.start : slot.start + slot.transfer.elements].view(like.shape)


def _copy_messages(messages: Sequence[Message], target: Tensor, source: Tensor) -> None:
    """Messages of one direction lie one after another."""
    if messages:
        lo, hi = messages[0].lo, messages[-1].hi
        target[lo:hi].copy_(source[lo:hi])
