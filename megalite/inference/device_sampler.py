"""Sampling on a GPU: all rows of a step at once, from buffers on the device; nothing waits for the device."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from megalite.inference import draws
from megalite.inference.choice import Choice, Details, Needs
from megalite.inference.edits import Edits, Penalties, Send
from megalite.inference.host_sampler import LARGEST, RowParams
from megalite.inference.matchers import Masks
from megalite.inference.vocabulary import Vocabulary
from megalite.kernels import penalties, ranking, sampling
from megalite.planner.memory import SAMPLING_CHUNK


class DeviceSampler:
    """Samples rows by the parameters that are in `table`."""

    def __init__(self, tokens: Tensor, vocab_size: int, send: Send, at_temperature: bool):
        """`tokens`: see `Sampler`."""
        self.send = send
        self.at_temperature = at_temperature
        self.table = torch.zeros((len(tokens), sampling.WIDTH), dtype=torch.int64, device=tokens.device)
        """Parameters of each row: int64 [rows, sampling.WIDTH]; a row that was never admitted is greedy."""
        self._floats = self.table.view(torch.float64)
        self._floats[:, [sampling.TOP_P, sampling.PENALTIES]] = 1
        self.edits = Edits(vocab_size, tokens, self.table[:, sampling.PROMPT], send)
        self.penalties = Penalties(tokens, self.table[:, sampling.PROMPT], send)

    def admit(self, rows: list[int], params: list[RowParams]) -> None:
        """Take over the parameters of these rows, in one copy."""
        numbers = [[one.seed, one.index, one.prompt_len, one.top_k, one.least] for one in params]
        shares = [[one.top_p, one.temperature, *one.strengths] for one in params]
        whole = np.array(numbers, np.uint64).view(np.int64)
        values = np.column_stack([np.array(rows), whole, np.array(shares, np.float64).view(np.int64)])
        sent = self.send(values)
        self.table.index_copy_(0, sent[:, 0], sent[:, 1:])

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what rows with special needs take, for logits in `dtype`: padding has all needs in turn."""
        rows = torch.tensor([len(self.table) - 1], device=self.table.device)
        logits = torch.zeros((1, self.edits.vocab_size), dtype=dtype, device=rows.device)
        everything: Future[np.ndarray] = Future()
        everything.set_result(np.full((1, logits.shape[1] // 32 + 1), -1, np.int32))
        self.penalties.begin()
        for masks in (None, Masks([0], everything)):
            for needs in (Needs(edits=True), Needs(longest=1), Needs(True, 1, (1,))):
                self.sample(logits, rows, torch.zeros_like(rows), needs, masks)

    def sample(
        self, logits: Tensor, rows: Tensor, positions: Tensor, needs: Needs, masks: Masks | None = None
    ) -> Choice:
        """See `Sampler.sample`."""
        changed = needs.edits or needs.longest or masks is not None
        edited = self._edited(logits, rows, positions, needs, masks) if changed else None
        ids, logprobs, stats = sampling.choose(
            logits, edited, rows, positions, self.table, at_temperature=self.at_temperature
        )
        if needs.longest:
            penalties.count(rows, positions, ids, self.table, self.penalties.tokens, self.penalties.times)
        details = None
        if needs.logprobs:
            if self.at_temperature:  # what is listed is at temperature 1 all the same
                stats = sampling.choose(logits, None, rows, positions, self.table)[2]
            details = _details(logits, ids, stats, needs.most(logits.shape[1]))
        return Choice(ids, logprobs, details, needs)

    def sample_columns(self, logits: Tensor, rows: Tensor, positions: Tensor, vocabulary: Vocabulary) -> Choice | None:
        """See `Sampler.sample_columns`."""
        columns = vocabulary.columns
        if columns is None:
            return None
        with vocabulary.axis.track.entering("all_gather"):
            ids, logprobs, _ = sampling.choose(
                logits, None, rows, positions, self.table, at_temperature=self.at_temperature, columns=columns
            )
        return Choice(ids, logprobs)

    def _edited(self, logits: Tensor, rows: Tensor, positions: Tensor, needs: Needs, masks: Masks | None) -> Tensor:
        """A changed copy of logits [n, V], float32."""
        buffer = torch.empty(logits.numel() + 1, device=logits.device)
        edited, source = buffer[:-1].view(logits.shape), logits
        if masks is None:
            penalties.copy(logits, edited)
        else:
            source = edited
            penalties.copy_allowed(logits, edited, *self._sent(masks, len(logits)))
        if needs.edits:
            self.edits.apply(buffer, rows, positions)
            source = edited
        if needs.longest:
            source = source.clone() if source is edited else source
            tokens, times = self.penalties.tokens, self.penalties.times
            penalties.penalise(source, edited, rows, positions, self.table, tokens, times, needs.longest)
        return edited

    def _sent(self, masks: Masks, count: int) -> tuple[Tensor, Tensor]:
        """The masks on the device, int32 [m, words], and of each of `count` rows which is its mask, or -1; one copy."""
        words = masks.wait()
        which = np.full(count, -1, np.int32)
        which[masks.places] = np.arange(len(words))
        sent = self.send(np.concatenate([which, words.ravel()]))
        return sent[count:].view(words.shape), sent[:count]


def _details(logits: Tensor, ids: Tensor, stats: Tensor, k: int) -> Details:
    """Places of `ids` [n] in the logits [n, V], and the k likeliest tokens of each row."""
    own = logits.gather(1, ids.clamp(min=0)[:, None]).float()
    if k == 0:
        top, values = ids.new_empty((len(ids), 0)), own[:, :0]
    elif k <= ranking.MAX_BEST:
        top, values = ranking.best(logits, k)
    else:
        step = max(1, SAMPLING_CHUNK // logits.shape[1])
        top = torch.cat([draws.best_ids(part.float().clamp(max=LARGEST), k) for part in logits.split(step)])
        values = logits.gather(1, top).float()
    scores = [(x.clamp(max=LARGEST) - stats[:, 1:2]) - stats[:, 2:3] for x in (own, values)]
    return Details(scores[0][:, 0], ranking.rank(logits, ids), top, scores[1])
