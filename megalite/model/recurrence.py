"""What layers with a state per sequence need of a forward pass: which tokens follow which, and where the states are.

A state belongs to a row: the number that every running sequence has. A sequence's first token finds a state of zeros
whatever its row holds, so that a row needs no clearing. Rows of one token are computed together, longer ones in chunks,
each chunk of every row that has so many. Shapes: T tokens, C channels, K taps of a convolution; see `linear_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalite.kernels.device import send
from megalite.model.kinds.linear_attention import LINEAR_CHUNK
from megalite.model.linear_attention import Chunks, Signals, step

States = Mapping[int, tuple[Tensor, ...]]
"""By layer: the last inputs of its convolution [rows, K - 1, C] and the state of its heads [rows, heads, S, P]."""
TAIL, HEADS = 0, 1


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one sequence in a forward pass."""

    offset: int
    """Place of the first among the T tokens."""
    count: int
    fresh: bool = True
    """They are the sequence's first."""
    row: int = 0


class _Rows(NamedTuple):
    """The rows in which runs have their states."""

    numbers: Tensor
    """int64 [B]."""
    fresh: Tensor
    """bool [B]."""

    @classmethod
    def of(cls, runs: Sequence[Run], device: torch.device) -> _Rows:
        numbers, fresh = np.array([run.row for run in runs]), np.array([run.fresh for run in runs])
        return cls(send(numbers, device), send(fresh, device))

    def read(self, states: Tensor) -> Tensor:
        found = states[self.numbers]
        return found.masked_fill_(self.fresh.view(-1, *[1] * (found.ndim - 1)), 0)


class _Ones(NamedTuple):
    """Tokens of rows that have one token each."""

    places: Tensor | None
    """Among the T tokens, int64 [B]; None: all in order."""
    rows: _Rows


