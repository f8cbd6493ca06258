import json
import logging
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="pip install 'megalite[serve]'")
pytest.importorskip("fastapi", reason="pip install 'megalite[serve]'")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from serve_fakes import FakeRouter, delta, output, request, step

from megalite.config.schema import SamplingParams
from megalite.serve.metrics import ServeMetrics, metrics_router


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    return ServeMetrics("demo", clock=clock)


def value(metrics: ServeMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model_name": "demo", **labels})


def test_totals_go_on_where_a_replica_was_started_again(metrics):
    metrics.replica_step(0, step(5, prompt_tokens=10, output_tokens=4, prefix_hits=3))
    metrics.replica_step(0, step(9, prompt_tokens=12, output_tokens=9, prefix_hits=3, preemptions=1))
    metrics.replica_state(0, "lost")
    # Its steps may have passed those of its predecessor by its first message: the state says that it is another.
    metrics.replica_step(0, step(20, prompt_tokens=5, output_tokens=1))
    # A process that counts from 0 again, without a word about it.
    metrics.replica_step(0, step(2, prompt_tokens=7, output_tokens=2))

    assert value(metrics, "vllm:prompt_tokens_total", engine="0") == 12 + 5 + 7
    assert value(metrics, "vllm:generation_tokens_total", engine="0") == 9 + 1 + 2
    assert value(metrics, "vllm:prefix_cache_queries_total", engine="0") == 24
    assert value(metrics, "vllm:prefix_cache_hits_total", engine="0") == 3
    assert value(metrics, "vllm:num_preemptions_total", engine="0") == 1
    assert value(metrics, "megalite_steps_total", engine="0") == 9 + 20 + 2
    assert value(metrics, "megalite_replica_losses_total", engine="0") == 1


def test_time_between_tokens_is_measured_for_each_sample(metrics, clock):
    metrics.replica_step(0, step(1, deltas=[delta("a", 7), delta("b", 7), delta("b", 7, index=1)]))
    clock.now += 0.06
    metrics.replica_step(0, step(2, deltas=[delta("a", 8), delta("b", 8)]))
    clock.now += 0.06
    # The last delta has no token; the id is free again after it.
    metrics.replica_step(0, step(3, deltas=[delta("a", finish_reason="stop"), delta("b", 9, 10, index=1)]))
    clock.now += 60
    metrics.replica_step(0, step(4, deltas=[delta("a", 7)]))

    name = "vllm:inter_token_latency_seconds"
    assert value(metrics, f"{name}_count", engine="0") == 3
    assert value(metrics, f"{name}_sum", engine="0") == pytest.approx(0.06 + 0.06 + 0.12 / 2)


def test_activity_is_seconds_and_speed_is_of_the_last_seconds(metrics, clock):
    assert metrics.speed(0) == 0
    metrics.replica_step(0, step(1, output_tokens=1000, busy={"compute": 1.0}))  # since when is not known
    for second in range(1, 11):
        clock.now += 1
        metrics.replica_step(
            0, step(1 + second, output_tokens=1000 + 20 * second, busy={"compute": 0.5, "waiting": 0.25})
        )
    assert value(metrics, "megalite_activity_seconds_total", engine="0", activity="compute") == pytest.approx(5)
    assert value(metrics, "megalite_activity_seconds_total", engine="0", activity="waiting") == pytest.approx(2.5)
    assert metrics.speed(0) == pytest.approx(20)
    clock.now += 5  # silence counts
    assert metrics.speed(0) == 0


def test_a_request_that_ended(metrics, caplog):
    metrics.request_started(request(params=SamplingParams(n=2), max_tokens=16))
    with caplog.at_level(logging.INFO, logger="megalite.serve.access"):
        ended = output('a"\nb', reasons=("stop", "length"))
        metrics.request_finished(ended, arrival=9.0, first_token=11.5, end=13.0, endpoint="/v1/completions")
    expected = {
        "vllm:time_to_first_token_seconds": 2.5,
        "vllm:e2e_request_latency_seconds": 4.0,
        "vllm:request_queue_time_seconds": 0.5,
        "vllm:request_prefill_time_seconds": 0.5,
        "vllm:request_decode_time_seconds": 1.5,
        "vllm:request_inference_time_seconds": 2.0,
        "vllm:request_time_per_output_token_seconds": 0.5,
        "vllm:request_prompt_tokens": 3,
        "vllm:request_generation_tokens": 8,
    }
    assert {name: value(metrics, f"{name}_sum", engine="0") for name in expected} == pytest.approx(expected)
    metrics.request_finished(ended, arrival=9.0, first_token=None, end=13.0, endpoint="/v1/completions")
    whole = ended.metrics.first_token_ts - 9.0  # not streamed: when the replica had it
    assert value(metrics, "vllm:time_to_first_token_seconds_sum", engine="0") == pytest.approx(2.5 + whole)
    assert value(metrics, "vllm:request_params_n_sum") == 2
    assert value(metrics, "vllm:request_params_max_tokens_sum") == 16
    for reason in ("stop", "length"):
        assert value(metrics, "vllm:request_success_total", engine="0", finished_reason=reason) == 2
    assert value(metrics, "megalite_requests_total", endpoint="/v1/completions") == 2

    (record,) = caplog.records
    line = record.getMessage()
    assert "\n" not in line and "secret" not in line and "abcd" not in line
    assert json.loads(line.removeprefix("request ")) == {
        "request_id": 'a"\nb',
        "endpoint": "/v1/completions",
        "model": "demo",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "output_tokens": 8,
        "ttft": 2.5,
        "total": 4.0,
        "finish_reason": ["stop", "length"],
        "replica": 0,
    }


def test_a_request_that_failed_counts_as_an_error_and_silence_is_the_default(metrics, caplog):
    failed = output(reasons=(), error="the model's logits are not finite")
    failed.metrics = None
    with caplog.at_level(logging.WARNING, logger="megalite.serve.access"):
        metrics.request_finished(failed, arrival=9.0, first_token=None, end=9.5, endpoint="/v1/completions")
    assert not caplog.records
    assert value(metrics, "vllm:request_success_total", engine="0", finished_reason="error") == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum", engine="0") == 0.5
    assert value(metrics, "vllm:time_to_first_token_seconds_count", engine="0") == 0


@pytest.fixture
def exposed(metrics) -> str:
    """What /metrics gives once everything has happened."""
    app = FastAPI()
    app.include_router(metrics_router(metrics, FakeRouter()))
    metrics.replica_state(1, "ready")
    metrics.replica_step(0, step(1, busy={"compute": 0.5, "communication": 0.2, "waiting": 0.1}))
    metrics.request_started(request())
    metrics.request_finished(output(), arrival=9.0, first_token=10.0, end=13.0, endpoint="/v1/completions")
    metrics.rejected("overloaded")
    metrics.replayed(3)
    answer = TestClient(app).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return answer.text


def test_the_exposition_shows_the_replicas(exposed):
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposed)
        for sample in family.samples
    }

    def of(name: str, **labels: str) -> float:
        return found[(name, *sorted({"model_name": "demo", **labels}.items()))]

    assert of("vllm:num_requests_running", engine="0") == 3
    assert of("vllm:num_requests_waiting", engine="0") == 2
    assert of("vllm:kv_cache_usage_perc", engine="0") == pytest.approx(0.6)
    assert of("megalite_outstanding_tokens", engine="0") == 12345
    assert of("megalite_assigned_requests", engine="0") == 5
    assert of("megalite_replica_state", engine="0", state="ready") == 1
    assert of("megalite_replica_state", engine="1", state="ready") == 0
    assert of("megalite_replica_state", engine="1", state="lost") == 1
    assert of("megalite_replica_losses_total", engine="1") == 1
    assert of("megalite_rejected_requests_total", reason="overloaded") == 1
    assert of("megalite_replayed_requests_total") == 3
    assert not [name for name, *_ in found if name.endswith("_created")]


