"""The matchers of rows whose output follows a grammar, and a step's masks of what may come next. Torch-free.

Every rank that samples has matchers of its own. One is brought up to what is known of its sequence whenever a mask is
wanted, so a sequence may begin anywhere: at its prompt, after a preemption, or with tokens that were given. A row with
a grammar is planned only when the values of all its tokens are known (`Scheduler.schedule`).

A thread works while the device computes logits: `admit` and `masks` wait for nothing, `Masks.wait` does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megalite.config.structured import is_installed
from megalite.inference import request
from megalite.text.grammar import GrammarError, Grammars, grammars_of, shortened
from megalite.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

MOST_THREADS = 8
"""Masks of a step that are made at a time, where there are as many cores."""


@dataclass(slots=True, eq=False)
class _Row:
    """A row with a grammar."""

    sequence: request.Sequence
    ends: np.ndarray
    """The request's stop ids, int64: what may come where the output may end."""
    taken: int = 0
    """Output tokens that the matcher has had."""
    matcher: LLMatcher | None = None
    """None: it is being made, or there is a problem."""
    problem: str | None = None
    """Why no token can come any more."""


class Outcome(NamedTuple):
    """What became of a row's grammar with a token."""

    finished: bool = False
    """Nothing may follow."""
    in_vain: bool = False
    """The output was complete before this token: what a replay was given had finished the grammar."""
    problem: str | None = None


FOLLOWED = Outcome()


class Masks:
    """Which tokens may come next in some of a step's sampled rows."""

    def __init__(self, places: list[int], made: Future[np.ndarray]):
        self.places = places
        """Places of these rows among the sampled ones, ascending."""
        self._made = made

    def wait(self) -> np.ndarray:
        """int32 [len(places), words]: bit i of word j is set if token 32 * j + i may come next."""
        return self._made.result()


class Matchers:
    """The matchers of one rank, by row number."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int):
        """`tokenizer` None: no request has a grammar."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}

    @cached_property
    def _grammars(self) -> Grammars:
        assert self._tokenizer is not None, "refused before"
        return grammars_of(self._tokenizer, self._vocab_size)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "masks")

    @cached_property
    def _pool(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // 2)))

    def prepare(self) -> None:
        """Begin to read the tokenizer, which for a large one takes a second, if there may be grammars."""
        if self._tokenizer is not None and is_installed():
            self._thread.submit(self._grammars.prepare)

    def is_complete(self, sequence: request.Sequence) -> bool:
        """Whether nothing may follow the tokens that a sequence was given. Any rank may ask; it waits."""
        given = sequence.token_ids[sequence.num_prompt :]
        if not given or not sequence.request.grammar:
            return False
        try:
            matcher = self._grammars.matcher(sequence.request.grammar)
        except GrammarError:  # its mask will say so
            return False
        return matcher.consume_tokens(given) and matcher.is_stopped()

    def admit(self, row: int, sequence: request.Sequence) -> None:
        """A sequence begins, or goes on, in this row."""
        self._rows.pop(row, None)
        if sequence.request.grammar:
            ends = np.array(sorted(sequence.request.stop_token_ids), np.int64)
            self._rows[row] = state = _Row(sequence, ends[(ends >= 0) & (ends < self._vocab_size)])
            self._thread.submit(self._begin, state)

    def masks(self, rows: Sequence[request.Row]) -> Masks | None:
        """Begin to make the masks of a step that samples these rows, in order; None: none has a grammar."""
        if not self._rows:
            return None
        for number in [number for number, state in self._rows.items() if state.sequence.finish_reason is not None]:
            del self._rows[number]
        found = [(place, self._rows[row.row]) for place, row in enumerate(rows) if row.row in self._rows]
        if not found:
            return None
        return Masks([place for place, _ in found], self._thread.submit(self._fill, [state for _, state in found]))

    def follow(self, rows: Sequence[request.Row], token_ids: Sequence[int]) -> dict[int, Outcome]:
        """Take the tokens of a plan's sampled rows; by place, the outcome of those with a grammar where it is not the
        usual one. Sequences that have ended are passed over."""
        outcomes: dict[int, Outcome] = {}
        taking: list[tuple[int, _Row, LLMatcher, int]] = []
        for place, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)) if self._rows else ():
            state = self._rows.get(row.row)
            if state is None or state.sequence is not row.sequence or row.sequence.finish_reason is not None:
                continue
            if state.matcher is None or state.problem is not None:
                outcomes[place] = Outcome(problem=state.problem)
            elif state.matcher.is_stopped():
                outcomes[place] = Outcome(finished=True, in_vain=True)
            elif token_id >= 0 and token_id not in row.sequence.request.stop_token_ids:
                taking.append((place, state, state.matcher, token_id))
        if taking:
            took = self._pool.consume_token_par([(matcher, token_id) for _, _, matcher, token_id in taking])
            for (place, state, matcher, _), fits in zip(taking, took, strict=True):
                state.taken += 1
                if not fits:
                    outcomes[place] = Outcome(problem=self._failed(state))
                elif matcher.is_stopped():
                    outcomes[place] = Outcome(finished=True)
        return outcomes

    # ---- in the thread

    def _begin(self, state: _Row) -> None:
        try:
            state.matcher = self._grammars.matcher(state.sequence.request.grammar)
        except GrammarError as error:
            state.problem = f"the grammar can't be followed: {error}"

    def _fill(self, states: list[_Row]) -> np.ndarray:
        end = self._grammars.end
        bits = np.zeros((len(states), self._grammars.words), np.int32)
        wanted: list[tuple[LLMatcher, int]] = []
        for place, state in enumerate(states):
            if state.matcher is None or state.problem is not None:
                continue
            seq = state.sequence
            new = seq.token_ids[seq.num_prompt + state.taken :]
            state.taken += len(new)
            if new and not state.matcher.consume_tokens(new):
                self._failed(state)
            elif state.matcher.is_stopped():  # what is sampled is in vain
                bits[place] = -1
            else:
                wanted.append((state.matcher, place))
        if wanted:
            self._pool.unsafe_compute_mask_ptr(wanted, bits.ctypes.data, bits.strides[0], len(bits))
        for matcher, place in wanted:
            if matcher.is_error():
                bits[place] = 0
                self._failed(states[place])
            elif matcher.is_accepting():
                words, ends = bits[place].view(np.uint32), states[place].ends
                words[end // 32] &= ~np.uint32(1 << end % 32)
                np.bitwise_or.at(words, ends // 32, np.left_shift(1, ends % 32).astype(np.uint32))
        return bits

    def _failed(self, state: _Row) -> str:
        assert state.matcher is not None
        reason = shortened(state.matcher.get_error())
        if "NoExtension" in reason:
            reason = "no token of the vocabulary can come next"
        state.problem = f"the grammar can't be followed: {reason}"
        return state.problem
