"""What a training run reads, as micro batches: windows of running text, or examples packed together.

Which sequences a step reads depends on how many were read before, and on nothing else; how they are dealt out to
replicas and micro batches depends on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megalite.config.schema import DataSection, TrainSection
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError, Problem
from megalite.train.data.order import TrainingOrder
from megalite.train.data.packing import pack
from megalite.train.data.prepared import Corpus, Split
from megalite.train.micro_batch import MicroBatch, blank, from_sequences, from_windows

PACKED_AT_ONCE = 16
"""Held-out examples that are packed together, in micro batches' worth of each replica."""


@dataclass(frozen=True, slots=True)
class StepData:
    """The data of one step."""

    batches: list[MicroBatch]
    """This replica's; every replica has as many."""
    lengths: Sequence[int]
    """Tokens of each sequence of all replicas."""


def open_reader(corpus: Corpus, data: DataSection, train: TrainSection, state: ParallelState) -> Reader:
    """The reader for what `corpus` holds. ConfigError if there is too little of it."""
    return (WindowReader if corpus.is_text else ExampleReader)(corpus, data, train, state)


class WindowReader:
    """Windows of data.sequence_length tokens of running text."""

    def __init__(self, corpus: Corpus, data: DataSection, train: TrainSection, state: ParallelState):
        self._text, self._held_out_text = corpus.train.tokens, corpus.held_out.tokens
        self._length = data.sequence_length
        self._micro = train.micro_batch_size
        self._dp = state.dp
        self._share = self._micro * train.gradient_accumulation_steps
        self.sequences_per_step = self._share * self._dp.size
        """Sequences of a step, over all replicas."""
        # Of the training text one length is left for the offset and the last target.
        windows = _count_windows(len(self._text) - self._length, self._text, self._length, "training")
        self._order = TrainingOrder(windows, data.seed, self._length)
        self._held_out = _count_windows(len(self._held_out_text) - 1, self._held_out_text, self._length, "held-out")

    def step(self, first: int) -> StepData:
        """The step that begins with sequence number `first`, counted over all epochs."""
        start = first + self._dp.rank * self._share
        firsts = range(start, start + self._share, self._micro)
        batches = [from_windows(self._windows(self._text, self._order.indices(one, self._micro))) for one in firsts]
        return StepData(batches, [self._length] * self.sequences_per_step)

    def held_out(self, limit: int | None) -> Iterator[MicroBatch]:
        """This replica's share of the held-out split, or of `limit` micro batches' worth of it over all replicas.

        Every replica gets as many micro batches; what fills them up has weight 0.
        """
        size, dp = self._micro, self._dp
        count = self._held_out if limit is None else min(limit * size, self._held_out)
        for first in range(0, count, size * dp.size):
            mine = np.arange(first + dp.rank * size, first + (dp.rank + 1) * size)
            windows = self._windows(self._held_out_text, np.minimum(mine, count - 1) * self._length)
            yield from_windows(windows, (mine < count).tolist())

    def describe(self) -> str:
        """What there is to read, in a line."""
        return f"{len(self._text):,} tokens of text to train on, {len(self._held_out_text):,} held out"

    def _windows(self, tokens: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """Inputs and, one further, targets: int64 [len(starts), length + 1]."""
        windows = np.stack([tokens[start : start + self._length + 1] for start in starts])
        return torch.from_numpy(windows.astype(np.int64))


def _count_windows(room: int, tokens: np.ndarray, length: int, split: str) -> int:
    """Windows of `length` tokens that begin within `room` tokens, at least one."""
    if room < length:
        rule = f"must be shorter: the {split} text has {len(tokens)} tokens"
        raise ConfigError(Problem(key="data.sequence_length", rule=rule, value=length))
    return room // length


class ExampleReader:
    """Whole examples, packed into micro batches of at most micro_batch_size * sequence_length tokens.

    Its methods are those of `WindowReader`.
    """

    def __init__(self, corpus: Corpus, data: DataSection, train: TrainSection, state: ParallelState):
        self._examples, self._held_out = corpus.train, corpus.held_out
        self._facts = corpus.facts["splits"]
        self._capacity = train.micro_batch_size * data.sequence_length
        self._dp = state.dp
        self._micro = train.micro_batch_size
        # One stage computes fewest micro batches fastest; several are idle unless there are as many as were asked for.
        self._least = train.gradient_accumulation_steps if state.pp.size > 1 else 1
        self.sequences_per_step = self._micro * train.gradient_accumulation_steps * state.dp.size
        self._order = TrainingOrder(len(self._examples), data.seed)

    def step(self, first: int) -> StepData:
        return self._packed(self._examples, self._order.indices(first, self.sequences_per_step))

    def held_out(self, limit: int | None) -> Iterator[MicroBatch]:
        count = len(self._held_out) if limit is None else min(limit * self._micro, len(self._held_out))
        size = self._micro * self._dp.size * PACKED_AT_ONCE
        for first in range(0, count, size):
            yield from self._packed(self._held_out, np.arange(first, min(first + size, count))).batches

    def describe(self) -> str:
        train, held_out = self._facts["train"], self._facts["held_out"]
        words = f"{train['documents']:,} examples of {train['tokens']:,} tokens to train on, {train['learnt']:,} of "
        words += f"them in responses; {held_out['documents']:,} examples held out"
        too_long, left_out = (train[key] + held_out[key] for key in ("too_long", "left_out"))
        if too_long:
            words += f". {too_long:,} were longer than data.sequence_length: {left_out:,} are left out"
            words += f", {too_long - left_out:,} lost their end"
        return words

    def _packed(self, examples: Split, indices: np.ndarray) -> StepData:
        lengths = (examples.lengths[indices] - 1).tolist()  # the last token is a target only
        packs = pack(lengths, self._capacity, self._dp.size, least=self._least)
        batches = []
        for members in packs[self._dp.rank]:
            found = [examples[index] for index in indices[members]]
            rows = [ids.tolist() for ids, _ in found], [mask[1:].tolist() for _, mask in found]
            batches.append(from_sequences(*rows) if found else blank(1))
        return StepData(batches, lengths)


Reader = WindowReader | ExampleReader
