"""`launch/serve.py` whole: a client's streams while each rank is killed in turn, and the order of the end."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

from forks import Forks
from served import TOKENS, Served, ranks
from tiny_tokenizer import with_tokenizer


def test_each_rank_is_killed_in_turn(forks: Forks, tiny: Any, tmp_path: Path) -> None:
    """Every stream is that of an undisturbed run: no token is missing, none comes twice."""
    model = with_tokenizer(tiny("llama3"), tmp_path / "model")
    served = Served(forks, tmp_path, model, "parallel.tp=2", "parallel.dp=2", "server.balance=round_robin")

    async def test() -> None:
        await served.ready(2)
        undisturbed = await served.streams()
        assert {(len(own[1]), own[2]) for samples in undisturbed for own in samples} == {(TOKENS, "length")}
        for replica, rank in ((0, 0), (1, 1), (0, 0), (1, 1)):  # what was killed is the one that was started last
            victim = ranks(served.program, replica)[rank]
            assert await served.streams(40, victim.kill) == undisturbed
            await served.ready(2)
        assert sum(one["restarts"] for one in await served.replicas()) == 4
        served.program.signal(signal.SIGTERM)
        await served.client.aclose()

    asyncio.run(test())
    ended = served.program.ended()
    assert ended.code == 0, ended.err
    assert ended.err.count("was lost: its connection ended") == 4
