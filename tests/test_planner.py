"""The planner: its memory is the engine's, its speeds are near those that were measured, its reasons name numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import VARIANTS

from megalite.config.schema import EngineSection
from megalite.core.layout import Layout
from megalite.errors import ConfigError
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.planner.cost import Cluster, StageCosts
from megalite.planner.devices import named
from megalite.planner.generation import Workload, parse, predict
from megalite.planner.search import layouts, search
from megalite.tools.benchmarks.shapes import SHAPES
from megalite.weights.table import local_elements

MEASURED = "input=100-1024,output=100-1024,requests=256"
"""The 256 requests of docs/performance.md."""


def shape(name: str) -> ModelConfig:
    return families.from_values(Path("config.json"), {**SHAPES[name], "dtype": "bfloat16"})


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_stages_weigh_what_their_widest_rank_holds(name, tiny):
    """The costs' own sums over layers are the weight table's, for every family and layout."""
    config = families.read(tiny(name))
    for layout in (Layout(), Layout(2), Layout(3), Layout(1, 2), Layout(2, 2)):
        costs = StageCosts(config, layout, Cluster(named("h100"), layout.size), itemsize=2)
        held = [local_elements(config, layout, layout.rank(pp=stage)) for stage in range(layout.pp)]
        assert [elements for _, elements in costs.stages] == held, layout


@pytest.mark.parametrize(
    ("device", "name", "layout", "tokens_a_second"),
    [
        ("h100", "qwen3-0.6B", Layout(), 19_570),
        ("h100", "llama-8B", Layout(), 8_218),
        ("h200", "llama-8B", Layout(), 9_733),
        ("h200", "llama-8B", Layout(tp=2), 15_321),
        ("h200", "llama-8B", Layout(pp=2), 13_126),
        ("h200", "llama-8B", Layout(dp=2), 14_241),
    ],
)
def test_predictions_are_within_a_quarter_of_what_was_measured(device, name, layout, tokens_a_second):
    """docs/performance.md, 2026-11-27."""
    cluster = Cluster(named(device), layout.size)
    found = predict(shape(name), layout, cluster, parse(MEASURED), EngineSection(), itemsize=2)
    assert found.throughput == pytest.approx(tokens_a_second, rel=0.25)


def test_layouts_are_ranked_with_reasons_and_what_is_missing():
    config = shape("llama-8B")
    found = search(config, Cluster(named("h200"), 2), parse(MEASURED), EngineSection(), itemsize=2)
    assert [(one.layout.tp, one.layout.pp, one.layout.dp) for one in found] == [(2, 1, 1), (1, 1, 2), (1, 2, 1)]
    assert "the most tokens a second" in found[0].reason and "of the first's speed" in found[2].reason
    small = search(config, Cluster(named("l4"), 2), Workload(), EngineSection(), itemsize=4)
    assert [bool(one.prediction.short) for one in small] == [False, False, True]
    last = small[-1].prediction
    assert last.layout.dp == 2 and last.memory[0].weights == 4 * local_elements(config, Layout(), 0)
    room, need = named("l4").memory, last.memory[0].weights + last.memory[0].activations + last.memory[0].logits
    assert last.short > need - room and "does not fit" in small[-1].reason


def test_uneven_layouts_are_among_them():
    config = shape("qwen3-10M")  # 8 query heads, 2 KV heads, 8 layers
    sizes = [(one.tp, one.pp, one.dp) for one in layouts(3, config)]
    assert sizes == [(1, 1, 3), (1, 3, 1), (3, 1, 1)]
    assert [one.dp for one in layouts(8, config, tp=2)] == [4, 2, 1]
    assert not list(layouts(9, config, tp=9)) and not list(layouts(9, config, pp=9))
    [found] = search(config, Cluster(named("h100"), 3), Workload(), EngineSection(), itemsize=2, candidates=[Layout(3)])
    assert found.prediction.throughput > 0


def test_a_sum_over_hosts_is_slower_and_a_group_knows_where_it_is():
    cluster = Cluster(named("h200"), 8, hosts=2)
    assert cluster.all_reduce(2**20, 4, 2) > cluster.all_reduce(2**20, 4)
    config = shape("llama-8B")
    apart, together = (StageCosts(config, Layout(tp, 1, 8 // tp), cluster, 2) for tp in (8, 4))
    assert (apart.tp_hosts, together.tp_hosts) == (2, 1)
    assert StageCosts(config, Layout(2, 4, 1), cluster, 2).crossings == (False, True, False)


@pytest.mark.parametrize("text", ["input=0", "input=5-2", "concurrency=1-2", "what=1", "input", "input=1,input=2"])
def test_a_workload_that_makes_no_sense(text):
    with pytest.raises(ConfigError, match="--workload"):
        parse(text)


def test_the_tool_needs_a_config_json_only(tmp_path, monkeypatch, capsys):
    from megalite.tools import toolkit

    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["llama-8B"], "dtype": "bfloat16"}))
    words = ["plan", "--model", str(tmp_path), "--devices", "4", "--hosts", "2", "--device", "h100"]
    monkeypatch.setattr("sys.argv", [*words, "--json"])
    assert toolkit.tool("plan") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 6 and found[0]["throughput"] >= found[1]["throughput"] > 0
    stage = found[0]["memory"][0]
    names = ("weights", "kv", "activations", "logits", "graphs", "reserve")
    assert all(stage[name] > 0 for name in names) and stage["total"] >= sum(stage[name] for name in names)
    monkeypatch.setattr("sys.argv", words)
    assert toolkit.tool("plan") == 0
    page = capsys.readouterr().out
    assert "memory of the fullest rank of each stage" in page and page.count("tp=1,pp=1,dp=4") == 2
    monkeypatch.setattr("sys.argv", [*words[:-1], "abacus"])
    assert toolkit.tool("plan") == 2
    assert "--device: no profile of this name" in capsys.readouterr().err
