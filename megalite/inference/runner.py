"""Executes step plans on this rank's stage: block copies, forward pass, sampling. It decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from megalite.core.adapters import Adapters
from megalite.core.collectives import prepare_sums
from megalite.core.pipeline import StageLink
from megalite.errors import maybe_fault
from megalite.inference.adapter_rows import AdapterRows
from megalite.inference.choice import PLAIN, Choice, Needs, SampledRows
from megalite.inference.graphs import StepGraphs, StepOutput
from megalite.inference.matchers import Masks
from megalite.inference.request import StepPlan
from megalite.inference.rows import Batch, Rows
from megalite.inference.sampler import Sampler
from megalite.inference.vocabulary import Vocabulary
from megalite.model.decoder import Decoder
from megalite.model.kv_cache import DeviceCache, HostCache
from megalite.monitor.collector import Meter
from megalite.planner.memory import PROMPT_SIZES

PromptLogits = Callable[[int, Tensor], None]
"""Takes logits [C, vocab] of a plan's prompt rows from the given one on; all of them come, in order."""


class StepResults:
    """Sampled tokens on their way to the host."""

    def __init__(self, choice: Choice):
        self.choice = choice.to_host()
        self.event = None
        if choice.ids.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> SampledRows:
        """What was sampled, one entry a row; waits until it is in host memory."""
        if self.event is not None:
            self.event.synchronize()
        return self.choice.listed()


