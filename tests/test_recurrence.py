"""Linear attention with a state per sequence: chunks, steps and rows against one token after the other in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.model import families
from megalite.model.kinds.base import CacheSpec
from megalite.model.kv_cache import HostCache
from megalite.model.linear_attention import Signals
from megalite.model.recurrence import Recurrence, Run
from megalite.weights.transfer import build, initialise

CPU = torch.device("cpu")
GROUPS, HEADS, KEYS, VALUES, TAPS, CHANNELS = 3, 2, 8, 12, 4, 5
ROWS = 6
CLOSE = {"rtol": 0, "atol": 2e-5}


@dataclass
class Sequence:
    """What a sequence's tokens bring, and what should come of them."""

    signals: Signals
    inputs: Tensor
    mixed: Tensor
    convolved: Tensor


TAP_WEIGHTS = torch.randn(CHANNELS, TAPS, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(CHANNELS, generator=torch.Generator().manual_seed(1))


def sequence(length: int, seed: int, *, delta: bool) -> Sequence:
    random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    k = torch.nn.functional.normalize(random(length, GROUPS, KEYS), dim=-1)
    heads = (length, GROUPS, HEADS)
    rate = random(*heads).sigmoid() if delta else None
    signals = Signals(random(length, GROUPS, KEYS), k, random(*heads, VALUES), -random(*heads).abs(), rate)
    inputs = random(length, CHANNELS)
    padded = torch.cat([torch.zeros(TAPS - 1, CHANNELS), inputs]).double()
    convolved = torch.stack([(padded[i : i + TAPS] * TAP_WEIGHTS.t()).sum(0) + BIAS for i in range(length)])
    return Sequence(signals, inputs, one_by_one(signals), convolved)


def one_by_one(x: Signals) -> Tensor:
    """The recurrence as it is defined, in float64."""
    x = x.each(Tensor.double)
    state, outputs = torch.zeros(GROUPS, HEADS, KEYS, VALUES, dtype=torch.float64), []
    for t in range(len(x.q)):
        state = state * x.decay[t].exp()[..., None, None]
        written = x.v[t]
        if x.rate is not None:
            written = x.rate[t][..., None] * (written - torch.einsum("gs,ghsp->ghp", x.k[t], state))
        state = state + torch.einsum("gs,ghp->ghsp", x.k[t], written)
        outputs.append(torch.einsum("gs,ghsp->ghp", x.q[t], state))
    return torch.stack(outputs)


def packed(parts: list[Signals]) -> Signals:
    rate = None if parts[0].rate is None else torch.cat([part.rate for part in parts])
    return Signals(*(torch.cat([getattr(p, name) for p in parts]) for name in ("q", "k", "v", "decay")), rate)


@pytest.mark.parametrize("delta", [True, False], ids=["gated delta rule", "state space duality"])
@pytest.mark.parametrize("lengths", [[1], [64], [70, 1, 130, 64, 3], [5, 5]], ids=str)
def test_whole_sequences_and_their_gradients(lengths, delta):
    made = [sequence(length, seed, delta=delta) for seed, length in enumerate(lengths)]
    offsets = [sum(lengths[:place]) for place in range(len(lengths))]
    recurrence = Recurrence.of_runs([Run(*run) for run in zip(offsets, lengths, strict=True)], CPU)
    signals = packed([one.signals for one in made]).each(lambda x: x.requires_grad_())
    mixed = recurrence.mix(0, signals)
    torch.testing.assert_close(mixed.double(), torch.cat([one.mixed for one in made]), **CLOSE)
    convolved = recurrence.convolve(0, torch.cat([one.inputs for one in made]), TAP_WEIGHTS, BIAS)
    torch.testing.assert_close(convolved.double(), torch.cat([one.convolved for one in made]), **CLOSE)

    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(5))
    names = ("q", "k", "v", "decay", *(("rate",) if delta else ()))
    found = torch.autograd.grad((mixed * weights).sum(), [getattr(signals, name) for name in names])
    plain = signals.each(lambda x: x.detach().double().requires_grad_())
    ends = [*offsets[1:], sum(lengths)]
    whole = torch.cat([one_by_one(plain.each(lambda x, a=a, b=b: x[a:b])) for a, b in zip(offsets, ends, strict=True)])
    wanted = torch.autograd.grad((whole * weights).sum(), [getattr(plain, name) for name in names])
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("delta", [True, False], ids=["gated delta rule", "state space duality"])
def test_states_go_from_step_to_step_in_their_rows(delta):
    """Prompts in chunks beside rows that decode, and a row that is another sequence's from one step to the next."""
    spec = CacheSpec.state(taps=TAPS, channels=CHANNELS, heads=GROUPS * HEADS, keys=KEYS, values=VALUES)
    cache = HostCache({3: spec}, 0, block_size=1, dtype=torch.float32, rows=ROWS)
    for states in cache.states[3]:
        states.fill_(torch.nan)  # what a row holds is nothing to a sequence that begins
    made = {name: sequence(length, ord(name), delta=delta) for name, length in (("a", 150), ("b", 12), ("c", 9))}
    done = dict.fromkeys(made, 0)
    steps = [
        [("a", 4, 70), ("b", 0, 5)],
        [("b", 0, 1), ("a", 4, 3)],
        [("b", 0, 1), ("a", 4, 1)],
        [("c", 0, 1), ("a", 4, 65)],
        [("a", 4, 1), ("c", 0, 7)],
        [("c", 0, 1)],
    ]
    for step in steps:
        offset, runs = 0, []
        for name, row, count in step:
            runs.append(Run(offset, count, done[name] == 0, row))
            offset += count
        places = [(name, slice(done[name], done[name] + count)) for name, _, count in step]
        recurrence = Recurrence.of_runs(runs, CPU, cache.states)
        if all(count == 1 for _, _, count in step):  # as in a captured graph, with a row of padding
            rows, positions = ([*numbers, last] for numbers, last in zip(*decoding(step, done), strict=True))
            recurrence = Recurrence.of_rows(torch.tensor(rows), torch.tensor(positions), cache.states)
            places.append(("a", slice(0, 1)))
        x = packed([made[name].signals.each(lambda x, at=at: x[at]) for name, at in places])
        mixed = recurrence.mix(3, x)[:offset]
        convolved = recurrence.convolve(3, torch.cat([made[n].inputs[at] for n, at in places]), TAP_WEIGHTS, BIAS)
        wanted = [(made[name].mixed[at], made[name].convolved[at]) for name, at in places[: len(step)]]
        torch.testing.assert_close(mixed.double(), torch.cat([one for one, _ in wanted]), **CLOSE)
        torch.testing.assert_close(convolved[:offset].double(), torch.cat([one for _, one in wanted]), **CLOSE)
        for name, _, count in step:
            done[name] += count
    assert all(state[1].isnan().all() for state in cache.states[3]), "a row that nobody had was written"


