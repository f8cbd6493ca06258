"""Training of LoRA adapters beside frozen weights, in every layout, against PEFT in float32."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantized_models import write
from safetensors.torch import load_file
from train_helpers import as_run, build_from, layers_for

from megalite.config.schema import LoraSection, OptimizerSection
from megalite.core.dropout import Dropout
from megalite.core.layout import Layout
from megalite.core.linear import Coded, settle
from megalite.core.parallel_state import Axis, ParallelState
from megalite.errors import ConfigError
from megalite.model.attention import PackedAttention
from megalite.model.families import read
from megalite.train.export import export_model
from megalite.train.micro_batch import from_windows
from megalite.train.optimizer import learning_rate
from megalite.train.trainer import Trainer, check_trainable
from megalite.weights import lora_training
from megalite.weights.adapter_table import AdapterTable, table_of
from megalite.weights.lora import PREFIX
from megalite.weights.table import owned

STEPS = 3
SEED = 5
SEQUENCES = 4
LENGTH = 12
OPTIMIZER = OptimizerSection(
    learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=1, weight_decay=0.3, gradient_clipping=0.1
)
SETTINGS = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "some": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "o_proj"]},
    "latent": {"r": 4, "lora_alpha": 8, "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]},
    "delta": {"r": 4, "lora_alpha": 8, "target_modules": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"]},
    "uneven": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": {"k_proj": 2, "v_proj": 5}},
}


def token_ids(vocab: int) -> torch.Tensor:
    """[STEPS, SEQUENCES, LENGTH + 1]"""
    return torch.randint(vocab, (STEPS, SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(11))


@dataclass
class Plain:
    """What PEFT and PyTorch's AdamW make of an adapter in one process."""

    start: Path
    """The adapter before, as PEFT saves it."""
    steps: list[tuple[float, float]]
    """Loss and gradient norm."""
    gradients: dict[str, torch.Tensor]
    """Of the first step, by the names in an adapter's file; likewise the trained tensors."""
    end: dict[str, torch.Tensor]


class SameDropout(torch.nn.Module):
    """Drops of what one of PEFT's adapters reads what ours drops: the sequences of a step lie end to end there."""

    def __init__(self, dropout: Dropout, linear: str):
        super().__init__()
        self.dropout = dropout
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = self.dropout.channels(self.linear, torch.arange(x.shape[-1], dtype=torch.int32))
        return self.dropout(x.flatten(0, 1), channels).view_as(x)


def with_dropout(adapted, dropout: Dropout, table: AdapterTable) -> None:
    """Put it into PEFT's model."""
    linears = {module.name: linear for linear, held in table.starts(1, 0).items() for module, _ in held}
    for name, module in adapted.named_modules():
        if name.removeprefix(PREFIX) in linears:
            module.lora_dropout["default"] = SameDropout(dropout, linears[name.removeprefix(PREFIX)])


