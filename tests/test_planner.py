"""The planner: its memory is the engine's, its speeds are near those that were measured, its reasons name numbers."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import VARIANTS

from megalite.config.load import load_config
from megalite.config.schema import EngineSection
from megalite.core.layout import Layout
from megalite.errors import ConfigError, ResourceError
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.quantization import as_applied
from megalite.planner import choose, device_map, devices
from megalite.planner.applied import Matrices, Rates
from megalite.planner.cost import Batch, Cluster, StageCosts, Times
from megalite.planner.devices import named
from megalite.planner.generation import Workload, parse, predict
from megalite.planner.memory import HOLES, RankMemory
from megalite.planner.search import layouts, search, search_training
from megalite.planner.training import TrainingWork
from megalite.run.placement import consecutive
from megalite.tools.benchmarks import published
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
        assert [stage.elements for stage in costs.stages] == held, layout


NUMBERS = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
"""Of a layer of the 8B shape, in four products of three times 4,096 and once 14,336 inputs,"""
OUTPUTS = 4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096
"""and their outputs."""
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def layers_of(config: ModelConfig, rows: int, device: str = "h100", **more) -> Times:
    """Of a layer, when so many sequences of 1,000 tokens gain one each."""
    batch, found = Batch(rows=rows, keys=1000 * rows), Times()
    found.add(StageCosts(config, Layout(), Cluster(named(device), 1), 2, **more).forward(0, batch), 1 / 32)
    return found


def test_codes_are_read_as_they_are_for_few_rows():
    read, plain = named("h100").read, shape("llama-8B")
    in_int4 = families.from_values(Path("x"), {**SHAPES["llama-8B"], "dtype": "bfloat16", "quantization_config": AWQ})
    assert layers_of(plain, 1).weights == pytest.approx(2 * NUMBERS / read)
    assert layers_of(as_applied(plain, "fp8"), 64).weights == pytest.approx((NUMBERS + 4 * OUTPUTS) / read)
    assert layers_of(in_int4, 1).weights == pytest.approx((NUMBERS / 2 + NUMBERS / 128 * (2 + 2)) / read)
    assert layers_of(in_int4, 1, "a100").weights == pytest.approx(2 * NUMBERS / named("a100").read), "numbers there"
    assert layers_of(plain, 1, kv_cache_dtype="fp8").attention == pytest.approx(2 * 8 * 128 * 1000 / read)
    kept = StageCosts(as_applied(plain, "fp8"), Layout(), Cluster(named("h100"), 1), 2).stages[0].nbytes
    ends_and_norms = 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert kept == 32 * (NUMBERS + 4 * OUTPUTS) + ends_and_norms, "embedding and head stay numbers"
    assert kept == RankMemory(as_applied(plain, "fp8"), Layout(), 0, 2).weights and as_applied(plain, None) is plain


def test_codes_of_many_rows_are_written_out_or_multiplied_as_fp8():
    device, plain = named("h100"), shape("llama-8B")
    in_int4 = families.from_values(Path("x"), {**SHAPES["llama-8B"], "dtype": "bfloat16", "quantization_config": AWQ})
    work, codes = 2 * 512 * NUMBERS, NUMBERS / 2 + NUMBERS / 128 * (2 + 2)
    found, dense = layers_of(in_int4, 512), layers_of(plain, 512)
    assert found.products == pytest.approx(dense.products) and dense.weights == pytest.approx(2 * NUMBERS / device.read)
    assert found.weights == pytest.approx(dense.weights + (codes + 2 * NUMBERS) / device.read), "read, written, read"
    found, codes = layers_of(as_applied(plain, "fp8"), 512), NUMBERS + 4 * OUTPUTS
    held = [
        RankMemory(one, Layout(), 0, 2).activations(max_tokens=512)
        for one in (plain, as_applied(plain, "fp8"), in_int4)
    ]
    assert held[0] == held[1] == held[2] - 2 * 2 * 14336 * 4096, "gate and up are written out at once"
    converted = 512 * (3 * 4096 + 14336) * (2 + 2 + 1) / device.read
    both = math.hypot(codes / device.read, work / (2 * device.matmul))
    assert found.weights + found.products == pytest.approx(both + converted)


def test_experts_in_codes_are_read_by_each_row_and_written_out_for_many():
    rates, experts = Rates(1e12, 1e15, 2e15), Matrices("codes", 8 * 10**8, 4 * 10**8)
    reading, beyond = experts.seconds_of_experts(4, 2, 8, rates, 2)
    assert reading == pytest.approx(8 * 0.5e8 / 1e12) and reading + beyond == math.hypot(reading, 16 * 10**8 / 1e15)
    reading, _ = experts.seconds_of_experts(1000, 2, 8, rates, 2)
    assert reading == pytest.approx((4e8 + 2 * 16e8) / 1e12)


def test_the_heap_of_a_process_on_a_cpu_holds_layers_or_sampling_and_messages_on_their_way():
    config, mib = shape("llama-34M"), 2**20
    first, last = (RankMemory(config, Layout(1, 2, 1), rank, 4) for rank in (0, 1))
    layers = 512 * (3 * 512 + 3 * 1536) * 4  # attention; gate, up and what they become are less: 3 x 1,408
    assert last.activations(max_tokens=512) == layers == first.activations(max_tokens=512) - 512 * 2 * 512 * 4
    assert first.step(max_tokens=512, max_rows=16) == int(HOLES * (layers + mib)), "a message more, the update less"
    assert last.step(max_tokens=512, max_rows=16) == int(HOLES * (layers - mib)), "sampling takes less"
    sampling = 512 * 512 * 4 + 1000 * 8192 * 4 + 25 * 2**17
    assert last.step(max_tokens=512, max_rows=1000) == int(HOLES * sampling)
    tp = RankMemory(config, Layout(2), 0, 4)
    assert tp.step(max_tokens=512, max_rows=16) == int(HOLES * (tp.activations(max_tokens=512) + mib)), "two segments"


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


# ---- parallel: {tp: null, pp: null, dp: null}


def resolved(kind: str, tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_config(kind, path, overrides)


@pytest.fixture
def eight(monkeypatch, tmp_path):
    """A machine with 8 H100, as far as the planner can see, that measured nothing."""
    monkeypatch.setattr(devices, "visible_gpus", lambda: [("NVIDIA H100 80GB HBM3", 80 << 30)] * 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def chosen(tmp_path: Path, *overrides: str, ranks: int | None = None, model: str = "llama-8B"):
    loaded = resolved("infer", tmp_path, INFER, *overrides)
    return choose.choose(loaded, lambda: shape(model), choose.Place(ranks=ranks))


INFER = "model: {path: x}\ninput: {prompts: [a, b]}\nparallel: {tp: null, pp: null, dp: null}\n"


def test_open_sizes_are_chosen_for_the_gpus_that_are_there(eight, tmp_path):
    loaded = resolved("infer", tmp_path, INFER)
    found, said = choose.choose(loaded, lambda: shape("llama-8B"), choose.Place())
    assert math.prod(found.config.parallel.sizes) == 8 and found.origins["parallel.tp"] == "the planner"
    assert "chosen from 10" in said[0] and "8 x H100" in said[-1] and found.sha256 != loaded.sha256
    assert load_text(tmp_path, found.given).config == found.config, "ranks that get it get the layout"
    kept, _ = choose.choose(
        resolved("infer", tmp_path, INFER, "parallel.pp=3"), lambda: shape("llama-8B"), choose.Place()
    )
    assert kept.config.parallel.pp == 3 and math.prod(kept.config.parallel.sizes) == 6, "as many as they divide"
    assert kept.origins["parallel.pp"] == "the command line"
    four, _ = choose.choose(loaded, lambda: shape("llama-8B"), choose.Place.on(consecutive([("a", 2), ("b", 2)])))
    assert math.prod(four.config.parallel.sizes) == 4
    with pytest.raises(ConfigError, match="no layout of 7 ranks has tp=2"):
        choose.choose(
            resolved("infer", tmp_path, INFER, "parallel.tp=2"), lambda: shape("llama-8B"), choose.Place(ranks=7)
        )
    with pytest.raises(ConfigError, match="config.json"):
        choose.choose(loaded, lambda: None, choose.Place())


def load_text(tmp_path: Path, text: str):
    (tmp_path / "given.yaml").write_text(text)
    return load_config("infer", tmp_path / "given.yaml")


def test_without_a_gpu_one_rank_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "visible_gpus", lambda: [])
    found, said = choose.choose(resolved("infer", tmp_path, INFER), lambda: None, choose.Place())
    assert found.config.parallel.sizes == (1, 1, 1) and "no GPU is visible" in said[0]
    two, _ = choose.choose(
        resolved("infer", tmp_path, INFER, "parallel.dp=2"), lambda: shape("qwen3-10M"), choose.Place()
    )
    assert two.config.parallel.sizes == (1, 1, 2)


def test_layouts_that_train_and_generate_are_chosen_together(eight, tmp_path):
    text = """
