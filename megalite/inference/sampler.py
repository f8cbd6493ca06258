"""Chooses the next token of each sampled row, and reports log-probabilities.

What is done to a row of logits, in this order (vLLM's, vllm/v1/sample/sampler.py):

1. log-probabilities are taken from the raw logits, in float32 (or from those over the temperature, see `Sampler`);
2. ids that a grammar rules out (matchers.py), ids outside allowed_token_ids, ids that would complete one of bad_words
   and, before min_tokens, ids that would end the output get -inf;
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
from functools import partial

import torch
from torch import Tensor

from megalite.config.schema import SamplingParams
from megalite.errors import MegaliteError
from megalite.inference.choice import FAILURES, PLAIN, Choice, Needs, TokenLogprobs
from megalite.inference.device_sampler import DeviceSampler
from megalite.inference.draws import largest_weight
from megalite.inference.host_sampler import HostSampler, RowParams, chunk_rows, details, peaked
from megalite.inference.matchers import Masks, Matchers
from megalite.inference.request import Sequence
from megalite.inference.vocabulary import Vocabulary
from megalite.kernels.device import send
from megalite.text.tokenizer import Tokenizer

__all__ = ["FAILURES", "PLAIN", "Choice", "Needs", "Sampler", "TokenLogprobs", "policy_temperature"]

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
        max_rows: int,
        max_len: int,
        device: torch.device,
        tokens: Tensor,
        at_temperature: bool = False,
        tokenizer: Tokenizer | None = None,
    ):
        """`tokens` int32 [max_rows + 1, max_len] on `device`: prompt and output of each row; kept up by the caller, the
        last row is padding.

        `at_temperature`: a sampled token's log-probability is that of the distribution at its request's temperature,
        which importance weights need; greedy requests stay at temperature 1.

        `tokenizer`: what grammars are compiled for; None: no request has one.
        """
        self.vocab_size = vocab_size
        assert tokens.shape == (max_rows + 1, max_len) and tokens.dtype == torch.int32
        self.max_len = max_len
        self.tokens = tokens
        self._params = [RowParams()] * (max_rows + 1)  # a row that was never admitted is greedy, as padding is
        self.matchers = Matchers(tokenizer, vocab_size)
        self._needy: set[int] = set()
        """Rows whose `Needs` are more than plain."""
        to_device = partial(send, device=device)
        self._side: HostSampler | DeviceSampler
        if device.type == "cpu":
            self._side = HostSampler(tokens, vocab_size, to_device, self._params, at_temperature)
        else:
            self._side = DeviceSampler(tokens, vocab_size, to_device, at_temperature)

    # Rows

    @torch.inference_mode()
    def admit(self, sequences: Iterable[Sequence]) -> None:
        """Take over the parameters of sequences that begin, or go on, in the row that each has.

        MegaliteError: a logit_bias of an id that the model doesn't have.
        """
        rows, penalised = [], []
        for sequence in sequences:
            row, params = sequence.row, self._row_params(sequence)
            rows.append(row)
            self._params[row] = params
            edited = self._side.edits.admit(row, sequence)
            self.matchers.admit(row, sequence)
            if params.penalised:
                penalised.append((row, sequence))
            self._needy.discard(row)
            if edited or params.penalised or params.logprobs is not None:
                self._needy.add(row)
        if rows:
            self._side.admit(rows, [self._params[row] for row in rows])
        if penalised:
            self._side.penalties.admit(penalised)

    def _row_params(self, sequence: Sequence) -> RowParams:
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

    def needs(self, sequences: Collection[Sequence]) -> Needs:
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

    @torch.inference_mode()
    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile on a GPU what rows with special needs take, for logits in `dtype`, before the first of them comes."""
        if isinstance(self._side, DeviceSampler):
            self._side.warm_up(dtype)

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, rows: Tensor, positions: Tensor, needs: Needs, masks: Masks | None = None
    ) -> Choice:
        """Sample each row; `logits` [n, V] of any float dtype are left as they are.

        `rows` int64 [n]: row numbers, distinct but for padding. `positions` int64 [n]: where in `tokens` the new token
        will stand; everything before it is there. `masks`: of rows with a grammar.
        """
        assert logits.shape == (len(rows), self.vocab_size)
        return self._side.sample(logits, rows, positions, needs, masks)

    @torch.inference_mode()
    def sample_columns(self, logits: Tensor, rows: Tensor, positions: Tensor, vocabulary: Vocabulary) -> Choice | None:
        """As `sample` of rows without special needs, from this rank's columns of the logits [n, width].

        None, on every rank alike: all columns are needed. Collective over the axis of `vocabulary`.
        """
        return self._side.sample_columns(logits, rows, positions, vocabulary)

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, next_ids: list[int] | tuple[int, ...], k: int) -> list[TokenLogprobs]:
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
                raise MegaliteError(FAILURES[min(raw.failed)])
            of = torch.tensor(ids, device=logits.device)
            found = details(raw.logits, raw.logits.log_softmax(-1), of, k)
            scores += [score for score in found.listed(ids, [k] * len(ids)) if score is not None]
        return scores
