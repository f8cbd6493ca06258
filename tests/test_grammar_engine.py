"""Structured output in the engine: every output is of its language, and the same in every layout and setting."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from one_request import make_request
from slow_generation import Ask, Expected, Slow
from test_engine import OVERLAP, TIGHT, Setting, assert_as_expected, generate, replica_of, requests_for, tokens
from tiny_models import VOCAB
from tiny_tokenizer import with_tokenizer
from tokenizer_family import FAMILY
from tokenizers import decoders

from megalite.config.schema import SamplingParams
from megalite.core.layout import Layout
from megalite.errors import ConfigError
from megalite.inference.io.inputs import PromptLimits
from megalite.inference.matchers import Matchers, Outcome
from megalite.inference.request import Request, Row, Sequence
from megalite.inference.run import run_everywhere
from megalite.text.grammar import GrammarError, Grammars, grammar_text, grammars_of
from megalite.text.tokenizer import Tokenizer

PET = {
    "type": "object",
    "properties": {
        "n": {"type": "string", "maxLength": 3},
        "k": {"enum": ["a", "é", 3, None]},
        "l": {"type": "array", "items": {"type": "integer", "minimum": -20, "maximum": 300}, "maxItems": 2},
        "o": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
    "required": ["n", "k", "l", "o"],
    "additionalProperties": False,
}
SUM = 'start: term (("+" | "-") term){0,2}\nterm: /[1-9][0-9]?/ | "(" start ")"'


def is_pet(text: str) -> bool:
    value = json.loads(text)
    assert list(value) == list(PET["properties"]) and list(value["o"]) == ["x"]
    assert len(value["l"]) <= 2 and all(type(one) is int and -20 <= one <= 300 for one in value["l"])
    return len(value["n"]) <= 3 and value["k"] in ("a", "é", 3, None) and value["o"]["x"] in (True, False)


def is_sum(text: str) -> bool:
    return re.fullmatch(r"[0-9+()-]+", text) is not None and isinstance(eval(text), int)


ANY = r"(?s).*"
_ASKED = [
    (5, {"json": PET, "disable_any_whitespace": True}, {"n": 2}, is_pet),
    (20, {"json": json.dumps(PET), "disable_any_whitespace": True}, {"seed": 2, "temperature": 0.8}, is_pet),
    (3, {"regex": "[A-Z][a-z]{2,5} [0-9]{4}-[01][0-9]"}, {"top_k": 9}, r"[A-Z][a-z]{2,5} \d{4}-[01]\d"),
    (7, {"choice": ["yes", "no", "Ja, é", "yesterday"]}, {"n": 3}, r"yes|no|Ja, é|yesterday"),
    (4, {"grammar": SUM}, {"stop_token_ids": [2]}, is_sum),
    (9, {"grammar": 'root ::= "[" item ("," item)* "]"\nitem ::= [a-c]'}, {}, r"\[[a-c](,[a-c])*\]"),
    (6, {"regex": "[ab]+"}, {"ignore_eos": False, "logit_bias": {2: 3.0}, "n": 2}, r"[ab]+"),
    (11, {"regex": "[a-f]{12}"}, {"temperature": 0, "repetition_penalty": 1.3}, r"[a-f]{12}"),
    (11, {"regex": "[a-f]{9}"}, {"allowed_token_ids": [68, 69, 70], "frequency_penalty": 0.5}, r"[a-c]{9}"),
    (8, None, {"max_tokens": 15}, ANY),
]
ASKS = [
    Ask(
        place,
        tokens(length),
        SamplingParams(
            **{"max_tokens": 70, "ignore_eos": True, "logprobs": 1, "structured_outputs": wanted, **more},
        ),
    )
    for place, (length, wanted, more, _) in enumerate(_ASKED)
]
CHECKS = [check for *_, check in _ASKED]


@pytest.fixture(scope="module")
def talking(tiny, tmp_path_factory) -> Path:
    return with_tokenizer(tiny("llama3", 2), tmp_path_factory.mktemp("talking") / "model")


@pytest.fixture(scope="module")
def expected(talking) -> list[Expected]:
    made = [Slow(talking)(ask) for ask in ASKS]
    tokenizer = Tokenizer.load(talking)
    for want, check in zip(made, CHECKS, strict=True):
        for one in want.completions:
            text = tokenizer.decode(one.token_ids, skip_special_tokens=True)
            assert one.reason == "stop" or check == ANY, text
            assert re.fullmatch(check, text) if isinstance(check, str) else check(text), text
    return made


_TIGHT = {**TIGHT, "num_kv_blocks": 28}
SETTINGS = {
    "together": Setting(),
    "recomputed": Setting(engine=_TIGHT),
    "overlap, recomputed": Setting(engine={**_TIGHT, **OVERLAP}),
    "tp2": Setting(layout=Layout(2, 1, 1)),
    "pp2": Setting(layout=Layout(1, 2, 1)),
    "overlap, tp2 pp2": Setting(layout=Layout(2, 2, 1), engine=OVERLAP),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_follow_their_grammars_in_every_setting(name, talking, ranks, expected, tmp_path):
    setting = SETTINGS[name]
    answers = ranks(setting.layout.size).run(generate, talking, setting, ASKS, str(tmp_path / "store"))
    for [(outputs, seen)] in answers:
        assert_as_expected(ASKS, outputs, expected)
        assert bool(seen.recomputed) == ("recomputed" in name)


def go_on(rank: int, folder: Path, ask: Ask, given: tuple[int, ...], store: str):
    """The output of a request that has had some tokens already."""
    replica = replica_of(Setting(engine=OVERLAP), rank, folder, store)
    [request] = requests_for(replica, [ask])
    replayed = replace(request, given=(given, *[()] * (request.num_samples - 1)))
    return run_everywhere(replica, replica.engine(), [replayed], key="replay")


@pytest.mark.parametrize("count", [9, None], ids=["a part", "all"])
def test_a_replayed_request_goes_on_in_its_grammar(count, talking, ranks, expected, tmp_path):
    given = expected[0].completions[0].token_ids[:count]
    [[output]] = ranks(1).run(go_on, talking, ASKS[0], tuple(given), str(tmp_path / "store"))
    assert [one.token_ids for one in output.outputs] == [one.token_ids for one in expected[0].completions]
    assert [one.finish_reason for one in output.outputs] == ["stop", "stop"]


def test_a_grammar_that_fails_on_the_way_costs_its_request(talking, ranks, tmp_path):
    hopeless = [
        ({"regex": "aü"}, {}, "no token of the vocabulary can come next"),  # half of it is no token of this tokenizer
        ({"regex": "[ab]{3}"}, {"allowed_token_ids": [5]}, "every token is ruled out"),
        ({"grammar": 'start: ""'}, {}, "every token is ruled out"),
        ({"regex": "[a-f]{9}"}, {}, None),
    ]
    asks = [
        Ask(place, tokens(4), SamplingParams(max_tokens=20, ignore_eos=True, structured_outputs=wanted, **more))
        for place, (wanted, more, _) in enumerate(hopeless)
    ]
    setting = Setting(layout=Layout(2, 1, 1), engine=OVERLAP)
    for [(outputs, _)] in ranks(2).run(generate, talking, setting, asks, str(tmp_path / "store")):
        for output, (*_, problem) in zip(outputs, hopeless, strict=True):
            assert [one.finish_reason for one in output.outputs] == ["error" if problem else "stop"]
            assert problem is None or problem in output.error
        assert re.fullmatch("[a-f]{9}", outputs[3].outputs[0].text)


# ---- what is refused


def test_a_model_s_requests_are_checked_before_they_run(talking):
    limits = PromptLimits(tokenizer=Tokenizer.load(talking), vocab_size=VOCAB, max_model_len=50)
    with pytest.raises(ConfigError, match=r"structured_outputs\.json: Invalid type"):
        make_request([5], SamplingParams(structured_outputs={"json": {"type": "strin"}}), limits)
    params = SamplingParams(structured_outputs={"regex": "a"})
    assert make_request([5], params, limits).grammar
    with pytest.raises(ConfigError, match="structured_outputs need a tokenizer"):
        make_request([5], params, replace(limits, tokenizer=None))


# ---- matchers


class Follows:
    """A sequence in row 0 with a grammar."""

    def __init__(self, tokenizer: Tokenizer, wanted: dict, given: str = "", vocab_size: int = VOCAB + 40):
        self.tokenizer = tokenizer
        self.request = Request(
            id="r",
            prompt_token_ids=(5,),
            params=SamplingParams(),
            seed=0,
            max_tokens=9,
            stop_token_ids=frozenset([2, 31, VOCAB + 3, 9999]),
            grammar=grammar_text(wanted),
        )
        self.sequence = Sequence(self.request, 0, [5, *self.ids(given)], row=0)
        self.matchers = Matchers(tokenizer, vocab_size)
        self.matchers.admit(0, self.sequence)

    @property
    def rows(self) -> list[Row]:
        return [Row(self.sequence, 0, len(self.sequence.token_ids) - 1, 1, True)]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def allowed(self) -> set[int]:
        masks = self.matchers.masks(self.rows)
        assert masks.places == [0]
        return set(np.flatnonzero(np.unpackbits(masks.wait()[0].view(np.uint8), bitorder="little")).tolist())

    def say(self, token_id: int) -> Outcome:
        outcome = self.matchers.follow(self.rows, [token_id]).get(0, Outcome())
        self.sequence.token_ids.append(token_id)
        return outcome


ENDS = {2, 31, VOCAB + 3}


def test_stop_ids_may_come_where_the_output_may_end_and_padding_ids_never(talking):
    row = Follows(Tokenizer.load(talking), {"regex": "a(b|c)?(dd)?"})
    a, b, c, d = row.ids("abcd")
    assert row.allowed() == {a}
    assert row.say(a) == Outcome() and row.allowed() == {b, c, d} | ENDS
    assert row.say(d) == Outcome() and row.allowed() == {d}
    assert row.say(d) == Outcome(finished=True)


def test_a_row_begins_with_the_tokens_that_it_has(talking):
    row = Follows(Tokenizer.load(talking), {"choice": ["abc", "abd"]}, given="ab")
    assert row.allowed() == set(row.ids("cd"))
    assert row.say(row.ids("d")[0]).finished
    row.sequence.finish_reason = "stop"
    assert row.matchers.masks(row.rows) is None, "it has ended"


def test_a_token_that_does_not_fit_and_work_beyond_the_limits_are_problems_of_the_row(talking, monkeypatch):
    row = Follows(Tokenizer.load(talking), {"regex": "ab"})
    assert row.allowed() == set(row.ids("a"))
    assert "can't be followed" in row.say(row.ids("b")[0]).problem
    assert row.allowed() == set(), "and not the end"
    monkeypatch.setattr("megalite.text.grammar.MAX_LEXER_STATES", 40)
    row = Follows(Tokenizer.load(talking), {"regex": "(.*a.{30})|(.*b.{31})"})
    for token_id in row.ids("abbaabab" * 4):
        allowed, outcome = row.allowed(), row.say(token_id)
        if outcome.problem is not None:
            break
        assert token_id in allowed
    assert "too many states" in outcome.problem and row.allowed() == set()


@pytest.mark.parametrize("name", ["byte level", "metaspace first"])
def test_any_tokenizer_has_a_token_for_the_end(name, tmp_path):
    """Without special tokens, with ids left out, with an end beyond all that are known."""
    whole = json.loads(FAMILY[name]().to_str())
    for special, gap, eos in itertools.product((True, False), (0, 40), (None, "</s>", "hello", "new")):
        values = json.loads(json.dumps(whole))
        vocabulary = values["model"]["vocab"]
        vocabulary["hello"] += gap
        if not special:
            values["added_tokens"] = []
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({} if eos is None else {"eos_token": eos}))
        tokenizer = Tokenizer.load(tmp_path)
        matcher = Grammars(tokenizer, len(tokenizer)).matcher(grammar_text({"regex": " ?the"}))
        assert matcher.consume_tokens(tokenizer.encode("the", add_special_tokens=False)) and matcher.is_accepting()


def test_a_tokenizer_that_can_not_be_read_is_the_grammar_s_problem(talking, monkeypatch):
    tokenizer = Tokenizer.load(talking)
    tokenizer.backend.decoder = decoders.CTC()
    with pytest.raises(GrammarError, match="the model's tokenizer can't be used"):
        grammars_of(tokenizer, VOCAB).matcher(grammar_text({"regex": "a"}))
