"""A router without replicas, and messages that a replica would send, for tests of what looks at them."""

from megalite.config.schema import SamplingParams
from megalite.inference.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenDelta
from megalite.inference.request import Request
from megalite.serve.messages import Hello, Step
from megalite.serve.router import ReplicaView


def hello(replica: int = 0, num_kv_blocks: int = 100) -> Hello:
    return Hello(
        replica=replica,
        pid=1,
        max_model_len=512,
        num_kv_blocks=num_kv_blocks,
        block_size=16,
        max_num_seqs=8,
        vocab_size=300,
        eos_token_ids=[1],
        dtype="float32",
        device="cpu",
    )


def step(number: int, **fields) -> Step:
    zeros = dict.fromkeys(("running", "waiting", "prefix_hits", "prompt_tokens", "output_tokens", "preemptions"), 0)
    return Step(**{"deltas": [], "outputs": [], "step": number, "free_blocks": 100, **zeros, **fields})


def delta(request_id: str, *token_ids: int, index: int = 0, finish_reason=None) -> TokenDelta:
    return TokenDelta(
        request_id=request_id, index=index, text="a", token_ids=list(token_ids), finish_reason=finish_reason
    )


def output(request_id: str = "r", reasons=("stop",), tokens: int = 4, error: str | None = None) -> RequestOutput:
    completions = [
        CompletionOutput(index=i, text="abcd", token_ids=[5] * tokens, cumulative_logprob=-1.0, finish_reason=reason)
        for i, reason in enumerate(reasons)
    ]
    times = RequestMetrics(queued_ts=10.0, scheduled_ts=10.5, first_token_ts=11.0, last_token_ts=12.5)
    return RequestOutput(
        request_id=request_id,
        prompt="secret",
        prompt_token_ids=[1, 2, 3],
        outputs=completions,
        replica=0,
        error=error,
        num_cached_tokens=2,
        metrics=times,
    )


def request(**fields) -> Request:
    return Request(
        **{"id": "r", "prompt_token_ids": (1, 2), "params": SamplingParams(), "seed": 0, "max_tokens": 16, **fields}
    )


class FakeRouter:
    """Two replicas, of which one is lost."""

    def __init__(self) -> None:
        self.state = "ready"
        first = ReplicaView(
            replica=0,
            state="ready",
            restarts=0,
            hello=hello(),
            step=step(
                7, running=3, waiting=2, free_blocks=40, prompt_tokens=100, prefix_hits=25, busy={"compute": 0.75}
            ),
            requests=5,
            tokens=12345,
        )
        second = ReplicaView(replica=1, state="lost", restarts=2, hello=hello(1), step=None, requests=0, tokens=0)
        self.views = [first, second]

    def replicas(self) -> list[ReplicaView]:
        return self.views
