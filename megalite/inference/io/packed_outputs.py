"""Results as bytes, for the way from rank to rank: numbers as arrays, texts as UTF-8 with their lengths. Torch-free.

What comes out equals what went in to the last bit. Log-probabilities are four long columns for all positions of all
results; JSON took a second for each 100,000 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, chain, islice
from typing import Any, get_args

from megalite.inference.io.packed import pack, pack_texts, unpack, unpack_texts
from megalite.inference.logprobs import FlatLogprobs, Logprob, Logprobs
from megalite.inference.outputs import CompletionOutput, RequestMetrics, RequestOutput
from megalite.inference.request import FinishReason

_NONE = -(2**31)
"""Stands for None among numbers, none of which are so small; also for the entry that a first token does not have."""
_METRICS = tuple(field.name for field in fields(RequestMetrics))
_REASONS: tuple[FinishReason | None, ...] = (None, *get_args(FinishReason))


def pack_outputs(outputs: list[RequestOutput]) -> bytes:
    """`unpack_outputs` is the inverse."""
    texts: list[str | None] = []
    heads: list[int] = []
    numbers: list[float] = []
    ids: list[list[int]] = []
    token_logprobs: list[list[float]] = []
    columns = _Columns()
    for output in outputs:
        texts += [output.request_id, output.prompt, output.error]
        heads += [len(output.outputs), output.finished, _coded(output.replica), _coded(output.num_cached_tokens)]
        heads += [output.metrics is not None, columns.add(output.prompt_logprobs)]
        numbers += [] if output.metrics is None else [getattr(output.metrics, name) for name in _METRICS]
        ids.append(output.prompt_token_ids)
        for one in output.outputs:
            reason = one.stop_reason
            texts += [one.text, reason if isinstance(reason, str) else None]
            heads += [one.index, _coded(None if isinstance(reason, str) else reason)]
            heads += [_REASONS.index(one.finish_reason), columns.add(one.logprobs)]
            numbers.append(one.cumulative_logprob)
            ids.append(one.token_ids)
            token_logprobs.append(one.token_logprobs)
    words = list(dict.fromkeys(columns.words))
    places = {word: place for place, word in enumerate(words)}
    text, lengths = pack_texts([*texts, *words])
    rows = [heads, [len(texts)], lengths, columns.counts, columns.token_ids, [*map(_coded, columns.ranks)]]
    rows.append([places[word] for word in columns.words])
    return pack(text, [*rows, *ids], [numbers, columns.logprobs, *token_logprobs])


def unpack_outputs(data: bytes) -> list[RequestOutput]:
    text, ints, floats = unpack(data)
    heads, [num_texts], lengths, counts, token_ids, ranks, places, *ids = ints
    numbers, logprobs, *token_logprobs = floats
    texts = unpack_texts(text, lengths)
    words = [texts[num_texts + place] for place in places]
    columns = _Columns(counts, token_ids, [_value(rank) for rank in ranks], logprobs, words)
    head, number, string, row, measured = iter(heads), iter(numbers), iter(texts), iter(ids), iter(token_logprobs)
    outputs = []
    for num_outputs in head:
        finished, replica, cached, has_metrics, listed = (next(head) for _ in range(5))
        output = RequestOutput(
            request_id=next(string) or "",
            prompt=next(string),
            error=next(string),
            prompt_token_ids=next(row),
            prompt_logprobs=columns.take(listed),
            finished=bool(finished),
            replica=_value(replica),
            num_cached_tokens=_value(cached),
        )
        if has_metrics:
            measured_times: dict[str, Any] = {name: next(number) for name in _METRICS}
            output.metrics = RequestMetrics(**measured_times)
            output.metrics.num_generation_tokens = int(output.metrics.num_generation_tokens)
        for _ in range(num_outputs):
            index, stop, reason, listed = (next(head) for _ in range(4))
            one = CompletionOutput(
                index=index,
                text=next(string) or "",
                stop_reason=next(string),
                token_ids=next(row),
                cumulative_logprob=next(number),
                logprobs=columns.take(listed),
                token_logprobs=next(measured),
                finish_reason=_REASONS[reason],
            )
            if stop != _NONE:
                one.stop_reason = stop
            output.outputs.append(one)
        outputs.append(output)
    return outputs


def _coded(value: int | None) -> int:
    return _NONE if value is None else value


def _value(code: int) -> int | None:
    return None if code == _NONE else code


@dataclass(slots=True)
class _Columns:
    """The log-probabilities of all results, one entry after the other."""

    counts: list[int] = field(default_factory=list)
    """Entries of each position; _NONE: there are none, not even no entries."""
    token_ids: list[int] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    words: list[str | None] = field(default_factory=list)
    taken: tuple[int, int] = 0, 0
    """Positions and entries that `take` has given."""

    def add(self, listed: Sequence[Logprobs | None] | None) -> int:
        """The number of positions, by which `take` finds them; below 0 for FlatLogprobs."""
        if listed is None:
            return _NONE
        if isinstance(listed, FlatLogprobs):
            self.counts += [end - start for start, end in zip(listed.start_indices, listed.end_indices, strict=True)]
            self.token_ids += listed.token_ids
            self.ranks += listed.ranks
            self.logprobs += listed.logprobs
            self.words += listed.decoded_tokens
            return -1 - len(listed)
        self.counts += [_NONE if position is None else len(position) for position in listed]
        filled = [position for position in listed if position]
        entries = [entry for position in filled for entry in position.values()]
        self.token_ids += chain.from_iterable(filled)
        self.ranks += [entry.rank for entry in entries]
        self.logprobs += [entry.logprob for entry in entries]
        self.words += [entry.decoded_token for entry in entries]
        return len(listed)

    def take(self, code: int) -> Any:
        """What `add` gave this number for; in the same order."""
        if code == _NONE:
            return None
        position, entry = self.taken
        counts = self.counts[position : position + (code if code >= 0 else -1 - code)]
        ends = list(accumulate((max(count, 0) for count in counts), initial=0))
        part = slice(entry, entry + ends[-1])
        self.taken = position + len(counts), part.stop
        token_ids, logprobs, ranks, words = (
            self.token_ids[part],
            self.logprobs[part],
            self.ranks[part],
            self.words[part],
        )
        if code < 0:
            return FlatLogprobs(ends[:-1], ends[1:], token_ids, logprobs, ranks, words)
        pairs = zip(token_ids, map(Logprob, logprobs, ranks, words), strict=True)
        return [None if count == _NONE else dict(islice(pairs, count)) for count in counts]
