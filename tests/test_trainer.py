"""What a trainer gives besides steps in layouts with stages: log-probabilities, sums of gradients and room."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_helpers import CPU, as_run, build_from, logits_of

from megalite.config.schema import OptimizerSection
from megalite.core.layout import Layout
from megalite.core.parallel_state import Axis, ParallelState
from megalite.errors import ConfigError
from megalite.model import families
from megalite.train import zero
from megalite.train.loss import TokenLoss
from megalite.train.micro_batch import from_sequences, from_windows
from megalite.train.model import LanguageModel, Scorer
from megalite.train.trainer import Trainer, check_trainable
from megalite.train.zero import MOMENTS, WEIGHT, get_whole
from megalite.weights.transfer import build, initialise

OPTIMIZER = OptimizerSection(learning_rate=1e-2, min_learning_rate=1e-2, warmup_steps=0)
LENGTHS = (9, 14, 5, 11, 3)


def sequences(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def batches_of(rows: list[list[int]]):
    """The first two sequences in one micro batch, the others in one each; `position` is a value of each token."""
    groups = [rows[:2], *([row] for row in rows[2:])]
    weights = [[[1.0] * (len(row) - 1) for row in group] for group in groups]
    positions = [{"position": [list(map(float, range(len(row) - 1))) for row in group]} for group in groups]
    return list(map(from_sequences, groups, weights, positions))


def make_trainer(decoder, **options) -> Trainer:
    return Trainer(decoder, OPTIMIZER, steps=4, **options)


def new_decoder(folder: Path, layout: Layout, dtype: torch.dtype):
    decoder = build(families.read(folder), ParallelState(layout), dtype=dtype, device=CPU)
    initialise(decoder, seed=3)
    return decoder


# ---- forward passes --------------------------------------------------------------------------------------------------


def score(rank: int, folder: Path, layout: Layout, sequence_parallel: bool, zero_stage: int):
    """Of trainer and scorer: log-probabilities of all sequences, and the mean loss."""
    with as_run(rank):
        state = ParallelState(layout, sequence_parallel=sequence_parallel)
        scorer = Scorer(build_from(folder, state))
        trainer = make_trainer(build_from(folder, state), zero_stage=zero_stage)
        batches = batches_of(sequences(trainer.decoder.config.vocab_size))
        return [
            (torch.cat(logprobs(batches)), mean_loss(iter(batches)))
            for logprobs, mean_loss in ((trainer.logprobs, trainer.evaluate), (scorer.logprobs, scorer.mean_loss))
        ]


@pytest.mark.parametrize(
    ("layout", "sequence_parallel", "zero_stage"),
    [
        (Layout(pp=2, interleave=2), False, 1),
        (Layout(pp=3), False, 1),
        (Layout(tp=2, pp=2), True, 2),
        (Layout(tp=2, dp=2), True, 3),
    ],
    ids=str,
)
def test_every_rank_knows_the_log_probabilities(layout, sequence_parallel, zero_stage, tiny, ranks):
    """Of micro batches of any length, which sequence parallel has to pad."""
    folder = tiny("qwen3", max(2, layout.pp * layout.interleave))
    results = ranks(layout.size).run(score, folder, layout, sequence_parallel, zero_stage)
    decoder = build_from(folder, ParallelState(Layout()))
    wanted = torch.cat(
        [
            logits_of(decoder, torch.tensor(row[:-1])).log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            for row in sequences(decoder.config.vocab_size)
        ]
    )
    for found in results:
        for logprobs, loss in found:
            torch.testing.assert_close(logprobs, wanted, atol=1e-5, rtol=0)
            assert loss == pytest.approx(-float(wanted.mean()), rel=1e-5)


# ---- steps -----------------------------------------------------------------------------------------------------------


class HalfWeighted:
    """A loss with a metric."""

    metric_names = ("position",)

    def __call__(self, logprobs, batch):
        return TokenLoss(loss=-logprobs / 2, metrics={"position": batch.values["position"]})


def two_steps(rank: int, folder: Path):
    """What is read of a step, the loss around it, and how often a block is run in it; the same with recomputation."""
    with as_run(rank):
        found = []
        for recompute in (False, True):
            trainer = make_trainer(build_from(folder, ParallelState(Layout(pp=2))), recompute=recompute)
            batches = batches_of(sequences(trainer.decoder.config.vocab_size))
            before, calls = trainer.evaluate(batches), []
            next(iter(trainer.decoder.layers.values())).attn.qkv.register_forward_pre_hook(
                lambda *_, c=calls: c.append(1)
            )
            read = trainer.read(trainer.step(batches, HalfWeighted()))
            found.append((before, read, len(calls), trainer.evaluate(batches)))
        return found


def test_every_rank_reads_the_loss_and_its_metrics_and_recomputes_blocks_where_asked(tiny, ranks):
    counts = [length - 1 for length in LENGTHS]
    for results in ranks(2).run(two_steps, tiny("llama_tied", 2)):
        for (before, read, calls, after), passes in zip(results, (1, 2), strict=True):
            assert read["loss"] == pytest.approx(before / 2, rel=1e-5)
            assert read["position"] == pytest.approx(sum(n * (n - 1) / 2 for n in counts) / sum(counts))
            assert after < before
            assert calls == passes * 4, "for each micro batch"


def shortened_steps(rank: int, folder: Path, layout: Layout, shortened: bool):
    """Norms of the gradients of three steps of two micro batches; float32 weights and moments after the first, last."""
    with as_run(rank), pytest.MonkeyPatch.context() as patches:
        if not shortened:
            patches.setattr(zero, "shorten_steps", lambda *_: None)
        trainer = make_trainer(new_decoder(folder, layout, torch.bfloat16))
        norms, states = [], []
        for step in range(3):
            generator = torch.Generator().manual_seed(7 * trainer.state.dp.rank + step)
            windows = torch.randint(trainer.decoder.config.vocab_size, (4, 9), generator=generator)
            trainer.step([from_windows(part) for part in windows.split(2)])
            norms.append(trainer.gradient_norm)
            assert trainer.engine.optimizer.averaged_gradients[0] is None
            params = trainer.decoder.named_parameters()
            states.append(
                {(name, kind): get_whole(p, kind).clone() for name, p in params for kind in (WEIGHT, *MOMENTS)}
            )
        return norms, states[0], states[-1]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("qwen3", Layout()),
        ("qwen3_moe", Layout()),
        ("qwen3", Layout(dp=2)),
        ("qwen3_moe", Layout(tp=2, dp=2)),
    ],
    ids=str,
)
def test_a_shorter_step_gives_what_that_of_deepspeed_gives(model, layout, tiny, ranks):
    """Partitions end within parameters; some experts get no token.

    The first step is the same but for the last digit; by it, weights are rounded to bfloat16 differently after that.
    """
    folder, run = tiny(model, 2), ranks(layout.size).run
    results = [run(shortened_steps, folder, layout, shortened) for shortened in (False, True)]
    for (norms, first, last), (short_norms, short_first, short_last) in zip(*results, strict=True):
        assert norms[0] > 1, "nothing was clipped"
        assert short_norms[0] == pytest.approx(norms[0], rel=1e-5)
        assert short_norms == pytest.approx(norms, rel=1e-2)
        for key, wanted in first.items():
            scale = wanted.abs().max().item()
            torch.testing.assert_close(short_first[key], wanted, rtol=1e-5, atol=1e-6 * scale)
            apart = (short_last[key] - last[key]).norm() / last[key].norm().clamp(min=1e-12)
            assert apart < (1e-3 if key[1] == WEIGHT else 2e-2), key


def bad_step(rank: int, folder: Path, zero_stage: int):
    """Norm of an infinite gradient, whether the step changed weights, and the norm of a good one after it."""
    with as_run(rank):
        trainer = make_trainer(new_decoder(folder, Layout(), torch.bfloat16), zero_stage=zero_stage)
        before = [param.detach().clone() for param in trainer.decoder.parameters()]
        batch = batches_of(sequences(trainer.decoder.config.vocab_size))[0]
        trainer.step([replace(batch, weights=batch.weights * torch.inf)])
        norm = trainer.gradient_norm
        same = all(torch.equal(*pair) for pair in zip(before, trainer.decoder.parameters(), strict=True))
        trainer.step([batch])
        return norm, same, trainer.gradient_norm


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_step_whose_gradient_is_not_finite_is_left_out(zero_stage, tiny, ranks):
    [(norm, same, good)] = ranks(1).run(bad_step, tiny("qwen3", 2), zero_stage)
    assert norm == float("inf") and same and 0 < good < float("inf")


def tied_copies(rank: int, folder: Path, layout: Layout, dtype: torch.dtype):
    """What this rank holds of the tied embedding after each step: its weight, the float32 one and the moments."""
    with as_run(rank):
        trainer = make_trainer(new_decoder(folder, layout, dtype))
        state, decoder = trainer.state, trainer.decoder
        weight = decoder.embed.tokens.weight if state.is_first_stage else decoder.head.weight
        held = []
        for step in range(3):
            generator = torch.Generator().manual_seed(7 * state.dp.rank + step)
            windows = torch.randint(decoder.config.vocab_size, (6, 9), generator=generator)
            trainer.step([from_windows(part) for part in windows.split(2)])
            held.append([weight.detach().clone(), *(get_whole(weight, kind) for kind in (WEIGHT, *MOMENTS))])
        return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [Layout(pp=2, dp=2), Layout(tp=2, pp=2)], ids=str)
def test_tied_copies_stay_the_same_to_the_bit(layout, dtype, tiny, ranks):
    results = ranks(layout.size).run(tied_copies, tiny("llama_tied", 2), layout, dtype)
    for replica in layout.replicas():
        for one, other in zip(replica[: layout.tp], replica[-layout.tp :], strict=True):
            for mine, theirs in zip(results[one], results[other], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(results[0][0][1], results[0][2][1]), "they are trained"


def bfloat16_steps(rank: int, folder: Path, layout: Layout, zero_stage: int) -> list[float]:
    """Loss of two steps, and the gradient norm of the second."""
    with as_run(rank):
        trainer = make_trainer(new_decoder(folder, layout, torch.bfloat16), zero_stage=zero_stage)
        vocab, dp = trainer.decoder.config.vocab_size, trainer.state.dp
        windows = torch.randint(vocab, (8, 17), generator=torch.Generator().manual_seed(1))
        batches = [from_windows(part) for part in windows.chunk(dp.size)[dp.rank].split(1)]
        return [*(trainer.read(trainer.step(batches))["loss"] for _ in range(2)), trainer.gradient_norm]


def test_stages_train_in_bfloat16_as_one_process_does(tiny, ranks):
    [wanted] = ranks(1).run(bfloat16_steps, tiny("qwen3"), Layout(), 1)
    for found in ranks(4).run(bfloat16_steps, tiny("qwen3"), Layout(pp=2, dp=2, interleave=2), 2):
        assert found[:2] == pytest.approx(wanted[:2], rel=2e-3)
        assert found[2] == pytest.approx(wanted[2], rel=5e-2)  # two ways to round give norms that differ by 3%


TINY, TINY_BATCHES = 2**-9, 32


def long_accumulation(rank: int, folder: Path, layout: Layout, zero_stage: int, gradient_dtype: str):
    """The gradient of one step by Adam's first moment, and the sum of the micro batches' gradients in float64.

    The first micro batch weighs 512 times as much as each of the others: one of them is lost beside it in bfloat16.
    """
    with as_run(rank):
        decoder = new_decoder(folder, layout, torch.bfloat16)
        windows = torch.randint(decoder.config.vocab_size, (2, 1, 9), generator=torch.Generator().manual_seed(1))
        large, small = (from_windows(window) for window in windows)
        small = replace(small, weights=small.weights * TINY)
        first = decoder.state.dp.is_first
        batches = [large] + [small] * TINY_BATCHES if first else [small] * (TINY_BATCHES + 1)
        wanted: dict[str, torch.Tensor] = {}
        everywhere = TINY_BATCHES + (layout.dp - 1) * (TINY_BATCHES + 1)
        weight = 8 * (1 + everywhere * TINY)
        for batch, times in ((large, 1), (small, everywhere)):
            logprobs = LanguageModel(decoder)(batch)
            (-(logprobs * batch.weights).sum() * layout.dp / weight).backward()
            for name, param in decoder.named_parameters():
                wanted[name] = wanted.get(name, 0) + param.grad.double() * times / layout.dp
                param.grad = None
        options = replace(OPTIMIZER, gradient_clipping=0, gradient_dtype=gradient_dtype)
        trainer = Trainer(decoder, options, steps=4, zero_stage=zero_stage)
        trainer.step(batches)
        params = dict(decoder.named_parameters())
        found = {name: get_whole(params[name], MOMENTS[0]).double() / (1 - OPTIMIZER.betas[0]) for name in params}
        norm = torch.stack([value.square().sum() for value in wanted.values()]).sum().sqrt()
        errors = torch.stack([(found[name] - wanted[name]).square().sum() for name in wanted]).sum().sqrt()
        return float(errors / norm), trainer.gradient_norm / float(norm)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_small_gradients_are_not_lost_beside_large_ones(zero_stage, tiny, ranks):
    for error, norm in ranks(2).run(long_accumulation, tiny("qwen3", 2), Layout(dp=2), zero_stage, "float32"):
        assert error < 2e-3 and norm == pytest.approx(1, abs=2e-3)


def test_gradients_in_bfloat16_are_there_for_who_asks(tiny, ranks):
    [(error, _)] = ranks(1).run(long_accumulation, tiny("qwen3", 2), Layout(), 1, "bfloat16")
    assert error > 0.02


# ---- memory ----------------------------------------------------------------------------------------------------------


def states_of(trainer: Trainer) -> dict[tuple[str, str], torch.Tensor]:
    params = dict(trainer.decoder.named_parameters())
    return {(name, kind): get_whole(params[name], kind).clone() for name in params for kind in (WEIGHT, *MOMENTS)}


def same_states(trainer: Trainer, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    found = states_of(trainer)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def give_room(rank: int, folder: Path, zero_stage: int) -> None:
    with as_run(rank):
        state = ParallelState(Layout(dp=2))
        one, other = (make_trainer(build_from(folder, state), zero_stage=zero_stage) for _ in range(2))
        params = dict(one.decoder.named_parameters())
        whole = {name: get_whole(param, WEIGHT) for name, param in params.items()}
        names = ["embed.tokens.weight", "layers.1.attn.qkv.weight", "norm.weight"]
        with one.gathered(names):
            assert all(torch.equal(params[name], whole[name]) for name in names)
        assert (params[names[1]].numel() == 0) == (zero_stage == 3)
        batches = batches_of(sequences(one.decoder.config.vocab_size))
        for trainer in (one, other):
            trainer.step(batches)
        kept = states_of(one)
        for _ in range(2):
            one.offload_optimizer()
            one.logprobs(batches)
            one.reload_optimizer()
        same_states(one, kept)
        losses = [trainer.read(trainer.step(batches))["loss"] for trainer in (one, other)]
        assert losses[0] == losses[1]
        same_states(one, states_of(other))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_parameters_are_whole_while_gathered_and_optimizer_state_comes_back_as_it_went(zero_stage, tiny, ranks):
    ranks(2).run(give_room, tiny("qwen3", 2), zero_stage)


def offloaded(rank: int, folder: Path, zero_stage: int) -> None:
    with as_run(rank):
        state, keys = ParallelState(Layout()), {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
        made = [
            make_trainer(build_from(folder, state), zero_stage=zero_stage, deepspeed_keys=one) for one in (None, keys)
        ]
        batches = batches_of(sequences(made[0].decoder.config.vocab_size))
        for _ in range(2):
            one, other = (trainer.read(trainer.step(batches))["loss"] for trainer in made)
            assert one == other
        with pytest.raises(
            ConfigError, match="deepspeed: DeepSpeed refuses it: .*nonsense.*Change the section deepspeed"
        ):
            make_trainer(made[0].decoder, zero_stage=1, deepspeed_keys={"zero_optimization": {"nonsense": 1}})


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_an_offloaded_optimizer_takes_the_same_steps_and_what_deepspeed_refuses_is_the_configs(zero_stage, tiny, ranks):
    ranks(1).run(offloaded, tiny("qwen3", 2), zero_stage)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "sizes", "zero_stage", "reason"),
    [
        ("qwen3", {}, 0, "0 has no gradient norm"),
        ("qwen3", {"pp": 2}, 3, "3 leaves norms and biases"),
        ("llama_tied", {"pp": 2}, 2, "2 cuts gradients over dp"),
        ("qwen3", {"tp": 64}, 1, "attention heads in training"),
        ("mixtral", {"tp": 8}, 1, "experts in training"),
    ],
)
def test_layouts_that_can_not_be_trained_in_are_refused(model, sizes, zero_stage, reason, tiny):
    state = ParallelState(Layout())
    for axis, size in sizes.items():
        setattr(state, axis, Axis(tuple(range(size)), 0))
    with pytest.raises(ConfigError, match=reason):
        check_trainable(families.read(tiny(model)), state, zero_stage)
