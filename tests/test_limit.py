"""How few tokens a text can be, told from its length: true for every kind of tokenizer, or a fixed limit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megalite.text.limit import MAX_TEXT, MOST_CHARACTERS
from megalite.text.tokenizer import Tokenizer, TokenizerError

VOCABULARY = {
    text: number for number, text in enumerate(["<unk>", "a", "b", "ab", "é", " ", "▁", "aaaa", "e", "\u0301"])
}
BYTES = {f"<0x{byte:02X}>": len(VOCABULARY) + byte for byte in range(256)}
LETTERS = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
MERGES = {"vocab": {**VOCABULARY, "aa": 999}, "merges": [("a", "b"), ("a", "a"), ("aa", "aa")]}
PIECES = [(text, -1.0) for text in (*VOCABULARY, *BYTES)]
MODELS = {
    "byte level": lambda: models.BPE(vocab={**LETTERS, "aa": 256, "aaaa": 257}, merges=[("a", "a"), ("aa", "aa")]),
    "unknown": lambda: models.BPE(**MERGES, unk_token="<unk>"),
    "unknown run": lambda: models.BPE(**MERGES, unk_token="<unk>", fuse_unk=True),
    "dropped": lambda: models.BPE(**MERGES),
    "bytes": lambda: models.BPE(**{**MERGES, "vocab": {**MERGES["vocab"], **BYTES}}, byte_fallback=True),
    "word": lambda: models.WordLevel(VOCABULARY, unk_token="<unk>"),
    "piece": lambda: models.WordPiece(VOCABULARY, unk_token="<unk>"),
    "unigram": lambda: models.Unigram([(text, -1.0) for text in VOCABULARY], 0),
    "unigram bytes": lambda: models.Unigram(PIECES, 0, True),
}
NORMALIZERS = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFKC twice": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFC()]),
    "NFD": normalizers.NFD(),
    "metaspace": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "shorter": normalizers.Replace("aaaa", "a"),
    "pattern": normalizers.Replace(Regex("a+"), "a"),
    "strip": normalizers.Strip(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
}
SPLITTERS = {
    "none": None,
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "spaces": pre_tokenizers.WhitespaceSplit(),
    "removed": pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Split("b", "removed")]),
    "isolated": pre_tokenizers.Split("b", "isolated"),
    "metaspace": pre_tokenizers.Metaspace(),
}
RUNS = st.tuples(st.sampled_from(["a", "b", " ", "é", "e\u0301", "α\u0313\u0300\u0345", "각", "ﷺ", "🙂", "0", "<x>"]))
LONG_TEXTS = st.lists(st.tuples(RUNS, st.integers(1, 40)).map(lambda run: run[0][0] * run[1]), min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(list(MODELS)),
    st.sampled_from(list(NORMALIZERS)),
    st.sampled_from(list(SPLITTERS)),
    st.sampled_from([None, {}, {"rstrip": True}, {"normalized": True}]),
    LONG_TEXTS.map("".join),
)
def test_no_text_has_fewer_tokens_than_its_length_says(model, normalizer, splitter, added, text):
    """Where the length of a text is taken to say how many tokens it has at least, it has as many."""
    backend = Backend(MODELS[model]())
    if NORMALIZERS[normalizer] is not None:
        backend.normalizer = NORMALIZERS[normalizer]
    if SPLITTERS[splitter] is not None:
        backend.pre_tokenizer = SPLITTERS[splitter]
    if added is not None:
        backend.add_special_tokens([AddedToken("<x>", special=True, **added)])
    tokenizer = Tokenizer(backend, {}, {})
    most = tokenizer.most_characters(1, is_ascii=text.isascii())
    if most != MOST_CHARACTERS:
        assert len(tokenizer.encode(text)) * most >= len(text)


def test_most_characters_of_a_token():
    """64 of the longest token where nothing can vanish, four times that where characters compose; else a limit."""

    def most(model: str, normalizer: str = "none", splitter: str = "none") -> tuple[int, int]:
        backend = Backend(MODELS[model]())
        if NORMALIZERS[normalizer] is not None:
            backend.normalizer = NORMALIZERS[normalizer]
        if SPLITTERS[splitter] is not None:
            backend.pre_tokenizer = SPLITTERS[splitter]
        tokenizer = Tokenizer(backend, {}, {})
        return tuple(tokenizer.most_characters(64, is_ascii=ascii) for ascii in (True, False))

    assert most("byte level", splitter="bytes") == (256, 256)
    assert most("byte level", "NFC", "bytes") == (256, 1024)
    assert most("unknown") == (320, 320)  # <unk>
    assert most("bytes", "metaspace") == (384, 384)  # <0x00>
    limit = (64 * MOST_CHARACTERS, 64 * MOST_CHARACTERS)
    assert most("byte level", "strip", "bytes") == most("word") == most("unigram") == most("unknown run") == limit
    assert most("unknown", "accents") == most("unknown", "pattern") == most("unknown", splitter="spaces") == limit
    assert Tokenizer(Backend(MODELS["unknown"]()), {}, {}).most_characters(10**9, is_ascii=True) == MAX_TEXT


def test_each_text_is_tokenised_whatever_the_others_are():
    backend = Backend(models.BPE(**MERGES))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?:(a+)+)+b"), "isolated")
    fine, failing, other = Tokenizer(backend, {}, {}).encode_batch(["ab", "a" * 40, "b"])
    assert (fine, other) == ([3], [2])
    assert isinstance(failing, TokenizerError)