class Runner:
    """One stage of one replica. `execute` is collective over the replica: every rank runs the same plans in order."""

    def __init__(
        self,
        decoder: Decoder,
        rows: Rows,
        host: HostCache | None,
        *,
        sampler: Sampler,
        meter: Meter,
        max_rows: int,
        max_tokens: int,
        weights: int,
        use_graphs: bool,
        return_ids: bool,
        scored_rows: int,
        adapters: Adapters | None = None,
    ):
        """`max_rows`, `max_tokens`: of a step. `weights`: of a stage, one number for every rank.

        `return_ids`: with several stages, sampled ids go from the last to the first by themselves, as plans are made
        before they are known. `scored_rows`: of prompts that are scored, at most so many logits exist at a time.
        """
        self.decoder = decoder
        self.state = decoder.state
        self.rows = rows
        self.cache = rows.cache
        self.host = host
        """Host memory for swapped-out blocks."""
        self.sampler = sampler
        self.meter = meter
        self.scored_rows = scored_rows
        weight = next(param for param in decoder.parameters() if hasattr(param, "tensor_model_parallel"))
        width = decoder.config.hidden_size
        self.link = StageLink(self.state, hidden_size=width, dtype=weight.dtype, device=weight.device)
        prepare_sums(self.state.tp, width=width, dtype=weight.dtype, device=weight.device)
        self.vocabulary = None
        """On the last stage: how its ranks, each with some columns of the logits, choose together."""
        if self.state.is_last_stage:
            self.vocabulary = Vocabulary(
                self.state.tp,
                decoder.vocab_widths,
                max_rows=max_rows,
                sums=self.state.tp.sums.get((width, weight.dtype)),
                dtype=weight.dtype,
            )
        self.adapters = AdapterRows(adapters, rows) if adapters is not None else None
        self.return_ids = return_ids and self.state.pp.size > 1
        self._returning: deque[tuple[int, Tensor, Tensor]] = deque()
        """First stage: step, rows and positions of ids that will come back."""
        self.graphs = None
        if isinstance(self.cache, DeviceCache):
            self.graphs = StepGraphs(
                self._whole_step,
                rows,
                max_rows=max_rows,
                max_tokens=max_tokens,
                weights=weights,
                hidden=0 if self.state.is_first_stage else width,
                dtype=weight.dtype,
                capture=use_graphs,
                meter=meter,
            )

    @torch.inference_mode()
    def warm_up(self, most: int, *, for_any: bool) -> None:
        """Capture the decode steps of up to `most` rows, where they are captured. Collective over the stage.

        `for_any`: also compile what only some requests take: long prompts, which are launched kernel by kernel,
        penalties, edits of logits, grammars and listed log-probabilities.
        """
        if self.graphs is None:
            return
        self.graphs.capture_all(most)
        if for_any:
            batch, x = self.rows.padding_prompt(PROMPT_SIZES[0]), self.graphs.hidden
            if self.adapters is not None:
                self.adapters.choose(batch)
            hidden = self.decoder(batch.token_ids if x is None else x[: PROMPT_SIZES[0]], batch.context)
            logits = self._sampled(batch, hidden).hidden
            if self.state.is_last_stage:
                self._choose(logits, batch.rows, batch.positions, PLAIN, None)
                self.sampler.warm_up(logits.dtype)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, on_prompt: PromptLogits = lambda first, logits: None) -> StepResults | None:
        """Start this stage's part of a step. On an accelerator this returns before its end, unless prompts are scored.

        On the last stage: the results of the sampled rows, after `on_prompt` has had the logits of the prompt rows.
        """
        self._copy_blocks(plan)
        if not plan.rows:
            return None
        maybe_fault("decode.step" if plan.decodes else "prefill.step", self.state.rank)
        self._take_returned(plan.step - self.state.pp.size)
        self.rows.admit(plan.admitted)
        if self.adapters is not None:
            self.adapters.admit(plan)
        masks = None
        if self.state.is_last_stage:
            self.sampler.admit(plan.admitted)
            masks = self.sampler.matchers.masks(plan.sampled)
        x = None
        if not self.state.is_first_stage:
            with self.meter.phase("waiting", "hidden", "pp"):
                x = self.link.receive(plan.num_tokens)
        if self.graphs is not None:
            with self.meter.phase("compute", "forward"):
                output = self.graphs.run(plan, x)
            if output is not None:
                return self._finished(plan, output, masks, padded=True)
        with self.meter.phase("compute", "forward"):
            batch = self.rows.batch(plan)
            if self.adapters is not None:
                self.adapters.choose(batch)
            hidden = self.decoder(batch.token_ids if x is None else x, batch.context)
        if self.state.is_last_stage:
            self._score(batch, hidden, on_prompt)
        return self._finished(plan, self._sampled(batch, hidden), masks, padded=False)

    def _finished(self, plan: StepPlan, output: StepOutput, masks: Masks | None, *, padded: bool) -> StepResults | None:
        """Send hidden states on, or sample what has special needs and start the results' way to the host."""
        sequences = [row.sequence for row in plan.sampled]
        count, batch, choice = len(sequences), output.batch, output.choice
        if not self.state.is_last_stage:
            with self.meter.phase("communication", "send", "pp"):
                hidden = output.hidden[: plan.num_tokens]
                self.link.send(hidden.clone() if padded else hidden)  # the next step may overwrite what is on its way
                if self.return_ids and self.state.is_first_stage and count:
                    self.link.expect_ids(count)
                    self._returning.append((plan.step, batch.rows[:count].clone(), batch.positions[:count].clone()))
            return None
        if not count:
            return None
        needs = self.sampler.needs(sequences)
        if choice is None or needs != PLAIN or masks is not None:
            rows, positions = batch.rows[:count], batch.positions[:count]
            with self.meter.phase("sampling"):
                choice = self._choose(output.hidden[:count], rows, positions, needs, masks)
                self.rows.write(rows, positions, choice.ids)
        if self.return_ids:
            with self.meter.phase("communication", "send", "pp"):
                self.link.return_ids(choice.ids[:count])
        return StepResults(choice[:count])

    def _take_returned(self, step: int) -> None:
        """Put the ids that came back from steps up to this one where they stand."""
        while self._returning and self._returning[0][0] <= step:
            _, rows, positions = self._returning.popleft()
            with self.meter.phase("waiting", "ids", "pp"):
                ids = self.link.returned(len(rows))
            self.rows.write(rows, positions, ids)

    def _whole_step(self, batch: Batch, x: Tensor | None) -> StepOutput:
        """A step of a padded size, on the last stage to the next tokens, as rows without special needs get them."""
        if self.adapters is not None:
            self.adapters.choose(batch)
        hidden = self.decoder(batch.token_ids if x is None else x, batch.context)
        if not self.state.is_last_stage:
            return StepOutput(batch, hidden, None)
        logits = self.decoder.logits(hidden, batch.logit_rows)
        choice = self._choose(logits, batch.rows, batch.positions, PLAIN, None)
        self.rows.write(batch.rows, batch.positions, choice.ids)
        return StepOutput(batch, logits, choice)

    def _choose(self, logits: Tensor, rows: Tensor, positions: Tensor, needs: Needs, masks: Masks | None) -> Choice:
        """The next tokens from this rank's columns of the logits."""
        vocabulary, choice = self.vocabulary, None
        assert vocabulary is not None
        if self.state.tp.size > 1 and needs == PLAIN and masks is None:
            choice = self.sampler.sample_columns(logits, rows, positions, vocabulary)
        if choice is None:
            choice = self.sampler.sample(vocabulary.whole(logits), rows, positions, needs, masks)
        return choice

    def _sampled(self, batch: Batch, hidden: Tensor) -> StepOutput:
        """Of a step in which rows may have several tokens: the logits of the sampled rows."""
        if not self.state.is_last_stage or not len(batch.rows):
            return StepOutput(batch, hidden, None)
        with self.meter.phase("compute", "head"):
            return StepOutput(batch, self.decoder.logits(hidden, batch.logit_rows), None)

    def _score(self, batch: Batch, hidden: Tensor, on_prompt: PromptLogits) -> None:
        """Give `on_prompt` the logits of prompts that are scored."""
        assert self.vocabulary is not None
        for first in range(0, batch.prompt_rows.shape[0], self.scored_rows):
            with self.meter.phase("compute", "head"):
                logits = self.decoder.logits(hidden, batch.prompt_rows[first : first + self.scored_rows])
            on_prompt(first, self.vocabulary.whole(logits))

    def _copy_blocks(self, plan: StepPlan) -> None:
        for copy in plan.copies:
            assert self.host is not None
            source, target = (self.cache, self.host) if copy.kind == "out" else (self.host, self.cache)
            size = self.cache.block_size
            for layer, stacks in source.stacks.items():
                for values, copies in zip(stacks, target.stacks[layer], strict=True):
                    block = values[:, :, copy.source * size : (copy.source + 1) * size]
                    copies[:, :, copy.target * size : (copy.target + 1) * size].copy_(block)

    def close(self) -> None:
        """Wait for what is on its way between stages."""
        while self._returning:
            self.link.returned(len(self._returning.popleft()[1]))
        self.link.drain()

    def sleep(self) -> None:
        """Give back the memory of the caches and of captured graphs, which hold their addresses."""
        self.cache.free()
        if self.host is not None:
            self.host.free()
        self.drop_graphs()

    def use_adapters(self, adapters: Adapters) -> None:
        """Other adapters than those so far; between runs."""
        self.drop_graphs()
        self.adapters = AdapterRows(adapters, self.rows)

    def drop_graphs(self) -> None:
        """Forget captured graphs. NCCL never destroys a communicator that a graph still uses."""
        if self.graphs is not None:
            self.graphs.captured.clear()

    def wake(self) -> None:
        """Take the memory again; graphs are captured anew when they are needed."""
        self.cache.allocate()
        if self.host is not None:
            self.host.allocate()
