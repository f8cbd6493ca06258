"""Where the time of a step goes: kernels by name and kind beside their floor, and the host's time by phase."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megalite import LLM
from megalite.kernels.device import synchronize
from megalite.monitor.metrics import PHASES
from megalite.tools.benchmarks.floor import Floor
from megalite.tools.benchmarks.frame import head, row

KINDS = {
    "communication": r"nccl|all_?reduce|allgather|all_gather|reduce_scatter|symm|multimem",
    "sampling": r"sampl|arg_?max|softmax|topk|sort|penal|histogram|greedy",
    "attention": r"attention|merge|flash|fmha|sdpa|mha_",
    "matmul": r"gemm|gemv|cutlass|nvjet|cublas|(?<![a-z])thin|linear|splitk|matmul|mm\b",
    "rope and KV store": r"store|rope|rotary",
    "norm": r"norm",
    "gate": r"silu|gate|gelu",
    "copies": r"memcpy|memset|copy|cat|index|gather|scatter|embedding",
    "elementwise": r"elementwise|::add|::mul",
}
"""Kinds of kernels by what their names hold; the first that fits."""
LOOKED_AT = 16
"""Decode steps that are averaged over, at most."""
SHOWN = 25
"""Kernels of a table; the rest are summed."""


class StepClock:
    """When steps ended, by the engine's meter; `on_step` hears of each, with its prefill and decode tokens."""

    def __init__(self, llm: LLM, on_step: Callable[[int, int], None] = lambda prefill, decode: None):
        self.meter, self.on_step = llm.replica.meter, on_step
        self.ends: list[float] = []

    def __enter__(self) -> StepClock:
        self.meter.on_step.append(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self.meter.on_step.remove(self._note)

    def _note(self, prefill: int, decode: int) -> None:
        if prefill + decode:
            self.ends.append(time.perf_counter())
            self.on_step(prefill, decode)

    def seconds(self, steps: int = 1) -> list[float]:
        """From each step's end to that of the one `steps` later."""
        return [later - sooner for sooner, later in zip(self.ends, self.ends[steps:], strict=False)]


@dataclass
class Kernel:
    """All launches of one kernel."""

    name: str
    count: int = 0
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        return next((kind for kind, words in KINDS.items() if re.search(words, self.name, re.IGNORECASE)), "other")


class Watch:
    """The kernels that run between `start` and `stop`; on a CPU, torch's operations."""

    def __init__(self, device: torch.device):
        self.device = device
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        self.profile = profile(activities=[activity])
        self.span = 0.0

    def start(self) -> None:
        synchronize(self.device)
        self.profile.start()
        self.began = time.perf_counter()

    def stop(self) -> None:
        synchronize(self.device)
        self.span = time.perf_counter() - self.began
        self.profile.stop()

    def kernels(self) -> list[Kernel]:
        """Most time first."""
        found: dict[str, Kernel] = {}
        if self.device.type == "cuda":
            for event in self.profile.events() or ():
                if event.device_type == DeviceType.CUDA:
                    kernel = found.setdefault(event.name, Kernel(event.name))
                    kernel.count += 1
                    kernel.seconds += event.time_range.elapsed_us() / 1e6
        else:
            for one in self.profile.key_averages():
                found[one.key] = Kernel(one.key, one.count, one.self_cpu_time_total / 1e6)
        return sorted(found.values(), key=lambda kernel: -kernel.seconds)


def decode_account(llm: LLM, work: Callable[[], object], steps: int, contexts: Sequence[int], floor: Floor) -> str:
    """`work` decodes sequences of lengths about `contexts` for so many steps, all of them in every step."""
    meter, device, batch = llm.replica.meter, llm.replica.device, len(contexts)
    mine = -(-batch // floor.layout.dp)
    watch, seen = Watch(device), 0
    first = max(1, steps // 8)
    looked_at = min(LOOKED_AT, max(1, steps // 2))
    at: list[tuple[float, float, dict[str, float]]] = []

    def spent() -> tuple[float, float, dict[str, float]]:
        report = meter.report(rank=0, tp=0, pp=0, dp=0, layers=(0, 0))
        return time.perf_counter(), time.thread_time(), {phase: getattr(report, phase) for phase in PHASES}

    def note(prefill: int, decode: int) -> None:
        nonlocal seen
        full = prefill == 0 and decode >= mine // floor.layout.pp
        seen = seen + 1 if full else 0
        if seen in (first, first + looked_at):
            at.append(spent())

    def look(prefill: int, decode: int) -> None:
        nonlocal seen
        seen = seen + 1 if prefill == 0 and decode >= mine // floor.layout.pp else 0
        if seen == first:
            watch.start()
        elif seen == first + looked_at:
            watch.stop()

    with StepClock(llm, note):
        work()
    seen = 0
    with StepClock(llm, look):
        work()
    if len(at) < 2 or not watch.span:
        return f"decode, batch {batch}: too few steps to look at"
    (began, cpu, phases), (ended, cpu_after, after) = at[:2]
    wall = (ended - began) / looked_at
    host = [("the step, by the clock", wall), ("the main thread at work", (cpu_after - cpu) / looked_at)]
    host += [(f"phase: {phase}", (after[phase] - phases[phase]) / looked_at) for phase in PHASES]
    host.append(("no phase", wall - sum(seconds for _, seconds in host[2:])))
    floors = {
        "matmul": floor.weights * floor.itemsize / floor.rates.read,
        "attention": floor.kv_bytes * sum(contexts) / floor.rates.read,
    }
    ranks = floor.layout.size
    title = f"A decode step, batch {batch}, context {contexts[0]}: {1000 * floor.decode(contexts):.3g} ms is the floor"
    lines = [f"**{title}**\n", head("host", "ms"), *(row(name, f"{1000 * one:.3f}") for name, one in host)]
    return "\n".join([*lines, "", tables(watch, looked_at, {kind: one / ranks for kind, one in floors.items()})])


def prefill_account(llm: LLM, work: Callable[[], object], lengths: Sequence[int], floor: Floor) -> str:
    """`work` computes prompts of these lengths, and a first token of each."""
    watch = Watch(llm.replica.device)
    watch.start()
    work()
    watch.stop()
    scores = floor.score_flops * sum(length * length for length in lengths) / 2
    whole = floor.prefill(lengths)
    attention = scores / floor.rates.matmul / floor.layout.size
    title = f"Prefill of {len(lengths)} x {lengths[0]}: {1000 * whole:.3g} ms is the floor"
    return f"**{title}**\n\n" + tables(watch, 1, {"matmul": whole - attention, "attention": attention})


def tables(watch: Watch, steps: int, floors: dict[str, float]) -> str:
    """Kinds and kernels, a step each; `floors` of kinds, in seconds."""
    kernels = watch.kernels()
    kinds: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        kinds[kernel.kind].append(kernel)
    busy = sum(kernel.seconds for kernel in kernels)
    lines = [head("kind", "kernels a step", "ms", "floor")]

    def line(name: str, members: list[Kernel], floor: str) -> str:
        count, seconds = sum(one.count for one in members), sum(one.seconds for one in members)
        return row(name, f"{count / steps:.4g}", f"{1000 * seconds / steps:.3f}", floor)

    for kind, members in sorted(kinds.items(), key=lambda item: -sum(one.seconds for one in item[1])):
        lines.append(line(kind, members, f"{1000 * floors[kind]:.3f}" if kind in floors else ""))
    lines.append(line("all", kernels, ""))
    lines.append(f"| (by the clock, while it is looked at) | | {1000 * watch.span / steps:.3f} | |")
    lines += ["", head("kernel", "kind", "calls a step", "us each", "ms a step", "share")]
    for one in kernels[:SHOWN]:
        each, all_ = 1e6 * one.seconds / one.count, 1000 * one.seconds / steps
        share = one.seconds / busy if busy else 0.0
        cells = f"{one.count / steps:.4g}", f"{each:.2f}", f"{all_:.3f}", f"{share:.1%}"
        lines.append(row(f"`{short(one.name)}`", one.kind, *cells))
    rest = kernels[SHOWN:]
    if rest:
        count, seconds = sum(one.count for one in rest), sum(one.seconds for one in rest)
        lines.append(f"| {len(rest)} others | | {count / steps:.4g} | | {1000 * seconds / steps:.3f} | |")
    return "\n".join(lines)


def short(name: str) -> str:
    """A kernel's name without its types and return value, for a table's cell."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    depth, kept = 0, []
    for letter in name.removeprefix("void "):
        depth += letter == "<"
        if depth == 0:
            kept.append(letter)
        depth -= letter == ">"
    name = "".join(kept).partition("(")[0].replace("|", "/")
    return name if len(name) <= 60 else f"{name[:57]}..."
