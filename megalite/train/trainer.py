"""Training steps of a `Decoder` through DeepSpeed: tp x dp, ZeRO stages 1 to 3, float32 or bfloat16.

DeepSpeed averages gradients over dp, clips them and keeps optimizer state in float32 over dp. What it does not know
is tp: gradients that are partial on each tp rank are summed here, by hooks that run before DeepSpeed sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalite.config.schema import OptimizerSection
from megalite.core.collectives import all_reduce_sum
from megalite.core.layout import Even, Whole
from megalite.core.parallel_state import Axis, ParallelState
from megalite.errors import ConfigError, Problem
from megalite.model.attention import PackedAttention
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.train.batch import MicroBatch
from megalite.train.loss import NEXT_TOKEN, Loss, cross_entropy
from megalite.train.zero import begin_optimizer
from megalite.weights.mapping import pieces


class LanguageModel(nn.Module):
    """A micro batch of T tokens -> log-probability of each target, by the full distribution: float32 [T]."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.first_row, _ = Even(decoder.config.vocab_size).range(decoder.state.tp.size, decoder.state.tp.rank)
        self._context: tuple[tuple[int, ...], PackedAttention] | None = None

    def forward(self, batch: MicroBatch) -> Tensor:
        hidden = self.decoder(batch.ids, self._attention(batch))
        logits = self.decoder.logits(hidden)
        return -cross_entropy(logits, batch.targets, self.first_row, self.decoder.state.tp)

    def _attention(self, batch: MicroBatch) -> PackedAttention:
        """Made anew only when the lengths change: fixed windows share one."""
        if self._context is None or self._context[0] != batch.lengths:
            self._context = batch.lengths, PackedAttention(batch.lengths, batch.ids.device)
        return self._context[1]


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """Of step `step` (from 0) of `steps`: linear warm-up, then a cosine from the peak to the minimum."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    low, high = section.min_learning_rate, section.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows of a local parameter that other tp ranks hold too."""

    start: int
    """First row in the local parameter."""
    lo: int
    hi: int
    total: int
    """They are rows lo..hi of `total`."""
    holders: tuple[int, ...]
    """tp ranks that hold each of the rows lo..hi."""

    @property
    def end(self) -> int:
        return self.start + self.hi - self.lo


def shared_rows(config: ModelConfig, state: ParallelState) -> dict[str, list[SharedRows]]:
    """The replicated key and value rows by parameter; empty unless there are more tp ranks than KV heads."""
    shared: dict[str, list[SharedRows]] = {}
    tp = state.tp
    for piece in pieces(config):
        if isinstance(piece.split, Whole) or piece.stage not in state.layout.layers(
            state.pp.rank, config.layer_costs()
        ):
            continue
        holders = [0] * piece.split.total
        for rank in range(tp.size):
            lo, hi = piece.split.range(tp.size, rank)
            holders[lo:hi] = [count + 1 for count in holders[lo:hi]]
        if max(holders) > 1:
            assert piece.dim == 0, "replicated parts are rows"
            lo, hi = piece.split.range(tp.size, tp.rank)
            start = piece.local_start(tp.size, tp.rank)
            rows = SharedRows(start, lo, hi, piece.split.total, tuple(holders[lo:hi]))
            shared.setdefault(piece.param, []).append(rows)
    return shared


def complete_gradients(decoder: Decoder) -> dict[str, Tensor]:
    """Hook onto each parameter whose gradient is partial on this tp rank, so that it comes out whole.

    Rows that h tp ranks hold get the whole gradient divided by sqrt(h). DeepSpeed adds the square of every tp rank's
    slice to the global gradient norm: so h copies count as one. Adam does not see a constant factor on a row's gradient
    (but for eps), so the update is that of the whole gradient. Returns h of each row of the parameters that have such
    rows: float32 [rows]. Every tp rank runs the same backward graph, so the hooks' collectives meet in the same order.
    """
    tp = decoder.state.tp
    if tp.size == 1:
        return {}
    shared = shared_rows(decoder.config, decoder.state)
    holders: dict[str, Tensor] = {}
    for name, param in decoder.named_parameters():
        if param.sum_gradient_over_tp:
            param.register_hook(lambda grad: all_reduce_sum(grad.contiguous().clone(), tp))
        if name in shared:
            holders[name] = torch.ones(param.shape[0], device=param.device)
            for rows in shared[name]:
                holders[name][rows.start : rows.end] = torch.tensor(rows.holders, device=param.device)
            param.register_hook(_sum_shared_rows(shared[name], holders[name].rsqrt(), tp))
    return holders


def _sum_shared_rows(shared: list[SharedRows], scale: Tensor, tp: Axis) -> Callable[[Tensor], Tensor]:
    """Sums rows over their holders, and multiplies every row by its scale [rows]."""

    def hook(grad: Tensor) -> Tensor:
        buffers = [grad.new_zeros(rows.total, *grad.shape[1:]) for rows in shared]
        for rows, buffer in zip(shared, buffers, strict=True):
            buffer[rows.lo : rows.hi] = grad[rows.start : rows.end]
        summed = all_reduce_sum(torch.cat(buffers), tp).split([rows.total for rows in shared])
        grad = grad.clone()
        for rows, total in zip(shared, summed, strict=True):
            grad[rows.start : rows.end] = total[rows.lo : rows.hi]
        return grad * scale.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1))

    return hook


