"""Pipeline communication: hidden states, and gradients of them, from stage to stage.

Sends are asynchronous: a stage goes on with its next work while its results are on their way. gloo cannot send CUDA
tensors (it aborts the process), so over gloo they pass through host memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.parallel_state import Flow, ParallelState
from megalite.core.schedules import Backward, Forward, Instruction, Receive, Send, receives_with_sends
from megalite.monitor.collector import Meter

Message = tuple[dist.Work, Tensor]
"""A message on its way: its handle, and the tensor that it arrives in."""
MAX_SENDS = 8
"""Sends in flight before a stage waits for the oldest: a bound on the memory that a slow receiver costs."""


def transport_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where a tensor of `device` has to be for `group` to send it; host memory without a group."""
    backend = dist.get_backend(group) if group is not None else ""
    return device if "nccl" in backend else torch.device("cpu")


class _FlowEnd:
    """One end of a flow; `meter` records its messages, which lie on the device `transport` while they travel."""

    def __init__(self, flow: Flow, group: dist.ProcessGroup | None, device: torch.device, meter: Meter):
        self.flow, self.name, self.track = flow, str(flow), flow.track
        self.meter = meter
        self.group = group
        self.transport = transport_device(group, device)


class Outbox(_FlowEnd):
    """The sending end of a flow. In host memory it keeps `most` messages, as gloo says that one has arrived only to
    who waits for it."""

    def __init__(self, flow: Flow, group: dist.ProcessGroup | None, device: torch.device, meter: Meter, most: int):
        super().__init__(flow, group, device, meter)
        self.most = most if self.transport.type == "cpu" else MAX_SENDS
        self.sends: deque[Message] = deque()

    def send(self, tensor: Tensor) -> None:
        """Begin to send a tensor and return at once, unless the most are still on their way."""
        buffer = tensor.to(self.transport).contiguous()
        with self.track.entering("send"):
            while len(self.sends) >= self.most or (self.sends and self.sends[0][0].is_completed()):
                self.sends.popleft()[0].wait()
            self.meter.count_bytes("pp", buffer.numel() * buffer.element_size())
            self.meter.message(self.name, begins=True)
            work = dist.isend(buffer, self.flow.receiver, group=self.group)
        assert work is not None, "this rank is in the group"
        self.sends.append((work, buffer))

    def drain(self) -> None:
        """Wait until every send has arrived. Over NCCL the device's next work waits, the host does not."""
        with self.track.waiting("send"):
            while self.sends:
                self.sends.popleft()[0].wait()


class Inbox(_FlowEnd):
    """The receiving end of a flow."""

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype) -> Message:
        """Begin to receive a tensor into memory of its transport; it is there after `wait`."""
        buffer = torch.empty(shape, dtype=dtype, device=self.transport)
        work = dist.irecv(buffer, self.flow.sender, group=self.group)
        assert work is not None, "this rank is in the group"
        return work, buffer

    def wait(self, message: Message) -> Tensor:
        """The tensor of the earliest message that was begun and not waited for yet."""
        with self.track.entering("receive"):
            message[0].wait()
        self.meter.message(self.name, begins=False)
        return message[1]


def _flow_ends(
    flows: Mapping[Flow, dist.ProcessGroup], state: ParallelState, device: torch.device, most: int
) -> tuple[dict[str, Inbox], dict[str, Outbox]]:
    """This rank's ends of its flows, by kind of message."""
    inward: dict[str, Inbox] = {}
    outward: dict[str, Outbox] = {}
    for flow, group in flows.items():
        if flow.receiver == state.rank:
            inward[flow.kind] = Inbox(flow, group, device, state.meter)
        else:
            outward[flow.kind] = Outbox(flow, group, device, state.meter, most)
    return inward, outward


class StageLink:
    """Inference: hidden states from stage to stage and sampled ids from the last to the first, between ranks of the
    same tp rank.

    Over NCCL everything goes from device to device in the order of the current stream, and the host never waits. An
    NCCL message occupies its stream until its peer is ready for it, and what waits for the whole device (allocating
    page-locked memory, loading a kernel) waits for it too. No such wait can close a circle as long as every stage
    handles one step after the other: `receive`, `send` and `return_ids` of a step before those of the next, and
    `expect_ids` right after the step's `send`.

    As many messages as stages are on their way at most: a stage begins a step once it knows the results of the one so
    many before, of which the next stage has received all.
    """

    def __init__(self, state: ParallelState, *, hidden_size: int, dtype: torch.dtype, device: torch.device):
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self.inward, self.outward = _flow_ends(state.inference_flows(), state, device, most=state.pp.size)
        self.expected: deque[Message] = deque()
        """Ids on their way, in the order of the steps."""

    def send(self, hidden: Tensor) -> None:
        """Begin to send [T, hidden] to the next stage. It must not be written to before `drain`."""
        self.outward["hidden"].send(hidden)

    def receive(self, num_tokens: int) -> Tensor:
        """[num_tokens, hidden] from the previous stage; over gloo it blocks until they are here."""
        inbox = self.inward["hidden"]
        return inbox.wait(inbox.begin((num_tokens, self.hidden_size), self.dtype)).to(self.device)

    def return_ids(self, ids: Tensor) -> None:
        """The last stage begins to send a step's ids, int32 or int64 [n], to the first, tp rank to tp rank."""
        self.outward["ids"].send(ids.to(torch.int32))

    def expect_ids(self, n: int) -> None:
        """The first stage begins to receive the ids of a step."""
        self.expected.append(self.inward["ids"].begin((n,), torch.int32))

    def returned(self, n: int) -> Tensor:
        """Ids of the earliest step whose ids were not asked for yet, int32 [n] on this rank's device."""
        if not self.expected:
            self.expect_ids(n)
        message = self.expected.popleft()
        assert len(message[1]) == n, f"{n} ids wanted of a step that returns {len(message[1])}"
        return self.inward["ids"].wait(message).to(self.device)

    def drain(self) -> None:
        """Wait until every send has arrived."""
        for outbox in self.outward.values():
            outbox.drain()


