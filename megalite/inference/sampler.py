"""Chooses the next token of each sampled row, and reports log-probabilities.

What is done to a row of logits, in this order (vLLM's, vllm/v1/sample/sampler.py):

1. log-probabilities are taken from the raw logits, in float32 (or from those over the temperature, see `Sampler`);
2. ids outside allowed_token_ids, ids that would complete one of bad_words and, before min_tokens, ids that would end
   the output get -inf;
3. logit_bias is added;
4. repetition, then frequency, then presence penalty (2 to 4: edits.py);
5. temperature 0 (below 1e-5): the largest logit wins, of equal ones the lowest id;
6. else temperature, min_p, top_k, top_p, and a draw from what is left (draws.py).

A token comes from its own row, seed, sample index and position, never from the batch. Equal probabilities rank by id,
lowest first: top_k keeps exactly k tokens, top_p the smallest set, and both end in the greedy choice. Logits above
LARGEST count as that.

Parameters and tokens of a row are on the device under the row's number, so sampling is a function of device buffers: it
waits for nothing, and a step of rows without further needs can be captured in a graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from megalite.config.schema import SamplingParams
from megalite.errors import MegaliteError
from megalite.inference.choice import FAILURES, PLAIN, Choice, Needs, SampledRows, TokenLogprobs
from megalite.inference.device_sampler import DeviceSampler
from megalite.inference.draws import largest_weight
from megalite.inference.host_sampler import HostSampler, RowParams, chunk_rows, details, peaked
from megalite.inference.request import Row, Sequence

__all__ = ["FAILURES", "PLAIN", "Choice", "Needs", "SampledRows", "Sampler", "TokenLogprobs", "policy_temperature"]

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM: a division by them would overflow."""


def policy_temperature(params: SamplingParams) -> float:
    """The temperature of the distribution that a token's log-probability is taken from; 1 where sampling is greedy."""
    return params.temperature if params.temperature >= GREEDY_BELOW else 1.0