def decoding(step, done) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    """Row numbers and positions of rows that decode, each with that of padding."""
    return ([row for _, row, _ in step], [done[name] for name, _, _ in step]), (ROWS, 0)


def test_a_cache_has_a_row_more_than_sequences_and_gives_them_back():
    spec = CacheSpec(token=((2, 4), (2, 4)), sequence=((3, 5), (6, 8, 12)))
    cache = HostCache({0: spec, 1: CacheSpec(token=((2, 4),))}, 2, block_size=4, dtype=torch.bfloat16, rows=ROWS)
    assert [state.shape for state in cache.states[0]] == [(ROWS + 1, 3, 5), (ROWS + 1, 6, 8, 12)]
    assert cache.states.keys() == {0} and cache.states[0][0].dtype == torch.float32
    assert cache.nbytes == (ROWS + 1) * spec.sequence_bytes + 3 * 2 * 8 * 4 * 2
    cache.free()
    assert cache.nbytes == 0


def test_a_new_model_begins_with_states_that_last(tiny):
    for name, layer, norm in (("qwen3_next", "layers.0.attn.", "norm"), ("granitemoehybrid", "layers.2.attn.", "skip")):
        decoder = build(families.read(tiny(name)), ParallelState(Layout()), dtype=torch.float32, device=CPU)
        initialise(decoder, seed=0)
        new = dict(decoder.named_parameters())
        kept = torch.exp(-new[f"{layer}log_decay"].exp() * torch.nn.functional.softplus(new[f"{layer}time_shift"]))
        assert 0.85 < kept.min() < 0.87 and 0.98 < kept.max() < 1 and (new[layer + norm] == 1).all()
        assert 0.3 < new[f"{layer}taps"].std() < 0.7
