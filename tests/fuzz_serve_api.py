"""Random requests by the server's own schema: `python tests/fuzz_serve_api.py [EXAMPLES [demo]]`. Needs schemathesis.

They go to the application over a router without replicas; with `demo` to `launch/serve.py` with the demo model.
Every answer must be documented, its body of the documented shape, and none a failure of the server's. A script and no
test: schemathesis is a plugin of pytest's that takes seconds of every start. The seed is fixed.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_api import ScriptedRouter, app_over, tokenizer
from serve_demo import demo
from waiting import PATIENCE

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def main(examples: int, real: bool) -> None:
    if not real:
        known = tokenizer()
        app = app_over(ScriptedRouter(known), max_samples=8)
        ask_all(schemathesis.openapi.from_asgi("/openapi.json", app), examples)
        known.close()
        return
    with tempfile.TemporaryDirectory() as folder, demo(Path(folder), "server.max_samples=8") as server:
        ask_all(schemathesis.openapi.from_url(f"{server.url}/openapi.json"), examples)
        [replica] = server.replicas()
        assert replica["restarts"] == replica["requests"] == replica["kv_usage"] == 0, replica
        assert server.end() == 0, server.said
        assert "Traceback" not in server.said, server.said


def ask_all(schema: schemathesis.BaseSchema, examples: int) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:

            @hypothesis.seed(0)
            @hypothesis.settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def run(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict):
                    case.body.pop("model", None)  # no random name is one
                answer = case.call(timeout=PATIENCE)
                seen[case.path, answer.status_code] += 1
                case.validate_response(answer, checks=CHECKS)

            try:
                run()
            except Unsatisfiable:
                pass  # nothing can be wrong about a request without parameters
    for (path, status), count in sorted(seen.items()):
        print(f"{path} {status}: {count}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50, sys.argv[2:] == ["demo"])
