"""A decoder as training sees it: micro batches in, log-probabilities out; and forward passes through all stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.core.adapters import learnt_formats
from megalite.core.collectives import all_reduce_sum, broadcast_from_last
from megalite.core.parallel_state import ParallelState
from megalite.core.pipeline import Pipeline
from megalite.core.schedules import forward_only
from megalite.model.attention import PackedAttention
from megalite.model.decoder import BlockCall, Decoder
from megalite.train.loss import target_logprobs
from megalite.train.micro_batch import MicroBatch

ChunkModel = Callable[[MicroBatch, Tensor | None, int], Tensor]
"""Called as `LanguageModel.forward`: a `LanguageModel`, or a DeepSpeed engine around one."""
CONTEXTS = 32
"""Attention contexts kept by their lengths: fixed windows share one, and the chunks of a micro batch do."""


class LanguageModel(nn.Module):
    """This stage's part of the way from a micro batch of T tokens to the log-probability of each target."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.first_row, _ = decoder.config.head_vocab.range(decoder.state.tp.size, decoder.state.tp.rank)
        self._attention = lru_cache(maxsize=CONTEXTS)(PackedAttention)

    def forward(self, batch: MicroBatch, received: Tensor | None = None, chunk: int = 0) -> Tensor:
        """Run a chunk of this stage's layers; `received`: hidden states of the chunk before, [T or T/tp, hidden].

        After the model's last chunk the log-probability of each target at the batch's temperature, by the distribution
        over the whole vocabulary: float32 [T]. Else hidden states.
        """
        context = self._attention(batch.lengths, batch.ids.device, beyond=batch.beyond)
        hidden: Tensor = self.decoder(batch.ids if received is None else received, context, chunk)
        if not self.decoder.is_end(chunk):
            return hidden
        assert self.decoder.head is not None
        logprobs: Tensor = self.decoder.head(self.decoder.normed(hidden), partial(self._logprobs, batch))
        return logprobs

    def _logprobs(self, batch: MicroBatch, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Takes the place of the head's product with its input: see `Product`."""
        if bias is not None:
            weight = torch.cat([weight, bias[:, None]], 1)
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
        return target_logprobs(
            hidden,
            weight,
            batch.targets,
            axis=self.decoder.state.tp,
            first_row=self.first_row,
            temperature=batch.temperature,
            softcap=self.decoder.config.final_softcap,
        )


def recompute_blocks(decoder: Decoder) -> None:
    """Keep only each block's input for the backward pass, which computes the rest again (arXiv 1604.06174)."""

    def recomputed(block: BlockCall) -> BlockCall:
        # What is dropped in a block follows from its tokens, so there is no state of random numbers to keep.
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)

    decoder.wrap_blocks(recomputed)


def prepared(batch: MicroBatch, state: ParallelState, device: torch.device) -> MicroBatch:
    """A batch on the device, padded to a length that sequence parallel can cut."""
    return batch.padded(state.tp.size if state.sequence_parallel else 1).to(device)


def hidden_rows(batch: MicroBatch, state: ParallelState) -> int:
    """Rows of a prepared batch's hidden states between stages."""
    return batch.num_tokens // (state.tp.size if state.sequence_parallel else 1)


class AdaptersOnly(nn.Module):
    """Adapters that train, as the parameters of a module that runs the whole model.

    So a DeepSpeed engine around it knows nothing of the frozen weights: it neither casts, cuts nor broadcasts them.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        updates = (one.update for one in learnt_formats(model).values())
        self.updates = nn.ModuleList(one for one in updates if one is not None)
        self._run = model.forward

    def forward(self, batch: MicroBatch, received: Tensor | None = None, chunk: int = 0) -> Tensor:
        return self._run(batch, received, chunk)


def make_pipeline(decoder: Decoder) -> Pipeline:
    """The connections of a decoder's stages; see `Pipeline`."""
    weight = decoder.some_weight
    return Pipeline(decoder.state, hidden_size=decoder.config.hidden_size, dtype=weight.dtype, device=weight.device)


class Scorer:
    """Forward passes alone, through all stages of a replica. Every rank of the replica calls every method alike."""

    def __init__(self, decoder: Decoder, model: ChunkModel | None = None, pipeline: Pipeline | None = None):
        """`model`: what runs a chunk and ends in log-probabilities, by default a `LanguageModel` of the decoder."""
        self.decoder = decoder
        self.state = decoder.state
        self.device = decoder.some_weight.device
        self.model = model or LanguageModel(decoder)
        self.pipeline = pipeline or make_pipeline(decoder)

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probability of each target, by the full distribution, on every rank: float32 [T] each."""
        counts = [batch.num_tokens for batch in batches]
        if not counts:
            return []
        whole = torch.empty(sum(counts), dtype=torch.float32, device=self.device)
        for (_, found), place in zip(self._outputs(batches), torch.split(whole, counts), strict=True):
            if found is not None:
                place.copy_(found[: len(place)])
        return list(torch.split(broadcast_from_last(whole, self.state.pp), counts))

    def mean_loss(self, batches: Iterable[MicroBatch]) -> float:
        """Mean negative log-likelihood, weighted, over the batches of all replicas; every replica has as many."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch, found in self._outputs(batches):
            if found is not None:
                sums += torch.stack([-(found * batch.weights).double().sum(), batch.weights.double().sum()])
        total, weight = all_reduce_sum(all_reduce_sum(sums, self.state.pp), self.state.dp).tolist()
        return float(total / weight)

    @torch.no_grad()
    def _outputs(self, batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor | None]]:
        """Each batch, prepared, and what the model gives after its last chunk; None on the other stages.

        Batches go through in rounds of as many as there are stages; a stage does not wait for the others between.
        """
        source, layout = iter(batches), self.state.layout
        while some := [prepared(batch, self.state, self.device) for batch in islice(source, layout.pp)]:
            work = _ForwardWork(self.decoder, self.model, some)
            self.pipeline.run(forward_only(layout.pp, self.state.pp.rank, len(some), layout.interleave), work)
            yield from zip(some, work.outputs, strict=True)
        self.pipeline.drain()


class _ForwardWork:
    """A stage's forward passes; see `StageWork`."""

    def __init__(self, decoder: Decoder, model: ChunkModel, batches: Sequence[MicroBatch]):
        self.decoder = decoder
        self.model = model
        self.batches = batches
        self.outputs: list[Tensor | None] = [None] * len(batches)

    def rows(self, micro_batch: int) -> int:
        return hidden_rows(self.batches[micro_batch], self.decoder.state)

    def forward(self, micro_batch: int, chunk: int, received: Tensor | None) -> Tensor | None:
        output = self.model(self.batches[micro_batch], received, chunk)
        if not self.decoder.is_end(chunk):
            return output
        self.outputs[micro_batch] = output
        return None

    def backward(self, micro_batch: int, chunk: int, gradient: Tensor | None) -> Tensor | None:
        raise AssertionError("a forward pass has no backward")
