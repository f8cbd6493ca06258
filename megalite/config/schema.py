"""Every key of every config file: its type, default, bounds, meaning and unit. Imports no runtime.

`null` means "decide for me"; what was decided is printed. Names inside `engine` and `sampling` are vLLM's.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, field
from functools import wraps
from typing import Any, Literal

from megalite.config import vllm
from megalite.config.rules import key

MAX_SEED = 2**63 - 1
MAX_SAMPLES = 1 << 14
"""Largest number of completions sampled for a prompt."""
MAX_TOKEN_IDS = 1 << 18
"""Largest number of token ids in a list or mapping of a request: as many as a large vocabulary has."""
MAX_STOPS = 1 << 10
"""Largest number of stop strings of a request."""
MAX_PROMPTS = 1 << 20
"""Largest number of prompts of an iteration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which model, and its data type."""

    path: str | None = key(needed="Set model.path to a folder in Hugging Face layout or a hub id (owner/name).")
    """Folder in Hugging Face layout, folder of rank shards, or hub id (`owner/name`)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder with tokenizer.json; null: the model's own. A model without one runs on token ids."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and activations; auto: the checkpoint's, or float32 where the CPU has no fast bfloat16."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: read the weights; dummy: random weights from config.json alone, for benchmarks."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: defaults of `sampling` come from the model's generation_config.json; none: only its end tokens are used."""
    quantization: str | None = None
    """null: as the checkpoint's config.json says. fp8: weights that are not quantized become fp8, a scale a row, while
    they are loaded. Else what the checkpoint must be stored as: fp8, gptq, awq, compressed-tensors, mxfp4."""
    trust_remote_code: bool = False
    """Must be false: code from a model folder is never run; see `family_module`."""
    family_module: str | None = None
    """Python module of your own (importable name) that registers a model family when imported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSection:
    """How the model is laid out; tp * pp * dp is the number of ranks."""

    tp: int | None = key(1, at_least=1)
    """Tensor parallel ranks: each holds a slice of every layer. null, for one, two or all three sizes: what the planner
    finds fastest on the GPUs that are there, or on the ranks that a launcher started."""
    pp: int | None = key(1, at_least=1)
    """Pipeline stages: each holds some of the layers."""
    layers: list[int] | None = key(at_least=1)
    """Layers on each pipeline stage, in order, e.g. [9, 9, 8, 6]; null: stages of about equal weights."""
    dp: int | None = key(1, at_least=1)
    """Data parallel replicas: each holds the whole model and computes other prompts or training data."""
    dp_mode: Literal["sync", "async"] = "sync"
    """Prompts are divided among replicas up front, by predicted tokens and common beginnings. sync: that is all; async:
    a replica that has none left takes from those of the others."""
    interleave: int = key(1, at_least=1)
    """Chunks of layers on each pipeline stage, assigned round-robin: more chunks shorten the pipeline bubble; training
    only."""
    sequence_parallel: bool = False
    """Sequence parallelism: between tensor parallel layers, activations are split by token over tp; training only."""
    first_rank: int = key(0, at_least=0)
    """First global rank of the layout; hybrid jobs only, whose two layouts may be on different ranks."""

    @property
    def is_open(self) -> bool:
        """Some size is null: the planner has to choose it."""
        return None in (self.tp, self.pp, self.dp)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """tp, pp and dp; one that is still open counts as 1."""
        return tuple(1 if size is None else size for size in (self.tp, self.pp, self.dp))  # type: ignore[return-value]

    @property
    def stages(self) -> tuple[int, ...]:
        """`layers` as `Layout.stages`."""
        return tuple(self.layers or ())


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSection:
    """Memory and batching of the inference engine."""

    max_model_len: int | None = key(at_least=1)
    """Longest prompt + output, tokens; null: what fits, at most the model's context length (RoPE scaling included)."""
    gpu_memory_utilization: float = key(0.9, above=0, at_most=1)
    """Fraction of GPU memory for weights, activations and KV cache; on CPU, of the memory available at start."""
    num_kv_blocks: int | None = key(at_least=1)
    """KV cache blocks per rank; null: from measured free memory, never more than the work needs."""
    swap_space: float = key(0.0, at_least=0, unit="GiB")
    """Host memory per rank for swapped-out KV blocks, GiB; 0: preempted requests are recomputed."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """auto: keys and values are kept in the model's data type, whatever the checkpoint says; fp8: in float8 e4m3, half
    as large as bfloat16, divided by the checkpoint's `k_scale` and `v_scale` where it has them."""
    block_size: int = key(16, at_least=1, at_most=1024)
    """Tokens in one KV cache block; a power of two."""
    max_num_seqs: int = key(256, at_least=1)
    """Largest number of sequences in one step."""
    max_num_batched_tokens: int = key(8192, at_least=1)
    """Largest number of tokens in one step; longer prompts are prefilled in chunks."""
    enforce_eager: bool = False
    """true: no CUDA graphs for decoding."""
    async_scheduling: bool | None = None
    """true: the next step is prepared while the device runs one; null: on a GPU. Results do not depend on it."""
    enable_prefix_caching: bool = True
    """Reuse the KV cache blocks of finished prompts for later prompts with the same prefix."""
    seed: int = key(0, at_least=0, at_most=MAX_SEED)
    """Seed of requests that have none of their own."""
    check_lockstep: bool = False
    """Compare a hash of the scheduler's state between ranks every step; for debugging."""


