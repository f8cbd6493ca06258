"""Training steps of a `Decoder` through DeepSpeed: tp x pp x dp, ZeRO stages 1 to 3, float32 or bfloat16.

DeepSpeed averages gradients over dp, clips them and keeps optimizer state in float32 over dp. What it does not know
is done here: the stages' schedule, and gradients that are partial on each tp rank or end of the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalite.config.parallel_rules import zero_refusal
from megalite.config.schema import OptimizerSection
from megalite.core.adapters import dropout_of
from megalite.core.collectives import all_reduce_sum
from megalite.core.megatron import as_mpu
from megalite.core.parallel_state import ParallelState
from megalite.core.progress import here
from megalite.core.schedules import training
from megalite.errors import ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.model.kinds.experts import Experts
from megalite.train import zero
from megalite.train.balance import LoadBalance
from megalite.train.gradients import PartialGradients, TiedEmbedding
from megalite.train.loss import NEXT_TOKEN, Loss
from megalite.train.micro_batch import MicroBatch
from megalite.train.model import (
    AdaptersOnly,
    LanguageModel,
    Scorer,
    hidden_rows,
    make_pipeline,
    prepared,
    recompute_blocks,
)
from megalite.train.optimizer import deepspeed_config, learning_rate, make_optimizer
from megalite.weights.adapter_table import AdapterTable
from megalite.weights.table import Weights, pieces


def check_trainable(
    model: ModelConfig, state: ParallelState, zero_stage: int, adapter: AdapterTable | None = None
) -> None:
    """ConfigError for a layout this model, or `adapter` beside it, can't be trained in."""
    problems = []
    tied = model.tie_embeddings and adapter is None
    reason = zero_refusal(zero_stage, pp=state.pp.size, tied=tied, adapts=adapter is not None)
    if reason is not None:
        problems.append(Problem(key="train.zero_stage", rule=f"{zero_stage} {reason}"))
    experts = min((kind.num_experts for kind in model.of(Experts)), default=state.tp.size)
    for most, what in ((model.num_heads, "attention heads"), (experts, "experts")):
        if state.tp.size > most:
            rule = f"must be at most the model's {most} {what} in training"
            problems.append(Problem(key="parallel.tp", rule=rule, value=state.tp.size))
    if adapter is not None:
        costs, adapted = model.layer_costs(), {piece.stage for piece in pieces(adapter)}
        chunks = [chunk for stage in range(state.pp.size) for chunk in state.layout.chunks(stage, costs)]
        bare = next((chunk for chunk in chunks if adapted.isdisjoint(chunk)), None)
        if bare is not None:
            rule = f"leave layers {bare[0]} to {bare[-1]}, which are a part of the pipeline, without anything to train"
            problems.append(Problem(key="train.lora.target_modules", rule=rule, fix="Name more, or use fewer stages."))
    if problems:
        raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Sums over the tokens of one step on this replica. They stay on the device: reading them waits for the step."""

    sums: Tensor
    """float64 [1 + metrics]: of the loss and of each metric, times the weights; zeros on all stages but the last."""
    weight: float
    """Sum of the weights over all replicas."""
    names: tuple[str, ...]
    """`loss`, then the metrics."""


class Trainer:
    """A decoder in a DeepSpeed engine. Every method is collective: all ranks call it alike."""

    def __init__(
        self,
        decoder: Decoder,
        optimizer: OptimizerSection,
        *,
        steps: int,
        zero_stage: int = 1,
        recompute: bool = False,
        router_aux_loss_coef: float | None = None,
        deepspeed_keys: Mapping[str, Any] | None = None,
        adapter: AdapterTable | None = None,
    ):
        """`steps`: over which the learning rate falls. `recompute`: keep only the inputs of layers for the backward.

        `router_aux_loss_coef`: weight of the load-balancing loss; None: the model's. `deepspeed_keys`: further keys for
        DeepSpeed's config. `adapter`: of the adapters beside the decoder's linears, which train in place of its own
        weights (`lora_training.attach`). ConfigError if the model can't be trained in the decoder's layout.
        """
        import deepspeed  # 0.5 s, and only training needs it

        self.decoder = decoder
        self.table: Weights = adapter or decoder.config
        """Weight table of what trains."""
        self.state = decoder.state
        self.section = optimizer
        self.steps = steps
        self.steps_done = 0
        self.zero_stage = zero_stage
        weight = decoder.some_weight
        self.device = weight.device
        check_trainable(decoder.config, self.state, zero_stage, adapter)
        if recompute:
            recompute_blocks(decoder)
        self.dropout = dropout_of(decoder)
        self.tied = TiedEmbedding(decoder)
        coefficient = decoder.config.router_aux_loss_coef if router_aux_loss_coef is None else router_aux_loss_coef
        self.balance = LoadBalance(decoder, coefficient)
        self.partial = PartialGradients(decoder, self.table, once_a_step=zero_stage == 1)
        self.holders = self.partial.holders
        self.optimizer = make_optimizer(decoder, optimizer)
        keys = deepspeed_config(optimizer, zero_stage=zero_stage, dtype=weight.dtype, more=deepspeed_keys or {})
        model = LanguageModel(decoder)
        with zero.one_optimizer_for_stages_1_and_2(), zero.refusals_named(deepspeed_keys or {}):
            self.engine, *_ = deepspeed.initialize(
                model=model if adapter is None else AdaptersOnly(model),
                optimizer=self.optimizer,
                config=keys,
                mpu=as_mpu(self.state),
                dist_init_required=False,
            )
        zero.begin_optimizer(self.optimizer, self.engine.optimizer, zero_stage)
        zero.shorten_steps(self.engine.optimizer, zero_stage)
        self.pipeline = make_pipeline(decoder)
        self.scorer = Scorer(decoder, self.engine, self.pipeline)

    def step(self, batches: Sequence[MicroBatch], loss: Loss = NEXT_TOKEN) -> StepReport:
        """One optimizer step over this replica's micro batches; every replica has as many.

        Every micro batch goes forward and backward through the pipeline's stages (1F1B), gradients add up, DeepSpeed
        averages them over dp and clips them, and AdamW updates the weights at the learning rate of this step. What is
        minimised is the mean of `loss` over the tokens of all replicas, weighted by `batch.weights`, and with experts
        the load-balancing loss of the micro batches, weighted by their tokens. `read` gives the means.
        """
        here.step = ("training step", self.steps_done + 1)
        rate = learning_rate(self.section, self.steps_done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        work = _TrainingWork(self, batches, loss)
        layout = self.state.layout
        self.pipeline.run(training(layout.pp, self.state.pp.rank, len(batches), layout.interleave), work)
        self.pipeline.drain()
        with self.state.meter.phase("compute", "optimizer"):
            self.partial.complete(self._accumulated)
            self.tied.complete_gradient(self._accumulated)
            self.engine.step()
        self.steps_done += 1
        self.state.meter.step(learnt_tokens=sum(batch.num_tokens for batch in batches))
        return StepReport(sums=work.sums, weight=work.weight, names=work.names)

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probability of each target of this replica's micro batches, on every rank of it: float32 [T] each."""
        with self._evaluating():
            return self.scorer.logprobs(batches)

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """Mean loss per token in nats, weighted, over the batches of all replicas; every replica has as many."""
        with self._evaluating():
            return self.scorer.mean_loss(batches)

    def read(self, report: StepReport) -> dict[str, float]:
        """Means over all replicas: `loss` and the loss's metrics."""
        sums = all_reduce_sum(all_reduce_sum(report.sums.clone(), self.state.pp), self.state.dp)
        return dict(zip(report.names, (sums / max(report.weight, 1e-9)).tolist(), strict=True))

    def gathered(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Context in which the named parameters of the decoder are whole on this rank, for reading; see `Decoder`.

        ZeRO stage 3 keeps them cut over dp otherwise.
        """
        if self.zero_stage < 3:
            return nullcontext()
        import deepspeed

        params = [self.decoder.get_parameter(name) for name in names]
        gathering: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(params, modifier_rank=None)
        return gathering

    def offload_optimizer(self) -> None:
        """Move the optimizer's state to host memory, so that others get its place on the device, until it is reloaded.

        No other method may be called meanwhile, but `logprobs`, `evaluate` and `gathered`.
        """
        zero.offload(self.engine, self.optimizer, self.zero_stage)

    def reload_optimizer(self) -> None:
        """Undo `offload_optimizer`."""
        zero.reload(self.engine, self.optimizer, self.zero_stage)

    @property
    def gradient_norm(self) -> float:
        """The true global norm before clipping, of the last step."""
        return float(self.engine.get_global_grad_norm())

    def _accumulated(self, param: nn.Parameter) -> Tensor | None:
        return zero.accumulated_gradient(self.engine.optimizer, param)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.engine.eval()
        try:
            yield
        finally:
            self.engine.train()


class _TrainingWork:
    """A stage's forward and backward passes in one step; DeepSpeed keeps their gradients. See `StageWork`."""

    def __init__(self, trainer: Trainer, batches: Sequence[MicroBatch], loss: Loss):
        """Collective over the replicas: they sum up what the means of the step are over."""
        self.engine = trainer.engine
        self.decoder = trainer.decoder
        self.balance = trainer.balance
        self.loss = loss
        state = trainer.state
        weights = torch.stack([batch.weights.double().sum() for batch in batches]).sum()
        tokens = weights.new_tensor(sum(batch.num_real for batch in batches))
        weight, count = all_reduce_sum(torch.stack([weights, tokens]), state.dp).tolist()
        self.weight, self.tokens = max(weight, 1e-9), max(count, 1.0)
        self.batches = [prepared(batch, state, trainer.device) for batch in batches]
        self.dropout = trainer.dropout
        self.keys: list[Tensor] = []
        """Dropout keys of each micro batch's tokens, where adapters have dropout."""
        if self.dropout is not None:
            for batch, whole in zip(batches, self.batches, strict=True):
                keys = self.dropout.keys(batch.ids.numpy(), batch.lengths, trainer.steps_done)
                padding = keys.new_zeros(whole.num_tokens - batch.num_tokens)
                self.keys.append(torch.cat([keys, padding]).to(trainer.device, non_blocking=True))
        self.replicas = state.dp.size  # DeepSpeed takes the mean over them
        self.names = ("loss", *loss.metric_names, *self.balance.metric_names)
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=trainer.device)
        self.passes: dict[tuple[int, int], _Pass] = {}
        """By (micro batch, chunk): the passes between their forward and their backward."""

    def rows(self, micro_batch: int) -> int:
        return hidden_rows(self.batches[micro_batch], self.decoder.state) + self.balance.extra_rows

    def forward(self, micro_batch: int, chunk: int, received: Tensor | None) -> Tensor | None:
        batch, counts = self.batches[micro_batch], self.balance.nothing
        if received is not None:
            received, counts = self.balance.unpack(received)
            received.requires_grad_()
        with self.balance.observing(batch) as seen, self._dropping(micro_batch):
            output = self.engine(batch, received, chunk)
        counts = counts if seen.counts is None else counts + seen.counts
        if not self.decoder.is_end(chunk):
            self.passes[micro_batch, chunk] = _Pass(received, output, seen.probabilities, counts)
            return self.balance.pack(output.detach(), counts)
        found = self.loss(output, batch)
        weighted = (found.loss * batch.weights).sum()
        metrics = [(found.metrics[name] * batch.weights).sum() for name in self.loss.metric_names]
        values = torch.stack([weighted.detach(), *metrics])
        self.sums[: len(values)] += values.double()
        scaled = weighted * (self.replicas / self.weight)
        self.passes[micro_batch, chunk] = _Pass(received, scaled, seen.probabilities, counts)
        return None

    def backward(self, micro_batch: int, chunk: int, gradient: Tensor | None) -> Tensor | None:
        done = self.passes.pop((micro_batch, chunk))
        scalar, counts = done.output, done.counts
        if gradient is not None:
            gradient, counts = self.balance.unpack(gradient)
            with_gradient: Callable[..., Tensor] = _WithGradient.apply
            scalar = with_gradient(done.output, gradient)
        if done.probabilities is not None:
            batch = self.batches[micro_batch]
            part = self.balance.loss(batch, counts, done.probabilities)
            share = batch.num_real / self.tokens
            self.sums[-1] += part.detach().double() * share * self.weight
            scalar = scalar + part * (self.balance.weigh(share) * self.replicas)
        with self._dropping(micro_batch):  # what is recomputed drops the same again
            self.engine.backward(scalar)
        if done.received is None:
            return None
        assert done.received.grad is not None
        return self.balance.pack(done.received.grad, counts)

    def _dropping(self, micro_batch: int) -> AbstractContextManager[None]:
        """Context of a micro batch's passes: its tokens decide what adapters' dropout drops."""
        return nullcontext() if self.dropout is None else self.dropout.of(self.keys[micro_batch])


@dataclass(frozen=True, slots=True)
class _Pass:
    """A chunk's forward pass over a micro batch, kept for its backward pass."""

    received: Tensor | None
    """What the chunk was given."""
    output: Tensor
    """Hidden states, or after the last chunk the scaled loss."""
    probabilities: Tensor | None
    """Probabilities of this chunk's routers, see `Routing`; None: it has no routers."""
    counts: Tensor
    """Assignments to each expert in all layers up to this chunk's end: float32 [E]."""


class _WithGradient(torch.autograd.Function):
    """A scalar whose backward pass gives `output` exactly `gradient`: DeepSpeed sees every backward, and begins it.

    Its own factors on a loss are in the gradient already, from the last stage.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None
