"""A chat as its user writes it, checked and read the same way by every job.

An input line, a line of training data and a record of a task hold the same keys: `messages`, and beside them what its
chat template is to see: `tools` (JSON schemas) and `chat_template_kwargs` (variables such as `enable_thinking`). A
config gives both for all chats; those of a chat itself override them. They reach the template as
transformers hands them to it: a message's content may be missing, null or a list of parts, and there may be keys beside
it such as `tool_calls`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.config.typecheck import problem
from megalite.errors import Problem

VARIABLES = ("tools", "chat_template_kwargs")
"""The keys beside `messages`; also of the section of a config that says where chats come from."""
CHAT_KEYS = ("messages", *VARIABLES)
_MEDIA = ("image", "audio", "video", "file")
"""Begin the types of parts that are no text."""
_NO_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")


def chat_problem(values: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the chat of a line or record that has `messages`."""
    messages = values.get("messages")
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        return problem("messages", "must be a list of {role, content}, at least one", messages)
    return messages_problem(messages, key="messages") or variables_problem(values)


def messages_problem(messages: Any, *, key: str) -> Problem | None:
    """What is wrong with the messages of a chat."""
    if not messages:
        return problem(key, "must be a list of {role, content}, at least one", messages)
    for position, message in enumerate(messages):
        at = f"{key}[{position}]"
        if not isinstance(message, Mapping):
            return problem(at, "a chat message must be {role: ..., content: ...}", message)
        if "role" not in message:
            return problem(at, "a chat message needs a role", message)
        if not isinstance(message["role"], str):
            return problem(f"{at}.role", "must be text", message["role"])
        if not message["role"]:
            return problem(f"{at}.role", "must not be empty", message["role"], "Usual roles: system, user, assistant.")
        wrong = _content_problem(message.get("content"), f"{at}.content")
        if wrong is not None:
            return wrong
    return None


def _content_problem(content: Any, key: str) -> Problem | None:
    if content is None or isinstance(content, str | Mapping):
        return None
    if not isinstance(content, list | tuple):
        return problem(key, "must be text, a list of parts, or null", content, "Put numbers in quotes.")
    for place, part in enumerate(content):
        at = f"{key}[{place}]"
        if not isinstance(part, str | Mapping):
            return problem(at, 'must be a part such as {type: "text", text: ...}', part)
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if not isinstance(kind, str):
            return problem(f"{at}.type", "must be text", kind)
        if kind.removeprefix("input_").startswith(_MEDIA):
            return problem(f"{at}.type", "only texts can be read", kind)
    return None


def variables_problem(values: Mapping[str, Any], *, prefix: str = "") -> Problem | None:
    """What is wrong with `tools` and `chat_template_kwargs`, where there are any."""
    tools, variables = (values.get(key) for key in VARIABLES)
    if tools is not None:
        if not isinstance(tools, list | tuple):
            return problem(f"{prefix}tools", "must be a list of JSON schemas, or null", tools)
        for place, tool in enumerate(tools):
            if not isinstance(tool, Mapping):
                return problem(f"{prefix}tools[{place}]", "must be a JSON schema, which is a mapping", tool)
    if variables is not None:
        key = f"{prefix}chat_template_kwargs"
        if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
            return problem(key, "must be a mapping of names to values, or null", variables)
        for name in _NO_VARIABLES:
            if name in variables:
                return problem(f"{key}.{name}", "is no variable of the template", variables[name])
    return None


def chat_variables(*levels: Mapping[str, Any]) -> dict[str, Any]:
    """What the template sees beside the messages, by name; of several mappings with the keys VARIABLES, later ones
    override earlier ones."""
    found: dict[str, Any] = {}
    for level in levels:
        found |= level.get("chat_template_kwargs") or {}
        if level.get("tools") is not None:
            found["tools"] = list(level["tools"])
    return found


def section_variables(section: Any) -> dict[str, Any]:
    """`chat_variables` of a config's section."""
    return chat_variables(_values(section))


def section_problems(section: Any, prefix: str) -> list[Problem]:
    """`variables_problem` of a config's section."""
    found = variables_problem(_values(section), prefix=prefix)
    return [found] if found else []


def _values(section: Any) -> dict[str, Any]:
    return {key: getattr(section, key) for key in VARIABLES}