def _takes_vllm_arguments(schema: Any) -> Any:
    """Let the constructor of `schema` also take the other arguments of vLLM's; see config/vllm.py."""
    made = schema.__init__

    @wraps(made)
    def init(self: Any, *args: Any, **given: Any) -> None:
        others = {name: value for name, value in given.items() if name not in schema.__dataclass_fields__}
        own = {name: value for name, value in given.items() if name not in others}
        if "guided_decoding" in others:
            own.setdefault("structured_outputs", others.pop("guided_decoding"))
        made(self, *args, **own, **(vllm.SAMPLING.sort_out(others) if others else {}))

    schema.__init__ = init
    return schema


@_takes_vllm_arguments
@dataclass(slots=True)
class SamplingParams:
    """How one request is sampled and when it ends. The same class as the `sampling` section and the Python API.

    May be changed until it is used: a call works on its own copy."""

    n: int = key(1, at_least=1, cap=MAX_SAMPLES)
    """Completions returned for a prompt. A request may have 2^27 tokens: prompt and longest output of each sample."""
    presence_penalty: float = key(0.0, at_least=-2, at_most=2)
    """Subtracted once from the logit of every token generated so far."""
    frequency_penalty: float = key(0.0, at_least=-2, at_most=2)
    """Subtracted from a token's logit for each time it was generated."""
    repetition_penalty: float = key(1.0, above=0, fix="1 is no penalty.")
    """Divides positive and multiplies negative logits of tokens in the prompt or output (CTRL, arXiv 1909.05858)."""
    temperature: float = key(1.0, at_least=0)
    """Divides the logits before sampling; 0: greedy."""
    top_p: float = key(1.0, above=0, at_most=1, fix="1 keeps all tokens.")
    """Sample from the smallest set of most probable tokens whose probabilities sum to at least this."""
    top_k: int = key(0, at_least=-1, fix="0 and -1 keep all tokens.")
    """Sample from the k most probable tokens; 0 or -1: all."""
    min_p: float = key(0.0, at_least=0, at_most=1, fix="0 keeps all tokens.")
    """Drop tokens whose probability is below this fraction of the highest."""
    seed: int | None = key(at_least=0, at_most=MAX_SEED)
    """Seed of this request; null: from engine.seed and the request's position in the input, in Python in all calls."""
    stop: Any = None
    """A string or list of strings that end the output; not part of the text unless include_stop_str_in_output. At most
    1024, and 65536 characters together; times the samples, with logit_bias, at most 2^24."""
    stop_token_ids: list[int] | None = key(cap=MAX_TOKEN_IDS)
    """Token ids that end the output."""
    ignore_eos: bool = False
    """Continue after the end-of-sequence token."""
    max_tokens: int | None = key(16, at_least=1)
    """Largest number of tokens generated; null: up to max_model_len."""
    min_tokens: int = key(0, at_least=0)
    """No end-of-sequence token, stop token or stop string before this many tokens."""
    logprobs: int | None = None
    """Largest number of top tokens reported per generated token, beside the token itself, with their log-probabilities
    in the model's full distribution: 0 to 20, or -1 for all. At most 2^26 for all samples and the prompt together."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    _: KW_ONLY
    flat_logprobs: bool = False
    """In Python, return log-probabilities as FlatLogprobs: a few long lists instead of a dict per position."""
    detokenize: bool = True
    """Convert the output to text; false: token ids only."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string that ended the output in its text."""
    logit_bias: dict[int, float] | None = key(at_least=-100, at_most=100, cap=MAX_TOKEN_IDS)
    """Added to the logits of these token ids."""
    allowed_token_ids: list[int] | None = key(cap=MAX_TOKEN_IDS)
    """Sample from these token ids only; null: all."""
    bad_words: list[str] | None = None
    """Texts that are not generated: the token that would complete one, as the tokenizer writes it at the start, after a
    space or after a line break, is never sampled. Bounds as for stop."""
    structured_outputs: dict[str, Any] | None = None
    """What the output must be, exactly one of: json (a JSON schema, as mapping or text), json_object (true), regex,
    choice (a list of texts), grammar (Lark or GBNF); with JSON also disable_any_whitespace. Where nothing may follow,
    the output ends. Needs the extra `grammar`."""
    best_of: int | None = key(at_least=1, cap=MAX_SAMPLES)
    """Completions sampled, of which the n with the highest cumulative log-probability are returned; null: n."""

    def clone(self) -> SamplingParams:
        """A copy that shares no list or mapping."""
        return deepcopy(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSection:
    """What to generate from: `prompts` or `file`."""

    prompts: list[Any] | None = None
    """Texts, lists of token ids, or chats (lists of {role, content})."""
    file: str | None = None
    """JSON lines with `prompt` (text or token ids) or `messages`, optional `id` and `sampling`, for chats `tools` and
    `chat_template_kwargs`; `-`: standard input. A line may have 64 MiB, a text 2^24 characters, or 1024 for
    each token of max_model_len where the tokenizer drops characters."""
    tools: list[Any] | None = None
    """JSON schemas of tools that the chat template shows, for chats that have none of their own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}; those of a chat itself override them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSection:
    """Where results go."""

    file: str | None = None
    """JSON lines, appended as prompts finish; a second run continues the file. null: text on the terminal."""
    overwrite: bool = False
    """Overwrite the file instead of continuing it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorSection:
    """What is shown about the run."""

    report: bool = True
    """Print each rank's memory, speed and share of time per activity at the end."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    status_file: str | None = None
    """JSON file of the run's state; null: beside the output file, or in a temporary folder."""
    timeline: str | None = None
    """File for a trace of every step of every rank (JSON, or gzip if its name ends in .gz), which ui.perfetto.dev shows
    and tools/plot_timeline.py draws; each host writes its own, unless they share it. null: none."""
    live: bool = False
    """Show ranks, queues, tokens/s and GPU use on the terminal while the run goes on; needs the extra `live`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainMonitorSection:
    """What is shown about the run besides its log."""

    report: bool = True
    """Print each rank's memory, speed and share of time per activity at the end."""
    timeline: str | None = None
    """File for a trace of every step of every rank (JSON, or gzip if its name ends in .gz), which ui.perfetto.dev shows
    and tools/plot_timeline.py draws; each host writes its own, unless they share it. null: none."""
    live: bool = False
    """Show ranks, tokens/s and GPU use on the terminal while the run goes on; needs the extra `live`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSection:
    """The HTTP server over the replicas: where it listens, what it takes, how it ends."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback is open to a network: set `api_key`, and TLS in front."""
    port: int = key(8000, at_least=0, at_most=65535)
    """0: a free one, which is printed."""
    api_key: str | None = None
    """`env:NAME` or `file:PATH`: where the key is that clients send as a bearer token; null: none is asked for."""
    model_names: list[str] | None = None
    """Names under which clients may ask for the model, the first is the one that answers carry; null: model.path."""
    balance: Literal["prefix", "least_tokens", "round_robin"] = "prefix"
    """Which replica gets a request. prefix: the one with the longest cached prefix while loads are alike, else the one
    with the fewest outstanding tokens; least_tokens: always that one; round_robin: in turn."""
    max_queued_requests: int = key(1024, at_least=1)
    """Requests that wait or run; more are answered with 429."""
    max_queued_tokens: int = key(1 << 24, at_least=1)
    """Tokens that these may have together: for each prompt and sample, prompt + max_tokens."""
    max_samples: int = key(128, at_least=1, cap=MAX_SAMPLES)
    """Largest number of completions of one HTTP request: prompts times n or best_of."""
    max_logprobs: int = key(20, at_least=0)
    """Largest number of top log-probabilities a token."""
    max_body: float = key(8.0, above=0, unit="MiB")
    """Largest request body, MiB."""
    body_timeout: float = key(30.0, above=0, unit="seconds")
    """Seconds within which a client must have sent its request."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """What happens to a request with fields that are not known here."""
    special_tokens_in_chats: bool = False
    """true: what a chat spells like a control token (`<|im_end|>`) becomes that token; false: it stays text, in all
    that a client sends: contents, names, tools, template variables. Control tokens are those that tokenizer.json marks
    as special, and the template's own are always read. Prompts of /v1/completions are no chats: there they are tokens.
    """
    drain_timeout: float = key(30.0, at_least=0, unit="seconds")
    """Seconds that running requests have to finish after SIGTERM; then they end with finish_reason abort."""
    stall_timeout: float = key(60.0, above=0, unit="seconds")
    """Seconds without a finished step, with work to do, after which a replica counts as lost."""
    restarts: int = key(5, at_least=0)
    """Times in an hour that a replica which was lost is started again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedSection:
    """The processes of a run and how they find and watch each other."""

    start_timeout: float = key(60.0, above=0, unit="seconds")
    """Seconds within which every rank must have joined."""
    peer_timeout: float = key(15.0, above=0, unit="seconds")
    """Seconds after which a rank counts as lost whose process is stopped or whose host does not answer. One that died
    does at once; one that is busy, for however long, never does."""
    step_timeout: float = key(1800.0, above=0, unit="seconds")
    """Seconds that a rank may keep others waiting in a collective or message; then the run ends, and says who it was
    and where. What a run does between them counts: reading weights, scoring samples, saving."""
    backend: Literal["nccl", "gloo"] | None = None
    """null: nccl where each rank has a GPU of its own, else gloo."""
    device: Literal["cpu", "cuda"] | None = None
    """null: cuda where there is one."""
    interface: str | None = None
    """Network interface for gloo and nccl; null: the one that routes to MASTER_ADDR."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferConfig:
    """`launch/infer.py`: generate text."""

    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    lora: dict[str, str] = field(default_factory=dict)
    """LoRA adapters by name: folders as PEFT saves them. A prompt uses one where its input line says `"lora": NAME`."""
    engine: EngineSection = field(default_factory=EngineSection)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    input: InputSection = field(default_factory=InputSection)
    output: OutputSection = field(default_factory=OutputSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """`launch/serve.py`: an OpenAI-compatible server over parallel.dp replicas."""

    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    lora: dict[str, str] = field(default_factory=dict)
    """LoRA adapters by name: folders as PEFT saves them. Each is a model of its name to clients."""
    engine: EngineSection = field(default_factory=EngineSection)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Of requests that do not say otherwise."""
    server: ServerSection = field(default_factory=ServerSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewModelSection:
    """The model to train: a new one of this shape, or that of `path`."""

    path: str | None = None
    """Folder in Hugging Face layout with the initial weights; null: new weights of the shape below."""
    config: dict[str, Any] | None = None
    """A Hugging Face config.json as a mapping, e.g. {model_type: qwen3, hidden_size: 256, ...}; used when path is
    null."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the forward and backward pass; optimizer state is float32."""
    router_aux_loss_coef: float | None = key(at_least=0)
    """Weight of the load-balancing loss of a mixture of experts; null: as config.json says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSection:
    """The tokenizer: one that exists, or a byte-level BPE trained on the training files."""

    path: str | None = None
    """Folder with a tokenizer.json to use as it is; null: that of model.path, or if there is none train one."""
    vocab_size: int = 4096
    """Vocabulary size of a trained tokenizer, special tokens included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """Text or examples to train on. Files named *.jsonl hold a JSON object a line, others are texts."""

    source: str = "stdlib"
    """`stdlib`: the Python standard library's source of this interpreter; else a file, a folder or a glob of files."""
    format: Literal["auto", "text", "examples"] = "auto"
    """text: texts, or lines with `text`; examples: lines with `prompt` and `response`, or with `messages` for the chat
    template (and `tools`, `chat_template_kwargs`), and the loss is on responses only; auto: what the first line is."""
    tools: list[Any] | None = None
    """JSON schemas of tools that the chat template shows, for chats that have none of their own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}; those of a chat itself override them."""
    pattern: str = "**/*.py"
    """Files taken from a folder."""
    exclude: list[str] = field(default_factory=list)
    """Globs of relative names to leave out; `*` goes across folders."""
    held_out: float = key(0.03, above=0, below=1)
    """Fraction kept for evaluation: of text files by a hash of their names, of lines by a hash of their content."""
    sequence_length: int = key(512, at_least=2, unit="tokens")
    """Tokens in one training sequence; the largest number of tokens in one example."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """What happens to longer examples: error: the run is refused; skip: left out; truncate: cut at the end."""
    seed: int = key(0, at_least=0, at_most=MAX_SEED)
    """Seed of the order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """AdamW, with linear warm-up and cosine decay."""

    learning_rate: float = key(1e-3, above=0)
    """Peak learning rate, after warm-up."""
    min_learning_rate: float = key(1e-4, at_least=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = key(100, at_least=0)
    """Steps over which the learning rate rises from 0 to its peak."""
    weight_decay: float = key(0.1, at_least=0)
    """Decoupled weight decay (arXiv 1711.05101)."""
    betas: list[float] = key([0.9, 0.95], at_least=0, below=1)
    """Decay per step of the running means of gradients and of squared gradients."""
    eps: float = key(1e-8, above=0)
    """Added to the root of the mean squared gradient."""
    gradient_clipping: float = key(1.0, at_least=0, fix="0 is no clipping.")
    """Largest global gradient norm; 0: none."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which gradients are summed over micro batches and replicas. bfloat16 halves their memory and loses
    what is small beside the sum; only for a model in bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """Low-rank adapters (LoRA, arXiv 2106.09685) that are trained in place of the model's weights; PEFT's names."""

    r: int | None = key(at_least=1, cap=1 << 14)
    """Rank of the adapters; null: there are none, and the model's own weights are trained, unless `path` is set."""
    lora_alpha: float = key(8.0, above=0)
    """The product B A is multiplied by lora_alpha / r."""
    lora_dropout: float = key(0.0, at_least=0, below=1)
    """Share of what adapters read that is set to 0 while they train, the rest scaled up. Which it is follows from
    train.seed, the step and the sequence, so it is the same in every layout. Must be 0 in hybrid jobs."""
    target_modules: Any = "all-linear"
    """Which linears of the layers have adapters: all-linear, a list of names such as [q_proj, v_proj], or a regular
    expression for whole names. The embedding, the head, experts and routers have none."""
    exclude_modules: list[str] = field(default_factory=list)
    """Names of some that have none after all."""
    use_rslora: bool = False
    """true: lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    path: str | None = None
    """Folder of an adapter, as PEFT saves it, to go on from; rank, alpha and modules are its own."""

    @property
    def is_asked(self) -> bool:
        """Adapters are trained, in place of the model's weights."""
        return self.r is not None or self.path is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """Number of steps, batch sizes, evaluation, checkpoints and log."""

    steps: int = key(1000, at_least=1)
    """Optimizer steps."""
    micro_batch_size: int = key(8, at_least=1)
    """Sequences a rank computes at once; examples are packed into at most this times data.sequence_length tokens."""
    gradient_accumulation_steps: int = key(1, at_least=1)
    """Micro batches per optimizer step on each rank. A step takes micro_batch_size times this times parallel.dp
    sequences; examples are packed into as few micro batches as hold them, with pipeline stages into no fewer than this.
    Use several times as many as stages: the pipeline bubble is (pp - 1) / interleave micro batches a step."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage over dp; 0 is refused."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    lora: LoraSection = field(default_factory=LoraSection)
    eval_every: int = key(200, at_least=1)
    """Steps between held-out evaluations."""
    eval_batches: int = key(50, at_least=1)
    """Micro batches of one evaluation, over all replicas; fewer where there is less held-out data."""
    patience: int | None = key(at_least=1)
    """Stop after this many evaluations without a lower held-out loss; null: run all steps."""
    max_seconds: float | None = key(above=0)
    """Stop this run after so many seconds, with an evaluation and a checkpoint; null: run all steps."""
    save_every: int = key(500, at_least=1)
    """Steps between checkpoints."""
    log_every: int = key(10, at_least=1)
    """Steps between log lines."""
    seed: int = key(0, at_least=0, at_most=MAX_SEED)
    """Seed of new weights."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts whose completions the model card shows; after training on chats, user messages and their answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOutputSection:
    """Where the model goes."""

    folder: str | None = key(needed="Set output.folder to where the model and the training state go.")
    """Folder of the model (Hugging Face layout), the log and the training state."""
    resume: bool = True
    """Continue from the last training state in the folder, if there is one."""
    tensorboard: bool | None = None
    """Write the log for TensorBoard too, into folder/training/tensorboard; null: when TensorBoard is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """`launch/train.py`: train a model with DeepSpeed."""

    model: NewModelSection = field(default_factory=NewModelSection)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    train: TrainSection = field(default_factory=TrainSection)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys for DeepSpeed's own config; keys that megalite sets itself are refused."""
    output: TrainOutputSection = field(default_factory=TrainOutputSection)
    monitor: TrainMonitorSection = field(default_factory=TrainMonitorSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridDataSection:
    """Prompts to sample for, and what the reward needs to know of each."""

    source: str | None = key(needed="Such as my_tasks:sums, or a file of JSON lines.")
    """A task, `package.module:function`, or a file of JSON lines, each with `prompt` or `messages` (and `tools`,
    `chat_template_kwargs`), the keys that the reward reads, and for supervised steps `response`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task's function."""
    tools: list[Any] | None = None
    """JSON schemas of tools that the chat template shows, for chats that have none of their own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}; those of a chat itself override them."""
    seed: int = key(0, at_least=0, at_most=MAX_SEED)
    """Seed of the order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridTrainSection:
    """The training side."""

    parallel: ParallelSection = field(default_factory=ParallelSection)
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage over dp; 0 is refused."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    micro_batch_tokens: int = key(4096, at_least=1)
    """Largest number of tokens that a replica computes at once; a longer sequence is computed alone."""
    lora: LoraSection = field(default_factory=LoraSection)
    seed: int = key(0, at_least=0, at_most=MAX_SEED)
    """Seed of new weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridInferSection:
    """The generating side."""

    model: str | None = None
    """Must be null: the model that is trained is the one that generates."""
    parallel: ParallelSection = field(default_factory=ParallelSection)
    engine: EngineSection = field(default_factory=EngineSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedSection:
    """Steps on the task's own responses before the first samples are drawn."""

    steps: int = key(0, at_least=0)
    """Optimizer steps; 0: none."""
    examples_per_step: int = key(64, at_least=1)
    """Responses in one step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridSection:
    """The loop: sample, reward, update, sync the new weights to the sampler."""

    algorithm: Literal["grpo", "rejection"] = "grpo"
    """grpo: policy gradient with group-normalised advantages (arXiv 2402.03300), of the distribution over the whole
    vocabulary at sampling.temperature, so nothing else may shape it; an update whose groups all have equal rewards is
    skipped. rejection: fine-tuning on the best samples, from whatever distribution."""
    steps: int = key(100, at_least=1)
    """Iterations."""
    prompts_per_step: int = key(16, at_least=1, cap=MAX_PROMPTS)
    """Prompts in one iteration."""
    samples_per_prompt: int = key(8, at_least=1, cap=MAX_SAMPLES)
    """Samples of each prompt: the group over which advantages are normalised."""
    updates_per_step: int = key(1, at_least=1)
    """Optimizer steps into which the samples of an iteration are divided."""
    sync_every: int = key(1, at_least=1)
    """Iterations between weight syncs; above 1 the sampler lags behind."""
    reward: str | None = key(needed="Such as megalite.rewards:parses_as_python.")
    """`package.module:function` that gives a sample's reward."""
    reward_workers: int = key(1, at_least=1)
    """Processes that compute rewards."""
    reward_time_limit: float = key(15.0, above=0, unit="seconds")
    """Time limit of one sample's reward, seconds."""
    failure_reward: float = 0.0
    """Reward of a sample whose reward function failed or took too long."""
    clip_low: float = key(0.2, at_least=0, below=1)
    """grpo: the probability ratio is clipped below 1 - clip_low."""
    clip_high: float = key(0.2, at_least=0)
    """grpo: the probability ratio is clipped above 1 + clip_high."""
    kl_coefficient: float = key(0.0, at_least=0)
    """grpo: weight of the KL divergence from the model after the supervised steps; 0: no such model is kept. With
    train.lora a copy of the adapters is."""
    divide_by_deviation: bool = True
    """grpo: divide advantages by the group's standard deviation."""
    keep_above: float = 0.0
    """rejection: the best sample of a prompt is trained on if its reward is above this."""
    importance_correction: Literal["off", "token", "sequence"] = "off"
    """grpo: weight each token or sample by its probability ratio of trainer to sampler, truncated."""
    importance_limit: float = key(2.0, at_least=1)
    """Largest importance weight; larger ones are truncated to it."""
    verify_sync: Literal["always", "first", "off"] = "always"
    """Compare checksums of every tensor between trainer and sampler after a sync."""
    sync_bucket: float = key(32.0, above=0, unit="MiB")
    """MiB that a rank sends or receives at once in a sync."""
    free_kv_while_training: bool = False
    """Free the KV cache's memory while training."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory while generating."""
    save_every: int = key(10, at_least=1)
    """Iterations between checkpoints."""
    log_every: int = key(1, at_least=1)
    """Iterations between log lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridConfig:
    """`launch/hybrid.py`: train and generate with one model in one job."""

    model: NewModelSection = field(default_factory=NewModelSection)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    data: HybridDataSection = field(default_factory=HybridDataSection)
    train: HybridTrainSection = field(default_factory=HybridTrainSection)
    infer: HybridInferSection = field(default_factory=HybridInferSection)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Not defaulted by the model's generation_config.json: the sampling distribution is part of the training."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    supervised: SupervisedSection = field(default_factory=SupervisedSection)
    hybrid: HybridSection = field(default_factory=HybridSection)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys for DeepSpeed's own config; keys that megalite sets itself are refused."""
    output: TrainOutputSection = field(default_factory=TrainOutputSection)
    monitor: TrainMonitorSection = field(default_factory=TrainMonitorSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)


GeneratingConfig = InferConfig | ServeConfig
Config = InferConfig | TrainConfig | HybridConfig | ServeConfig
