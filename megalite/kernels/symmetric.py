"""Memory that every GPU of a group on one host maps: who can have it, and how it is made.

torch allocates and maps it (torch.distributed._symmetric_memory, without multicast); the kernels of `reduce` and
`gather` use it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.kernels.gather import SLOT, gather_rows, pieces
from megalite.kernels.jit import triton
from megalite.kernels.reduce import MAX_WIDTH, Peers, all_reduce, all_reduce_add_norm

Method = Literal["one_shot", "two_shot", "nccl"]

ONE_SHOT_BYTES = 2 * 2**20
"""Largest summand of two ranks that one shot takes; of more ranks, the bytes that a rank reads are what counts."""
TWO_SHOT_BYTES = 16 * 2**20
"""Above it NCCL is as fast: of [16,384, 4,096] in bfloat16 on two H100 a two-shot sum took 416 us, NCCL 476; of
[2,048, 4,096] 59 and 88; of [256, 4,096] 14 and 35."""
MIN_LINK_RATE = 100e9
"""Bytes a second between two GPUs: NVLink is above it, PCI Express below."""
MIN_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs whose sums are made so."""
BLOCKS_PER_PROCESSOR = 2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PROBE_BYTES = TWO_SHOT_BYTES


class Unavailable(Exception):
    """Why a group has no symmetric memory."""


def method(num_bytes: int, ranks: int, capability: tuple[int, int]) -> Method:
    """How a summand of so many bytes is summed over the ranks of a host that have symmetric memory."""
    if capability < MIN_CAPABILITY or num_bytes > TWO_SHOT_BYTES:
        return "nccl"
    # One shot reads (n - 1) summands, two shots 2 (n - 1) / n of one but meet twice.
    return "one_shot" if num_bytes * (ranks - 1) <= ONE_SHOT_BYTES else "two_shot"


