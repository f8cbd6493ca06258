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
    """Name of the callable, for messages."""
    without_effect: frozenset[str]
    refused: Mapping[str, Refused]

    def sort_out(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that are not vLLM's either. A warning, on the first rank, lists those without effect.

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


def _refused(*rows: tuple[str, str] | tuple[str, str, tuple[Any, ...]]) -> dict[str, Refused]:
    """From rows of names, their reason, and their usual values where these are others than null and false."""
    return {name: Refused(*row[1:]) for row in rows for name in row[0].split()}


_LLM_WITHOUT_EFFECT = frozenset(
    """
    attention_backend attention_config code_revision compilation_config
    cudagraph_capture_sizes data_parallel_backend disable_async_output_proc disable_cascade_attn
    disable_custom_all_reduce disable_log_requests disable_log_stats disable_nccl_for_dp_synchronization
    distributed_executor_backend enable_chunked_prefill enable_dbo enable_expert_parallel
    enable_flashinfer_autotune enable_layerwise_nvtx_tracing enable_log_requests enable_mfu_metrics
    enable_prompt_tokens_details guided_decoding_backend kv_cache_metrics limit_mm_per_prompt
    enable_lora fully_sharded_loras lora_dtype lora_extra_vocab_size max_cpu_loras max_lora_rank max_loras
    long_prefill_token_threshold max_long_partial_prefills max_num_partial_prefills max_parallel_loading_workers
    max_seq_len_to_capture model_impl multi_step_stream_outputs nccl_communicator num_lookahead_slots
    num_scheduler_steps optimization_level preemption_mode prefix_caching_hash_algo ray_workers_use_nsight
    safetensors_load_strategy scheduler_delay_factor served_model_name stream_interval use_tqdm_on_load
    use_v2_block_manager worker_use_ray
    """.split()
)
"""How vLLM computes, loads, logs or starts processes."""

_GENERATE = "models generate, and nothing else"
_NO_FUNCTIONS = "the sampler runs no functions; see logit_bias, allowed_token_ids and bad_words"

_LLM_REFUSED = _refused(
    ("allowed_local_media_path mm_processor_kwargs", "only text goes in here", (None, False, {}, "")),
    ("additional_config", "there is nothing that reads it", (None, {})),
    ("calculate_kv_scales", "scales of keys and values are the checkpoint's"),
    ("chat_template", "give it to chat(..., chat_template=...)", (None,)),
    ("config_format", "a model folder is in Hugging Face layout", (None, "auto", "hf")),
    ("convert", _GENERATE, (None, "auto", "none")),
    ("override_pooler_config pooler_config", _GENERATE),
    ("runner task", _GENERATE, (None, "auto", "generate")),
    ("cpu_offload_gb", "weights are never offloaded; spread them over more ranks", (None, 0)),
    (
        "decode_context_parallel_size prefill_context_parallel_size",
        "the layout is tensor_parallel_size, pipeline_parallel_size and data_parallel_size",
        (None, 1),
    ),
    ("disable_sliding_window", "a window of the model's is always obeyed"),
    ("download_dir", "the hub's cache is set by the environment variable HF_HOME", (None,)),
    ("enable_sleep_mode", "an LLM keeps its memory until it is closed"),
    ("hf_config_path", "config.json is read from the model's folder", (None,)),
    ("hf_overrides rope_scaling", "config.json is obeyed; change a copy of it", (None, {})),
    ("rope_theta", "config.json is obeyed; change a copy of it"),
    ("hf_token", "the hub's token is set by the environment variable HF_TOKEN", (None, True, False)),
    ("kv_cache_memory_bytes", "set num_kv_blocks or gpu_memory_utilization"),
    ("kv_transfer_config", "the KV cache stays with its rank"),
    ("kv_offloading_size", "set swap_space"),
    ("logits_processors", _NO_FUNCTIONS, (None, [])),
    ("logprobs_mode", "log-probabilities are of the raw logits", (None, "raw_logprobs")),
    ("max_logprobs", "logprobs may be up to 20, or -1 for all", (None, -1, *range(21))),
    ("scheduling_policy", "requests are served in their order", (None, "fcfs")),
    ("speculative_config", "there is no speculative decoding", (None, {})),
    ("structured_outputs_config", "see structured_outputs in SamplingParams", (None, {})),
    ("tokenizer_mode", "tokenizer.json is the one form that is read", (None, "auto", "hf")),
    ("tokenizer_revision", "the tokenizer is that of `revision`; name a folder in `tokenizer`", (None,)),
    ("worker_cls", "there are no workers to replace", (None, "auto")),
    ("worker_extension_cls", "there are no workers to extend", (None, "")),
)

_SAMPLING_WITHOUT_EFFECT = frozenset(
    "output_kind skip_clone skip_reading_prefix_cache spaces_between_special_tokens stream_interval".split()
)
"""How results are streamed, kept or cached; and a setting of tokenizers that are not in tokenizer.json."""

_SAMPLING_REFUSED = _refused(
    ("early_stopping use_beam_search", "there is no beam search; see best_of"),
    ("length_penalty", "there is no beam search", (None, 1)),
    ("extra_args", "there is nothing that reads them", (None, {})),
    ("logits_processors", _NO_FUNCTIONS, (None, [])),
    ("logprob_token_ids", "set logprobs to -1 and look them up"),
    ("prompt_logprob_start", "prompt_logprobs are of the whole prompt", (None, 0)),
    ("prompt_logprob_token_ids", "set prompt_logprobs to -1 and look them up"),
    ("repetition_detection", "set a repetition_penalty"),
    ("routed_experts_prompt_start", "routed experts are not returned", (None, 0)),
    ("thinking_token_budget", "thinking is like other output; set max_tokens", (None, -1)),
    ("trace_decode_token_ids", "outputs are sampled; score a given text with LLM.logprobs"),
    ("truncate_prompt_tokens", "prompts are never cut; cut their token ids"),
)

_CALL_REFUSED = _refused(
    ("chat_template_content_format", "contents reach the template as they are", (None, "auto", "string")),
    ("prompt_adapter_request", "of adapters only LoRA is read"),
    ("mm_processor_kwargs", "only text goes in here", (None, False, {}, "")),
    ("priority", "requests are served in their order", (None, "fcfs")),
    ("tokenization_kwargs", "give token ids instead", (None, {})),
)

LLM = Foreign("LLM", _LLM_WITHOUT_EFFECT, _LLM_REFUSED)
SAMPLING = Foreign("SamplingParams", _SAMPLING_WITHOUT_EFFECT, _SAMPLING_REFUSED)
CALL = Foreign("generate, chat", frozenset(), _CALL_REFUSED)
