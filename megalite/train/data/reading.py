"""What a training run reads, as micro batches: windows of running text, or examples packed together.

Which sequences a step reads depends on how many were read before, and on nothing else; how they are dealt out to
replicas and micro batches is the layout's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megalite.config.schema import DataSection, TrainSection
from megalite.core.parallel_state import ParallelState
from megalite.train.data.batch import MicroBatch, blank, from_sequences, from_windows
from megalite.train.data.order import ExampleOrder, TrainingOrder, held_out_windows, read_windows
from megalite.train.data.packing import pack
from megalite.train.data.prepared import Corpus, ExampleSet

PACKED_AT_ONCE = 16
"""Held-out examples that are packed together, in micro batches' worth of each replica."""


@dataclass(frozen=True, slots=True)
class StepData:
    """What one step computes."""

    batches: list[MicroBatch]
    """This replica's; every replica has as many."""
    lengths: Sequence[int]
    """Tokens of each sequence of all replicas."""


class Reader(Protocol):
    """Where steps and evaluations come from."""

    sequences_per_step: int
    """Over all replicas."""

    def step(self, first: int) -> StepData:
        """The step that begins with sequence number `first`, counted over all epochs."""

    def held_out(self, limit: int | None) -> Iterator[MicroBatch]:
        """This replica's share of the held-out split, or of `limit` micro batches' worth of it over all replicas.

        Every replica gets as many micro batches; what fills them up does not count.
        """

    def describe(self) -> str:
        """What there is to read, in a line."""


def open_reader(corpus: Corpus, data: DataSection, train: TrainSection, state: ParallelState) -> Reader:
    """The reader for what `corpus` holds. ConfigError if there is too little of it."""
    kind = ExampleReader if isinstance(corpus.train, ExampleSet) else WindowReader
    return kind(corpus, data, train, state)


class WindowReader:
    """Windows of data.sequence_length tokens."""

    def __init__(self, corpus: Corpus, data: DataSection, train: TrainSection, state: ParallelState):
        self._text, self._held_out_text = corpus.train, corpus.held_out
        self._length = data.sequence_length
        self._micro = train.micro_batch_size
        self._dp = state.dp
        self._share = self._micro * train.gradient_accumulation_steps
        self.sequences_per_step = self._share * self._dp.size
        self._order = TrainingOrder(len(self._text), self._length, data.seed)
        self._held_out = held_out_windows(len(self._held_out_text), self._length)

    def step(self, first: int) -> StepData:
        start = first + self._dp.rank * self._share
        firsts = range(start, start + self._share, self._micro)
        batches = [self._batch(self._text, self._order.starts(one, self._micro)) for one in firsts]
        return StepData(batches, [self._length] * self.sequences_per_step)

    def held_out(self, limit: int | None) -> Iterator[MicroBatch]:
        size, dp = self._micro, self._dp
        windows = self._held_out if limit is None else self._held_out[: limit * size]
        for first in range(0, len(windows), size * dp.size):
            mine = range(first + dp.rank * size, first + (dp.rank + 1) * size)
            starts = windows[[min(i, len(windows) - 1) for i in mine]]
            yield self._batch(self._held_out_text, starts, [i < len(windows) for i in mine])

    def describe(self) -> str:
        return f"{len(self._text):,} tokens of text to train on, {len(self._held_out_text):,} held out"

    def _batch(self, tokens: np.ndarray, starts: np.ndarray, counts: list[bool] | None = None) -> MicroBatch:
        return from_windows(torch.from_numpy(read_windows(tokens, starts, self._length)), counts)


class ExampleReader:
    """Whole examples, packed into micro batches of at most micro_batch_size * sequence_length tokens."""

    def __init__(self, corpus: Corpus, data: DataSection, train: TrainSection, state: ParallelState):
        self._examples, self._held_out = corpus.train, corpus.held_out
        self._facts = corpus.facts["splits"]
        self._capacity = train.micro_batch_size * data.sequence_length
        self._state = state
        self._micro = train.micro_batch_size
        # One stage computes fewest micro batches fastest; several are idle unless there are as many as were asked for.
        self._least = train.gradient_accumulation_steps if state.pp.size > 1 else 1
        self.sequences_per_step = self._micro * train.gradient_accumulation_steps * state.dp.size
        self._order = ExampleOrder(len(self._examples), data.seed)

    def step(self, first: int) -> StepData:
        return self._packed(self._examples, self._order.indices(first, self.sequences_per_step))

    def held_out(self, limit: int | None) -> Iterator[MicroBatch]:
        count = len(self._held_out) if limit is None else min(limit * self._micro, len(self._held_out))
        size = self._micro * self._state.dp.size * PACKED_AT_ONCE
        for first in range(0, count, size):
            yield from self._packed(self._held_out, np.arange(first, min(first + size, count))).batches

    def describe(self) -> str:
        train = self._facts["train"]
        words = (
            f"{train['documents']:,} examples of {train['tokens']:,} tokens to train on, {train['learnt']:,} of them "
        )
        words += f"in responses; {self._facts['held_out']['documents']:,} examples held out"
        too_long, left_out = (sum(split[key] for split in self._facts.values()) for key in ("too_long", "left_out"))
        if too_long:
            words += f". {too_long:,} were longer than data.sequence_length: {left_out:,} are left out"
            words += f", {too_long - left_out:,} lost their end"
        return words

    def _packed(self, examples: ExampleSet, indices: np.ndarray) -> StepData:
        lengths = (examples.lengths[indices] - 1).tolist()  # the last token is a target only
        packs = pack(lengths, self._capacity, self._state.dp.size, least=self._least)
        batches = [self._batch(examples, indices[micro]) for micro in packs[self._state.dp.rank]]
        return StepData(batches, lengths)

    def _batch(self, examples: ExampleSet, indices: np.ndarray) -> MicroBatch:
        if not len(indices):
            return blank(1)
        found = [examples[index] for index in indices]
        return from_sequences([ids.tolist() for ids, _ in found], [learnt[1:].tolist() for _, learnt in found])
