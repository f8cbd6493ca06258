"""Connections that are no requests: what is sent is no HTTP, has no end, or does not come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from waiting import PATIENCE

from megalite.config.schema import ServerSection
from megalite.serve.connection import BODY, MAX_HEAD
from megalite.serve.listener import Listener, open_socket

GOOD = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def listening(head_timeout: float, served: Any = app) -> AsyncIterator[int]:
    with open_socket(ServerSection(port=0)) as sock:
        listener = Listener(served, sock, head_timeout=head_timeout, patience=1)
        try:
            yield sock.getsockname()[1]
        finally:
            await listener.stop()


async def answers(port: int, *parts: bytes) -> list[tuple[int, str]]:
    """Status and what is said of each answer, until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.01)
    async with asyncio.timeout(PATIENCE):
        data = await reader.read()
    writer.close()
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split()[0])
        body, data = data[:length], data[length:]
        found.append((int(head.split()[1]), body.decode() if body == b"ok" else json.loads(body)["error"]["message"]))
    return found


def test_what_is_no_request_has_an_envelope() -> None:
    async def test() -> None:
        async with listening(PATIENCE) as port:
            assert await answers(port, b"\x16\x03\x01 hello\r\n\r\n") == [(400, "Invalid HTTP request received.")]
            long = [b"a" * 10_000 for _ in range(MAX_HEAD // 10_000 + 1)]
            refused = [(431, f"The head of a request may have {MAX_HEAD} bytes.")]
            assert await answers(port, b"GET / HTTP/1.1\r\nX: ", *long) == refused
            assert await answers(port, b"GET /", *long) == refused
            assert await answers(port, GOOD, GOOD[:20], GOOD[20:], b"no\r\n\r\n") == [
                (200, "ok"),
                (200, "ok"),
                (400, "Invalid HTTP request received."),
            ]

    asyncio.run(test())


def test_who_writes_without_waiting_hears_of_a_client_that_lags() -> None:
    chunk, direct = b"x" * 50_000, []

    async def writes(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = scope["extensions"][BODY]
        for number in range(400):
            direct.append(body.is_ready())
            if direct[-1]:
                body.write(b"%d;" % number + chunk)
                body.write(b"")
            else:
                await send({"type": "http.response.body", "body": b"%d;" % number + chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def test() -> None:
        async with listening(PATIENCE, writes) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
            writer.write(GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            async with asyncio.timeout(PATIENCE):
                while False not in direct:
                    await asyncio.sleep(0)
                data = (await reader.read()).partition(b"\r\n\r\n")[2]
            writer.close()
        assert True in direct and len(direct) == 400
        assert data == b"".join(_chunk(b"%d;" % number + chunk) for number in range(400)) + b"0\r\n\r\n"

    asyncio.run(test())


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    async def test() -> None:
        late = (408, "The head of a request did not arrive within 0.3 s.")
        async with listening(0.3) as port:
            for parts in ((), (b"GET / HTTP/1.1\r\n",)):
                assert await answers(port, *parts) == [late]
            assert await answers(port, GOOD, b"GET / HT") == [(200, "ok"), late]

    asyncio.run(test())


def test_what_follows_an_answer_is_not_waited_for() -> None:
    async def test() -> None:
        post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n"
        async with listening(0.3) as port:
            assert await answers(port, post, b"1234567890" * 2, GOOD, b"GET / HT") == [
                (200, "ok"),
                (200, "ok"),
                (408, "The head of a request did not arrive within 0.3 s."),
            ]
            assert await answers(port, post, b"12345", b"67890") == [(200, "ok")]

    asyncio.run(test())
