"""The Python API in vLLM's spelling, in this process and under the launchers."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import threading
import weakref
from functools import partial
from pathlib import Path

import llm_rank
import numpy as np
import pytest
import torch
from reference import score
from started import Started
from tiny_models import edit_config
from tiny_tokenizer import with_tokenizer
from tqdm import tqdm
from waiting import PATIENCE, wait_until

from megalite import LLM, SamplingParams
from megalite.errors import CheckpointError, ConfigError
from megalite.inference.outputs import RequestOutput
from megalite.run.processes import descendants

MODEL = "llama3"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46], [9]]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A model that has a tokenizer with a chat template."""
    return with_tokenizer(tiny(MODEL), tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    with LLM(str(folder), dtype="float32", max_model_len=100, block_size=8) as made:
        yield made


def watches() -> int:
    """Runs that are being watched. One that ended with an error would end this process within seconds."""
    return sum(thread.name == "watchdog" for thread in threading.enumerate())


def down_to(count: int) -> bool:
    wait_until(lambda: watches() <= count, f"{count} watched runs are left")
    return watches() == count


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# ---- generate


def test_prompts_in_all_spellings(llm, reference):
    wanted = [made.tokens for made in reference(MODEL, PROMPTS, 8)]
    assert ids(llm.generate(PROMPTS, GREEDY)) == wanted
    assert ids(llm.generate(prompts=PROMPTS[1], sampling_params=GREEDY)) == wanted[1:2]
    assert ids(llm.generate(prompt_token_ids=PROMPTS, sampling_params=GREEDY)) == wanted
    assert ids(llm.generate(tuple(map(tuple, PROMPTS)), [GREEDY] * 3)) == wanted
    for nothing in ([], (), np.array([], int), torch.tensor([], dtype=torch.int64), iter([])):
        assert llm.generate(nothing, GREEDY) == []
    hi = llm.get_tokenizer().encode("Hi")
    forms = ["Hi", {"prompt": "Hi"}, {"prompt_token_ids": hi}, np.array(hi, np.int32), torch.tensor(hi), tuple(hi)]
    forms += [{"prompt_token_ids": torch.tensor(hi)}, {"prompt_token_ids": np.array(hi), "prompt": "Hi"}]
    forms += [tuple(map(np.int64, hi)), [torch.tensor(token) for token in hi]]
    outputs = llm.generate(forms, GREEDY)
    assert len({tuple(tokens) for tokens in ids(outputs)}) == 1
    assert [place for place, output in enumerate(outputs) if output.prompt == "Hi"] == [0, 1, 7]
    for alone in forms[:5]:
        assert ids(llm.generate(alone, GREEDY)) == ids(outputs)[:1]
    for rows in (torch.tensor([hi] * 2), np.array([hi] * 2), [np.array(hi)] * 2, np.array(["Hi", "Hi"])):
        assert ids(llm.generate(rows, GREEDY)) == ids(outputs)[:2]


def test_text_prompts_and_what_comes_back(llm, reference):
    [output] = llm.generate("Hi", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1))
    [wanted] = reference(MODEL, [llm.replica.tokenizer.encode("Hi")], 8)
    [one] = output.outputs
    assert (output.prompt, output.prompt_token_ids) == ("Hi", wanted.prompt)
    assert (output.finished, output.prompt_logprobs, output.error) == (True, None, None)
    assert (one.index, one.token_ids, one.finish_reason, one.stop_reason) == (0, wanted.tokens, "length", None)
    assert one.text == llm.replica.tokenizer.decode(wanted.tokens, skip_special_tokens=True)
    for entry, token in zip(one.logprobs, one.token_ids, strict=True):
        assert list(entry) == [token] and entry[token].rank == 1
        assert entry[token].decoded_token == llm.replica.tokenizer.token_text(token)
    logprobs = [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)]
    assert one.token_logprobs == logprobs and one.cumulative_logprob == pytest.approx(sum(logprobs))