def test_promtool_reads_the_exposition(exposed):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    checked = subprocess.run([promtool, "check", "metrics"], input=exposed, capture_output=True, text=True, timeout=30)
    said = (checked.stdout + checked.stderr).splitlines()
    # vLLM's names hold colons, which Prometheus would rather keep for rules.
    assert [line for line in said if not line.endswith("metric names should not contain ':'")] == []
    assert all(line.startswith("vllm:") for line in said)
    assert checked.returncode in (0, 3)  # 3: it could be read, but for the names


# ---- the board for Grafana


BOARD = json.loads((Path(__file__).parent.parent / "docs/grafana.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_the_boards_panels_ask_for_metrics_that_exist(exposed):
    there = {sample.name for family in text_string_to_metric_families(exposed) for sample in family.samples}
    asked = {name for query in QUERIES for name in re.findall(r"\b(?:vllm:|megalite_)\w+", query)}
    assert all(re.search(r"\b(?:vllm:|megalite_)\w+", query) for query in QUERIES)
    assert asked <= there
    assert "vllm:num_requests_running" in there and "vllm:num_requests_running" in json.dumps(BOARD["templating"])


def test_the_board_can_be_imported():
    assert BOARD["id"] is None and BOARD["uid"] and BOARD["title"] and BOARD["schemaVersion"] >= 36
    names = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD["panels"])))
    assert used <= names | {"__rate_interval"}
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = []
    for place in (panel["gridPos"] for panel in BOARD["panels"]):
        assert place["x"] + place["w"] <= 24
        cells += [(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])]
    assert len(set(cells)) == len(cells), "no panel lies on another"


def test_promtool_reads_the_boards_queries(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    plain = [query.replace("$__rate_interval", "5m").replace("$model", ".*") for query in QUERIES]
    rules = [{"record": f"panel:{place}", "expr": query} for place, query in enumerate(plain)]
    file = tmp_path / "rules.yaml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    checked = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(QUERIES)} rules found" in checked.stdout
