"""Rules for prompts and sampling parameters, wherever they come from: a config, an input line or Python."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from megalite.config.chat import messages_problem
from megalite.config.rules import Rules
from megalite.config.schema import MAX_STOPS, MAX_TOKEN_IDS, SamplingParams
from megalite.config.structured import structured_problem
from megalite.config.typecheck import hints, misfit, problem, unknown_key
from megalite.errors import ConfigError, Problem

MAX_LOGPROBS = 20
"""Largest number of top tokens reported per position."""
MAX_KEY = 100
"""Characters of an unknown key that are shown."""
MAX_KEYS = 100
"""Keys of a mapping that are looked at."""
MAX_STOP_CHARS = 1 << 16
"""Characters of all stop strings of a request together."""
MAX_REQUEST_TOKENS = 1 << 27
"""Largest number of tokens of a request: its samples, each with the prompt and its longest output."""
MAX_REQUEST_LOGPROBS = 1 << 26
"""Largest number of log-probabilities reported for a request."""
MAX_REQUEST_RULES = 1 << 24
"""Largest number of stop strings, bad words, allowed and biased tokens of a request, counted for each sample: all are
looked at for every token."""


def sampling_problems(
    params: SamplingParams, *, prefix: str = "sampling.", vocab_size: int | None = None
) -> list[Problem]:
    """Everything that is wrong with `params`; token ids are checked where `vocab_size` is known.

    `prefix` goes before each field's name in the problem's key. Types are checked too, as Python's callers may pass
    anything; rules are looked at once the types are right.
    """
    known = hints(SamplingParams)
    given = [one.name for one in fields(params) if getattr(params, one.name) is not one.default]
    wrong = [misfit(f"{prefix}{name}", known[name], getattr(params, name)) for name in given]
    found = [one for one in wrong if one]
    if found:
        return found
    rules = Rules(params, prefix)
    sampling_rules(rules, vocab_size)
    return rules.problems


def sampling_rules(rules: Rules, vocab_size: int | None) -> None:
    """The rules between the values of sampling parameters, and those of single values that are no bounds."""
    params: SamplingParams = rules.section
    if params.best_of is not None:
        fix = f"Set best_of to {params.n} or more, or leave it out."
        rules.need("best_of", params.best_of >= params.n, f"must be at least n = {params.n}", fix)
        differ = params.temperature > 0 or params.best_of <= max(params.n, 1)
        rules.need("best_of", differ, "with temperature 0 all samples are equal", "Set a temperature, or leave it out.")
    if params.max_tokens is not None and rules.sound("max_tokens"):
        rules.need(
            "min_tokens", params.min_tokens <= params.max_tokens, f"must be at most max_tokens = {params.max_tokens}"
        )
    stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
    texts = isinstance(stops, list | tuple) and all(isinstance(stop, str) for stop in stops)
    rules.need("stop", texts, "must be text, a list of texts, or null", "Put numbers in quotes.")
    if rules.sound("stop"):
        rules.need("stop", all(stops), "must not hold an empty text: it would end every output at once")
        rules.need("detokenize", params.detokenize or not stops, "stop strings are looked for in the text")
    rules.need("bad_words", all(word.strip() for word in params.bad_words or ()), "must not hold an empty text")
    for name, words in (("stop", stops if rules.sound("stop") else ()), ("bad_words", params.bad_words or ())):
        rules.need(name, len(words) <= MAX_STOPS, f"must be at most {MAX_STOPS} texts")
        long = f"must be at most {MAX_STOP_CHARS} characters together"
        rules.need(name, sum(map(len, words)) <= MAX_STOP_CHARS, long)
    if params.structured_outputs is not None:
        key = f"{rules.prefix}structured_outputs"
        rules.note("structured_outputs", structured_problem(key, params.structured_outputs))
        fix = "Leave it out, or say in the schema or the grammar how long an output is."
        rules.need("min_tokens", not params.min_tokens, "structured_outputs say where an output may end", fix)
    most = min(MAX_LOGPROBS, vocab_size or MAX_LOGPROBS)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        rule = f"must be between 0 and {most}, -1 for all, or null for none"
        rules.need(name, value is None or -1 <= value <= most, rule)
    rules.need("allowed_token_ids", params.allowed_token_ids != [], "must hold a token id, or be null for all")
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        for token in getattr(params, name) or ():
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                rules.note(name, _bad_token(f"{rules.prefix}{name}", token, vocab_size))
                break


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
    """Entries at one position: the token itself and the top tokens, all of them for -1."""
    if logprobs is None:
        return 0
    return (vocab_size or 1) if logprobs < 0 else logprobs + 1


def _bad_token(key: str, token: int, vocab_size: int | None) -> Problem:
    rule = "token ids are >= 0" if vocab_size is None else f"the model's token ids are 0 to {vocab_size - 1}"
    return problem(key, rule, token)


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
        in_config = key.startswith("input.prompts")
        return problem(key, rule, prompt, "Text that YAML reads as something else goes in quotes." * in_config)
    if not prompt:
        return problem(key, "an empty prompt", prompt, "A prompt holds at least one token.")
    kinds = set(map(type, prompt))  # prompts are long, so no look at each of their tokens from Python
    if kinds == {int} and min(prompt) >= 0 and (vocab_size is None or max(prompt) < vocab_size):
        return None
    if any(issubclass(kind, dict) for kind in kinds):
        return messages_problem(prompt, key=key)
    for position, token in enumerate(prompt):
        if type(token) is not int:
            rule = "must be a token id (a whole number); a list of texts is several prompts"
            return problem(f"{key}[{position}]", rule, token)
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            return _bad_token(f"{key}[{position}]", token, vocab_size)
    return None
