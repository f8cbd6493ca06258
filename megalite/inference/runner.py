"""Executes step plans on this rank's stage: block copies, forward pass, logits. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.core.collectives import gather_columns
from megalite.core.pipeline import StageLink
from megalite.errors import maybe_fault
from megalite.inference.batch import Batch, is_decode, pack
from megalite.inference.graphs import DecodeGraphs
from megalite.inference.request import StepPlan
from megalite.model.decoder import Decoder
from megalite.model.kv_cache import DeviceCache, HostCache
from megalite.monitor.metrics import Meter

PromptLogits = Callable[[int, Tensor], None]
"""Takes logits [C, vocab] of a plan's prompt rows from the given one on; all of them come, in order."""


class Runner:
    """One stage of one replica. `execute` is collective over the replica: every rank runs the same plans in order."""

    def __init__(
        self,
        decoder: Decoder,
        cache: HostCache | DeviceCache,
        host: HostCache | None,
        *,
        meter: Meter,
        max_blocks: int,
        use_graphs: bool,
        scored_rows: int,
    ):
        """`scored_rows`: of prompts that are scored, at most so many logits exist at a time."""
        self.decoder = decoder
        self.state = decoder.state
        self.cache = cache
        self.host = host
        """Host memory for swapped-out blocks."""
        self.meter = meter
        self.scored_rows = scored_rows
        weight = next(decoder.parameters())
        self.link = StageLink(
            self.state, hidden_size=decoder.config.hidden_size, dtype=weight.dtype, device=weight.device
        )
        self.graphs = None
        if use_graphs:
            assert isinstance(cache, DeviceCache)
            self.graphs = DecodeGraphs(self._decode, cache, max_blocks=max_blocks)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, on_prompt: PromptLogits = lambda first, logits: None) -> Tensor | None:
        """Run this stage. On the last stage: logits [R, vocab] of the sampled rows, after `on_prompt` has had those of
        the prompt rows; else None."""
        self._copy_blocks(plan)
        if not plan.rows:
            return None
        maybe_fault("decode.step", self.state.rank)
        batch = pack(plan, self.cache)
        x = batch.token_ids
        if not self.state.is_first_stage:
            with self.meter.phase("waiting"):
                x = self.link.receive(batch.token_ids.shape[0])
        if self.graphs is not None and is_decode(plan):
            with self.meter.phase("compute"):
                out = self.graphs.run(batch, x)
            if self.state.is_last_stage:
                return self._gathered(out[: batch.logit_rows.shape[0]])
        else:
            with self.meter.phase("compute"):
                out = self.decoder(x, batch.context)
            if self.state.is_last_stage:
                return self._logits(batch, out, on_prompt)
        with self.meter.phase("communication"):
            self.link.send(out)
        return None

    def _logits(self, batch: Batch, hidden: Tensor, on_prompt: PromptLogits) -> Tensor | None:
        """What `execute` gives on the last stage."""
        for first in range(0, batch.prompt_rows.shape[0], self.scored_rows):
            with self.meter.phase("compute"):
                logits = self.decoder.logits(hidden[batch.prompt_rows[first : first + self.scored_rows]])
            on_prompt(first, self._gathered(logits))
        if not batch.logit_rows.shape[0]:
            return None
        with self.meter.phase("compute"):
            logits = self.decoder.logits(hidden[batch.logit_rows])
        return self._gathered(logits)

    def _gathered(self, logits: Tensor) -> Tensor:
        """This rank's columns -> all of them."""
        return gather_columns(logits, self.decoder.vocab_widths, self.state.tp)

    def _decode(self, batch: Batch, x: Tensor) -> Tensor:
        """A decode step: hidden states, or on the last stage this rank's columns of the logits."""
        hidden = self.decoder(x, batch.context)
        return self.decoder.logits(hidden[batch.logit_rows]) if self.state.is_last_stage else hidden

    def _copy_blocks(self, plan: StepPlan) -> None:
        for copy in plan.copies:
            assert self.host is not None
            source, target = (self.cache, self.host) if copy.kind == "out" else (self.host, self.cache)
            size = self.cache.block_size
            for layer, values in source.layers.items():
                block = values[:, :, copy.source * size : (copy.source + 1) * size]
                target.layers[layer][:, :, copy.target * size : (copy.target + 1) * size].copy_(block)

    def close(self) -> None:
        """Wait for the sends in flight."""
        self.link.drain()

    def sleep(self) -> None:
        """Give back the memory of the caches and of captured graphs, which hold their addresses."""
        self.cache.free()
        if self.host is not None:
            self.host.free()
        self.drop_graphs()

    def drop_graphs(self) -> None:
        """Forget captured graphs. NCCL never destroys a communicator that a graph still uses."""
        if self.graphs is not None:
            self.graphs.captured.clear()

    def wake(self) -> None:
        """Take the memory again; graphs are captured anew when they are needed."""
        self.cache.allocate()
        if self.host is not None:
            self.host.allocate()
