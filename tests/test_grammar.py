"""Structured output: what can be asked for, and that every output is of the language that was asked for."""

from __future__ import annotations

import json
import re

import pytest

from megalite import SamplingParams, StructuredOutputsParams
from megalite.config.sampling import sampling_from_mapping, sampling_problems
from megalite.config.structured import MAX_CHOICES, MAX_DEPTH, MAX_TEXT, structured_problem
from megalite.errors import ConfigError
from megalite.inference.arguments import plain_params
from megalite.text.grammar import GrammarError, check_grammar, grammar_text

# ---- what can be asked for


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({}, "exactly one of json, json_object, regex, choice, grammar, and has none"),
        ({"json_object": False, "regex": None}, "has none"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice"),
        ({"jsn": {}}, "unknown key 'jsn'"),
        ({"json": "{"}, r"s\.json: is not valid JSON at column 2"),
        ({"json": '{"a": 1, "a": 2}'}, "occurs twice"),
        ({"json": "[1]"}, "must be a JSON schema"),
        ({"json": 5}, "must be a JSON schema"),
        ({"json": {"minimum": float("nan")}}, "is no JSON"),
        ({"json": nested(MAX_DEPTH + 1)}, f"more than {MAX_DEPTH} lists and mappings"),
        ({"json": {"description": "a" * MAX_TEXT}}, f"may have {MAX_TEXT}"),
        ({"regex": " "}, "must be text, and not empty"),
        ({"regex": "a" * (MAX_TEXT + 1)}, f"{MAX_TEXT + 1} characters"),
        ({"regex": "\ud800"}, "half a surrogate pair at character 0"),
        ({"grammar": ["start"]}, "must be text"),
        ({"choice": []}, "a list of texts, at least one"),
        ({"choice": ["a", ""]}, "none empty"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, f"may have {MAX_CHOICES}"),
        ({"json_object": 1}, "true or false"),
        ({"regex": "a", "disable_any_whitespace": True}, "goes with json and json_object"),
    ],
)
def test_what_is_refused_by_its_form(given, rule):
    found = structured_problem("s", given)
    assert found is not None and re.search(rule, str(found)) and len(str(found)) < 400


def test_a_value_nested_without_end_is_refused_and_no_crash():
    with pytest.raises(ConfigError, match="nested too deeply"):
        plain_params(SamplingParams(structured_outputs={"json": nested(5000)}))
    params = sampling_from_mapping(SamplingParams(), {"structured_outputs": {"json": nested(5000)}})
    assert "within each other" in str(sampling_problems(params)[0])


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"json": {"type": "strin"}}, "Invalid type"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": {"$ref": "https://example.com/schema"}}, "failed"),
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "start: " + "(" * 1000 + '"a"' + ")" * 1000}, "too deeply nested"),
    ],
)
def test_what_is_refused_when_it_is_compiled(given, rule):
    assert structured_problem("s", given) is None
    with pytest.raises(GrammarError, match=rule) as raised:
        check_grammar(given)
    assert len(str(raised.value)) < 400


def test_a_long_chain_of_rules_overflows_no_stack():
    count = MAX_TEXT // 15
    rules = "".join(f'r{place}:"a"r{place + 1}\n' for place in range(count))
    given = {"grammar": f'start:r0\n{rules}r{count}:"b"'}
    assert structured_problem("s", given) is None
    check_grammar(given)


@pytest.mark.parametrize(
    "given",
    [
        {"json": json.dumps({"type": "object"})},
        {"json_object": True, "disable_any_whitespace": True},
        {"choice": ['"\n\\é😀\x07', "a", "ab"]},
        {"grammar": 'root ::= "a" | b\nb ::= [0-9]+'},
        {"grammar": 'start: "a" b\nb: /[0-9]+/', "regex": None},
    ],
)
def test_what_can_be_compiled(given):
    assert structured_problem("s", given) is None
    check_grammar(given)
    assert grammar_text(given)


def test_vllm_s_class_and_its_older_name():
    asked = StructuredOutputsParams(json={"type": "object"}, disable_any_whitespace=True, disable_fallback=True)
    for params in (SamplingParams(structured_outputs=asked), SamplingParams(guided_decoding=asked)):
        plain = plain_params(params)
        assert plain.structured_outputs == {"json": {"type": "object"}, "disable_any_whitespace": True}
        assert not sampling_problems(plain)
    assert "must be a mapping" in str(sampling_problems(SamplingParams(structured_outputs="json"))[0])


def test_min_tokens_is_not_for_outputs_that_a_grammar_ends():
    [found] = sampling_problems(SamplingParams(structured_outputs={"regex": "a"}, min_tokens=1))
    assert found.key == "sampling.min_tokens"


def test_without_llguidance_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("megalite.config.structured.is_installed", lambda: False)
    [found] = sampling_problems(SamplingParams(structured_outputs={"regex": "a"}))
    assert found.key == "sampling.structured_outputs" and 'pip install "megalite[grammar]"' in found.fix
