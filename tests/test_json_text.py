"""JSON that is read strictly: what is refused, in which words, and what can be read of it nevertheless."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite import json_text
from megalite.json_text import JsonError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_what_json_writes_is_read(value):
    text = json.dumps(value)
    assert json_text.parse(text) == json_text.parse(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "problem", "readable"),
    [
        ('{"a": 1', "is not valid JSON at column 8: ", None),
        ('{\n"a": 1,\n}', "is not valid JSON at line ", None),
        ("", "is not valid JSON at column 1: ", None),
        ('{"id": 1, "a": 2, "a": 3}', "the key 'a' occurs twice", {"id": 1}),
        ('[{"a": {"b": 2, "b": 2}}]', "the key 'b' occurs twice", [{"a": {}}]),
        ('{"id": 1, "a": NaN}', "NaN is not a JSON number", {"id": 1, "a": None}),
        ("[-Infinity]", "-Infinity is not a JSON number", [None]),
        ("[" * 100_000, "is nested too deeply", None),
        ("9" * 5000, "Exceeds the limit (4300 digits)", None),
        (b'{"a": "\xff"}', "is not UTF-8 at byte 8", {"a": "\ufffd"}),
    ],
)
def test_what_is_refused(text, problem, readable):
    with pytest.raises(JsonError) as refused:
        json_text.parse(text)
    assert str(refused.value).startswith(problem)
    assert refused.value.readable == readable


def in_pieces(text: bytes) -> tuple[Any, int]:
    """The value, or the error as text, and how many pauses there were."""
    pauses = 0

    async def pause() -> None:
        nonlocal pauses
        pauses += 1

    try:
        json_text.parse_in_pieces(text, pause).send(None)
    except StopIteration as ended:
        return ended.value, pauses
    except JsonError as error:
        return (str(error), error.readable), pauses
    raise AssertionError("it waits for nothing but pauses")


def at_once(text: bytes) -> Any:
    try:
        return json_text.parse(text)
    except JsonError as error:
        return str(error), error.readable


@given(JSON, st.sampled_from([None, 1]), st.integers(0, 200), st.sampled_from(["", "", ",", "]", "}", '"', "1", "NaN"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_pieces_change_nothing(monkeypatch, value, indent, place, put_in):
    """Neither the value nor what is wrong, wherever pieces are cut."""
    text = json.dumps(value, indent=indent, ensure_ascii=bool(indent))
    place %= len(text)
    text = text[:place] + put_in + text[place + len(put_in) :]
    for size in (1, 5, 17):
        monkeypatch.setattr(json_text, "PIECE", size)
        assert in_pieces(text.encode())[0] == at_once(text.encode()), text


@pytest.mark.parametrize(
    "text",
    [
        b'{"prompt": [%s1]}' % (b"1, " * 5_000),
        b'{"prompt": [[%s1], [%s1]]}' % (b"12," * 10_000, b"1 , " * 10_000),
        b'{"messages": [%s{}]}' % (b'{"role": "user", "content": "a, b"},' * 2000),
        b'{"a": {"b": {%s}}}' % b",".join(b'"%d": "1,2"' % number for number in range(5_000)),
        b'{"stop": [%s"a,"]}' % (b'1, "a,", ' * 30_000),
    ],
)
def test_large_texts_leave_time_for_others(text):
    value, pauses = in_pieces(text)
    assert value == json.loads(text)
    assert pauses > len(text) / json_text.PIECE - 2


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (b"{},", "has more than 1000 objects"),
        (b"[{},{}],", "has more than 1000 objects"),
        (b'"",', "has an array of more than 1000 values that are no numbers"),
        (b'"%d":1,', "has an object of more than 1000 members"),
    ],
)
def test_many_values_are_refused(monkeypatch, part, problem):
    monkeypatch.setattr(json_text, "MAX_VALUES", 1000)
    monkeypatch.setattr(json_text, "MAX_MEMBERS", 1000)
    inside = b"".join(part % number if b"%" in part else part for number in range(10_000))
    text = b"[{%s}]" % inside[:-1] if b":" in part else b"[%s]" % inside[:-1]
    assert in_pieces(text)[0] == (problem, None)


def test_what_lies_deep_in_a_large_text_is_refused():
    inner = b"[" + b"1," * json_text.PIECE + b"1]"
    deep = [b"[" * depth + inner + b"]" * depth for depth in (50, json_text.MAX_DEPTH)]
    assert in_pieces(deep[0])[0] == json.loads(deep[0])
    assert in_pieces(deep[1])[0] == ("is nested too deeply", None)
    assert in_pieces(b"[" * 100_000)[0] == ("is nested too deeply", None)


def test_lines(monkeypatch):
    monkeypatch.setattr(json_text, "MAX_LINE", 1 << 20)
    long = b'"%s"' % (b"a" * (1 << 20))
    raw = b"\n".join([b"\xef\xbb\xbf[1]\r", b"", b" \t", b" {", long, b'"%s"' % (b"a" * ((1 << 20) - 2)), long])
    found = list(json_text.lines(io.BytesIO(raw)))
    assert [line.number for line in found] == [1, 4, 5, 6, 7]
    assert [line.problem and str(line.problem)[:39] for line in found] == [
        None,
        "is not valid JSON at column 3: Expectin",
        "the line is longer than 1 MiB",
        None,
        "the line is longer than 1 MiB",
    ]
    assert [line.raw for line in found[:2]] == [b"[1]", b"{"]
    assert found[0].value == [1] and len(found[3].value) == (1 << 20) - 2
