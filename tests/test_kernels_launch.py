"""Launches by our way and by Triton's: what was compiled for the arguments, with the same arguments, on the same grid.

Nothing is compiled or launched here: a stand-in for the driver and for what is compiled notes what they are told.
"""

from __future__ import annotations

import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from test_kernels import CUDA, needs_triton  # first: it chooses the interpreter
from test_sampler import random_masks

from megalite.inference.choice import PLAIN, Needs
from megalite.inference.device_sampler import DeviceSampler
from megalite.kernels.jit import NOT_ALIGNED, NOT_SPECIALIZED, cdiv, next_power_of_2, quick_launches, tl, triton


def _kernel(x, slots, weight, num_rows, stride, eps, DIM: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr):
    pass


class Compiled:
    """What was compiled under a key; notes its launches."""

    packed_metadata, function = (4, 1, 0), 77

    def __init__(self, key):
        self.key = key
        self.launches = []

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, *args):
        grid, stream, function, metadata, (_, enter, leave), rest = args[:3], *args[3:6], args[6:9], args[9:]
        for hook in (enter, leave):
            if hook is not None:
                hook(None)
        self.launches.append((grid, stream, function, metadata, rest))


@pytest.fixture
def driver(monkeypatch):
    """Triton has a device."""
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 5,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.fixture
def make(driver):
    """Makes a kernel of a class whose compilations are noted in `.made`."""

    def make(base):
        class Noting(base):
            def _do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
                kernel = self.device_caches[device][0][key] = Compiled(key)
                self.made.append(kernel)
                return kernel

        kernel = Noting(_kernel, do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED)
        kernel.made = []
        return kernel

    return make


@needs_triton
def test_a_launch_is_the_one_that_triton_would_make(make):
    theirs, ours = make(triton.runtime.JITFunction), make(quick_launches())
    r, memory = random.Random(0), torch.zeros(64)
    tensors = [memory, memory[1:], memory[4:], memory.bfloat16(), memory.to(torch.int64)]
    for _ in range(300):
        x, slots, weight = (r.choice(tensors) for _ in range(3))
        numbers = r.choice([1, 3, 16, 17, 2**40]), r.choice([0, 1, 7, 128, 2**33, 2**33 + 1]), r.choice([1e-6, 1.0])
        options = {"DIM": r.choice([64, 80]), "ACTIVATION": r.choice(["silu", "gelu"]), "PDL": r.choice([True, False])}
        options |= {"num_warps": r.choice([4, 8])} | r.choice([{}, {"launch_pdl": True}])
        grid = tuple(r.randint(1, 9) for _ in range(r.randint(1, 3)))
        found = [kernel[grid](x, slots, weight, *numbers, **options) for kernel in (theirs, ours)]
        assert found[0].key == found[1].key
        (one, *first, values), (other, *second, also) = (kernel.launches[-1] for kernel in found)
        assert (one, first) == (other, second)
        assert len(values) == len(also) and all(a is b or a == b for a, b in zip(values, also, strict=True))
    assert len(ours.made) == len(theirs.made) < 300


@needs_triton
def test_profilers_hear_of_launches(make):
    kernel, heard = make(quick_launches()), []
    x = torch.zeros(8)
    launch = lambda: kernel[(1,)](x, x, x, 1, 2, 0.5, DIM=8, ACTIVATION="", PDL=False)  # noqa: E731
    launch(), launch()
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(heard.append)
    try:
        launch()
    finally:
        hooks.remove(heard.append)
    launch()
    assert len(heard) == 1 and len(kernel.made) == 1 and len(kernel.made[0].launches) == 4


@needs_triton
@pytest.mark.skipif(CUDA, reason="the interpreter tells what is launched")
@pytest.mark.parametrize("at_temperature", [False, True])
def test_after_the_warm_up_no_request_has_anything_compiled(driver, monkeypatch, at_temperature):
    from triton.runtime.interpreter import InterpretedFunction

    compiled = set()

    @cache
    def binder(function):
        places = {"do_not_specialize": NOT_SPECIALIZED, "do_not_specialize_on_alignment": NOT_ALIGNED}
        return triton.runtime.JITFunction(function, **places).device_caches[0][4]

    def note(self, *args, grid, warmup, **options):
        _, found, rest = binder(self.fn)(*args, **options)
        compiled.add((self.fn.__name__, *found, *rest.items()))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # ids that no kernel has written
    most, vocab = 16, 150
    tokens = torch.zeros((most + 1, 48), dtype=torch.int32)
    sampler = DeviceSampler(tokens, vocab, torch.from_numpy, at_temperature)

    def sample(count, needs=PLAIN, masks=None):
        rows, logits = torch.arange(count), torch.zeros((count, vocab), dtype=torch.bfloat16)
        sampler.sample(logits, rows, torch.full_like(rows, 7), needs, masks)

    with torch.inference_mode():
        sample(1)  # as every step does
        sampler.warm_up(torch.bfloat16)
        known = len(compiled)
        assert known > 15
        for count in (3, most):
            masks = random_masks([0, 2], vocab, torch.Generator())
            for needs in (Needs(True), Needs(longest=16), Needs(True, 40, (5,) * count), Needs(logprobs=(1,) * count)):
                sample(count, needs)
                sample(count, needs, masks)
    assert len(compiled) == known


@needs_triton
def test_numbers_for_grids():
    for x in range(1, 300):
        assert next_power_of_2(x) == triton.next_power_of_2(x)
        assert cdiv(x, 7) == triton.cdiv(x, 7)
