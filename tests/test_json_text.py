"""JSON that is read strictly: what is refused, in which words, and what can be read of it nevertheless."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
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
