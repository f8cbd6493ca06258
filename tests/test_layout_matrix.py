"""Every family in every layout computes what transformers computes: the promise of the project in one table."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from reference import Generated
from tiny_models import VARIANTS, VOCAB

from megalite.core.collectives import gather_columns
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.core.pipeline import StageLink
from megalite.model import families
from megalite.model.attention import PackedAttention
from megalite.weights.transfer import build, load_folder

LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (3, 1, 1), (1, 3, 1)]
VARIANT_NAMES = [*VARIANTS, "gpt2_bare"]
TOLERANCE = 1e-4
MAX_TOKENS = 12

_random = random.Random(1)
PROMPTS = [[_random.randrange(3, VOCAB) for _ in range(length)] for length in (1, 7, 19, 40)]


def packed_logprobs(rank: int, folder: Path, layout: Layout, sequences: list[list[int]]):
    """Log-probabilities [T, vocab] of all sequences in one packed forward pass, on the control rank."""
    config = families.read(folder)
    state = ParallelState(layout)
    decoder = build(config, state, dtype=torch.float32, device=torch.device("cpu"))
    load_folder(decoder, folder)
    link = StageLink(state, hidden_size=config.hidden_size, dtype=torch.float32, device=torch.device("cpu"))
    x = torch.tensor(sum(sequences, []))
    with torch.inference_mode():
        if not state.is_first_stage:
            x = link.receive(x.shape[0])
        x = decoder(x, PackedAttention([len(ids) for ids in sequences]))
        if not state.is_last_stage:
            link.send(x)
            link.drain()
            return None
        logits = gather_columns(decoder.logits(x), decoder.vocab_widths, state.tp)
        return logits.log_softmax(-1) if state.is_control else None


def assert_same(expected: list[Generated], logprobs: torch.Tensor) -> None:
    for want, got in zip(expected, logprobs.split([len(g.ids) for g in expected]), strict=True):
        torch.testing.assert_close(got, want.logprobs, atol=TOLERANCE, rtol=0)
        assert got.argmax(-1)[len(want.prompt) - 1 : -1].tolist() == want.tokens


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_greedy_choices_of_the_reference_are_not_near_ties(name, reference):
    """Otherwise equal tokens would be luck."""
    generated = reference(name, PROMPTS, MAX_TOKENS)
    assert min(g.margin for g in generated) > 10 * TOLERANCE
    assert len({token for g in generated for token in g.tokens}) > 4


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}pp{}dp{}".format(*layout))
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_packed_forward_equals_transformers(name, layout, tiny, reference, ranks):
    layout = Layout(*layout)
    expected = reference(name, PROMPTS, MAX_TOKENS)
    results = ranks(layout.size).run(packed_logprobs, tiny(name), layout, [g.ids for g in expected])
    controls = [logprobs for logprobs in results if logprobs is not None]
    assert len(controls) == layout.dp
    for logprobs in controls:
        assert_same(expected, logprobs)
