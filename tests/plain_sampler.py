"""The sampler as one would explain it: one row, Python floats, sets and sorted lists."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from megalite.config.schema import SamplingParams

INF = math.inf


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four words from a counter of four words and a key of two."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ k, second % 2**32, first >> 32 ^ d ^ m, first % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that draws output token `position` of sample `index` of a request."""
    low, high, *_ = philox((position, index, 0, 0), (seed % 2**32, (seed >> 32) % 2**32))
    return ((high << 32 | low) >> 11) * 2.0**-53


class TooClose(Exception):
    """Rounding decides this case, so the reference can't."""


def near(*distances: float) -> None:
    if min(distances) < 2e-6:
        raise TooClose


def ruled_out(
    params: SamplingParams, output: Sequence[int], *, stops: Collection[int], bad_words: Collection[tuple], vocab: int
) -> set[int]:
    """Ids that must not come next."""
    out = set(stops) if len(output) < params.min_tokens else set()
    if params.allowed_token_ids is not None:
        out |= set(range(vocab)) - set(params.allowed_token_ids)
    out |= {word[-1] for word in bad_words if [*output, word[-1]][-len(word) :] == list(word)}
    return {token for token in out if token < vocab}


def distribution(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int], without: set[int]
) -> dict[int, float]:
    """{token id: probability} that the next token is drawn from; one token for temperature 0."""
    logits = [-INF if token in without else logit for token, logit in enumerate(logits)]
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *output}:
        if logits[token] > 0:
            logits[token] /= params.repetition_penalty
        else:
            logits[token] *= params.repetition_penalty
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    best_first = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.temperature == 0:
        return {best_first[0]: 1.0}
    peak = logits[best_first[0]]
    weight = {token: math.exp((logits[token] - peak) / params.temperature) for token in best_first}
    if params.min_p > 0:
        near(*(abs(weight[token] / params.min_p - 1) for token in best_first))
    kept = [token for token in best_first if weight[token] >= params.min_p]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    total = sum(weight[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if nucleus and reached / total >= params.top_p:
            break
        nucleus.append(token)
        reached += weight[token]
        if params.top_p < 1:
            near(abs(reached / total - params.top_p))
    return {token: weight[token] / reached for token in nucleus if weight[token] > 0}


def next_token(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    without: set[int],
    number: float,
) -> int:
    """The token that `number`, uniform in [0, 1), draws."""
    found = distribution(logits, params, prompt, output, without)
    reached = 0.0
    for token in sorted(found):
        reached += found[token]
        if len(found) > 1:
            near(abs(reached - number))
        if number < reached:
            return token
    raise TooClose