def test_params_for_each_prompt_and_a_mixed_list(llm):
    params = [GREEDY, SamplingParams(max_tokens=3, n=2, seed=1), SamplingParams(max_tokens=5, ignore_eos=True, seed=2)]
    together = llm.generate(["ab", [7, 8], "cd"], params)
    assert [len(output.outputs) for output in together] == [1, 2, 1]
    assert [output.prompt for output in together] == ["ab", None, "cd"]
    assert [len(output.outputs[0].token_ids) for output in together] == [8, 3, 5]
    assert ids(llm.generate("cd", params[2])) == ids(together)[2:]
    assert together[1].outputs[0].token_ids != together[1].outputs[1].token_ids
    # without parameters: those of the config, whose default is 16 tokens
    assert len(llm.generate([[5, 6]])[0].outputs[0].token_ids) <= 16


def test_calls_go_on_with_the_engines_seeds_and_ids(folder):
    """Without seeds of their own, samples are not drawn twice, and the same calls give the same again."""
    open_ended = SamplingParams(max_tokens=12, ignore_eos=True)
    calls = [[[5, 6]], [[5, 6]], [[5, 6], [7], [5, 6]], [[5, 6]]]

    def drawn(calls: list, **engine) -> list[tuple[str, list[int]]]:
        with LLM(str(folder), dtype="float32", max_model_len=100, **engine) as made:
            outputs = [output for prompts in calls for output in made.generate(prompts, open_ended)]
            with pytest.raises(ConfigError):  # what is refused takes no place
                made.generate([[5], []], open_ended)
            outputs += made.chat([{"role": "user", "content": "hi"}], open_ended)
        return [(output.request_id, output.outputs[0].token_ids) for output in outputs]

    one = drawn(calls)
    assert [number for number, _ in one] == [str(number) for number in range(7)]
    same_prompt = [one[place][1] for place in (0, 1, 2, 4, 5)]
    assert len({tuple(tokens) for tokens in same_prompt}) == len(same_prompt)
    assert drawn([sum(calls, [])]) == one, "the samples are those of one call with all prompts"
    assert drawn(calls, seed=1) != one


def test_as_many_tokens_as_fit(llm):
    [output] = llm.generate([[5] * 90], SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 10
    [output] = llm.generate([[5] * 99], SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 1 and output.outputs[0].finish_reason == "length"


def test_the_model_owners_sampling_is_used_where_nothing_is_said(folder, tmp_path, config, caplog):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    values = {"temperature": 0.25, "top_k": 5, "max_new_tokens": 3, "do_sample": True}
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))
    with LLM(tmp_path / "model", dtype="float32") as made:
        params = made.get_default_sampling_params()
        assert params == SamplingParams(temperature=0.25, top_k=5, max_tokens=3)
        params.temperature = 2.0
        assert made.get_default_sampling_params().temperature == 0.25
        assert len(made.generate([[5, 6]])[0].outputs[0].token_ids) <= 3
        assert len(made.generate([[5, 6]], GREEDY)[0].outputs[0].token_ids) == 8, "what is given is taken as it is"
    with LLM(tmp_path / "model", dtype="float32", generation_config="vllm") as made:
        assert made.get_default_sampling_params() == SamplingParams()
        for told in ("2 outputs ended at max_tokens = 16; set max_tokens in SamplingParams to allow more", ""):
            caplog.clear()
            made.generate([[5, 6], [7]], SamplingParams(ignore_eos=True))
            assert told in caplog.text and bool(caplog.text) == bool(told), "said once"
    with LLM.from_config(config, [f"model.path={tmp_path}/model"]) as made:
        params = made.get_default_sampling_params()
        assert (params.temperature, params.max_tokens, params.top_k) == (0, 5, 5), "a config goes before the model"


def test_params_that_change_between_calls(llm):
    params = SamplingParams(temperature=0, max_tokens=np.int64(4), ignore_eos=True, stop_token_ids=np.array([102]))
    first = llm.generate([[5, 6], [7]], params)
    params.max_tokens = 6
    params.stop_token_ids.fill(101)
    assert [len(tokens) for tokens in ids(first)] == [4, 4]
    assert [len(tokens) for tokens in ids(llm.generate([[5, 6]], params))] == [6]
    params.temperature = -1.0
    with pytest.raises(ConfigError, match="temperature: must be >= 0"):
        llm.generate([[5, 6]], params)
    params.temperature = 0.0
    assert ids(llm.generate([[5, 6]], params))[0][:4] == ids(first)[0]