def train_with_peft(model: Path, folder: Path, settings: dict, rate: float = 0.0) -> Plain:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(7)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    trained = {name.replace(".default", ""): one for name, one in adapted.named_parameters() if one.requires_grad}
    with torch.no_grad():
        for one in trained.values():
            one.normal_(0, 0.1)
    adapted.save_pretrained(folder / "start")
    dropout = Dropout(rate, SEED)
    if rate:
        with_dropout(adapted, dropout, table_of(LoraSection(path=str(folder / "start")), read(model)))
    optimizer = torch.optim.AdamW(
        trained.values(), betas=tuple(OPTIMIZER.betas), eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
    )
    found = Plain(folder / "start", [], {}, {})
    for step, ids in enumerate(token_ids(base.config.vocab_size)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIMIZER, step, STEPS)
        keys = dropout.keys(ids[:, :-1].flatten().numpy(), [LENGTH] * SEQUENCES, step)
        with dropout.of(keys) if rate else nullcontext():
            logits = adapted(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found.gradients = {name: one.grad.clone() for name, one in trained.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER.gradient_clipping)
        optimizer.step()
        found.steps.append((loss.item(), norm.item()))
    found.end = {name: one.detach() for name, one in trained.items()}
    return found


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """`plain(folder, settings, rate)`: by PEFT, once for each."""
    known: dict[tuple[Path, str, float], Plain] = {}

    def find(model: Path, settings: str, rate: float = 0.0) -> Plain:
        if (model, settings, rate) not in known:
            folder = tmp_path_factory.mktemp("peft")
            known[model, settings, rate] = train_with_peft(model, folder, SETTINGS[settings], rate)
        return known[model, settings, rate]

    return find


@dataclass(frozen=True)
class Case:
    """One way to train."""

    model: str
    layout: Layout
    settings: str = "all"
    zero: int = 1
    accumulate: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    dropout: float = 0.0

    def trainer(self, folder: Path, start: Path) -> Trainer:
        """With the adapter of `start`, on this rank."""
        decoder = build_from(folder, ParallelState(self.layout, sequence_parallel=self.sequence_parallel))
        table = table_of(LoraSection(path=str(start)), decoder.config)
        lora_training.attach(decoder, table, Dropout(self.dropout, SEED) if self.dropout else None)
        lora_training.load(decoder, table, start)
        options = {"zero_stage": self.zero, "recompute": self.recompute, "router_aux_loss_coef": 0.0}
        return Trainer(decoder, OPTIMIZER, steps=STEPS, adapter=table, **options)


def train_in_layout(rank: int, folder: Path, start: Path, case: Case, out: Path):
    """Loss and gradient norm of each step; the weights that the optimizer knows; whether the others stayed."""
    with as_run(rank):
        trainer = case.trainer(folder, start)
        frozen = {name: one.clone() for name, one in trainer.decoder.named_parameters() if not one.requires_grad}
        steps, dp = [], trainer.state.dp
        for ids in token_ids(trainer.decoder.config.vocab_size):
            mine = ids.chunk(dp.size)[dp.rank]
            report = trainer.step([from_windows(part) for part in mine.chunk(case.accumulate)])
            steps.append((trainer.read(report)["loss"], trainer.gradient_norm))
        export_model(trainer.decoder, out, torch.float32, trainer.table)
        params = dict(trainer.decoder.named_parameters())
        assert all(torch.equal(params[name], one) and params[name].grad is None for name, one in frozen.items())
        held = sum(one.numel() for group in trainer.optimizer.param_groups for one in group["params"])
        return steps, held, sum(one.numel() for one in params.values() if one.requires_grad)


CASES = {
    "one rank, several ranks of adapters": Case("llama3", Layout(), "uneven", recompute=True),
    "tp2 sp": Case("llama3", Layout(tp=2), sequence_parallel=True),
    "tp3, two kv heads": Case("llama3", Layout(tp=3), "some"),
    "tp2 zero2, fused": Case("phi3", Layout(tp=2), zero=2, accumulate=2),
    "tp2 pp2 sp, fused and turned, tied": Case("gpt2", Layout(tp=2, pp=2), accumulate=2, sequence_parallel=True),
    "pp2 interleaved": Case("llama3", Layout(pp=2, interleave=2), "uneven", accumulate=2, recompute=True),
    "pp2 dp2 zero2 tied": Case("gemma2", Layout(pp=2, dp=2), zero=2, accumulate=2),
    "tp2 sp, experts that stay": Case("qwen3_moe", Layout(tp=2), "attention", sequence_parallel=True),
    "tp2, gated delta nets": Case("qwen3_next", Layout(tp=2), "delta"),
    "tp2 sp, latent attention": Case("deepseek_v3", Layout(tp=2), "latent", sequence_parallel=True),
    "dropout": Case("llama3", Layout(), "uneven", dropout=0.3, accumulate=2, recompute=True),
    "tp3 dropout": Case("llama3", Layout(tp=3), "uneven", dropout=0.3, sequence_parallel=True),
    "pp2 dp2 dropout": Case("llama3", Layout(pp=2, dp=2), "uneven", dropout=0.3, accumulate=2, recompute=True),
}


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_peft(name, plain, tiny, ranks, tmp_path):
    case = CASES[name]
    model = tiny(case.model, layers_for(case.model, case.layout))
    wanted = plain(model, case.settings, case.dropout)
    out = tmp_path / "adapter_model.safetensors"
    results = ranks(case.layout.size).run(train_in_layout, model, wanted.start, case, out)
    assert wanted.steps[0][1] > 2 * OPTIMIZER.gradient_clipping, "clipping is part of what is compared"
    for steps, _, _ in results:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(steps, wanted.steps, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=2e-5)
            assert norm == pytest.approx(wanted_norm, rel=2e-4)
    start, end = load_file(wanted.start / "adapter_model.safetensors"), load_file(out)
    assert end.keys() == wanted.end.keys()
    for key, values in end.items():
        moved = (wanted.end[key] - start[key]).norm()
        assert (values - wanted.end[key]).norm() < 5e-3 * moved, f"{key} went elsewhere"


def test_what_is_dropped_is_the_right_share_and_depends_on_all_that_it_should():
    dropout, ids = Dropout(0.25, seed=1), np.arange(400) % 50
    x, channels = torch.ones(400, 300), dropout.channels("a", torch.arange(300, dtype=torch.int32))

    def dropped(keys: torch.Tensor, channels: torch.Tensor = channels, by: Dropout = dropout) -> torch.Tensor:
        with by.of(keys):
            return by(x, channels) == 0

    keys = dropout.keys(ids, [400], step=3)
    found = dropped(keys)
    assert torch.equal(dropout(x, channels), x) and torch.equal(dropped(keys), found)
    with dropout.of(keys):
        assert dropout(x, channels).max() == pytest.approx(1 / 0.75)
    share, deviation = found.float(), (0.25 * 0.75) ** 0.5
    assert share.mean() == pytest.approx(0.25, abs=0.01)
    assert share.mean(0).std() * 400**0.5 == pytest.approx(deviation, rel=0.15)
    assert share.mean(1).std() * 300**0.5 == pytest.approx(deviation, rel=0.15)
    other = [
        dropped(dropout.keys(ids, [400], step=4)),
        dropped(dropout.keys(ids + 1, [400], step=3)),
        dropped(keys, dropout.channels("b", torch.arange(300, dtype=torch.int32))),
        dropped(Dropout(0.25, seed=2).keys(ids, [400], step=3)),
        found.roll(1, 0),
        found.roll(1, 1),
    ]
    for one in other:  # independent: alike where both or neither are dropped
        assert (one == found).float().mean() == pytest.approx(0.25**2 + 0.75**2, abs=0.01)
    parts = [dropout.keys(ids[:150], [150], 3), dropout.keys(ids[150:], [250], 3)]
    assert torch.equal(torch.cat(parts), dropout.keys(ids, [150, 250], 3)), "wherever a sequence is computed"


@pytest.mark.parametrize("model", ["llama3", "phi3"])
def test_gradients_are_those_of_peft(model, plain, tiny):
    folder = tiny(model, 2)
    wanted = plain(folder, "all")
    decoder = build_from(folder, ParallelState(Layout()))
    table = table_of(LoraSection(path=str(wanted.start)), decoder.config)
    lora_training.attach(decoder, table)
    lora_training.load(decoder, table, wanted.start)
    ids = token_ids(decoder.config.vocab_size)[0]
    logits = decoder.logits(decoder(ids[:, :-1].flatten(), PackedAttention([LENGTH] * SEQUENCES)))
    F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    params, seen = lora_training.parameters(decoder), set()
    assert {name for name, one in decoder.named_parameters() if one.grad is not None} == params.keys()
    for one in owned(table, Layout(), 0):
        found = params[one.piece.param].grad.narrow(one.dim, one.start, one.count)
        expected = wanted.gradients[one.piece.hf].narrow(one.piece.hf_dim, one.lo, one.count)
        assert (found - expected).norm() < 1e-4 * expected.norm(), one
        seen.add(one.piece.hf)
    assert seen == wanted.gradients.keys()


# ---- beside quantized weights ----------------------------------------------------------------------------------------


def train_beside(rank: int, folders: list[Path]):
    """Losses of new adapters beside each of the models, in steps over the same text."""
    found = []
    with as_run(rank):
        for folder in folders:
            layout = Layout(tp=2)
            decoder = build_from(folder, ParallelState(layout))
            settle(decoder)
            table = table_of(LoraSection(r=4), decoder.config)
            lora_training.attach(decoder, table)
            lora_training.initialise(lora_training.parameters(decoder), table, layout, rank, seed=3)
            trainer = Trainer(decoder, OPTIMIZER, steps=STEPS, adapter=table)
            text = from_windows(token_ids(decoder.config.vocab_size)[0])
            steps = [trainer.step([text]) for _ in range(STEPS)]
            found.append([trainer.read(step)["loss"] for step in steps])
    return found


def test_adapters_beside_codes_are_those_beside_the_numbers_that_they_stand_for(ranks, tmp_path):
    write("packed_4_zeros", tmp_path / "codes", tmp_path / "numbers")
    for losses, wanted in ranks(2).run(train_beside, [tmp_path / "codes", tmp_path / "numbers"]):
        assert losses == pytest.approx(wanted, rel=1e-5) and losses[-1] < losses[0]  # codes are cut between groups


class Doubled(Coded):
    """Codes whose numbers are twice as large, by operations of PyTorch in place of kernels."""

    def matrix(self, stored):
        return 2 * stored["codes"].float()

    def multiplied(self, x, stored, bias):
        return F.linear(x, self.matrix(stored), bias)


def test_a_product_of_codes_gives_the_gradient_of_its_input():
    codes = torch.randint(-8, 8, (6, 5), dtype=torch.int8)
    x = torch.randn(3, 5, requires_grad=True)
    Doubled("int8", torch.float32).product(x, {"codes": codes}).square().sum().backward()
    weight = 2 * codes.float()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.t()) @ weight)


def test_a_mixture_whose_experts_are_codes_is_refused(tmp_path):
    write("awq", tmp_path / "codes", tmp_path / "numbers", family="mixtral")
    with pytest.raises(ConfigError, match="whose experts give no gradient of their inputs"):
        table_of(LoraSection(r=4), read(tmp_path / "codes"))


def test_a_part_of_the_pipeline_without_adapters_is_refused(tiny):
    model = read(tiny("llama3"))
    table = table_of(LoraSection(r=4, target_modules=r".*layers\.0\..*"), model)
    state = SimpleNamespace(layout=Layout(pp=2), pp=Axis((0, 1), 0), tp=Axis((0,), 0))
    with pytest.raises(ConfigError, match="train.lora.target_modules: leave layers 2 to 3"):
        check_trainable(model, state, 1, table)
