"""`launch/serve.py` whole, in several layouts, and clients that know nothing of it."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from forks import Forks
from safetensors.numpy import save_file
from served import Served
from tiny_tokenizer import with_tokenizer
from waiting import PATIENCE, wait_until

if TYPE_CHECKING:
    from openai import OpenAI

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
TALK = [{"role": "user", "content": "How are you?"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
    "required": ["kind", "old"],
    "additionalProperties": False,
}
PROMPTS = [
    {"prompt": "import os", "temperature": 0, "max_tokens": 12, "logprobs": 1},
    {"prompt": ["def f(x):", "a list of\n"], "n": 2, "seed": 5, "max_tokens": 12},
    {"prompt": "some words and " * 5, "seed": 6, "max_tokens": 12, "frequency_penalty": 0.5, "top_p": 0.9},
    {"prompt": [5, 6, 7, 8], "seed": 7, "max_tokens": 12, "logit_bias": {"40": 3.0}, "stop": ["zz", "Q"]},
    {"prompt": "a number: ", "seed": 8, "guided_regex": "[0-9]{3,5}", "max_tokens": 12},
    {"messages": TALK, "seed": 9, "max_tokens": 12, "n": 3},
]


def adapter(model: Path, folder: Path) -> Path:
    """A random LoRA adapter for `model`, as PEFT saves one."""
    sizes = json.loads((model / "config.json").read_text())
    random = np.random.default_rng(3)
    tensors = {}
    for layer in range(sizes["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora"
        for half, shape in (("A", (2, sizes["intermediate_size"])), ("B", (sizes["hidden_size"], 2))):
            tensors[f"{name}_{half}.weight"] = random.normal(0, 0.5, shape).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 8, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def servers(forks: Forks, tiny: Any, tmp_path_factory: Any) -> Iterator[dict[tuple[int, int, int], Served]]:
    """One of each layout; they start at the same time."""
    folder = tmp_path_factory.mktemp("served")
    model = with_tokenizer(tiny("llama3"), folder / "model")
    found = {}
    for tp, pp, dp in LAYOUTS:
        (place := folder / f"{tp}{pp}{dp}").mkdir()
        layout = [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.dp={dp}"]
        if dp == 2:  # which changes nothing for requests that don't name it
            layout.append(f"lora.poet={adapter(model, folder / 'poet')}")
        found[tp, pp, dp] = Served(forks, place, model, *layout, "server.model_names=[tiny]")
    for (_, _, dp), served in found.items():
        served.wait_ready(dp)
    yield found
    for served in found.values():
        served.program.signal(signal.SIGTERM)
    for served in found.values():
        assert served.program.ended().code == 0


@pytest.fixture(scope="module")
def served(servers: dict[tuple[int, int, int], Served]) -> Served:
    """Over two replicas."""
    return servers[1, 1, 2]


@pytest.fixture(scope="module")
def client(openai: Any, served: Served) -> Iterator[OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=0, timeout=PATIENCE) as client:
        yield client


def test_the_layout_changes_no_token(servers: dict[tuple[int, int, int], Served]) -> None:
    """In float32: texts, tokens and ends of every request, streamed or not."""

    async def answers(served: Served) -> list[Any]:
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as http:

            async def one(body: dict[str, Any]) -> Any:
                path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
                answer = (await http.post(path, json=body)).raise_for_status().json()
                answer["usage"].pop("prompt_tokens_details")
                shown = [
                    (choice.get("text") or choice["message"]["content"], choice["finish_reason"], choice["stop_reason"])
                    for choice in answer["choices"]
                ]
                tokens = [(choice["logprobs"] or {}).get("tokens") for choice in answer["choices"]]
                assert await _streamed(http, path, body) == {place: one for place, (one, _, _) in enumerate(shown)}
                return shown, tokens, answer["usage"]

            return await asyncio.gather(*map(one, PROMPTS))

    wanted, *others = (asyncio.run(answers(served)) for served in servers.values())
    assert all(text for shown, _, _ in wanted for text, _, _ in shown)
    for other in others:
        assert other == wanted


async def _streamed(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[int, str]:
    """The text of each choice."""
    found: dict[int, str] = {}
    async with http.stream("POST", path, json={**body, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                    found[choice["index"]] = found.get(choice["index"], "") + text
    return found


def test_an_adapter_is_a_model_beside_its_own(served: Served, client: OpenAI) -> None:
    cards = served.ask("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), ("poet", "tiny")]
    assert cards[1]["root"].endswith("/poet")
    asked: dict[str, Any] = {"prompt": "import os", "temperature": 0, "max_tokens": 12}
    plain, poet = (client.completions.create(model=name, **asked) for name in ("tiny", "poet"))
    assert poet.model == "poet" and poet.choices[0].text != plain.choices[0].text
    parts = list(client.completions.create(model="poet", **asked, stream=True))
    assert "".join(part.choices[0].text for part in parts) == poet.choices[0].text
    assert {part.model for part in parts} == {"poet"}
    answer = served.ask("/v1/completions", model="novelist", **asked)
    words = "The model 'novelist' does not exist; see /v1/models."
    error = {"message": words, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert (answer.status_code, answer.json()) == (404, {"error": error})


def test_openais_client(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_tokens": 20, "seed": 1}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None and whole.usage is not None
    assert choice.message.content
    spelled = b"".join(bytes(one.bytes or []) for one in choice.logprobs.content)
    assert spelled.removesuffix(b"</s>").decode(errors="replace") == choice.message.content
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == choice.message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    assert client.chat.completions.create(**asked, tools=[tool]).choices[0].message.content
    scored = client.completions.create(model="tiny", prompt="import os", echo=True, logprobs=0, max_tokens=0)
    assert scored.choices[0].text == "import os" and scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.choices[0].logprobs.token_logprobs[1:])


def test_openais_client_has_json_that_obeys_a_schema(served: Served, client: OpenAI) -> None:
    """Of a model that writes at random, whose white space would not end."""
    spaces = {str(one): -100.0 for one in served.ask("/tokenize", prompt=" \n").json()["tokens"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=TALK, response_format=form, max_tokens=60, seed=seed, logit_bias=spaces
        )
        value = json.loads(answer.choices[0].message.content or "")
        assert value["kind"] in ("cat", "dog") and value["old"] in (True, False) and len(value) == 2


def test_a_client_that_leaves_frees_its_memory(served: Served) -> None:
    """Whether it reads a stream or waits for the whole: nothing of its requests is held, and most was not computed."""
    for stream in (True, False):
        before = sum(one["output_tokens"] for one in served.ask("/stats").json()["replicas"])
        body = json.dumps({"prompt": "a", "n": 64, "max_tokens": 100, "ignore_eos": True, "stream": stream})
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            if stream:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            wait_until(lambda: any(one["running"] for one in served.ask("/stats").json()["replicas"]), "its start")

        def idle() -> bool:
            return all(
                one["requests"] == one["running"] == one["waiting"] == one["kv_usage"] == 0
                for one in served.ask("/stats").json()["replicas"]
            )

        wait_until(idle, "the end of its requests")
        after = sum(one["output_tokens"] for one in served.ask("/stats").json()["replicas"])
        assert after - before < 6400


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_reads_the_metrics(served: Served) -> None:
    """It minds the colon of vLLM's names, and nothing else."""
    text = served.ask("/metrics").text
    found = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    said = [line for line in found.stderr.splitlines() if "should not contain ':'" not in line]
    assert not said and not found.stdout, said
