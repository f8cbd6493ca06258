"""What a training run says of itself: arithmetic of a step against numbers worked out by hand, and its log."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from megalite.config.schema import LoraSection, NewModelSection, TrainConfig, TrainOutputSection
from megalite.config.validate import validate
from megalite.model import families
from megalite.monitor.collector import Meter
from megalite.planner.devices import peak_flops
from megalite.train.flops import AdapterSize, active_parameters, training_flops
from megalite.train.log import RunLog, Speed
from megalite.weights.adapter_table import table_of

DENSE = {
    "model_type": "mistral",
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


def model(**changes):
    return families.from_values(Path("config.json"), {**DENSE, **changes})


def test_the_arithmetic_of_a_step():
    # A layer: q and out 8 x 8, k and v 8 x 4, three matrices 8 x 10; the head 8 x 100, and no table.
    parameters = 2 * (2 * 64 + 2 * 32 + 3 * 80) + 800
    assert active_parameters(model()) == parameters == 1664
    # Two sequences of 3 and 5 tokens: 6 N for each token, and 12 * layers * heads * channels * length for each token.
    assert training_flops(model(), [3, 5]) == 6 * 1664 * 8 + 12 * 2 * 4 * 2 * (3 * 3 + 5 * 5) == 86_400
    windowed = training_flops(model(sliding_window=4), [3, 5])
    assert windowed == 6 * 1664 * 8 + 12 * 2 * 4 * 2 * (3 * 3 + 5 * 4)


def test_frozen_weights_have_no_gradient():
    """Beside adapters: forward and back by 2 N each, where a layer up has one; 6 times what trains."""
    up = LoraSection(r=2, target_modules=r".*layers\.1\.mlp\.up_proj")
    size = AdapterSize.of(table_of(up, model()))
    assert size == AdapterSize(first_layer=1, parameters=2 * (8 + 10))
    layer = 2 * 64 + 2 * 32 + 3 * 80
    products = 2 * (2 * layer + 800) + 2 * (layer + 800) + 6 * 36
    keys = 4 * 4 * 2 * (3 * 3 + 5 * 5)  # of a layer, forward
    assert training_flops(model(), [3, 5], size) == products * 8 + keys * (2 + 2)
    whole = AdapterSize.of(table_of(LoraSection(r=2), model()))
    assert whole is not None and whole.first_layer == 0
    assert training_flops(model(), [3, 5], whole) == (4 * 1664 + 6 * whole.parameters) * 8 + keys * 2 * 3


def test_of_experts_the_chosen_ones_count():
    # Attention as above, the router 8 x 6, and two experts of three matrices 8 x 5.
    assert active_parameters(model(**EXPERTS)) == 2 * (2 * 64 + 2 * 32 + 48 + 2 * 3 * 40) + 800


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_peaks_by_the_name_of_the_device(name, peak):
    assert peak_flops(name) == peak


def test_speed_is_work_over_the_time_that_was_not_paused():
    now = 100.0
    meter = Meter(clock=lambda: now)
    speed = Speed(meter)
    speed.count(10, 4.0)
    now += 2
    with meter.part("evaluation"):
        now += 50
    speed.count(20, 6.0)
    now += 3
    assert speed.read() == (6.0, 2.0)
    now += 1
    assert speed.read() == (0.0, 0.0), "it begins anew"


def test_a_log_goes_on_after_what_will_not_be_done_again(tmp_path):
    first = RunLog(tmp_path, step=0, tensorboard=False)
    first.write(1, {"loss": 2.5, "mfu": None})
    first.write(2, {"loss": 2.25, "mfu": None})
    first.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    second = RunLog(tmp_path, step=1, tensorboard=False)
    second.write(2, {"loss": 2.25})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.5), (2, 2.25)]
    assert lines[0]["mfu"] is None and not (tmp_path / "tensorboard").exists()


def test_tensorboard_shows_what_was_logged(tmp_path):
    output = TrainOutputSection(folder=str(tmp_path), tensorboard=True)
    found = validate(TrainConfig(model=NewModelSection(config={}), output=output), None, None)
    if find_spec("tensorboard") is None:
        (found,) = found
        assert "output.tensorboard: TensorBoard is not installed, got true. pip install tensorboard" in str(found)
        pytest.skip("TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert found == []
    log = RunLog(tmp_path, step=0, tensorboard=None)
    log.write(1, {"loss": 2.5, "mfu": None})
    log.write(2, {"loss": 2.0, "mfu": None})
    log.close()
    log = RunLog(tmp_path, step=1, tensorboard=True)  # a run that was killed after step 2 goes on from the state of 1
    log.write(2, {"loss": 1.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
