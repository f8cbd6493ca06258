"""A chat is read the same way by inference, fine-tuning and hybrid jobs, and as transformers reads it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from tokenizer_family import FAMILY

from megalite.config.schema import DataSection, InputSection, SamplingParams
from megalite.hybrid.tasks import load_examples
from megalite.inference.io.inputs import PromptLimits
from megalite.inference.io.job_input import read_inputs
from megalite.text.chat_template import TemplateError
from megalite.text.tokenizer import Tokenizer
from megalite.train.data.examples import encode_answer, encode_chat
from megalite.train.data.records import Records, find_files

END = 2
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|user|>default{% endif %}"
    "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}{% if mood is defined %}{{ mood }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}"
    "{% elif m.content is defined %}{% for part in m.content %}{{ part.text }}{% endfor %}{% else %}-{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if think is defined %}<think>{% endif %}{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "hello the"}
CHATS: dict[str, dict[str, Any]] = {
    "text": {"messages": [USER]},
    "null": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool"}]},
    "missing": {"messages": [USER, {"role": "assistant", "tool_calls": CALL}, {"role": "tool", "content": "3"}]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": " b", "type": "text"}]}]
    },
    "an assistant begins": {"messages": [{"role": "assistant", "content": "hello"}, USER]},
    "tools": {"messages": [USER], "tools": TOOLS},
    "no tools": {"messages": [USER], "tools": None, "chat_template_kwargs": None},
    "variables": {"messages": [USER], "chat_template_kwargs": {"mood": "calm", "think": False}},
    "a mapping": {"messages": [USER, {"role": "tool", "content": [{"type": "text", "text": "é"}], "name": None}]},
}


@cache
def ours() -> Tokenizer:
    return Tokenizer(FAMILY["prepend"](), {"bos_token": "<s>", "eos_token": "</s>"}, {"default": TEMPLATE})


@cache
def theirs():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=FAMILY["prepend"](), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    ours().close()


def wanted(chat: dict[str, Any], *, prompt: bool = True, **more: Any) -> list[int]:
    """The ids of a chat, by transformers."""
    variables = {"add_generation_prompt": prompt, **more, **(chat.get("chat_template_kwargs") or {})}
    if chat.get("tools") is not None:
        variables["tools"] = chat["tools"]
    return theirs().apply_chat_template(chat["messages"], return_dict=False, **variables)


@pytest.mark.parametrize("name", CHATS)
def test_every_job_reads_a_chat_as_transformers_does(name, tmp_path):
    chat = CHATS[name]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat) + "\n")
    limits = PromptLimits(tokenizer=ours(), vocab_size=ours().vocab_size, max_model_len=4096)
    batch = read_inputs(InputSection(file=str(path)), SamplingParams(), limits)
    assert not batch.failures and list(batch.requests[0].prompt_token_ids) == wanted(chat)
    (example,) = load_examples(str(path), {}, split="train")
    text = ours().chat_text(example.messages, **example.variables)
    assert ours().encode(text, add_special_tokens=False) == wanted(chat)
    answered = {**chat, "messages": [*chat["messages"], {"role": "assistant", "content": "lo the"}]}
    path.write_text(json.dumps(answered) + "\n")
    section = DataSection(source=str(path), pattern="*")
    (record,) = Records(find_files(section), section)
    if "think" in (chat.get("chat_template_kwargs") or {}):
        return  # shown in prompts only
    variables = example.variables
    learnt = [
        encode_chat(ours(), record.values["messages"], END, **variables)[-1],
        encode_answer(ours(), example.messages, "lo the", END, **variables),
    ]
    assert [list(one.ids) for one in learnt] == [wanted(answered, prompt=False)] * 2
    answer = learnt[1]
    assert not any(answer.loss_mask[: len(wanted(chat))]) and all(answer.loss_mask[len(wanted(chat)) :])


def test_a_config_speaks_for_chats_that_do_not(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [
        CHATS["text"],
        CHATS["tools"],
        {**CHATS["text"], "chat_template_kwargs": {"mood": "wild"}},
        {"prompt": "a"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    limits = PromptLimits(tokenizer=ours(), vocab_size=ours().vocab_size, max_model_len=4096)
    section = InputSection(file=str(path), tools=CALL, chat_template_kwargs={"mood": "calm"})
    batch = read_inputs(section, SamplingParams(), limits)
    got = [list(request.prompt_token_ids) for request in batch.requests]
    given = {"tools": CALL}
    assert got[:2] == [wanted({**lines[0], **given}, mood="calm"), wanted(lines[1], mood="calm")]
    assert got[2:] == [wanted({**lines[2], **given}), theirs()("a").input_ids]
    assert batch.digest != read_inputs(InputSection(file=str(path)), SamplingParams(), limits).digest


def test_turns_of_a_chat_are_learnt_wherever_it_begins():
    messages = [{"role": "assistant", "content": "hello"}, USER, {"role": "assistant", "content": "b"}]
    (example,) = encode_chat(ours(), messages, END)
    text = ours().chat_text(messages, add_generation_prompt=False)
    assert list(example.ids) == theirs().apply_chat_template(messages, return_dict=False)
    spans = [i for i, counts in enumerate(example.loss_mask) if counts]
    read = ours().decode([example.ids[i] for i in spans], skip_special_tokens=False)
    assert read.replace(" ", "") == "hello</s>b</s>" and text.startswith("<|user|>default<|assistant|>hello</s>")


def test_a_template_that_opens_no_answers_shows_where_the_first_begins():
    template = "{{ bos_token }}default!{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    known = Tokenizer(FAMILY["byte level"](), {"bos_token": "<s>", "eos_token": "</s>"}, {"default": template})
    (example,) = encode_chat(known, [{"role": "assistant", "content": "hello"}, USER], END)
    known.close()
    read = [known.token_text(token) for token, counts in zip(example.ids, example.loss_mask, strict=True) if counts]
    assert "".join(read) == "assistant: hello</s>"


@pytest.mark.parametrize(
    "content", ["e", "hello ", " the\n", [{"type": "text", "text": "a "}, {"text": "e ", "type": "text"}]]
)
@pytest.mark.parametrize("template", ["whole", "trimmed"])
def test_an_answer_that_goes_on_ends_where_its_content_does(content, template):
    trimmed = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|user|>{% endfor %}"
    chat_template = TEMPLATE if template == "whole" else trimmed
    if template == "trimmed" and not isinstance(content, str):
        return
    messages = [USER, {"role": "assistant", "content": content}]
    options = {"chat_template": chat_template, "add_generation_prompt": False, "continue_final_message": True}
    got = ours().chat_text(messages, **options)
    assert got == theirs().apply_chat_template(messages, tokenize=False, **options)


def test_an_answer_without_text_can_not_go_on():
    for content in (None, [], [{"type": "text"}]):
        with pytest.raises(TemplateError, match="the last message has no text"):
            ours().chat_text(
                [{"role": "assistant", "content": content}], add_generation_prompt=False, continue_final_message=True
            )
