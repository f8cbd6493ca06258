"""The tokenizer against transformers, the incremental detokenizer against decoding all at once, and chat templates."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_family import FAMILY, SPECIAL, panicking
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from waiting import PATIENCE, wait_until

from megalite.errors import CheckpointError
from megalite.run.processes import Process, descendants
from megalite.text.chat_template import MAX_RENDERED_CHARS, MAX_TEMPLATE_CHARS, ChatTemplate, TemplateError
from megalite.text.detokenizer import TokenizerError
from megalite.text.tokenizer import Tokenizer

TEXTS = [
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "Ärger im Café, naïve œuvre — 東京は日本の首都です。 мир 🙂🏳️‍🌈 don't stop.",
    "the quick brown fox jumps over the lazy dog, isn't it ? the end .",
] * 4
CHAT = """{%- for message in messages %}
{{- bos_token if loop.first }}<|user|>{{ message['role'] }}
{{ message.content | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|user|>assistant
{% endif %}"""


def byte_level() -> Backend:
    backend = FAMILY["byte level, words"]()
    backend.add_tokens([AddedToken("東京", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def byte_fallback() -> Backend:
    return FAMILY["prepend"]()


def metaspace() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def wordpiece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return backend


def word_suffix() -> Backend:
    """Words end in </w>, as in the first GPT."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def plain_words() -> Backend:
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return backend


KINDS = {make.__name__: make for make in (byte_level, byte_fallback, metaspace, wordpiece, word_suffix, plain_words)}


@cache
def tokenizer(kind: str) -> Tokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(KINDS[kind](), config, {"default": CHAT})


def write(folder: Path, kind: str = "byte_level", **config: object) -> Path:
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def transformers_tokenizer(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


# ---- against transformers

SAMPLES = [
    *TEXTS[:3],
    "",
    " leading and trailing ",
    "a<|user|>b</s>",
    "<s>written out",
    "tabs\t\r\nand 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ☃ \u200b \x00",
    "東京東京 日本",
]


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece", "word_suffix"])
def test_other_tokenizers_as_transformers(tmp_path, kind):
    theirs = transformers_tokenizer(write(tmp_path, kind))
    ours = Tokenizer.load(tmp_path)
    for text in SAMPLES:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


MESSAGES = [{"role": "system", "content": "Be <brief> & 'kind' é"}, {"role": "user", "content": "Hi\n", "name": None}]


@pytest.mark.parametrize(
    "template",
    [
        CHAT,
        "{{ messages | tojson(indent=2) }} {{ tools is none }} {{ documents }} {{ unk_token }}{{ nothing }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "  {% if true %}\n  x\n  {% endif %}\n{{ messages[0].content | trim | upper }}\n",
        "{{ messages[1].name is defined }} {{ messages[0]['content'].split()[1:] }} {{ dict(a=1) }}",
        "{% macro m(x) %}[{{ x }}]{% endmacro %}{% for i in range(3) %}{{ m(i) }}{% endfor %}{{ thinking }}",
    ],
)
def test_chat_as_transformers(tmp_path, template):
    theirs = transformers_tokenizer(write(tmp_path, chat_template=template))
    ours = Tokenizer.load(tmp_path)
    for prompt in (True, False):
        text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat_text(MESSAGES, add_generation_prompt=prompt) == text
        ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode(text, add_special_tokens=False) == ids
    ours.close()


def test_what_programs_call_besides(tmp_path):
    folder = write(tmp_path, chat_template=CHAT, pad_token="<pad>", unk_token="<unk>")
    theirs, ours = transformers_tokenizer(folder), Tokenizer.load(folder)
    for name in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    texts = ["a text", "and\n another", ""]
    for some in (texts[0], texts):
        for special in (True, False):
            encoded, wanted = (one(some, add_special_tokens=special) for one in (ours, theirs))
            assert encoded.input_ids == encoded["input_ids"] == wanted.input_ids
            assert encoded.attention_mask == wanted.attention_mask
    ids = theirs(texts).input_ids
    for skip in ({}, {"skip_special_tokens": True}, {"skip_special_tokens": False}):
        assert ours.batch_decode(ids, **skip) == ours.decode(ids, **skip) == theirs.batch_decode(ids, **skip)
        for some in (ids[0], np.array(ids[0]), ids[0][0], np.int64(ids[0][0]), []):
            assert ours.decode(some, **skip) == theirs.decode(some, **skip)
    tokens = theirs.convert_ids_to_tokens(ids[0])
    assert ours.convert_ids_to_tokens(ids[0]) == tokens and ours.convert_ids_to_tokens(ids[0][0]) == tokens[0]
    for some in (tokens, tokens[0], "no such token"):
        assert ours.convert_tokens_to_ids(some) == theirs.convert_tokens_to_ids(some)
    for chat in (MESSAGES, [MESSAGES, MESSAGES[:1]]):
        for prompt, tokenize, return_dict in itertools.product((True, False), repeat=3):
            options = {"add_generation_prompt": prompt, "tokenize": tokenize, "return_dict": return_dict and tokenize}
            got, wanted = (one.apply_chat_template(chat, **options) for one in (ours, theirs))
            assert got == (wanted if isinstance(wanted, str | list) else dict(wanted)), options
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(chat) == text
    with pytest.raises(AttributeError):
        encoded.offsets_of_nothing  # noqa: B018
    with pytest.raises(ValueError, match="half a surrogate pair"):
        ours(["fine", "\ud800"])
    ours.close()


def test_templates_of_the_callers_own_are_few(tmp_path):
    """Each holds a process; only the last ones used are kept."""
    ours = Tokenizer.load(write(tmp_path, chat_template=CHAT))
    before = {one.pid for one in descendants(os.getpid())}
    for number in range(9):
        assert ours.chat_text(MESSAGES, chat_template=f"{number}") == f"{number}"
        ours.chat_text(MESSAGES)
    assert len({one.pid for one in descendants(os.getpid())} - before) == 4
    ours.close()
    assert not {one.pid for one in descendants(os.getpid())} - before


def test_a_decoder_that_fails_costs_one_text():
    """Cutting more of a token than it has is a panic of the library."""
    backend = panicking()
    with pytest.raises(BaseException, match="slice index") as error:
        backend.decode([1])
    assert not isinstance(error.value, Exception), "else this test shows nothing"
    ours = Tokenizer(backend, {}, {})
    assert ours.decode([2]) == "long token"
    with pytest.raises(TokenizerError, match="fails at these tokens"):
        ours.decode([1])
    with pytest.raises(TokenizerError, match="fails at these tokens"):
        ours.token_text(1)
    with pytest.raises(TokenizerError, match="fails at these tokens"):
        ours.detokenizer().feed(1)


def test_reasoning_goes_by_all_its_names(tmp_path):
    template = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    theirs = transformers_tokenizer(write(tmp_path, chat_template=template))
    ours = Tokenizer.load(tmp_path)
    for name in ("reasoning_content", "thinking", "reasoning"):
        messages = [{"role": "assistant", "content": "", name: "hm"}]
        assert ours.chat_text(messages) == theirs.apply_chat_template(messages, tokenize=False)
    ours.close()


# ---- loading


def test_folders_without_tokenizer_json(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"has tokenizer.model but no tokenizer.json[^$]*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer that can be read"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", "[]", "must be a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "3 is not a token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "can't be used"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "can't be used"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x", "template": 1}]}', "must be a text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "can't be used"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    write(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


def test_template_files_go_first(tmp_path):
    write(tmp_path, chat_template="from the config")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with {{ tools | length }} tools")
    ours = Tokenizer.load(tmp_path)
    assert ours.chat_text(MESSAGES) == "from the file"
    assert ours.chat_text(MESSAGES, tools=[{}, {}]) == "with 2 tools"
    ours.close()


def test_folders_without_a_usual_template(tmp_path):
    ours = Tokenizer.load(write(tmp_path))
    assert not ours.has_chat_template
    with pytest.raises(TemplateError, match="no chat template"):
        ours.chat_text(MESSAGES)
    ours = Tokenizer.load(write(tmp_path, chat_template=[{"name": "rag", "template": "x"}]))
    with pytest.raises(TemplateError, match=r"\['rag'\] and none named default"):
        ours.chat_text(MESSAGES)


@pytest.mark.parametrize("special", [True, False])
def test_a_batch_is_encoded_as_its_texts_are(tmp_path, special, monkeypatch):
    ours = Tokenizer.load(write(tmp_path))
    texts = [*TEXTS[0].split(), "", "a\ud800", *TEXTS[1].split(), "</s>a <s>", "x" * 3000]

    def alone(text: str) -> list[int] | str:
        try:
            return ours.encode(text, add_special_tokens=special)
        except ValueError as error:
            return str(error)

    expected = [alone(text) for text in texts]
    for size in (1, 20, 1 << 20):  # characters a batch
        monkeypatch.setattr("megalite.text.tokenizer._BATCH_CHARACTERS", size)
        together = ours.encode_batch(texts, add_special_tokens=special)
        assert [str(one) if isinstance(one, ValueError) else one for one in together] == expected
    assert ours.encode_batch([]) == []


# ---- token by token


def pieces(kind: str, prompt: list[int], output: list[int], skip: bool) -> list[str]:
    detokenizer = tokenizer(kind).detokenizer(prompt, skip_special_tokens=skip)
    return [*(detokenizer.feed(token_id) for token_id in output), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_add_up_for_any_text(kind, data):
    ours = tokenizer(kind)
    ids = ours.encode(data.draw(st.text(max_size=40)))
    cut = data.draw(st.integers(0, len(ids)))
    skip = data.draw(st.booleans())
    assert "".join(pieces(kind, [], ids, skip)) == ours.decode(ids, skip_special_tokens=skip)
    head = "".join(pieces(kind, [], ids[:cut], skip)[:-1])  # without the flush: whole characters
    after = "".join(pieces(kind, ids[:cut], ids[cut:], skip))
    whole = ours.decode(ids, skip_special_tokens=skip)
    assert whole.endswith(after)
    if kind == "byte_level":
        assert head + after == whole
    if "\ufffd" not in ours.decode(ids[:cut]):  # the prompt ends between characters
        assert ours.decode(ids[:cut], skip_special_tokens=skip) + after == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_add_up_for_any_ids(kind, data):
    """As a model with random weights writes them: bytes that are no UTF-8, special tokens, ids without a token."""
    ours = tokenizer(kind)
    some_ids = st.lists(st.integers(0, len(ours) + 3), max_size=20)
    prompt, ids, skip = data.draw(some_ids), data.draw(some_ids), data.draw(st.booleans())
    got = pieces(kind, [], ids, skip)
    assert "".join(got) == ours.decode(ids, skip_special_tokens=skip)
    for end in range(len(ids)):  # nothing given out is ever taken back
        assert ours.decode(ids[: end + 1], skip_special_tokens=skip).startswith("".join(got[: end + 1]))
    last = ours.backend.id_to_token(prompt[-1]) if prompt else ""
    # a run of bytes over the boundary is judged from the first character that the prompt leaves unfinished
    if kind != "byte_fallback" or not (last is None or last.startswith("<")):
        after = "".join(pieces(kind, prompt, ids, skip=True))
        assert ours.decode(prompt + ids, skip_special_tokens=True).endswith(after)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_half_a_character_is_held_back(kind):
    ours = tokenizer(kind)
    ids = ours.encode("a🙂b", add_special_tokens=False)
    got = pieces(kind, [], ids, skip=True)
    assert "\ufffd" not in "".join(got)
    assert any("🙂" in piece for piece in got)
    assert sum(piece == "" for piece in got[:-1]) >= 2


def test_characters_at_the_border_of_the_prompt_and_at_the_end():
    for kind in ("byte_level", "byte_fallback"):
        ids = tokenizer(kind).encode("é🙂", add_special_tokens=False)
        assert "".join(pieces(kind, ids[:-2], ids[-2:], skip=True)) == "🙂", "begun by the prompt"
    ids = tokenizer("byte_level").encode("🙂", add_special_tokens=False)[:-1]
    assert pieces("byte_level", [], ids, skip=True)[-1] == "\ufffd", "unfinished, so flushed"


@pytest.mark.parametrize(
    ("prompt", "text"), [(["<s>", "▁the"], " hello"), (["<s>"], "hello"), (["<0x41>"], " hello")], ids=str
)
def test_the_space_after_a_prompt_is_kept(prompt, text):
    known = tokenizer("byte_fallback").backend.token_to_id
    assert "".join(pieces("byte_fallback", [*map(known, prompt)], [known("▁hello")], skip=True)) == text


def test_token_text_is_as_inside_a_text():
    ours = tokenizer("byte_fallback")
    assert ours.token_text(ours.backend.token_to_id("▁hello")) == " hello"
    assert ours.token_text(10_000) == ""
    assert tokenizer("byte_level").token_text(tokenizer("byte_level").encode(" the")[1]) == " the"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_work_per_token_does_not_grow(kind):
    """A run of bytes that never becomes a character is the worst case for decoders that look back."""
    ours = tokenizer(kind)
    byte = ours.encode("🙂", add_special_tokens=False)[-1]
    seen = []

    class Counting:
        def decode(self, ids, **options):
            seen.append(len(ids))
            return ours.backend.decode(ids, **options)

    detokenizer, count = ours.detokenizer(), 5_000
    if kind == "byte_fallback":
        detokenizer._pairs._backend, original = Counting(), detokenizer._pairs._backend
    try:
        text = "".join([detokenizer.feed(byte) for _ in range(count)]) + detokenizer.flush()
    finally:
        if kind == "byte_fallback":
            detokenizer._pairs._backend = original
    assert text == "\ufffd" * count and sum(seen) <= 2 * count


# ---- templates that misbehave


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took more than 0.5 s"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}", "took more than"),
        ("{{ 'a' * 10 ** 10 }}", "took more than"),
        ("{{ 'a' | center(2 ** 40) }}", "took more than"),
        ("{{ 7 ** (10 ** 8) }}", "took more than"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", f"more than {MAX_RENDERED_CHARS} characters"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template refuses: roles must alternate"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{% include 'x' %}", "TypeError|no loader"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ a.b.c }}", "UndefinedError"),
    ],
)
def test_template_is_stopped(source, message):
    template = ChatTemplate(source, cpu_seconds=0.5 if "took" in message else 60.0)
    with pytest.raises(TemplateError, match=message):
        template.render(MESSAGES)
    template.close()


