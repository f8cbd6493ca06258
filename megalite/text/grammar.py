"""Grammars that an output must follow, compiled for a tokenizer by llguidance. Torch-free.

llguidance is an optional package; the config's rules refuse structured output where it is missing. Its limits count
work, not seconds, so that all ranks come to the same end; rules that refer to each other it follows recursively.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from megalite.config.structured import wanted
from megalite.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

STACK = 256 << 20
"""Bytes of address space for the stack of a thread that compiles; 8 MiB overflow at some 3000 rules in a chain, and the
text of a grammar has room for some 15000."""
MAX_LEXER_STATES = 100_000
"""Each takes some 300 bytes in a sequence that meets it."""
COMPILED_KEPT = 64
"""Grammars whose compiled form is kept for later sequences."""
MAX_MESSAGE = 300

_T = TypeVar("_T")


class GrammarError(ValueError):
    """A grammar can't be used, and why."""


def grammar_text(given: Mapping[str, Any]) -> str:
    """llguidance's text for a value of structured_outputs that obeys the config's rules.

    GrammarError: there is none, as far as it shows before it is compiled.
    """
    from llguidance import LLMatcher, grammar_from

    asked = wanted(given)
    overrides: Any = {"whitespace_flexible": False} if asked.pop("disable_any_whitespace", False) else None
    [(kind, value)] = asked.items()
    try:
        if kind in ("json", "json_object"):
            schema = {"type": "object"} if kind == "json_object" else value
            return LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
        if kind == "choice":
            return LLMatcher.grammar_from_lark(
                f"start: {' | '.join(json.dumps(one, ensure_ascii=False) for one in value)}"
            )
        if kind == "regex":
            return LLMatcher.grammar_from_regex(value)
        return grammar_from("grammar", value)
    except (ValueError, RecursionError) as error:
        raise GrammarError(shortened(error)) from error


def check_grammar(given: Mapping[str, Any]) -> None:
    """GrammarError: a value of structured_outputs can't be compiled, for whatever tokenizer."""
    from llguidance import LLMatcher

    text = grammar_text(given)
    wrong = _on_large_stack(lambda: LLMatcher.validate_grammar_with_warnings(text, None, limits=_limits()))
    if wrong[0]:
        raise GrammarError(shortened(wrong[1][0]))


class Grammars:
    """Matchers of grammars over the tokens of a model. Any thread may ask."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab().values()
        eos = tokenizer.eos_token_id
        found = [*([] if eos is None else [eos]), *sorted(tokenizer.special_ids), *sorted(known, reverse=True)]
        self.end = next(one for one in found if one < len(tokenizer))
        """The token that llguidance, which needs one, takes for the end; the request says which ones end its output.
        Where ids are left out it knows those below the number of tokens only, and the others are never chosen."""
        self._size = max(vocab_size, max(known) + 1)
        self.words = -(-self._size // 32)
        """int32 numbers of a mask: bit i of number j is set if token 32 * j + i may come next."""
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, text: str) -> LLMatcher:
        """A matcher at the beginning of the grammar that `grammar_text` gave. GrammarError: it can't be compiled."""
        with self._lock:
            known = self._compiled.get(text)
            if known is None:
                known = self._compiled[text] = _on_large_stack(lambda: self._compile(text))
                if len(self._compiled) > COMPILED_KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(text)
            return known.deep_copy()

    def prepare(self) -> None:
        """Read the tokenizer now, which for a large one takes a second. GrammarError: it can't be used."""
        with self._lock:
            self._read_tokens()

    def _read_tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._tokens is None:
            try:
                source = self.tokenizer.backend.to_str()
                self._tokens = LLTokenizer(source, n_vocab=self._size, eos_token=self.end)
            except ValueError as error:
                raise GrammarError(f"the model's tokenizer can't be used for it: {shortened(error)}") from error
        return self._tokens

    def _compile(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher

        made = LLMatcher(self._read_tokens(), text, log_level=0, limits=_limits())
        if made.is_error():
            raise GrammarError(shortened(made.get_error()))
        return made


@lru_cache(maxsize=4)
def grammars_of(tokenizer: Tokenizer, vocab_size: int) -> Grammars:
    """The grammars of a tokenizer: one object for all who ask in this process."""
    return Grammars(tokenizer, vocab_size)


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def shortened(error: object) -> str:
    """llguidance's words on one line, without the grammar that it repeats."""
    text = " ".join(str(error).replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


_starting = threading.Lock()


def _on_large_stack(work: Callable[[], _T]) -> _T:
    """What `work` gives or raises, in a thread that has STACK; a panic of Rust's is a GrammarError."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            panic = type(error).__name__ == "PanicException"  # of pyo3, which gives it no public name
            future.set_exception(GrammarError(shortened(error)) if panic else error)

    with _starting:
        before = threading.stack_size(STACK)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return future.result()