class Sampler:
    """Samples rows of logits wherever they are. Nothing depends on which rows are sampled together."""

    def __init__(
        self,
        vocab_size: int,
        *,
        max_rows: int = 0,
        max_len: int = 0,
        device: torch.device | None = None,
        tokens: Tensor | None = None,
        at_temperature: bool = False,
    ):
        """`tokens` int32 [max_rows + 1, max_len] on `device`: prompt and output of each row; kept up by the caller, the
        last row is padding.

        `at_temperature`: a sampled token's log-probability is that of the distribution at its request's temperature,
        which importance weights need; greedy requests stay at temperature 1.
        """
        self.vocab_size = vocab_size
        self._by_sequence = _BySequence(vocab_size, at_temperature)
        if tokens is None or device is None:
            return
        assert tokens.shape == (max_rows + 1, max_len) and tokens.dtype == torch.int32
        self.max_len = max_len
        self.device = device
        self.tokens = tokens
        self._params = [RowParams()] * (max_rows + 1)  # a row that was never admitted is greedy, as padding is
        self._needy: set[int] = set()
        """Rows with needs."""
        self._side: HostSampler | DeviceSampler
        if device.type == "cpu":
            self._side = HostSampler(tokens, vocab_size, self._send, self._params, at_temperature)
        else:
            self._side = DeviceSampler(tokens, vocab_size, self._send, at_temperature)

    def _send(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def penalty_bytes(self) -> int:
        """Memory taken by the first row with a penalty, for all."""
        return self.tokens.nbytes

    # Rows

    @torch.inference_mode()
    def admit(self, sequences: Iterable[Any]) -> None:
        """Take over the parameters of sequences that begin, or go on, in the row that each has.

        MegaliteError: a logit_bias of an id that the model doesn't have.
        """
        rows, penalised = [], []
        for sequence in sequences:
            row, params = sequence.row, self._row_params(sequence)
            rows.append(row)
            self._params[row] = params
            edited = self._side.edits.admit(row, sequence)
            if params.penalised:
                penalised.append((row, sequence))
            self._needy.discard(row)
            if edited or params.penalised or params.logprobs is not None:
                self._needy.add(row)
        if rows:
            self._side.admit(rows, [self._params[row] for row in rows])
        if penalised:
            self._side.penalties.admit(penalised)

    def _row_params(self, sequence: Any) -> RowParams:
        request, params = sequence.request, sequence.request.params
        return RowParams(
            seed=request.seed % 2**64,
            index=sequence.index,
            prompt_len=len(request.prompt_token_ids),
            temperature=params.temperature if params.temperature >= GREEDY_BELOW else 0.0,
            top_k=params.top_k if 0 < params.top_k < self.vocab_size else 0,
            top_p=params.top_p,
            least=math.ceil(params.min_p * largest_weight(self.vocab_size)),
            strengths=(params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
            logprobs=params.logprobs,
        )

    def needs(self, sequences: Collection[Any]) -> Needs:
        """What `sample` has to do for these rows, in order; PLAIN for most."""
        if not self._needy:
            return PLAIN
        edits, longest, logprobs, listed = False, 0, [], False
        for sequence in sequences:
            params = self._params[sequence.row]
            edits = edits or self._side.edits.wanted(sequence.row, sequence.num_output)
            if params.penalised:
                longest = 1
            logprobs.append(params.logprobs)
            listed = listed or params.logprobs is not None
        if longest:
            longest = 1 << max(max(seq.planned, len(seq.token_ids) + 1) for seq in sequences).bit_length()
        return Needs(edits, min(longest, self.max_len), tuple(logprobs) if listed else ())

    # Sampling

    @property
    def _seen(self) -> dict[Any, int]:
        return self._by_sequence.rows

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that ended."""
        self._by_sequence.rows.pop(sequence, None)

    @overload
    def sample(self, logits: Tensor, rows: Tensor, positions: Tensor, needs: Needs) -> Choice: ...

    @overload
    def sample(self, logits: Tensor, rows: list[Row] | tuple[Row, ...]) -> SampledRows: ...

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Any, positions: Any = None, needs: Any = PLAIN) -> Any:
        """Sample each row; `logits` [n, V] of any float dtype are left as they are.

        `rows` int64 [n]: row numbers, distinct but for padding. `positions` int64 [n]: where in `tokens` the new token
        will stand; everything before it is there.
        """
        assert logits.shape == (len(rows), self.vocab_size)
        if not isinstance(rows, Tensor):
            return self._by_sequence.sample(logits, rows)
        return self._side.sample(logits, rows, positions, needs)

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, next_ids: list[int] | tuple[int, ...], k: int, *, request_id: str = "?"
    ) -> list[TokenLogprobs]:
        """Log-probabilities of the tokens that follow in a prompt.

        `logits` [T, V], `next_ids` [T] the token after each row; `k` likeliest tokens are listed beside it, -1: all. A
        token that the model rules out has -inf. Raises MegaliteError for NaN.
        """
        scores: list[TokenLogprobs] = []
        step = chunk_rows(logits)
        for start in range(0, len(next_ids), step):
            ids = list(next_ids[start : start + step])
            raw = peaked(logits[start : start + step].float())
            if raw.failed is not None:
                raise MegaliteError(f"request {request_id}: {FAILURES[min(raw.failed)]}")
            of = torch.tensor(ids, device=logits.device)
            found = details(raw.logits, raw.logits.log_softmax(-1), of, k)
            scores += [score for score in found.listed(ids, [k] * len(ids)) if score is not None]
        return scores


class _BySequence:
    """The sampler for callers that know sequences and no row numbers: it keeps rows and their tokens itself."""

    def __init__(self, vocab_size: int, at_temperature: bool):
        self.vocab_size = vocab_size
        self.at_temperature = at_temperature
        self.rows: dict[Sequence, int] = {}
        self._core: Sampler | None = None
        self._written: dict[Sequence, int] = {}

    def sample(self, logits: Tensor, rows: list[Row] | tuple[Row, ...]) -> SampledRows:
        if not rows:
            return SampledRows()
        for ended in [sequence for sequence in self.rows if sequence.finish_reason is not None]:
            del self.rows[ended]
        self._written = {sequence: count for sequence, count in self._written.items() if sequence in self.rows}
        sequences = [row.sequence for row in rows]
        new = [sequence for sequence in sequences if sequence not in self.rows]
        count, length = len(self.rows) + len(new), max(len(sequence.token_ids) + 1 for sequence in sequences)
        core = self._core
        if core is None or count > len(core.tokens) - 1 or length > core.max_len:
            max_rows, max_len = 1 << count.bit_length(), 64 << length.bit_length()
            tokens = torch.zeros((max_rows + 1, max_len), dtype=torch.int32, device=logits.device)
            core = self._core = Sampler(
                self.vocab_size,
                max_rows=max_rows,
                max_len=max_len,
                device=logits.device,
                tokens=tokens,
                at_temperature=self.at_temperature,
            )
            new = list({**self.rows, **dict.fromkeys(new)})
            self.rows.clear()
            self._written.clear()
        used = set(self.rows.values())
        free = iter([row for row in range(len(core.tokens) - 1) if row not in used])
        self.rows.update(zip(new, free, strict=False))
        core.admit([_Numbered(sequence, self.rows[sequence]) for sequence in new])
        for sequence in sequences:
            known = self._written.get(sequence, 0)
            ids = torch.tensor(sequence.token_ids[known:], dtype=torch.int32, device=logits.device)
            core.tokens[self.rows[sequence], known : known + len(ids)] = ids
            self._written[sequence] = known + len(ids)
        needs = core.needs([_Numbered(sequence, self.rows[sequence]) for sequence in sequences])
        numbers = torch.tensor([self.rows[sequence] for sequence in sequences], device=logits.device)
        positions = torch.tensor([len(sequence.token_ids) for sequence in sequences], device=logits.device)
        sampled = core.sample(logits, numbers, positions, needs).to_host()
        if logits.is_cuda:
            torch.cuda.synchronize()
        listed = sampled.listed()
        for sequence, token_id in zip(sequences, listed.token_ids, strict=True):
            if token_id < 0:
                raise MegaliteError(f"request {sequence.request.id}: {FAILURES[token_id]}")
        return listed


class _Numbered:
    """A sequence with a row number."""

    def __init__(self, sequence: Sequence, row: int):
        self.request, self.index, self.token_ids = sequence.request, sequence.index, sequence.token_ids
        self.num_prompt, self.num_output = sequence.num_prompt, sequence.num_output
        self.row, self.planned = row, len(sequence.token_ids) + 1
