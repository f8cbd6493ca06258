"""guidellm's benchmark on a server: `python tests/benchmark_served.py`. Needs guidellm, whose workers are processes.

Its client, unchanged, sends 20 streamed requests to the demo model behind `launch/serve.py`. All must end, each with
the tokens that were asked for, and the server must have had nothing to say about any.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serve_demo import DEMO, demo

REQUESTS, PROMPT, NEW = 20, 64, 32


def main() -> int:
    with tempfile.TemporaryDirectory() as name, demo(Path(name), "parallel.dp=2") as server:
        found = Path(name) / "found.json"
        options = {
            "backend": f"kind=openai_http,target={server.url},request_format=/v1/completions,model=demo",
            "profile": "kind=concurrent,streams=4",
            "constraint": f"kind=max_requests,count={REQUESTS}",
            "tokenizer": f"kind=hf_auto,model={DEMO}",
            "data": f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={NEW}",
            "output": f"kind=json,path={found}",
        }
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        outside = {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1", **os.environ}
        command = [sys.executable, "-m", "guidellm", "run", *words, "--disable-console"]
        subprocess.run(command, env=outside, check=True)
        [run] = json.loads(found.read_text())["benchmarks"]
        code = server.end()
        wrong = [line for line in server.said.splitlines() if "Traceback" in line or line.startswith("error")]
    ended: list[Any] = run["requests"]["successful"]
    tokens = [one["output_metrics"]["text_tokens"] for one in ended]
    failed = len(run["requests"]["errored"]) + len(run["requests"]["incomplete"])
    print(f"{len(ended)} requests ended, {failed} failed; tokens of each: {sorted(set(tokens))}")
    for name in ("time_to_first_token_ms", "inter_token_latency_ms"):
        shares = run["metrics"][name]["successful"]["percentiles"]
        print(f"{name}: {shares['p50']:.1f} p50, {shares['p99']:.1f} p99")
    print(f"the server ended with {code}", *wrong, sep="\n")
    return 0 if len(ended) == REQUESTS and not failed and set(tokens) == {NEW} and not wrong and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
