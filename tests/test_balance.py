"""The load-balancing loss is that of transformers, and so are its gradients, in every layout."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from train_helpers import Case, as_run, build_from, in_parts

from megalite.config.schema import OptimizerSection
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.model import families
from megalite.model.kinds.experts import Experts
from megalite.model.layers.experts import MixtureOfExperts
from megalite.train.balance import LoadBalance
from megalite.train.micro_batch import MicroBatch, blank, from_sequences
from megalite.train.model import LanguageModel
from megalite.train.trainer import Trainer
from megalite.train.zero import MOMENTS, get_whole
from megalite.weights.transfer import build

OPTIMIZER = OptimizerSection(learning_rate=1e-3, min_learning_rate=1e-3, warmup_steps=0, gradient_clipping=0)
WEIGHT = 0.7
"""Of the balance: so much that it can't be overlooked."""
LENGTHS = ((9, 14), (5,), (11, 3, 8), (7, 7))
"""Of the sequences in each micro batch."""


def micro_batches(vocab: int) -> list[MicroBatch]:
    """Prompts count in the balance, and not in the loss."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for lengths in LENGTHS:
        rows = [torch.randint(vocab, (length + 1,), generator=generator).tolist() for length in lengths]
        made.append(from_sequences(rows, [[0.0] * 2 + [1.0] * (length - 2) for length in lengths]))
    return made


def plainly(folder: Path, monkeypatch) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, balance and gradients by one process without a trainer, the balance by transformers' function."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    decoder = build_from(folder, ParallelState(Layout()))
    spec = decoder.config.of(Experts)[0]
    logits: list[torch.Tensor] = []
    route = MixtureOfExperts.route

    def listening(layer, x):
        logits.append(F.linear(x, layer.router))
        return route(layer, x)

    monkeypatch.setattr(MixtureOfExperts, "route", listening)
    batches = micro_batches(decoder.config.vocab_size)
    loss, balance = torch.zeros(2).unbind()
    for batch in batches:
        logits.clear()
        loss = loss - (LanguageModel(decoder)(batch) * batch.weights).sum()
        found = load_balancing_loss_func(tuple(logits), spec.num_experts, spec.top_k)
        balance = balance + found * batch.num_tokens
    loss = loss / sum(float(batch.weights.sum()) for batch in batches)
    balance = balance / sum(batch.num_tokens for batch in batches)
    (loss + WEIGHT * balance).backward()
    gradients = {name: param.grad for name, param in decoder.named_parameters()}
    monkeypatch.undo()
    return float(loss.detach()), float(balance.detach()), gradients


def by_trainer(rank: int, folder: Path, case: Case):
    """What it reads, and the gradients of this rank by Adam's first moments."""
    with as_run(rank):
        trainer = case.trainer(folder, OPTIMIZER, steps=1, balance=WEIGHT)
        config, dp = trainer.decoder.config, trainer.state.dp
        batches = micro_batches(config.vocab_size)[dp.rank :: dp.size]
        found = trainer.read(trainer.step(batches + [blank(3)] * case.accumulate))
        moments = {name: get_whole(param, MOMENTS[0]) for name, param in trainer.decoder.named_parameters()}
        gradients = {name: moment / (1 - OPTIMIZER.betas[0]) for name, moment in moments.items()}
    return found, in_parts(config, case.layout, rank, gradients)


CASES = {
    "one rank": Case("mixtral", Layout()),
    "some layers dense, recomputed": Case("qwen3_moe_step", Layout(), recompute=True),
    "tp2": Case("mixtral", Layout(tp=2)),
    "tp2 sequence parallel": Case("qwen3_moe", Layout(tp=2), sequence_parallel=True, recompute=True),
    "pp2": Case("qwen3_moe", Layout(pp=2)),
    "pp4, stages without experts": Case("qwen3_moe", Layout(pp=4), recompute=True),
    "dp2, zero2": Case("mixtral", Layout(dp=2), zero=2),
    "dp2, zero3, blank micro batches": Case("qwen3_moe", Layout(dp=2), zero=3, accumulate=1),
    "tp2 pp2 interleaved, blank micro batches": Case(
        "mixtral", Layout(tp=2, pp=2, interleave=2), sequence_parallel=True, accumulate=2
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_balance_is_that_of_transformers(name, tiny, ranks, monkeypatch):
    case = CASES[name]
    folder = tiny(case.model, case.layers)
    loss, balance, gradients = plainly(folder, monkeypatch)
    whole = in_parts(families.read(folder), Layout(), 0, gradients)
    for found, parts in ranks(case.layout.size).run(by_trainer, folder, case):
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["load_balance"] == pytest.approx(balance, rel=1e-5)
        for (hf, piece, at), values in parts.items():
            torch.testing.assert_close(values, whole[hf, piece, 0][at : at + len(values)], rtol=1e-4, atol=1e-6)


def test_a_model_of_transformers_has_the_same_balance(tiny, ranks):
    """Its own forward pass, on sequences of one length."""
    from transformers import AutoModelForCausalLM

    folder = tiny("mixtral", 2)
    windows = torch.randint(families.read(folder).vocab_size, (3, 10), generator=torch.Generator().manual_seed(3))
    wanted = AutoModelForCausalLM.from_pretrained(folder)(windows[:, :-1], output_router_logits=True).aux_loss.detach()
    [found] = ranks(1).run(balance_of, folder, windows)
    assert found == pytest.approx(float(wanted), rel=1e-5)


def balance_of(rank: int, folder: Path, windows: torch.Tensor) -> float:
    with as_run(rank):
        trainer = Trainer(build_from(folder, ParallelState(Layout())), OPTIMIZER, steps=1)
        batch = from_sequences(windows.tolist(), [[1.0] * 9] * 3)
        return trainer.read(trainer.step([batch]))["load_balance"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_travel_bit_for_bit(dtype, tiny):
    """In the model's numbers, some of which are none."""
    decoder = build(families.read(tiny("mixtral")), ParallelState(Layout()), dtype=dtype, device=torch.device("cpu"))
    balance = LoadBalance(decoder, 0.1)
    hidden = torch.randn(3, decoder.config.hidden_size).to(dtype)
    counts = torch.tensor([0.0, 1.0, 257.0, 2.0**24 - 1, float("nan")])
    message = balance.pack(hidden, counts)
    assert len(message) == 3 + balance.extra_rows
    found, counted = balance.unpack(message)
    assert torch.equal(found, hidden) and torch.equal(counted.view(torch.int32), counts.view(torch.int32))


@pytest.mark.parametrize("value, wanted", [({}, 0.001), ({"router_aux_loss_coef": 0.02}, 0.02)])
def test_the_weight_is_the_models_own(value, wanted):
    moe = {"model_type": "mixtral", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    moe |= {"num_attention_heads": 2, "num_key_value_heads": 2, **value}
    assert families.from_values(Path("config.json"), moe).router_aux_loss_coef == wanted
