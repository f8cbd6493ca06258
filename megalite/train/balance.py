"""The load-balancing loss of a mixture of experts, in any layout (Switch Transformer, arXiv 2101.03961, equations 4-6).

For a micro batch it is E * sum over experts e of f_e * P_e: f_e is the share of assignments to e, P_e its mean
probability, both over all tokens and all layers with experts, as transformers computes it. f has no gradient; but that
of P in one layer is f of all layers, and these may be on several stages. So the counts that make f travel with the
micro batch: added up stage by stage on the way forward, whole on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megalite.model.decoder import Decoder
from megalite.model.kinds.experts import Experts
from megalite.model.layers.experts import MixtureOfExperts, Routing
from megalite.train.micro_batch import MicroBatch


class LoadBalance:
    """The load-balancing loss on one stage. It does nothing without experts, or with a coefficient of 0."""

    def __init__(self, decoder: Decoder, coefficient: float):
        specs = decoder.config.of(Experts)
        self.num_experts = specs[0].num_experts if specs and coefficient > 0 else 0
        self.num_layers = len(specs)
        self.coefficient = coefficient
        self.tp = decoder.state.tp.size
        self.routing = Routing()
        weight = decoder.some_weight
        self.nothing = torch.zeros(self.num_experts, device=weight.device)
        if self.num_experts:
            for module in decoder.modules():
                if isinstance(module, MixtureOfExperts):
                    module.routing = self.routing
        self.numbers = self.num_experts * self.nothing.itemsize // weight.itemsize
        """Numbers of the model's dtype that hold the counts in a message."""
        self.extra_rows = -(-self.numbers // decoder.config.hidden_size)
        """Rows of a message that hold those numbers."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("load_balance",) if self.num_experts else ()

    @contextmanager
    def observing(self, batch: MicroBatch) -> Iterator[Routing]:
        """Context in which a chunk is run on the batch; its result then says what the routers did."""
        self.routing.begin(batch.num_real)
        try:
            yield self.routing
        finally:
            self.routing.end()

    def pack(self, message: Tensor, counts: Tensor) -> Tensor:
        """[rows, hidden] with the counts of assignments, float32 [E], in further rows, bit for bit."""
        if not self.num_experts:
            return message
        rows = message.new_zeros(self.extra_rows, message.shape[1])
        rows.view(-1)[: self.numbers] = counts.view(message.dtype)
        return torch.cat([message, rows])

    def unpack(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`."""
        if not self.num_experts:
            return message, self.nothing
        hidden, rows = message[: -self.extra_rows], message[-self.extra_rows :].clone()
        return hidden.clone(), rows.view(-1)[: self.numbers].view(torch.float32)

    def loss(self, batch: MicroBatch, counts: Tensor, probabilities: Tensor) -> Tensor:
        """This chunk's part of the loss of a micro batch.

        `counts`: of assignments in all layers; `probabilities`: summed over tokens and this chunk's layers; [E] each.
        """
        rows = max(1, batch.num_real * self.num_layers)
        return self.num_experts * (counts / rows * (probabilities / rows)).sum()

    def weigh(self, share: float) -> float:
        """What a part of the loss is multiplied by where a micro batch has this share of the step's tokens.

        Every tp rank adds it, and what they give their routers and inputs is summed over tp.
        """
        return self.coefficient * share / self.tp