def test_a_stopped_template_goes_on_with_the_next_chat_but_not_for_ever():
    source = "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}done"
    template = ChatTemplate(source, cpu_seconds=0.5)
    for _ in range(3):
        with pytest.raises(TemplateError, match="took more"):
            template.render(MESSAGES, n=99_999)
        if template._timeouts < 3:
            assert template.render(MESSAGES, n=2) == "done"
    with pytest.raises(TemplateError, match="not tried again"):
        template.render(MESSAGES, n=2)
    template.close()


def test_template_size_and_values():
    with pytest.raises(TemplateError, match="more than"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1))
    with pytest.raises(TemplateError, match="must be made of texts"):
        ChatTemplate("x").render([{"role": "user", "content": object()}])


def test_the_child_ends_with_its_parent():
    script = (
        "from megalite.text.chat_template import ChatTemplate as T; t = T('x'); t.render([]); "
        "print(t._child._process.pid, flush=True); import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    pid = int(done.stdout)
    wait_until(lambda: not (child := Process.of(pid)) or not child.alive(), "the child is gone")


def test_a_fork_gets_its_own_child():
    template = ChatTemplate("{{ messages | length }}")
    assert template.render([]) == "0"
    if (pid := os.fork()) == 0:
        os._exit(0 if template.render([{}]) == "1" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert template.render([{}, {}]) == "2"
    template.close()


def test_load_copies_nothing_from_the_config_path(tmp_path):
    """The config may name other files; only the folder's own tokenizer.json is read."""
    source = tmp_path / "a"
    source.mkdir()
    write(source, tokenizer_file="/etc/passwd", vocab_file="../x")
    target = shutil.copytree(source, tmp_path / "b")
    assert Tokenizer.load(target).encode("the") == Tokenizer.load(source).encode("the")
