"""tools/bench.py gpu: its floors against a table computed elsewhere, and a whole run of tiny sizes on the CPU."""

from __future__ import annotations

import json

import pytest

from megalite.core.layout import Layout
from megalite.model import families
from megalite.tools.benchmarks import host
from megalite.tools.benchmarks.account import Kernel, short
from megalite.tools.benchmarks.floor import Floor, Rates
from megalite.tools.benchmarks.gpu import ROWS, Row
from megalite.tools.benchmarks.shapes import save_config

H100 = Rates(read=3.11e12, matmul=779e12)


@pytest.mark.parametrize(
    ("shape", "decode", "prefill"),
    [("qwen3-0.6B", (0.40, 0.99, 5.22), 698_000), ("llama-8B", (4.85, 5.52, 10.4), 53_800)],
)
def test_floors_on_one_card(tmp_path, shape, decode, prefill):
    model = families.read(save_config(shape, tmp_path))
    floor = Floor(model, Layout(), H100, itemsize=2)
    assert tuple(1000 * floor.decode([512] * batch) for batch in (1, 32, 256)) == pytest.approx(decode, rel=0.01)
    assert 8 * 2048 / floor.prefill([2048] * 8) == pytest.approx(prefill, rel=0.01)


def test_floors_of_layouts(tmp_path):
    """Two ranks halve what they share; stages halve the cohort's keys but not the weights; replicas share the rows."""
    model = families.read(save_config("llama-8B", tmp_path))
    one, tp, pp, dp = (Floor(model, Layout(*layout), H100, itemsize=2) for layout in ((), (2,), (1, 2), (1, 1, 2)))
    whole, half = [512] * 256, [512] * 128
    assert tp.decode(whole) == pytest.approx(one.decode(whole) / 2)
    assert pp.decode(whole) == dp.decode(whole) == one.decode(half)
    assert pp.decode([512]) == one.decode([512])
    assert dp.prefill([2048] * 8) == pytest.approx(one.prefill([2048] * 8) / 2)
    assert one.requests([448] * 2, [3, 2]) == pytest.approx(
        one.prefill([448] * 2) + one.decode([449, 449]) + one.decode([450])
    )


def test_kernels_have_a_kind_and_a_short_name():
    name = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>(int, float*)"
    assert short(name) == "at::native::vectorized_elementwise_kernel"
    kinds = {name: "elementwise", "nvjet_tst_128x64": "matmul", "_attention_kernel": "attention", "memset32": "copies"}
    assert {one: Kernel(one).kind for one in kinds} == kinds
    assert Kernel("nothing known").kind == "other"


def test_a_row_beside_its_floor():
    assert Row("m", "one card", "w", 2.0, "ms", floor=1.0).of_floor == 0.5
    row = Row("m", "one card", "w", 500.0, "tok/s", spread=0.015, floor=1000.0, note="n")
    assert row.to_line() == "| m | one card | w | 500 tok/s | 1.5% | 1,000 | 50% | n |"


def test_host_parts_are_timed_to_the_last_step():
    for rows, prompt in ((1, 3), (5, 8000)):  # the second takes several steps for its prompts
        assert min(host.measure(rows, prompt, steps=4).values()) > 0


@pytest.mark.slow
def test_every_row_on_the_cpu(forks, tmp_path):
    """Also with two ranks, of which only the table is looked at."""
    sizes = ["--shapes", "qwen3-10M", "--device", "cpu", "--scale", "0.005", "--rounds", "1"]
    preload = ("megalite.tools.benchmarks.gpu", "megalite.inference.llm")

    def run(*more: str) -> str:
        done = forks.run("tools/bench.py", "gpu", *sizes, *more, "--json", tmp_path / "rows", preload=preload)
        assert done.code == 0, done.out + done.err
        return done.out

    said = run("--profile", "--disk")
    rows = json.loads((tmp_path / "rows").read_text())
    for word in (
        "start: ready",
        "read rate",
        "first token",
        "decode",
        "prefill",
        "requests",
        "temperature",
        "penalties",
    ):
        assert any(word in row["what"] and row["value"] > 0 for row in rows), word
    assert len(ROWS) == 7 and all(row["what"] in said for row in rows)
    assert "A decode step, batch 1" in said and "| matmul |" in said and "Prefill of" in said
    said = run("--ranks", "2", "--layouts", "one", "tp", "--rows", "decode")
    assert "| model | what | one card | tp=2 |" in said and "x) |" in said
