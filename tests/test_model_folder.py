"""What a model folder holds beside its weights: the end tokens and sampling values are those of transformers."""

import json

import pytest
from test_families import LLAMA

from megalite.errors import CheckpointError
from megalite.weights.folder import ModelFolder

SAMPLINGS = [
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True},
    {"temperature": 0.0, "min_p": 0.1, "max_new_tokens": 2048, "top_k": None},
    {"top_k": 50, "temperature": 1.0, "pad_token_id": 0, "length_penalty": 2.0},
    {},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("eos", [2, [2, 7], [50256, 2], None, "absent"])
@pytest.mark.parametrize("own_file", [True, False])
def test_generation_settings_are_what_transformers_reads(tmp_path, sampling, eos, own_file):
    from transformers import GenerationConfig

    values = sampling if eos == "absent" else {**sampling, "eos_token_id": eos}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 5} | ({} if own_file else values)))
    if own_file:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
    found = ModelFolder.open(tmp_path)
    name = "generation_config.json" if own_file else "config.json"
    theirs = GenerationConfig.from_pretrained(tmp_path, config_file_name=name)
    names = {"repetition_penalty", "temperature", "top_k", "top_p", "min_p", "max_new_tokens"}
    wanted = {key: value for key, value in theirs.to_diff_dict().items() if key in names and value is not None}
    if "max_new_tokens" in wanted:
        wanted["max_tokens"] = wanted.pop("max_new_tokens")
    assert found.generation.sampling == wanted and found.generation.path.name == name
    ends = theirs.eos_token_id
    if ends is None:  # then config.json's, unless it is that which has none
        ends = 5 if own_file or eos == "absent" else []
    ends = tuple(ends) if isinstance(ends, list) else (ends,)
    assert found.generation.eos_token_ids == ends
    assert found.model.eos_token_ids == tuple(token for token in ends if token < LLAMA["vocab_size"])


@pytest.mark.parametrize("values", [{"temperature": "hot"}, {"top_k": 1.5}, {"top_p": True}, {"min_p": float("nan")}])
def test_sampling_that_is_no_number_is_named_when_it_is_asked_for(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    generation = ModelFolder.open(tmp_path).generation
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {list(values)[0]} must be a"):
        assert generation.sampling


@pytest.mark.parametrize(
    "config, own, taught, wanted",
    [
        (5, {"eos_token_id": [2, 303], "temperature": 0.7}, [2], None),
        (5, {"eos_token_id": [2, 303], "pad_token_id": 0}, [7], [2, 303, 7]),
        (5, {"eos_token_id": None}, [7, 5], [5, 7]),
        (5, {"eos_token_id": []}, [5], 5),
        (None, {"eos_token_id": None}, [7], 7),
        (None, None, [7], 7),
        (5, None, [5], None),
        (5, None, [7], [5, 7]),
        (5, {"eos_token_id": 2}, [], None),
    ],
)
def test_end_tokens_are_added_and_nothing_else_changes(tmp_path, config, own, taught, wanted):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": config}))
    if own is not None:
        (tmp_path / "generation_config.json").write_text(f" {json.dumps(own)} ")
    before = ModelFolder.open(tmp_path).generation
    after = before.with_ends(taught)
    assert set(taught) <= set(after.eos_token_ids) and set(before.eos_token_ids) <= set(after.eos_token_ids)
    if wanted is None:
        assert after is before and (own is None or after.to_bytes() == f" {json.dumps(own)} ".encode())
    else:
        assert json.loads(after.to_bytes()) == {**before.values, "eos_token_id": wanted}