class StageWork(Protocol):
    """What a stage computes: the forward and backward passes that `Pipeline.run` calls. T tokens, D hidden size."""

    def rows(self, micro_batch: int) -> int:
        """T of a micro batch's hidden states between stages."""

    def forward(self, micro_batch: int, chunk: int, received: Tensor | None) -> Tensor | None:
        """Run a chunk: hidden states [T, D] of the previous stage, if any -> those for the next stage, if any."""

    def backward(self, micro_batch: int, chunk: int, gradient: Tensor | None) -> Tensor | None:
        """Gradient [T, D] of what `forward` returned, if anything -> gradient of what it received, if anything."""


class Pipeline:
    """Training: executes the instructions of `schedules` on one stage, over a communicator for each `Flow`.

    A flow has messages of one kind in one direction, and both ends handle them in the same order. So they need no tags,
    and none waits behind another that depends on it.
    """

    def __init__(self, state: ParallelState, *, hidden_size: int, dtype: torch.dtype, device: torch.device):
        """Collective over the run the first time for a layout: it makes the communicators."""
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self.meter = state.meter
        flows = state.pipeline_flows()
        self.inward, self.outward = _flow_ends(flows, state, device, most=MAX_SENDS)
        ends = (*self.inward.values(), *self.outward.values())
        self.on_device = any(end.transport.type != "cpu" for end in ends)
        """Whether messages go from device to device, see `receives_with_sends`; nothing waits for the whole device
        between the messages that it puts side by side."""
        # NCCL connects two ranks at their first message, for which the hosts of both wait.
        for flow in flows if self.on_device else ():
            if flow.receiver == state.rank:
                inbox = self.inward[flow.kind]
                inbox.wait(inbox.begin((1,), dtype))
            else:
                self.outward[flow.kind].send(torch.zeros(1, dtype=dtype, device=device))

    def run(self, instructions: Sequence[Instruction], work: StageWork) -> None:
        """Execute a schedule's instructions; afterwards sends may still be on their way, see `drain`."""
        arriving: dict[Receive, Message] = {}
        leaving: dict[Send, Tensor | None] = {}
        for step in receives_with_sends(instructions) if self.on_device else instructions:
            match step:
                case Receive():
                    shape = work.rows(step.micro_batch), self.hidden_size
                    arriving[step] = self.inward[step.kind].begin(shape, self.dtype)
                case Forward(micro_batch, chunk):
                    received = self._arrived(arriving, Receive("activation", micro_batch, chunk))
                    with self.meter.phase("compute", f"forward {micro_batch}"):
                        output = work.forward(micro_batch, chunk, received)
                    leaving[Send("activation", micro_batch, chunk)] = _contiguous(output)
                case Backward(micro_batch, chunk):
                    received = self._arrived(arriving, Receive("gradient", micro_batch, chunk))
                    with self.meter.phase("compute", f"backward {micro_batch}"):
                        output = work.backward(micro_batch, chunk, received)
                    leaving[Send("gradient", micro_batch, chunk)] = _contiguous(output)
                case Send():
                    tensor = leaving.pop(step)
                    assert tensor is not None, step
                    with self.meter.phase("communication", "send", "pp"):
                        self.outward[step.kind].send(tensor)

    def drain(self) -> None:
        """Wait until every send has arrived."""
        for outbox in self.outward.values():
            outbox.drain()

    def _arrived(self, arriving: dict[Receive, Message], message: Receive) -> Tensor | None:
        """The received input of a computation; None if it has none."""
        if message not in arriving:
            return None
        with self.meter.phase("waiting", message.kind, "pp"):
            return self.inward[message.kind].wait(arriving.pop(message)).to(self.device)


def _contiguous(output: Tensor | None) -> Tensor | None:
    return None if output is None else output.contiguous()