def make_optimizer(decoder: Decoder, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; PyTorch's own, so that DeepSpeed has nothing to compile."""
    params = list(decoder.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = params[0].is_cuda or None
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=tuple(section.betas),
        eps=section.eps,
        fused=fused,
    )


def deepspeed_config(
    optimizer: OptimizerSection, *, zero_stage: int, dtype: torch.dtype, more: Mapping[str, Any]
) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, and `more` from the `deepspeed` section (the config's rules keep them apart)."""
    return {
        **more,
        "steps_per_print": 1 << 40,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step has as many backward passes as it is given micro batches
        "gradient_clipping": optimizer.gradient_clipping,
        "zero_optimization": {**more.get("zero_optimization", {}), "stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def check_trainable(model: ModelConfig, state: ParallelState) -> None:
    """ConfigError for a layout this model can't be trained in."""
    problems = []
    if state.pp.size > 1:
        problems.append(Problem(key="parallel.pp", rule="must be 1: training is not pipelined", value=state.pp.size))
    if state.tp.size > model.num_heads:
        rule = f"must be at most the model's {model.num_heads} attention heads in training"
        problems.append(Problem(key="parallel.tp", rule=rule, value=state.tp.size))
    experts = min((moe.num_experts for moe in model.moe if moe is not None), default=state.tp.size)
    if state.tp.size > experts:
        rule = f"must be at most the model's {experts} experts in training"
        problems.append(Problem(key="parallel.tp", rule=rule, value=state.tp.size))
    if problems:
        raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Sums over the tokens of one step on this replica. They stay on the device: reading them waits for the step."""

    sums: Tensor
    """float64 [1 + metrics]: of the loss and of each metric, times the weights."""
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
        deepspeed_keys: Mapping[str, Any] | None = None,
    ):
        """`steps`: over which the learning rate falls. `deepspeed_keys`: further keys for DeepSpeed's config."""
        import deepspeed  # 0.5 s, and only training needs it

        self.decoder = decoder
        self.state = decoder.state
        self.section = optimizer
        self.steps = steps
        self.zero_stage = zero_stage
        weight = next(decoder.parameters())
        self.device = weight.device
        check_trainable(decoder.config, self.state)
        self.holders = complete_gradients(decoder)
        """Of each row of the parameters that have rows on several tp ranks: how many hold it."""
        self.optimizer = make_optimizer(decoder, optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=LanguageModel(decoder),
            optimizer=self.optimizer,
            config=deepspeed_config(optimizer, zero_stage=zero_stage, dtype=weight.dtype, more=deepspeed_keys or {}),
            mpu=self.state.as_mpu(),
            dist_init_required=False,
        )
        begin_optimizer(self.optimizer, self.engine.optimizer, zero_stage)
        self.steps_done = 0

    def step(self, batches: Sequence[MicroBatch], loss: Loss = NEXT_TOKEN) -> StepReport:
        """One optimizer step over this replica's micro batches; every replica has as many.

        What is minimised is the mean of `loss` over the tokens of all replicas, weighted by `batch.weights`.
        """
        rate = learning_rate(self.section, self.steps_done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        weight = self._total_weight(batches)
        scale = self.state.dp.size / max(weight, 1e-9)  # DeepSpeed takes the mean over the replicas
        sums = torch.zeros(1 + len(loss.metric_names), dtype=torch.float64, device=self.device)
        for batch in map(self._prepared, batches):
            found = loss(self.engine(batch), batch)
            weighted = (found.loss * batch.weights).sum()
            parts = [weighted.detach(), *((found.metrics[name] * batch.weights).sum() for name in loss.metric_names)]
            sums += torch.stack(parts).double()
            self.engine.backward(weighted * scale)
        self.engine.step()
        self.steps_done += 1
        return StepReport(sums=sums, weight=weight, names=("loss", *loss.metric_names))

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probability of each target of this replica's micro batches, on every rank of it: float32 [T] each."""
        self.engine.eval()
        try:
            return [self.engine(self._prepared(batch))[: batch.num_tokens] for batch in batches]
        finally:
            self.engine.train()

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """Mean loss per token, weighted, over the batches of all replicas; every replica has as many."""
        self.engine.eval()
        try:
            return mean_loss(self.engine, map(self._prepared, batches), self.state.dp, self.device)
        finally:
            self.engine.train()

    def read(self, report: StepReport) -> dict[str, float]:
        """Means over all replicas: `loss` and the loss's metrics."""
        sums = all_reduce_sum(report.sums.clone(), self.state.dp)
        return dict(zip(report.names, (sums / max(report.weight, 1e-9)).tolist(), strict=True))

    @property
    def gradient_norm(self) -> float:
        """The true global norm before clipping, of the last step."""
        return float(self.engine.get_global_grad_norm())

    def _total_weight(self, batches: Sequence[MicroBatch]) -> float:
        own = torch.stack([batch.weights.double().sum() for batch in batches]).sum()
        return float(all_reduce_sum(own, self.state.dp))

    def _prepared(self, batch: MicroBatch) -> MicroBatch:
        multiple = self.state.tp.size if self.state.sequence_parallel else 1
        return batch.padded(multiple).to(self.device)


@torch.no_grad()
def mean_loss(
    model: Callable[[MicroBatch], Tensor], batches: Iterable[MicroBatch], dp: Axis, device: torch.device
) -> float:
    """Mean negative log-likelihood, weighted, over all replicas' batches."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        sums += torch.stack([-(model(batch) * batch.weights).double().sum(), batch.weights.double().sum()])
    total, weight = all_reduce_sum(sums, dp).tolist()
    return total / weight