class _Packing:
    """Runs of any lengths cut into chunks of equal length, the first chunks of all runs before the second ones.

    Runs are sorted by length, the longest first: so the chunks that come n-th are those of the first runs.
    """

    def __init__(self, runs: Sequence[Run], device: torch.device, *, alone: bool):
        """`alone`: the T tokens are those of the runs."""
        self._send = partial(send, device=device)
        runs = sorted(runs, key=lambda run: -run.count)
        counts = np.array([run.count for run in runs])
        length = min(LINEAR_CHUNK, int(counts[0]))
        chunks = -(-counts // length)
        self.active = [int((chunks > index).sum()) for index in range(chunks[0])]
        """How many runs have a first, a second, ... chunk."""
        self.shape = (int(chunks.sum()), length)
        self._counts, self._first = counts, counts.cumsum() - counts
        self._run = np.arange(len(runs)).repeat(counts)
        self._position = np.arange(counts.sum()) - self._first.repeat(counts)
        before = np.cumsum([0, *self.active])[self._position // length]
        place = (before + self._run) * length + self._position % length
        self.place = self._send(place) if len(place) < chunks.sum() * length or not _is_range(place) else None
        """Place of each token in the chunks laid end to end; None: tokens stay where they are."""
        tokens = np.concatenate([np.arange(run.offset, run.offset + run.count) for run in runs])
        self.tokens = None if alone and _is_range(tokens) else self._send(tokens)
        """Places of the runs' tokens among the T tokens; None: all, in order."""
        self.rows = _Rows.of(runs, device)
        self._taps: dict[int, tuple[Tensor, Tensor]] = {}

    def packed(self, x: Tensor) -> Tensor:
        """[tokens, ...] -> [chunks, length, ...], padded with zeros."""
        if self.place is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.place, x)
        return x.reshape(*self.shape, *x.shape[1:])

    def unpacked(self, x: Tensor) -> Tensor:
        """[chunks, length, ...] -> [tokens, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.place is None else flat[self.place]

    def taps(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs that a convolution reads for each token, int64 [tokens, count], and keeps of a run, [runs, count - 1].

        They are places among the tokens followed by the count - 1 inputs before each run.
        """
        if count not in self._taps:
            run = np.arange(len(self._counts))[:, None]
            reads = self._places(self._run[:, None], self._position[:, None] + np.arange(1 - count, 1), count)
            left = self._places(run, self._counts[:, None] + np.arange(1 - count, 0), count)
            self._taps[count] = self._send(reads), self._send(left)
        return self._taps[count]

    def _places(self, run: np.ndarray, position: np.ndarray, count: int) -> np.ndarray:
        earlier = len(self._position) + (run + 1) * (count - 1) + position
        places: np.ndarray = np.where(position >= 0, self._first[run] + position, earlier)
        return places


def _is_range(places: np.ndarray) -> bool:
    return bool((places == np.arange(len(places))).all())


class Recurrence:
    """The sequences of a forward pass as layers with a state see them.

    Where there are `states`, a row's state is taken from them, and the one after its tokens is left there.
    """

    def __init__(self, ones: _Ones | None, packing: _Packing | None, states: States | None):
        """Use `of_runs` or `of_rows`."""
        self._ones = ones
        self._packing = packing
        self._states = states

    @classmethod
    def of_runs(cls, runs: Sequence[Run], device: torch.device, states: States | None = None) -> Recurrence:
        """`states` None: every run is a whole sequence, and nothing is kept of it; differentiable."""
        single = [run for run in runs if run.count == 1 and states is not None]
        longer = [run for run in runs if run.count > 1 or states is None]
        ones = None
        if single:
            offsets = np.array([run.offset for run in single])
            places = None if not longer and _is_range(offsets) else send(offsets, device)
            ones = _Ones(places, _Rows.of(single, device))
        packing = _Packing(longer, device, alone=not single) if longer else None
        return cls(ones, packing, states)

    @classmethod
    def of_rows(cls, rows: Tensor, positions: Tensor, states: States) -> Recurrence:
        """One token of each of B rows, int64 [B] both; nothing here reads their values on the host."""
        return cls(_Ones(None, _Rows(rows, positions == 0)), None, states)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Causal convolution of every channel by itself: x [T, C], weight [C, K], bias [C] -> float32 [T, C]."""
        x, taps = x.float(), weight.float().t()
        held = None if self._states is None else self._states[layer][TAIL]
        parts = []
        if self._ones is not None and held is not None:
            places, rows = self._ones
            window = torch.cat([rows.read(held), _some(x, places)[:, None]], 1)  # [B, K, C]
            held.index_copy_(0, rows.numbers, window[:, 1:])
            parts.append((places, (window * taps).sum(1)))
        if self._packing is not None:
            places, rows = self._packing.tokens, self._packing.rows
            shape = len(rows.numbers), len(taps) - 1, x.shape[1]
            before = x.new_zeros(shape) if held is None else rows.read(held)
            source = torch.cat([_some(x, places), before.flatten(0, 1)])
            reads, left = self._packing.taps(len(taps))
            if held is not None:
                held.index_copy_(0, rows.numbers, source[left])
            out = source[reads[:, 0]] * taps[0]
            for tap, place in zip(taps[1:], reads.unbind(1)[1:], strict=True):
                out = out + source[place] * tap
            parts.append((places, out))
        out = _joined(parts, len(x))
        return out if bias is None else out + bias.float()

    def mix(self, layer: int, x: Signals) -> Tensor:
        """Linear attention of every sequence: signals of T tokens -> float32 [T, G, R, P]."""
        x = x.each(Tensor.float)
        shape = *x.v.shape[1:3], x.k.shape[-1], x.v.shape[-1]  # G, R, S, P
        held = None if self._states is None else self._states[layer][HEADS]
        parts = []
        if self._ones is not None and held is not None:
            places, rows = self._ones
            out, state = step(x.each(partial(_some, places=places)), rows.read(held).unflatten(1, shape[:2]))
            held.index_copy_(0, rows.numbers, state.flatten(1, 2))
            parts.append((places, out))
        if self._packing is not None:
            places, rows = self._packing.tokens, self._packing.rows
            count = len(rows.numbers)
            state = x.v.new_zeros(count, *shape) if held is None else rows.read(held).unflatten(1, shape[:2])
            out, state = self._advance(self._packing, x.each(partial(_some, places=places)), state)
            if held is not None:
                held.index_copy_(0, rows.numbers, state.flatten(1, 2))
            parts.append((places, out))
        return _joined(parts, len(x.v))

    @staticmethod
    def _advance(packing: _Packing, x: Signals, state: Tensor) -> tuple[Tensor, Tensor]:
        """All chunks of all runs, state [runs, ...] -> outputs [tokens, G, R, P] and the states after."""
        chunks = Chunks(x.each(packing.packed))
        first, outputs, after = 0, [], []
        for count in packing.active:
            after.append(state[count:])
            out, state = chunks.advance(slice(first, first + count), state[:count])
            outputs.append(out)
            first += count
        out = packing.unpacked(torch.cat(outputs).permute(0, 3, 1, 2, 4))
        return out, torch.cat([state, *reversed(after)])


def _some(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x[places]


def _joined(parts: list[tuple[Tensor | None, Tensor]], count: int) -> Tensor:
    """Parts of `count` tokens, each with their places."""
    (places, first), *others = parts
    if places is None:
        return first
    out = first.new_empty(count, *first.shape[1:]).index_copy(0, places, first)
    for places, part in others:
        assert places is not None
        out.index_copy_(0, places, part)
    return out
