"""Arguments of vLLM's that are no keys here: what is said when code written for vLLM passes them.

Accepted without effect are only those that can change no result here, whatever their value, and values that say
"as usual". The rest is refused with the reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.typecheck import problem
from megalite.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refused:
    """An argument that has no equal here."""

    reason: str
    usual: tuple[Any, ...] = (None, False)
    """Values that ask for nothing and are passed over."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """The arguments of one of vLLM's callables that are none of ours."""

    name: str
    """Of the callable, for messages."""
    without_effect: frozenset[str]
    refused: Mapping[str, Refused]

    def sort_out(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that are not vLLM's either. What is passed over is told in one line, by the first rank.

        ConfigError lists what is refused.
        """
        problems = [
            problem(f"{self.name}: {name}", f"is not supported: {refused.reason}", given[name])
            for name, refused in self.refused.items()
            if name in given and not any(given[name] is one or given[name] == one for one in refused.usual)
        ]
        if problems:
            raise ConfigError(*problems)
        passed_over = sorted(self.without_effect & given.keys())
        if passed_over and os.environ.get("RANK", "0") == "0":
            log.warning("%s: of no meaning here and passed over: %s", self.name, ", ".join(passed_over))
        return {key: value for key, value in given.items() if key not in self.without_effect | self.refused.keys()}


_NO_PICTURES = Refused("only text goes in here", (None, False, {}, ""))
_NO_PARALLEL = "the layout is tensor_parallel_size, pipeline_parallel_size and data_parallel_size"

_LLM_WITHOUT_EFFECT = frozenset(
    """
    async_scheduling attention_backend attention_config code_revision compilation_config
    cudagraph_capture_sizes data_parallel_backend disable_async_output_proc disable_cascade_attn
    disable_custom_all_reduce disable_log_requests disable_log_stats disable_nccl_for_dp_synchronization
    distributed_executor_backend enable_chunked_prefill enable_dbo enable_expert_parallel
    enable_flashinfer_autotune enable_layerwise_nvtx_tracing enable_log_requests enable_mfu_metrics
    enable_prompt_tokens_details guided_decoding_backend kv_cache_metrics limit_mm_per_prompt
    long_prefill_token_threshold max_long_partial_prefills max_num_partial_prefills max_parallel_loading_workers
    max_seq_len_to_capture model_impl multi_step_stream_outputs nccl_communicator num_lookahead_slots
    num_scheduler_steps
    optimization_level preemption_mode prefix_caching_hash_algo ray_workers_use_nsight safetensors_load_strategy
    scheduler_delay_factor served_model_name stream_interval use_tqdm_on_load use_v2_block_manager
    worker_use_ray
    """.split()
)
"""How vLLM computes, loads, logs or starts processes."""

_LLM_REFUSED = {
    "allowed_local_media_path": _NO_PICTURES,
    "additional_config": Refused("there is nothing that reads it", (None, {})),
    "calculate_kv_scales": Refused("the KV cache is in the model's own numbers"),
    "chat_template": Refused("give it to chat(..., chat_template=...)", (None,)),
    "config_format": Refused("a model folder is in Hugging Face layout", (None, "auto", "hf")),
    "convert": Refused("models generate, and nothing else", (None, "auto", "none")),
    "cpu_offload_gb": Refused("weights are never offloaded; spread them over more ranks", (None, 0)),
    "decode_context_parallel_size": Refused(_NO_PARALLEL, (None, 1)),
    "disable_sliding_window": Refused("a window of the model's is always obeyed"),
    "download_dir": Refused("the hub's cache is set by the environment variable HF_HOME", (None,)),
    "enable_lora": Refused("adapters are not read; merge them into the weights"),
    "enable_sleep_mode": Refused("an LLM keeps its memory until it is closed"),
    "fully_sharded_loras": Refused("adapters are not read"),
    "hf_config_path": Refused("config.json is read from the model's folder", (None,)),
    "hf_overrides": Refused("config.json is obeyed; change a copy of it", (None, {})),
    "hf_token": Refused("the hub's token is set by the environment variable HF_TOKEN", (None, True, False)),
    "kv_cache_dtype": Refused("the KV cache is in the model's own numbers", (None, "auto")),
    "kv_cache_memory_bytes": Refused("set num_kv_blocks or gpu_memory_utilization"),
    "kv_transfer_config": Refused("the KV cache stays with its rank"),
    "kv_offloading_size": Refused("set swap_space"),
    "logits_processors": Refused(
        "the sampler runs no functions; see logit_bias, allowed_token_ids and bad_words", (None, [])
    ),
    "logprobs_mode": Refused("log-probabilities are of the raw logits", (None, "raw_logprobs")),
    "max_logprobs": Refused("logprobs may be up to 20, or -1 for all", (None, -1, *range(21))),
    "mm_processor_kwargs": _NO_PICTURES,
    "override_pooler_config": Refused("models generate, and nothing else"),
    "pooler_config": Refused("models generate, and nothing else"),
    "prefill_context_parallel_size": Refused(_NO_PARALLEL, (None, 1)),
    "rope_scaling": Refused("config.json is obeyed; change a copy of it", (None, {})),
    "rope_theta": Refused("config.json is obeyed; change a copy of it"),
    "runner": Refused("models generate, and nothing else", (None, "auto", "generate")),
    "scheduling_policy": Refused("requests are served in their order", (None, "fcfs")),
    "speculative_config": Refused("there is no speculative decoding", (None, {})),
    "structured_outputs_config": Refused("there are no grammars", (None, {})),
    "task": Refused("models generate, and nothing else", (None, "auto", "generate")),
    "tokenizer_mode": Refused("tokenizer.json is the one form that is read", (None, "auto", "hf")),
    "tokenizer_revision": Refused("the tokenizer is that of `revision`; name a folder in `tokenizer`", (None,)),
    "worker_cls": Refused("there are no workers to replace", (None, "auto")),
    "worker_extension_cls": Refused("there are no workers to extend", (None, "")),
}

_SAMPLING_WITHOUT_EFFECT = frozenset(
    "output_kind skip_clone skip_reading_prefix_cache spaces_between_special_tokens stream_interval".split()
)
"""How results are streamed, kept or cached; and a setting of tokenizers that are not in tokenizer.json."""

_SAMPLING_REFUSED = {
    "early_stopping": Refused("there is no beam search"),
    "extra_args": Refused("there is nothing that reads them", (None, {})),
    "guided_decoding": Refused("there are no grammars; see allowed_token_ids"),
    "length_penalty": Refused("there is no beam search", (None, 1)),
    "logits_processors": _LLM_REFUSED["logits_processors"],
    "logprob_token_ids": Refused("set logprobs to -1 and look them up"),
    "prompt_logprob_start": Refused("prompt_logprobs are of the whole prompt", (None, 0)),
    "prompt_logprob_token_ids": Refused("set prompt_logprobs to -1 and look them up"),
    "repetition_detection": Refused("set a repetition_penalty"),
    "routed_experts_prompt_start": Refused("experts are not told", (None, 0)),
    "structured_outputs": Refused("there are no grammars; see allowed_token_ids"),
    "thinking_token_budget": Refused("thinking is like other output; set max_tokens", (None, -1)),
    "trace_decode_token_ids": Refused("outputs are sampled; score a given text with LLM.logprobs"),
    "truncate_prompt_tokens": Refused("prompts are never cut; cut their token ids"),
    "use_beam_search": Refused("there is no beam search; see best_of"),
}

_CALL_REFUSED = {
    "chat_template_content_format": Refused("contents reach the template as they are", (None, "auto", "string")),
    "lora_request": _LLM_REFUSED["enable_lora"],
    "mm_processor_kwargs": _NO_PICTURES,
    "priority": _LLM_REFUSED["scheduling_policy"],
    "prompt_adapter_request": _LLM_REFUSED["enable_lora"],
    "tokenization_kwargs": Refused("give token ids instead", (None, {})),
}

LLM = Foreign("LLM", _LLM_WITHOUT_EFFECT, _LLM_REFUSED)
SAMPLING = Foreign("SamplingParams", _SAMPLING_WITHOUT_EFFECT, _SAMPLING_REFUSED)
CALL = Foreign("generate, chat", frozenset(), _CALL_REFUSED)
