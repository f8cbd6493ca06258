"""Rules for prompts and sampling parameters, wherever they come from: a config, an input line or Python."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from megalite.config.chat import messages_problem
from megalite.config.schema import SamplingParams
from megalite.config.typecheck import Rules, hints, misfit, problem, unknown_key
from megalite.errors import ConfigError, Problem

MAX_LOGPROBS = 20
"""Most likeliest tokens listed for a position."""
MAX_SEED = 2**63
MAX_KEY = 100
"""Characters of an unknown key that are shown."""
MAX_KEYS = 100
"""Keys of a mapping that are looked at."""
MAX_SAMPLES = 1 << 14
"""Most completions sampled for a prompt."""
MAX_STOPS = 1 << 10
"""Most stop strings of a request."""
MAX_STOP_CHARS = 1 << 16
"""Characters of all of them together."""
MAX_TOKEN_IDS = 1 << 18
"""Most token ids in a list or mapping of a request: as many as a large vocabulary has."""
MAX_REQUEST_TOKENS = 1 << 27
"""Most tokens of a request: its samples, each with the prompt and its longest output."""
MAX_REQUEST_LOGPROBS = 1 << 26
"""Most log-probabilities listed for a request."""
MAX_REQUEST_RULES = 1 << 24
"""Most stop strings, bad words, allowed and biased tokens of a request, counted for each sample: all are looked at for
every token."""


def sampling_problems(
    params: SamplingParams, *, prefix: str = "sampling.", vocab_size: int | None = None
) -> list[Problem]:
    """Everything that is wrong with `params`; token ids are checked where `vocab_size` is known.

    `prefix` goes before each field's name in the problem's key. Types are checked too, as Python's callers may pass
    anything; rules are looked at once the types are right.
    """
    wrong = [
        misfit(f"{prefix}{field.name}", hints(SamplingParams)[field.name], getattr(params, field.name))
        for field in fields(params)
    ]
    wrong = [one for one in wrong if one]
    if wrong:
        return wrong
    rules = Rules(params, prefix)
    _choice_rules(params, rules)
    _length_rules(params, rules)
    _token_rules(params, rules, vocab_size)
    return rules.problems


def price_problem(
    params: SamplingParams,
    *,
    key: str,
    max_tokens: int,
    prompt_tokens: int = 1,
    samples: int | None = None,
    vocab_size: int | None = None,
) -> Problem | None:
    """What is wrong with the size of one request as a whole: values that are fine alone can be too much together.

    `params` have passed `sampling_problems`. `max_tokens`: of the longest output that can be; `samples`: of the prompt,
    None: those of `params`.
    """
    samples = samples or params.best_of or params.n
    longest = prompt_tokens + max_tokens
    listed = samples * max_tokens * _listed(params.logprobs, vocab_size)
    listed += prompt_tokens * _listed(params.prompt_logprobs, vocab_size)
    stops = 1 if isinstance(params.stop, str) else len(params.stop or ())
    lists = (params.logit_bias, params.allowed_token_ids, params.bad_words)
    rules = samples * (stops + sum(len(one or ()) for one in lists))
    less = "Lower n or max_tokens, or ask several times."
    for amount, most, what, fix in (
        (samples * longest, MAX_REQUEST_TOKENS, f"{samples} samples of up to {longest} tokens are {{}} tokens", less),
        (listed, MAX_REQUEST_LOGPROBS, "up to {} log-probabilities would be listed", f"Lower logprobs. {less}"),
        (
            rules,
            MAX_REQUEST_RULES,
            "stop, logit_bias, allowed_token_ids and bad_words of all samples are {} values",
            less,
        ),
    ):
        if amount > most:
            return Problem(key=key, rule=f"{what.format(amount)}, and one request may have {most}", fix=fix)
    return None


def _listed(logprobs: int | None, vocab_size: int | None) -> int:
    """Entries at one position: the token itself and the likeliest, which -1 takes for all."""
    if logprobs is None:
        return 0
    return (vocab_size or 1) if logprobs < 0 else logprobs + 1


def _choice_rules(params: SamplingParams, rules: Rules) -> None:
    """How a token is chosen."""
    rules.need("n", params.n >= 1, "must be >= 1")
    rules.need("n", params.n <= MAX_SAMPLES, f"must be at most {MAX_SAMPLES}")
    if params.best_of is not None:
        rules.need("best_of", params.best_of <= MAX_SAMPLES, f"must be at most {MAX_SAMPLES}")
        if rules.need("best_of", params.best_of >= 1, "must be >= 1, or null for n"):
            fix = f"Set best_of to {params.n} or more, or leave it out."
            rules.need("best_of", params.best_of >= params.n, f"must be at least n = {params.n}", fix)
        if params.temperature == 0:
            fix = "Set a temperature, or leave best_of out."
            rules.need("best_of", params.best_of <= max(params.n, 1), "with temperature 0 all samples are equal", fix)
    rules.need("temperature", params.temperature >= 0, "must be >= 0")
    rules.need("top_p", 0 < params.top_p <= 1, "must be above 0 and at most 1", "1 keeps all tokens.")
    rules.need("top_k", params.top_k >= -1, "must be >= 1, or 0 or -1 for all tokens")
    rules.need("min_p", 0 <= params.min_p <= 1, "must be between 0 and 1", "0 keeps all tokens.")
    rules.need("presence_penalty", -2 <= params.presence_penalty <= 2, "must be between -2 and 2")
    rules.need("frequency_penalty", -2 <= params.frequency_penalty <= 2, "must be between -2 and 2")
    rules.need("repetition_penalty", params.repetition_penalty > 0, "must be above 0", "1 is no penalty.")
    rules.need("seed", params.seed is None or 0 <= params.seed < MAX_SEED, "must be between 0 and 2^63 - 1, or null")


def _length_rules(params: SamplingParams, rules: Rules) -> None:
    """When the output ends."""
    known = params.max_tokens is not None
    fine = rules.need("max_tokens", not known or params.max_tokens >= 1, "must be >= 1, or null for no limit")
    if rules.need("min_tokens", params.min_tokens >= 0, "must be >= 0") and known and fine:
        rule = f"must be at most max_tokens = {params.max_tokens}"
        rules.need("min_tokens", params.min_tokens <= params.max_tokens, rule)
    stops = [params.stop] if isinstance(params.stop, str) else params.stop
    if stops is not None:
        texts = isinstance(stops, list | tuple) and all(isinstance(stop, str) for stop in stops)
        if rules.need("stop", texts, "must be text, a list of texts, or null", "Put numbers in quotes."):
            rules.need("stop", all(stops), "must not hold an empty text: it would end every output at once")
            rules.need("stop", len(stops) <= MAX_STOPS, f"must be at most {MAX_STOPS} texts")
            long = f"must be at most {MAX_STOP_CHARS} characters together"
            rules.need("stop", sum(map(len, stops)) <= MAX_STOP_CHARS, long)
            rules.need("detokenize", params.detokenize or not stops, "stop strings are looked for in the text")


def _token_rules(params: SamplingParams, rules: Rules, vocab_size: int | None) -> None:
    """Token ids, and how many of them are listed."""
    most = MAX_LOGPROBS if vocab_size is None else min(MAX_LOGPROBS, vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        rule = f"must be between 0 and {most}, -1 for all, or null for none"
        rules.need(name, value is None or -1 <= value <= most, rule)
    allowed, words = params.allowed_token_ids, params.bad_words or ()
    rules.need("allowed_token_ids", allowed is None or len(allowed) > 0, "must hold a token id, or be null for all")
    if rules.need("bad_words", all(word.strip() for word in words), "must not hold an empty text"):
        rules.need("bad_words", len(words) <= MAX_STOPS, f"must be at most {MAX_STOPS} texts")
        long = f"must be at most {MAX_STOP_CHARS} characters together"
        rules.need("bad_words", sum(map(len, words)) <= MAX_STOP_CHARS, long)
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        tokens = getattr(params, name) or ()
        if not rules.need(name, len(tokens) <= MAX_TOKEN_IDS, f"must hold at most {MAX_TOKEN_IDS} token ids"):
            continue
        for token in tokens:
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                rules.problems.append(_bad_token(f"{rules.prefix}{name}", token, vocab_size))
                break
    for token, bias in (params.logit_bias or {}).items():
        if not -100 <= bias <= 100:
            rule = "must be between -100 and 100"
            rules.problems.append(problem(f"{rules.prefix}logit_bias.{token}", rule, bias))
            break


def _bad_token(key: str, token: int, vocab_size: int | None) -> Problem:
    if vocab_size is None:
        return problem(key, "token ids are >= 0", token)
    return problem(key, f"the model's token ids are 0 to {vocab_size - 1}", token)


def sampling_from_mapping(base: SamplingParams, mapping: Any, *, prefix: str = "sampling.") -> SamplingParams:
    """`base` with the keys of `mapping` (a JSON object) changed; ConfigError lists its unknown keys and wrong types.

    Types only: what the values mean together is for `sampling_problems`.
    """
    if not isinstance(mapping, dict):
        raise ConfigError(problem(prefix.rstrip("."), "must be an object of sampling keys", mapping))
    changes = dict(mapping)
    for name, value in changes.items():
        if isinstance(value, list | dict) and len(value) > MAX_TOKEN_IDS:  # before each of them is looked at
            rule = f"has {len(value)} entries, and at most {MAX_TOKEN_IDS} are read"
            raise ConfigError(Problem(key=f"{prefix}{name[:MAX_KEY]}", rule=rule))
    if isinstance(changes.get("logit_bias"), dict):
        changes["logit_bias"] = {token_key(key): bias for key, bias in changes["logit_bias"].items()}
    problems: list[Problem | None] = []
    for name, value in changes.items():
        if name in hints(SamplingParams):
            problems.append(misfit(f"{prefix}{name}", hints(SamplingParams)[name], value))
        else:
            found = unknown_key(str(name)[:MAX_KEY], SamplingParams)
            problems.append(replace(found, key=f"{prefix}{found.key}"))
        if len(problems) == MAX_KEYS:  # more than there are keys
            break
    wrong = [one for one in problems if one]
    if wrong:
        raise ConfigError(*wrong)
    return replace(base, **changes)


def token_key(key: Any) -> Any:
    """A key of `logit_bias`: a token id is a number, but JSON and the command line can only write text."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20 else key


def prompt_problem(prompt: Any, *, key: str, vocab_size: int | None = None) -> Problem | None:
    """What is wrong with one prompt: text, token ids, or a chat (a list of `{role, content}`)."""
    if isinstance(prompt, str):
        return None if prompt else problem(key, "an empty prompt", prompt, "A prompt holds at least one token.")
    if not isinstance(prompt, list | tuple):
        rule = "a prompt must be text, a list of token ids, or a chat (a list of {role, content})"
        return problem(key, rule, prompt, "Text that YAML reads as something else goes in quotes.")
    if not prompt:
        return problem(key, "an empty prompt", prompt, "A prompt holds at least one token.")
    if any(isinstance(message, dict) for message in prompt):
        return messages_problem(prompt, key=key)
    for position, token in enumerate(prompt):
        if type(token) is not int:
            rule = "must be a token id (a whole number); a list of texts is several prompts"
            return problem(f"{key}[{position}]", rule, token)
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            return _bad_token(f"{key}[{position}]", token, vocab_size)
    return None