model: {path: x}
data: {source: "a:b"}
hybrid: {reward: "a:b"}
train: {parallel: {tp: null, pp: null, dp: null}}
infer: {parallel: {tp: null, pp: null, dp: null}}
sampling: {max_tokens: 256}
output: {folder: y}
"""
    found, said = choose.choose(resolved("hybrid", tmp_path, text), lambda: shape("llama-8B"), choose.Place())
    train, infer = found.config.train.parallel, found.config.infer.parallel
    assert math.prod(train.sizes) == math.prod(infer.sizes) == 8 and "s sampling" in said[0]
    trained = "model: {path: x}\nparallel: {tp: null, pp: null, dp: null}\noutput: {folder: y}\n"
    small = shape("qwen3-0.6B")
    [alone, said] = choose.choose(resolved("train", tmp_path, trained), lambda: small, choose.Place())
    assert alone.config.parallel.sizes == (1, 1, 8), "a small model needs no sums within its layers"
    with pytest.raises(ResourceError, match="parallel: no layout fits"):
        whole = resolved("train", tmp_path, trained, "parallel.tp=1", "parallel.pp=1")
        choose.choose(whole, lambda: shape("llama-8B"), choose.Place(ranks=2))


def test_training_counts_the_bubble_and_what_recomputing_saves():
    config, cluster = shape("llama-8B"), Cluster(named("h100"), 8)
    found = {one.layout.sizes: one.prediction for one in search_training(config, cluster, TrainingWork(), itemsize=2)}
    piped, whole = found[1, 8, 1], found[1, 1, 8]
    assert piped.bubble > whole.bubble == 0 and 0 < whole.recomputed < whole.kept / 5
    long = replace(TrainingWork(), sequence=32768, batch=8)
    saved = next(one.prediction for one in search_training(config, cluster, long, itemsize=2) if one.layout.dp == 8)
    assert saved.recompute and not saved.short, "it does not fit otherwise"
    few = search_training(config, Cluster(named("h100"), 8), TrainingWork(batch=8), itemsize=2)
    assert next(one.prediction for one in few if one.layout.pp == 8).bubble > piped.bubble


# ---- beside what others do, and what was measured


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama-34M", [(3, 5), (1, 3, 3, 1), (0, 1, 2, 2, 2, 1, 0, 0)]),
        ("llama-8B", [(14, 18), (5, 10, 10, 7), (1, 5, 5, 5, 5, 5, 5, 1)]),
        ("qwen3-0.6B", [(9, 19), (0, 0, 10, 18)]),
    ],
)
def test_layers_of_device_map_auto_are_those_of_accelerate(name, layers):
    """As accelerate 1.15.0 places models on the meta device, in bfloat16 on devices with room for all."""
    assert [device_map.spread(shape(name), len(one), 2) for one in layers] == layers


def test_one_device_of_a_device_map_works_at_a_time():
    load = Workload(concurrency=32)
    found = device_map.compare(shape("llama-8B"), Cluster(named("h100"), 4), load, itemsize=2)
    assert sum(found.layers) == 32 and sum(1 - share for share in found.idle) == pytest.approx(1)
    ours = search(shape("llama-8B"), Cluster(named("h100"), 4), load, EngineSection(), itemsize=2)[0].prediction
    assert ours.throughput > 2 * found.throughput


def test_ranks_of_a_cpu_are_one_device_of_a_device_map():
    cpu, load = replace(named("cpu"), cores=2), Workload(concurrency=8)
    found = device_map.compare(shape("qwen3-10M"), Cluster(cpu, 4), load, itemsize=4)
    assert found.layers == (8,) and found.idle == (0.0,)


def test_a_first_token_waits_for_its_whole_prompt_on_every_stage():
    """A prompt is in one cohort: stages share its layers, and not its tokens."""
    load, cluster = Workload(concurrency=64), Cluster(named("h100"), 4)
    whole, staged = (
        predict(shape("llama-8B"), layout, cluster, load, EngineSection(), itemsize=2)
        for layout in (Layout(1, 1, 4), Layout(1, 4, 1))
    )
    assert whole.first_token < staged.first_token < 1.2 * whole.first_token
    assert staged.first_token == pytest.approx(staged.spent_first.total)
    first, *others = search(shape("llama-8B"), cluster, load, EngineSection(), itemsize=2, objective="first_token")
    assert "the least time to the first token" in first.reason
    assert all("of the first token beside" in one.reason for one in others)


def test_no_more_requests_are_at_work_than_there_are():
    for load in (Workload(concurrency=64), parse("requests=64")):
        one = predict(shape("llama-8B"), Layout(1, 1, 3), Cluster(named("h100"), 3), load, EngineSection(), itemsize=2)
        assert one.concurrency == 64
        alone = replace(load, concurrency=22, requests=load.requests and 22)
        third = predict(shape("llama-8B"), Layout(), Cluster(named("h100"), 1), alone, EngineSection(), itemsize=2)
        assert one.throughput == pytest.approx(third.throughput * 64 / 22)


def test_a_cache_on_a_cpu_is_as_large_as_the_work_needs():
    engine, load = EngineSection(max_num_seqs=4), parse("input=20,output=10,requests=4")
    cpu = Cluster(replace(named("cpu"), memory=2**34), 1)
    one = predict(shape("qwen3-10M"), Layout(), cpu, load, engine, itemsize=4)
    assert one.memory[0].kv == 4 * 32 * 8 * 2 * 2 * 64 * 4 and one.fits > 1000, "two blocks of 16 each"


def test_ranks_beyond_the_cores_take_turns():
    batch = Batch(rows=8, keys=512, sampled=8)

    def step(cores: int) -> Times:
        cluster = Cluster(replace(named("cpu"), cores=cores), 4)
        return StageCosts(shape("qwen3-10M"), Layout(4, 1, 1), cluster, 4).step(0, batch)

    for part in ("host", "kernels", "sums"):
        assert getattr(step(2), part) == pytest.approx(2 * getattr(step(4), part))


def test_published_throughput_is_near_where_the_source_says_all_of_it():
    """Version 0.9.0 of TensorRT-LLM on A100: 13 of 15 within 30%."""
    known = [one for one in published.PUBLISHED if one.missing is None]
    assert len(known) == 15 and {one.version for one in known} == {"0.9.0"}
    far = [(one.model, one.input, one.output) for one in known if abs(one.predicted() / one.throughput - 1) > 0.3]
    assert far == [("Mistral 7B", 128, 2048), ("Mistral 7B", 2048, 2048)]
    routed = [one for one in published.PUBLISHED if one.missing == "experts of each token"]
    assert [(one.model, one.batch) for one in routed] == [("Mixtral 8x7B", 32)]


def test_what_was_measured_is_kept_and_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = named("h200")
    assert devices.keep("H200", {"read": 1e12, "nonsense": 3.0}) == tmp_path / "megalite" / "devices.json"
    after = named("NVIDIA H200")
    assert after.read == 1e12 and after.matmul == before.matmul and "measured on this machine" in after.source
    assert named("h100").read == devices.PROFILES["h100"].read
    devices.keep("cpu", {"read": 1e12})
    assert named("cpu").read == 1e12
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(1000)})  # another host of the same home
    assert named("cpu").read == devices.processor().read
    devices.calibration_file().write_text("{")
    assert named("h200") == before