def test_a_bar_of_the_callers_own(llm):
    """A callable is made and used as tqdm is."""
    said = io.StringIO()
    llm.generate([[5], [6], [7]], GREEDY, use_tqdm=partial(tqdm, file=said, disable=False))
    assert "3/3" in said.getvalue() and "prompts" in said.getvalue()


def test_ids_without_a_tokenizer(folder, reference):
    with LLM(folder, dtype="float32", skip_tokenizer_init=True) as made:
        outputs = made.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY)
        assert ids(outputs) == [one.tokens for one in reference(MODEL, PROMPTS, 8)]
        assert {one.outputs[0].text for one in outputs} == {""} and made.get_tokenizer() is None
        for call in (lambda: made.generate("Hi"), lambda: made.chat([{"role": "user", "content": "hi"}])):
            with pytest.raises(ValueError, match="the model has no tokenizer.json"):
                call()
        with pytest.raises(ValueError, match="bad_words need a tokenizer"):
            made.generate([[5]], SamplingParams(bad_words=["a"]))


@pytest.mark.parametrize("dtype", ["half", "float16", torch.float16])
def test_half_precision_is_for_gpus(folder, dtype):
    with pytest.raises(ValueError, match="float16 is for GPUs.* Use float32 or bfloat16 on the CPU"):
        LLM(folder, dtype=dtype, device="cpu")


PASSED_OVER = {"disable_log_stats": True, "enable_chunked_prefill": False, "distributed_executor_backend": "mp"}


def test_what_code_for_vllm_passes(folder, caplog):
    names = {"seed": None, "num_gpu_blocks_override": 40, "tokenizer_mode": "auto", **PASSED_OVER}
    with LLM(model=str(folder), dtype=torch.float32, **names) as made:
        assert "passed over: disable_log_stats, distributed_executor_backend, enable_chunked_prefill" in caplog.text
        params = SamplingParams(1, 0.0, 0.0, 1.0, 0.0, max_tokens=4, logprobs=-1, flat_logprobs=True)
        [output] = made.generate("Hi", params, use_tqdm=False)
        params.max_tokens = 2
        assert output.metrics.first_token_latency > 0
        assert output.metrics.num_generation_tokens == len(output.outputs[0].token_ids)
        flat = output.outputs[0].logprobs
        assert len(flat) == len(output.outputs[0].token_ids) and len(flat[0]) == 103 and len(flat.token_ids) % 103 == 0
        [silent] = made.generate("Hi", SamplingParams(temperature=0, max_tokens=4, detokenize=False))
        assert silent.outputs[0].text == "" and silent.outputs[0].token_ids == output.outputs[0].token_ids
        shared = [5, 6, 7, 8] * 10
        made.generate([shared], GREEDY)
        assert made.generate([[*shared, 9]], GREEDY)[0].num_cached_tokens == 32
        assert made.reset_prefix_cache() and made.generate([[*shared, 9]], GREEDY)[0].num_cached_tokens == 0
        [plain] = made.generate("Hi", GREEDY)
        for count in range(3):
            word = plain.outputs[0].text[count : count + 2]
            other = made.generate("Hi", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, bad_words=[word]))
            assert not word.strip() or word.strip() not in other[0].outputs[0].text
    for wrong in ({"cpu_offload_gb": 4}, {"calculate_kv_scales": True}, {"task": "embed"}):
        with pytest.raises(ValueError, match="is not supported"):
            LLM(folder, **wrong)


# ---- chat and score


def test_nothing_is_left_of_a_chat(folder):
    with LLM(folder, max_model_len=64) as llm:
        before = {one.pid for one in descendants(os.getpid())}
        llm.chat([{"role": "user", "content": "hi"}], GREEDY)
        started = {one.pid for one in descendants(os.getpid())} - before
        assert started
        weight = weakref.ref(next(llm.replica.decoder.parameters()))
    assert not started & {one.pid for one in descendants(os.getpid())}
    gc.collect()
    assert weight() is None, "the memory of a closed LLM is free, though the name is still known"


