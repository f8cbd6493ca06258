"""Training steps of a `Decoder` through DeepSpeed: tp x dp, ZeRO stages 1 to 3, float32 or bfloat16.

DeepSpeed averages gradients over dp, clips them and keeps optimizer state in float32 over dp. What it does not know
is tp: gradients that are partial on each tp rank are summed here, by hooks that run before DeepSpeed sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalite.config.schema import OptimizerSection, TrainConfig
from megalite.core.collectives import all_reduce_sum
from megalite.core.layout import Even, Whole
from megalite.core.parallel_state import Axis, ParallelState
from megalite.errors import ConfigError, Problem
from megalite.model.attention import PackedAttention
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.train.loss import cross_entropy
from megalite.train.zero import begin_optimizer
from megalite.weights.mapping import pieces


class LanguageModel(nn.Module):
    """Token ids [B, L + 1] -> negative log-likelihood of each sequence's last L tokens, float32 [B, L]."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.first_row, _ = Even(decoder.config.vocab_size).range(decoder.state.tp.size, decoder.state.tp.rank)
        self._contexts: dict[tuple[int, int, torch.device], PackedAttention] = {}

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape[0], ids.shape[1] - 1
        hidden = self.decoder(ids[:, :-1].flatten(), self._context(batch, length, ids.device))
        losses = cross_entropy(self.decoder.logits(hidden), ids[:, 1:].flatten(), self.first_row, self.decoder.state.tp)
        return losses.view(batch, length)

    def _context(self, batch: int, length: int, device: torch.device) -> PackedAttention:
        key = (batch, length, device)
        if key not in self._contexts:
            self._contexts[key] = PackedAttention([length] * batch, device)
        return self._contexts[key]


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


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, and what the `deepspeed` section adds (the config's rules keep them apart)."""
    return {
        **config.deepspeed,
        "steps_per_print": 1 << 40,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {**config.deepspeed.get("zero_optimization", {}), "stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
    }


def check_trainable(model: ModelConfig, state: ParallelState, tokens: int) -> None:
    """ConfigError for a layout this model can't be trained in. `tokens`: of one micro batch on one replica."""
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
    if state.sequence_parallel and tokens % state.tp.size:
        rule = f"needs the {tokens} tokens of a micro batch to divide by parallel.tp={state.tp.size}"
        fix = "Change data.sequence_length or train.micro_batch_size."
        problems.append(Problem(key="parallel.sequence_parallel", rule=rule, fix=fix))
    if problems:
        raise ConfigError(*problems)


class Trainer:
    """A decoder in a DeepSpeed engine. Every method is collective: all ranks call it alike."""

    def __init__(self, config: TrainConfig, decoder: Decoder):
        import deepspeed  # 0.5 s, and only training needs it

        self.config = config
        self.decoder = decoder
        self.state = decoder.state
        self.device = next(decoder.parameters()).device
        tokens = config.train.micro_batch_size * config.data.sequence_length
        check_trainable(decoder.config, self.state, tokens)
        self.holders = complete_gradients(decoder)
        """Of each row of the parameters that have rows on several tp ranks: how many hold it."""
        self.optimizer = make_optimizer(decoder, config.optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=LanguageModel(decoder),
            optimizer=self.optimizer,
            config=deepspeed_config(config),
            mpu=self.state.as_mpu(),
            dist_init_required=False,
        )
        begin_optimizer(self.optimizer, self.engine.optimizer, config.train.zero_stage)
        self.steps_done = 0

    @property
    def sequences_per_step(self) -> int:
        train = self.config.train
        return train.micro_batch_size * train.gradient_accumulation_steps * self.state.dp.size

    def step(self, batches: Iterable[Tensor]) -> Tensor:
        """One optimizer step over this replica's micro batches, int64 [B, L + 1] each; their mean loss on this replica.

        The loss stays on the device: reading it waits for the step.
        """
        rate = learning_rate(self.config.optimizer, self.steps_done, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for ids in batches:
            loss = self.engine(ids).mean()
            losses.append(loss.detach())
            self.engine.backward(loss)
            self.engine.step()
        self.steps_done += 1
        return torch.stack(losses).mean()

    @property
    def gradient_norm(self) -> float:
        """The true global norm before clipping, of the last step."""
        return float(self.engine.get_global_grad_norm())

    def mean_over_dp(self, value: Tensor) -> float:
        """Mean of a scalar over the replicas."""
        return float(all_reduce_sum(value.detach().clone(), self.state.dp)) / self.state.dp.size

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Mean loss per token over the replicas' batches of (ids [B, L + 1], whether each sequence counts [B])."""
        self.engine.eval()
        model = self.engine
        try:
            return mean_loss(model, batches, self.state.dp, self.device)
        finally:
            self.engine.train()


@torch.no_grad()
def mean_loss(
    model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], dp: Axis, device: torch.device
) -> float:
    """Mean of `model`'s losses over all replicas' batches of (ids [B, L + 1], whether each sequence counts [B])."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for ids, counts in batches:
        losses = model(ids).double() * counts[:, None]
        sums += torch.stack([losses.sum(), counts.sum() * losses.shape[1]])
    total, tokens = all_reduce_sum(sums, dp).tolist()
    return total / tokens
