"""What travels between the HTTP process and the control rank of a replica: msgpack over a socket, no code. Torch-free.

The HTTP process listens on a unix socket in a folder that only this user can open; each replica connects, says `Hello`,
and then both send whenever they have something. Every message is one frame: its length (4 bytes, little-endian), then a
list of tagged structs.
"""

from __future__ import annotations

import signal

import msgspec

from megalite.inference.outputs import RequestOutput, TokenDelta
from megalite.inference.request import Request

PASSED_ON = signal.SIGUSR1
"""What rank 0 of a launcher's run sends the HTTP process, its child, for a signal that it was sent itself. It never
counts as a second one: some launchers (deepspeed) send theirs to all processes below them."""


class Hello(msgspec.Struct, tag=True, array_like=True):
    """A replica is ready; its first message."""

    replica: int
    pid: int
    max_model_len: int
    """The longest sequence that fits on this replica."""
    num_kv_blocks: int
    block_size: int
    max_num_seqs: int
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str
    device: str


class Step(msgspec.Struct, tag=True, array_like=True):
    """What came of the steps since the last one; also sent, empty, once a second by a replica with nothing to do."""

    deltas: list[TokenDelta]
    """What streamed requests gained, in order."""
    outputs: list[RequestOutput]
    """Requests that ended."""
    step: int
    """Steps so far."""
    running: int
    """Sequences in a step."""
    waiting: int
    """Sequences not yet in a step."""
    free_blocks: int
    """KV blocks that nobody holds, cached prefixes included."""
    prefix_hits: int
    """Prompt tokens so far that were found in the prefix cache."""
    prompt_tokens: int
    """Prompt tokens so far."""
    output_tokens: int
    """Tokens generated so far."""
    preemptions: int
    started: list[str] = []
    """Ids of requests whose first tokens were scheduled."""
    busy: dict[str, float] = {}
    """Share of time by activity since the last message, e.g. compute, communication, waiting."""


class Submit(msgspec.Struct, tag=True, array_like=True):
    """Take on a request; ids are unique over the life of the server."""

    request: Request


class Abort(msgspec.Struct, tag=True, array_like=True):
    """Give a request up; its result still comes, with finish_reason abort, unless it had ended."""

    id: str


class Leave(msgspec.Struct, tag=True, array_like=True):
    """End in order: what still runs is given up, every rank leaves with 0."""


FromReplica = Hello | Step
ToReplica = Submit | Abort | Leave