def test_chat(llm):
    chats = [
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
    ]
    [one] = llm.chat(chats[0], GREEDY)
    assert one.prompt == "<s>user: hi\nassistant: " and one.prompt_token_ids.count(1) == 1
    both = llm.chat(chats, GREEDY, name="bot")
    assert [output.prompt for output in both] == ["<s>user: hi\nbot: ", "<s>system: x\nuser: y\nbot: "]
    same = llm.generate([output.prompt_token_ids for output in both], GREEDY)
    assert ids(same) == ids(both)
    assert llm.chat([], GREEDY) == []


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ("hi", r"chats\[0\]: a chat is a list of {role, content}, got 'hi'"),
        (["hi", "you"], r"chats\[0\]: a chat is a list"),
        ([[{"role": "user", "content": "hi"}], [3]], r"chats\[1\]: a chat is a list"),
        ([{"content": "a"}], r"prompts\[0\]\[0\]: a chat message needs a role"),
    ],
)
def test_what_is_no_chat(llm, chat, says):
    with pytest.raises(ConfigError, match=says):
        llm.chat(chat, GREEDY)


def test_a_chat_by_another_template_and_one_that_goes_on(llm):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well, "}]
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"
    [output] = llm.chat(chat, GREEDY, chat_template=own)
    assert output.prompt == "<user>hi<assistant>well, >"
    assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt)
    [output] = llm.chat(chat, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "<s>user: hi\nassistant: well, "
    several = llm.chat([chat, chat], GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert ids(several) == ids([output]) * 2
    for wrong in ({"continue_final_message": True}, {"chat_template": "{% if %}"}):
        with pytest.raises(ValueError):
            llm.chat(chat, GREEDY, **wrong)


def ids_of(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens)[:, None]


def test_score(llm, tiny):
    texts = ["some text", "!"]
    prompts = [llm.replica.tokenizer.encode(text) for text in texts] + [PROMPTS[1]]
    scores = llm.score([*texts, PROMPTS[1]])
    for prompt, got in zip(prompts, scores, strict=True):
        logprobs = score(tiny(MODEL), prompt)
        assert got == pytest.approx([logprobs[i, token].item() for i, token in enumerate(prompt[1:])], abs=1e-4)
    assert llm.score(PROMPTS[1]) == [pytest.approx(scores[2], abs=1e-5)]
    long = [3 + n * n % 90 for n in range(101)]  # the last token is no input, so it needs no position
    [tokens] = llm.logprobs({"prompt_token_ids": long})
    logprobs = score(tiny(MODEL), long)
    assert [token.token_id for token in tokens] == long[1:]
    assert [token.logprob for token in tokens] == pytest.approx(
        logprobs[:-1].gather(1, ids_of(long[1:]))[:, 0].tolist(), abs=1e-4
    )
    assert [token.is_greedy for token in tokens] == (logprobs[:-1].argmax(-1) == ids_of(long[1:])[:, 0]).tolist()
    with pytest.raises(ValueError, match="the prompt has 102 tokens"):
        llm.logprobs([[5] * 102])
    with pytest.raises(ConfigError, match="see LLM.logprobs"):
        llm.score("a", "b")


# ---- what is refused, and when


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_modellen": 3}, "LLM: unknown argument, got 'max_modellen'. Did you mean max_model_len?"),
        ({"tensor_paralel_size": 2}, "Did you mean tensor_parallel_size?"),
        ({"zzz": 2}, "The engine's are max_model_len, gpu_memory_utilization"),
        ({"max_model_len": "12"}, "engine.max_model_len: must be a whole number or null, got '12'"),
        ({"block_size": object()}, "engine.block_size: must be a whole number"),
        ({"max_model_len": 1000}, "engine.max_model_len: the model was made for at most 128 tokens, got 1000"),
        ({"gpu_memory_utilization": 1.5}, "engine.gpu_memory_utilization: must be above 0 and at most 1, got 1.5"),
        ({"dtype": "float8"}, "model.dtype: must be one of"),
        ({"quantization": "squeezellm"}, "model.quantization: 'squeezellm' is not supported"),
        ({"trust_remote_code": True}, "model.trust_remote_code: true is refused"),
        ({"pipeline_parallel_size": 9}, "parallel.pp: the model has 4 layers"),
        ({"tensor_parallel_size": 2}, "1 rank was started, but the config asks for tp * pp * dp = 2 * 1 * 1 = 2"),
        ({"tensor_parallel_size": 2}, "deepspeed --num_gpus 2 SCRIPT"),
        ({"tensor_parallel_size": 0}, "parallel.tp: must be >= 1, or null, got 0"),
        ({"model": "nowhere/at/all"}, "model.path: no such folder"),
    ],
)
def test_wrong_arguments(folder, changes, says):
    before = watches()
    with pytest.raises(ConfigError) as error:
        LLM(**{"model": str(folder), **changes})
    assert says in str(error.value)
    assert down_to(before)


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        ("", GREEDY, "prompts[0]: an empty prompt"),
        ([[5], []], GREEDY, "prompts[1]: an empty prompt"),
        (None, GREEDY, "prompts[0]: a prompt must be text, a list of token ids, or a chat"),
        (np.array(5), GREEDY, "prompts[0]: a prompt must be text"),
        (torch.tensor(5), GREEDY, "prompts[0]: a prompt must be text"),
        (np.int64(5), GREEDY, "prompts[0]: a prompt must be text"),
        (7.5, GREEDY, "prompts[0]: a prompt must be text"),
        (b"Hi", GREEDY, ""),
        (np.array([[[5]]]), GREEDY, "must be a token id"),
        (torch.tensor([5.0]), GREEDY, "a prompt must be text"),
        (np.array([True]), GREEDY, "token id"),
        ([["Hi"]], GREEDY, "a list of texts is several prompts"),
        ([{"prompt": None}], GREEDY, "prompts[0]: must have a prompt or prompt_token_ids"),
        ([{"prompt_token_ids": []}], GREEDY, "prompts[0]: an empty prompt"),
        ([{"prompt_token_ids": np.array(5)}], GREEDY, "prompts[0]: a prompt must be text"),
        ([{}], GREEDY, "prompts[0]: must have a prompt or prompt_token_ids"),
        ([[5], None], GREEDY, "prompts[1]: a prompt must be text"),
        ({"prompt": "Hi", "image": 1}, GREEDY, "prompts[0]: unknown key 'image'"),
        ({"prompt": "Hi", "multi_modal_data": {"image": 1}}, GREEDY, "prompts[0]: unknown key 'multi_modal_data'"),
        ([[5, 103]], GREEDY, "prompts[0][1]: the model's token ids are 0 to 102, got 103"),
        ([[5, 5.0]], GREEDY, "prompts[0][1]: must be a token id"),
        ([[5] * 100], GREEDY, "prompts[0]: the prompt has 100 tokens, and with the output it must fit in 100"),
        ([[5], [6]], [], "generate: 2 prompts but 0 sampling params"),
        ([[5], [6]], [GREEDY], "generate: 2 prompts but 1 sampling params"),
        ([[5], [6]], (GREEDY,) * 3, "generate: 2 prompts but 3 sampling params"),
        ([[5]], {"temperature": 0}, "generate: sampling params must be SamplingParams"),
        ([[5]], SamplingParams(temperature=-1), "temperature: must be >= 0, got -1"),
        ([[5]], SamplingParams(max_tokens=0), "max_tokens: must be >= 1"),
        ([[5]], SamplingParams(n=3, best_of=2), "best_of: must be at least n = 3"),
        ([[5]], SamplingParams(logit_bias={103: 1.0}), "logit_bias: the model's token ids are 0 to 102, got 103"),
        ([[5]], SamplingParams(top_p="x"), "top_p: must be a number"),
    ],
)
def test_wrong_prompts_and_params(llm, prompts, params, says):
    calls = llm._engine.output_tokens if llm._engine else 0
    with pytest.raises(ConfigError) as error:
        llm.generate(prompts, params)
    assert says in str(error.value)
    assert (llm._engine.output_tokens if llm._engine else 0) == calls, "nothing was computed"