class SymmetricSum:
    """Sums of rows of one width and dtype over a group's GPUs. Collective to make; needs a stop of all streams."""

    def __init__(self, group: dist.ProcessGroup, *, width: int, dtype: torch.dtype, device: torch.device):
        """Unavailable, on every rank alike, where there is none: the GPUs are on several hosts or not linked."""
        properties = torch.cuda.get_device_properties(device)
        self.capability = properties.major, properties.minor
        self.size = dist.get_world_size(group)
        usable = triton is not None and self.capability >= MIN_CAPABILITY and dtype in DTYPES and width <= MAX_WIDTH
        facts = _gathered([usable, _host(), BLOCKS_PER_PROCESSOR * properties.multi_processor_count], group)
        if not all(ok for ok, *_ in facts):
            raise Unavailable(
                f"a GPU of capability {MIN_CAPABILITY} or above, Triton and rows of {MAX_WIDTH} are needed"
            )
        if len({host for _, host, _ in facts}) > 1:
            raise Unavailable("the ranks are on several hosts")
        blocks = min(count for *_, count in facts)
        max_rows = max(1, TWO_SHOT_BYTES // (width * dtype.itemsize))
        halves, total = Peers.num_bytes(self.size, width, dtype, max_rows, blocks)
        self.memory, self.handle = _mapped(total, group, device)
        self.peers = Peers(
            rank=dist.get_rank(group),
            size=self.size,
            width=width,
            dtype=dtype,
            max_rows=max_rows,
            blocks=blocks,
            **_addresses(self.handle, halves, blocks, device),
        )
        rate = min(rate for (rate,) in _gathered([int(self._link_rate())], group))
        if rate < MIN_LINK_RATE:
            raise Unavailable(
                f"one GPU reads another's memory at {rate / 1e9:.0f} GB/s, below {MIN_LINK_RATE / 1e9:.0f}"
            )
        if not all(ok for (ok,) in _gathered([self._is_right()], group)):
            raise Unavailable("a sum of known numbers came out wrong")

    def takes(self, x: Tensor) -> bool:
        """Is x [R, width] better summed here than by NCCL?"""
        return method(x.numel() * x.element_size(), self.size, self.capability) != "nccl"

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x [R, width], which `takes` accepts, as a new tensor; the same bits on every rank."""
        two_shot = method(x.numel() * x.element_size(), self.size, self.capability) == "two_shot"
        return all_reduce(x if x.stride(1) == 1 else x.contiguous(), self.peers, two_shot=two_shot)

    def fuses(self, x: Tensor) -> bool:
        """Is `add_norm` for x [R, width]?"""
        return method(x.numel() * x.element_size(), self.size, self.capability) == "one_shot" and x.stride(1) == 1

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, zero_centred: bool) -> Tensor:
        """residual += the sum of the ranks' x, in place; returns its RMSNorm: `reduce.all_reduce_add_norm`."""
        return all_reduce_add_norm(x, residual, weight, eps, self.peers, zero_centred=zero_centred)

    def _link_rate(self) -> float:
        """Bytes a second at which this GPU reads the next rank's memory; the least of three copies' times counts."""
        source = self.handle.get_buffer((self.peers.rank + 1) % self.size, (_PROBE_BYTES,), torch.uint8)
        target = torch.empty_like(source, device=self.memory.device)
        times = []
        for _ in range(4):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return float(_PROBE_BYTES / min(times[1:]))

    def _is_right(self) -> bool:
        """Do sums of small integers, which every dtype holds exactly, come out as they should?"""
        rows, width = min(self.peers.max_rows, self.peers.blocks + 3), self.peers.width
        numbers = torch.arange(rows * width, device=self.memory.device).view(rows, width) % 3
        expected = (numbers * (self.size * (self.size + 1) // 2)).to(self.peers.dtype)
        mine = (numbers * (self.peers.rank + 1)).to(self.peers.dtype)
        found = [all_reduce(mine[:count], self.peers, two_shot=shot) for count in (1, rows) for shot in (False, True)]
        return all(torch.equal(one, expected[: one.shape[0]]) for one in found)


class SymmetricColumns:
    """The columns of logits, cut over a group's GPUs: `sampling.Columns`. Collective to make, as `SymmetricSum`."""

    def __init__(
        self,
        sums: SymmetricSum,
        group: dist.ProcessGroup,
        *,
        widths: Sequence[int],
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """`sums`: of the same group. `max_rows`: of a call. Unavailable, on every rank alike: there is no memory, or
        numbers come out wrong."""
        self.widths = list(widths)
        blocks, rank, size = sums.peers.blocks, sums.peers.rank, sums.size
        slots = max_rows * max(pieces(max(widths), dtype.itemsize), 1)
        halves, total = Peers.num_bytes(size, SLOT, torch.uint8, slots, blocks)
        self.memory, self.handle = _mapped(total, group, device)
        at = _addresses(self.handle, halves, blocks, device)
        self.peers = Peers(rank, size, SLOT, torch.uint8, slots, blocks, **at)
        self.begins = torch.tensor([0, *accumulate(self.widths)], dtype=torch.int32, device=device)
        if not all(ok for (ok,) in _gathered([self._is_right(max_rows, dtype)], group)):
            raise Unavailable("columns of known numbers came out wrong")

    def gathered(self, x: Tensor) -> Tensor:
        """x [n, width] of every rank -> [n, ranks * width]."""
        return gather_rows(x, self.peers)

    def gathered_drawn(self, logits: Tensor, rows: Tensor, table: Tensor) -> Tensor:
        """Logits [n, width of this rank] -> [n, V]; rows that are greedy by the table hold anything."""
        return gather_rows(logits, self.peers, widths=self.widths, begins=self.begins, drawn=(rows, table))

    def _is_right(self, max_rows: int, dtype: torch.dtype) -> bool:
        """Do small integers, which every dtype holds exactly, come where they belong?"""
        begin = sum(self.widths[: self.peers.rank])
        right = True
        for count in (min(max_rows, 8), 1, min(max_rows, 5)):
            whole = torch.arange(count * sum(self.widths), device=self.memory.device).view(count, -1) % 251
            mine = whole[:, begin : begin + self.widths[self.peers.rank]].to(dtype)
            found = gather_rows(mine, self.peers, widths=self.widths, begins=self.begins)
            right &= torch.equal(found, whole.to(dtype))
        return right


def _mapped(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, Any]:
    """Zeros, uint8, and torch's handle of all ranks' memory; Unavailable on every rank if one has none."""
    memory = handle = None
    reason = ""
    try:
        from torch.distributed import _symmetric_memory  # not in every build of torch

        memory = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        memory.zero_()
        torch.cuda.synchronize(device)  # before anyone can write flags into it
        handle = _symmetric_memory.rendezvous(memory, group)
    except (ImportError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
    if not all(ok for (ok,) in _gathered([handle is not None], group)):
        raise Unavailable(reason or "another rank could not make it")
    assert memory is not None
    return memory, handle


def _addresses(handle: Any, halves: int, blocks: int, device: torch.device) -> dict[str, Tensor]:
    """The fields of `Peers` on the device: where the ranks' buffers are, their flags behind, and no call made yet."""
    addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
    epochs = torch.zeros(blocks, dtype=torch.int32, device=device)
    return {"buffers": addresses, "flags": addresses + halves, "epochs": epochs}


def _host() -> int:
    """A number that the processes of one running machine share."""
    try:
        return zlib.crc32(Path("/proc/sys/kernel/random/boot_id").read_bytes())
    except OSError:
        return 0


def _gathered(facts: Sequence[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Every rank's facts, on every rank."""
    each = torch.empty(dist.get_world_size(group), len(facts), dtype=torch.int64)
    dist.all_gather_into_tensor(each, torch.tensor([facts], dtype=torch.int64), group=group)
    found: list[list[int]] = each.tolist()
    return found
