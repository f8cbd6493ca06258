"""What each pipeline stage does in which order, as lists of instructions: pure functions, no process and no torch.

1F1B (PipeDream-flush, arXiv 2006.09503, figure 3) for two stages and three micro batches:

    stage 0   F0 F1    B0 F2 B1    B2     Fm, Bm: forward and backward of micro batch m
    stage 1      F0 B0 F1 B1 F2 B2

With several chunks of layers a stage the order is that of arXiv 2104.04473, section 2.2: micro batches go in rounds of
as many as there are stages, through every chunk, and a stage idles for a chunk's time where it did for a stage's.

A message goes from a stage to its neighbour; neighbours exchange the messages of one kind in the same order, so a
transport needs no tags. A list is right for any number of micro batches, also fewer than stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

MessageKind = Literal["activation", "gradient"]
"""Activations go to the next stage (from the last to the first), gradients of them the other way."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Run a chunk of this stage's layers on a micro batch."""

    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Run it backwards."""

    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Begin to receive what a computation of this stage needs: the activation a forward, the gradient a backward."""

    kind: MessageKind
    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to send the result of a computation of this stage: an activation of a forward, a gradient of a backward."""

    kind: MessageKind
    micro_batch: int
    chunk: int


Compute = Forward | Backward
Instruction = Compute | Receive | Send


def training(stages: int, stage: int, micro_batches: int, chunks: int = 1) -> list[Instruction]:
    """Forward and backward of every micro batch on one stage: 1F1B, interleaved when a stage has several chunks.

    At most `in_flight(...)` micro batch chunks are between their forward and their backward at any time.
    """
    rounds = -(-micro_batches // stages)
    total = rounds * stages * chunks  # as if the last round were full: leaving out what is not there keeps the order
    warm = min(in_flight(stages, stage, chunks) - 1, total)
    forwards = [Forward(*_visit(index, stages, chunks)) for index in range(total)]
    backwards = [
        Backward(micro_batch, chunks - 1 - chunk)
        for micro_batch, chunk in (_visit(index, stages, chunks) for index in range(total))
    ]
    order: list[Compute] = list(forwards[:warm])
    for forward, backward in zip(forwards[warm:], backwards, strict=False):
        order += [forward, backward]
    order += backwards[total - warm :]
    return _with_messages([step for step in order if step.micro_batch < micro_batches], stages, stage, chunks)


def forward_only(stages: int, stage: int, micro_batches: int, chunks: int = 1) -> list[Instruction]:
    """The forward of every micro batch on one stage."""
    rounds = -(-micro_batches // stages)
    order = [Forward(*_visit(index, stages, chunks)) for index in range(rounds * stages * chunks)]
    return _with_messages([step for step in order if step.micro_batch < micro_batches], stages, stage, chunks)


def in_flight(stages: int, stage: int, chunks: int = 1) -> int:
    """Most micro batch chunks whose activations `training` makes a stage keep at once."""
    if chunks == 1:
        return stages - stage
    return 2 * (stages - stage - 1) + (chunks - 1) * stages + 1


def _visit(index: int, stages: int, chunks: int) -> tuple[int, int]:
    """Micro batch and chunk of the index-th forward: rounds of `stages` micro batches through chunk after chunk."""
    number, place = divmod(index, stages * chunks)
    return number * stages + place % stages, place // stages


def _with_messages(order: list[Compute], stages: int, stage: int, chunks: int) -> list[Instruction]:
    """With receives before and sends after; a receive begins one computation early, so that it overlaps with it."""
    first, last = stage == 0, stage == stages - 1

    def receives(step: Compute) -> Iterator[Receive]:
        if isinstance(step, Forward) and not (first and step.chunk == 0):
            yield Receive("activation", step.micro_batch, step.chunk)
        if isinstance(step, Backward) and not (last and step.chunk == chunks - 1):
            yield Receive("gradient", step.micro_batch, step.chunk)

    def sends(step: Compute) -> Iterator[Send]:
        if isinstance(step, Forward) and not (last and step.chunk == chunks - 1):
            yield Send("activation", step.micro_batch, step.chunk)
        if isinstance(step, Backward) and not (first and step.chunk == 0):
            yield Send("gradient", step.micro_batch, step.chunk)

    instructions: list[Instruction] = [one for step in order[:1] for one in receives(step)]
    for step, following in zip(order, [*order[1:], None], strict=True):
        if following is not None:
            instructions += receives(following)
        instructions += [step, *sends(step)]
    return instructions