def test_a_damaged_model_leaves_nothing_running(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    edit_config(tmp_path / "model", intermediate_size=45)
    before = watches()
    with pytest.raises(CheckpointError, match="wrong shapes"):
        LLM(tmp_path / "model")
    assert down_to(before)


# ---- beginning and end


@pytest.fixture
def config(folder, tmp_path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: {{path: {json.dumps(str(folder))}, dtype: float32}}\n"
        "engine: {max_model_len: 64}\nsampling: {temperature: 0, max_tokens: 5, ignore_eos: true}\n"
    )
    return path


def test_from_config(config, reference):
    with LLM.from_config(config, ["engine.block_size=4", "sampling.max_tokens=7"]) as made:
        assert (made.config.engine.max_model_len, made.config.engine.block_size) == (64, 4)
        wanted = [one.tokens for one in reference(MODEL, PROMPTS, 8)]
        assert ids(made.generate(PROMPTS)) == [tokens[:7] for tokens in wanted]
        assert ids(made.generate(PROMPTS, GREEDY)) == wanted
    with LLM.from_config(config, ["parallel.tp=null", "parallel.dp=null"]) as made:
        assert made.config.parallel.sizes == (1, 1, 1) and not made.config.parallel.is_open
    with pytest.raises(ConfigError, match="engine.blok_size: unknown key. Did you mean engine.block_size?"):
        LLM.from_config(config, ["engine.blok_size=4"])


def test_a_family_of_ones_own(config, tmp_path, monkeypatch):
    (tmp_path / "own_families.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="model.family_module: importing it failed: RuntimeError: imported"):
        LLM.from_config(config, ["model.family_module=own_families"])


def test_a_plain_process_is_the_users_own(folder):
    """Ctrl-C stays Python's, any thread will do, and an error in the block is the user's to catch."""
    before, handler = watches(), signal.getsignal(signal.SIGINT)
    made = []
    thread = threading.Thread(target=lambda: made.append(LLM(folder)))
    thread.start()
    thread.join()
    with pytest.raises(ZeroDivisionError), made[0] as llm:
        assert signal.getsignal(signal.SIGINT) is handler
        assert ids(llm.generate([[5]], GREEDY))
        raise ZeroDivisionError
    assert down_to(before)
    with pytest.raises(ConfigError, match="this LLM is closed"):
        llm.generate([[5]], GREEDY)
    llm.close()


# ---- under a launcher


HERE = Path(__file__).parent
LAUNCHERS = {"torchrun": {"data_parallel_size": 2}, "the door": {"pipeline_parallel_size": 2}}


@pytest.fixture(scope="module")
def launched(folder, forks, tmp_path_factory):
    """A folder for each launcher, under which the same script was started; all at once."""
    places = {name: tmp_path_factory.mktemp(name) for name in LAUNCHERS}
    scripts = [
        [HERE / "llm_rank.py", place, folder, json.dumps(sizes)]
        for place, sizes in zip(places.values(), LAUNCHERS.values(), strict=True)
    ]
    (places["torchrun"] / "go on").touch()
    real = Started(places["torchrun"], ["torchrun", "--nproc-per-node", 2, *scripts[0]])
    runs = real, forks.start(HERE / "door.py", 2, "no", *scripts[1])
    yield {name: (places[name], run) for name, run in zip(LAUNCHERS, runs, strict=True)}
    real.kill()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_rank_gets_all_under(launcher, launched, folder):
    place, run = launched[launcher]
    if launcher == "torchrun":  # stopped in the middle of a call: every rank hears of it, whichever got the signal
        run.ready(2)
        os.kill(int((place / "ready-1").read_text()), signal.SIGTERM)
        assert run.process.wait(PATIENCE) != 0
        assert [(place / f"stopped-{rank}").read_text() for rank in range(2)] == ["143", "143"], run.err
    else:
        ended = run.ended()
        assert ended.code == 0, ended.err
    got = [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert got[0] == got[1]
    assert "2 ranks were started, but the config asks for" in got[0]["wrong"]
    with LLM(folder, dtype="float32") as llm:
        alone = llm_rank.answers(llm)
    for call in ("generate", "chat", "again"):
        assert [comparable(line) for line in got[0][call]] == [comparable(line) for line in alone[call]]
    assert [pytest.approx(scores, abs=1e-4) for scores in got[0]["score"]] == alone["score"]
    assert got[0]["flat"] == alone["flat"]
    assert got[0]["stream"] == [list(one) for one in alone["stream"]]
    assert got[0]["refused"] == alone["refused"] and "prompts[1]: an empty prompt" in alone["refused"]


def comparable(line: str) -> list:
    """What must be equal whatever the layout is."""
    output = RequestOutput.from_line(line)
    logprobs = [pytest.approx(one.cumulative_logprob, abs=1e-3) for one in output.outputs]
    return [
        output.prompt,
        output.prompt_token_ids,
        logprobs,
        [(o.text, o.token_ids, o.stop_reason) for o in output.outputs],
    ]
