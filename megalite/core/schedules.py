"""Pipeline schedules: what each stage does in which order, as lists of instructions. Pure functions, torch-free.

1F1B (PipeDream-flush, arXiv 2006.09503, figure 3) for two stages and three micro batches:

    stage 0   F0 F1    B0 F2 B1    B2     Fm, Bm: forward and backward of micro batch m
    stage 1      F0 B0 F1 B1 F2 B2

With several chunks of layers a stage the order is that of arXiv 2104.04473, section 2.2: micro batches go in rounds of
as many as there are stages, through every chunk, and a stage idles for a chunk's time where it did for a stage's.

A message goes from a stage to its neighbour; neighbours exchange the messages of one kind in the same order, so a
transport needs no tags. A list is right for any number of micro batches, also fewer than stages.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Run the backward pass of a chunk on a micro batch."""

    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Begin to receive the input of a forward (an activation) or backward (a gradient) of this stage."""

    kind: MessageKind
    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to send the result of a forward (an activation) or backward (a gradient) of this stage."""

    kind: MessageKind
    micro_batch: int
    chunk: int


Compute = Forward | Backward
Instruction = Compute | Receive | Send


def training(stages: int, stage: int, micro_batches: int, chunks: int = 1) -> list[Instruction]:
    """Forward and backward of every micro batch on one stage: 1F1B, interleaved when a stage has several chunks.

    At most `in_flight(...)` micro batch chunks are between their forward and their backward at any time.
    """
    visits = _visits(stages, micro_batches, chunks)
    warm = min(in_flight(stages, stage, chunks) - 1, len(visits))
    forwards = [Forward(micro_batch, chunk) for micro_batch, chunk in visits]
    backwards = [Backward(micro_batch, chunks - 1 - chunk) for micro_batch, chunk in visits]
    order: list[Compute] = list(forwards[:warm])
    for forward, backward in zip(forwards[warm:], backwards, strict=False):
        order += [forward, backward]
    order += backwards[len(visits) - warm :]
    return _with_messages([step for step in order if step.micro_batch < micro_batches], stages, stage, chunks)


def forward_only(stages: int, stage: int, micro_batches: int, chunks: int = 1) -> list[Instruction]:
    """The forward of every micro batch on one stage."""
    order: list[Compute] = [Forward(*visit) for visit in _visits(stages, micro_batches, chunks)]
    return _with_messages([step for step in order if step.micro_batch < micro_batches], stages, stage, chunks)


def in_flight(stages: int, stage: int, chunks: int = 1) -> int:
    """Most micro batch chunks whose activations `training` makes a stage keep at once."""
    if chunks == 1:
        return stages - stage
    return 2 * (stages - stage - 1) + (chunks - 1) * stages + 1


def _visits(stages: int, micro_batches: int, chunks: int) -> list[tuple[int, int]]:
    """(micro batch, chunk) of the forwards in order: rounds of `stages` micro batches through chunk after chunk.

    As if the last round were full: dropping the micro batches that do not exist later keeps the order.
    """
    rounds = range(-(-micro_batches // stages))
    return [(r * stages + place, chunk) for r in rounds for chunk in range(chunks) for place in range(stages)]


def _with_messages(order: list[Compute], stages: int, stage: int, chunks: int) -> list[Instruction]:
    """Computations with their receives and sends; a receive begins one computation early, to overlap with it."""
    last = stages * chunks - 1
    receives: list[list[Instruction]] = []
    sends: list[list[Instruction]] = []
    for step in order:
        position = step.chunk * stages + stage  # of the chunk in the model
        kind: MessageKind = "activation" if isinstance(step, Forward) else "gradient"
        begin, end = (0, last) if kind == "activation" else (last, 0)
        receives.append([] if position == begin else [Receive(kind, step.micro_batch, step.chunk)])
        sends.append([] if position == end else [Send(kind, step.micro_batch, step.chunk)])
    receives.append([])
    instructions = receives[0]
    for step, following, sent in zip(order, receives[1:], sends, strict=True):
        instructions += [*following, step, *sent]
    return instructions


def receives_with_sends(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same instructions; a receive comes after the computation that it was ahead of, right before its sends.

    So a stage has all its messages between two computations at once, and without interleaving (or in a forward pass
    alone) no stage waits for ever even if its host waits, between any two computations, until they have all arrived.
    """
    result: list[Instruction] = []
    held: list[Instruction] = []
    for step in instructions:
        if isinstance(step, Receive):
            held.append(step)
        elif isinstance(step, Send):
            result.append(step)
        else:
            kind: MessageKind = "activation" if isinstance(step, Forward) else "gradient"
            needed = Receive(kind, step.micro_batch, step.chunk)
            result += [*(one for one in held if one == needed), step, *(one for one in held if one != needed)]
            held = []
    return result
