"""Every key of every config file: its type, default, meaning and unit. Imports no runtime.

`null` means "decide for me"; what was decided is printed. Names inside `engine` and `sampling` are vLLM's.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, field
from functools import wraps
from typing import Any, Literal

from megalite.config import vllm


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which model, and in which numbers."""

    path: str | None = None
    """Folder in Hugging Face layout, folder of rank shards, or hub id (`owner/name`). Required."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder with tokenizer.json; null: the model's own. A model without one runs on token ids."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers of weights and activations; auto: as the checkpoint says, float32 where the CPU has no fast bfloat16."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: read the weights; dummy: random weights from config.json alone, for benchmarks."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: keys of `sampling` that are not set here are as the model's generation_config.json says; none: it names
    end tokens only."""
    quantization: str | None = None
    """Must be null: no quantized format is supported yet."""
    trust_remote_code: bool = False
    """Must be false: code from a model folder is never run; see `family_module`."""
    family_module: str | None = None
    """Python module of your own (importable name) that registers a model family when imported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSection:
    """How the model is laid out; tp * pp * dp is the number of ranks."""

    tp: int = 1
    """Tensor parallel ranks: each holds a slice of every layer."""
    pp: int = 1
    """Pipeline stages: each holds some of the layers."""
    dp: int = 1
    """Replicas: each holds the whole model and takes other prompts."""
    dp_mode: Literal["sync", "async"] = "sync"
    """sync: prompts are dealt out by predicted tokens up front; async: replicas take from a shared queue when they have
    room."""
    interleave: int = 1
    """Chunks of layers on each pipeline stage, dealt out in turn: more shorten the idle time of pipelined training;
    training only."""
    sequence_parallel: bool = False
    """Cut activations between the parallel layers by token over tp; training only."""
    first_rank: int = 0
    """Global rank at which the layout begins; hybrid jobs only, whose layouts may be on different ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSection:
    """Memory and batching of the inference engine."""

    max_model_len: int | None = None
    """Longest prompt + output in tokens; null: what fits, at most the model's own (its rope's stretch counts)."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, activations and KV cache may take; on CPU, of the memory
    available at start."""
    num_kv_blocks: int | None = None
    """KV blocks per rank; null: from real memory, never more than the work needs."""
    swap_space: float = 0.0
    """Host memory per rank for swapped-out KV blocks, GiB; 0: preempted requests are recomputed."""
    block_size: int = 16
    """Tokens in one KV block."""
    max_num_seqs: int = 256
    """Most sequences in one step."""
    max_num_batched_tokens: int = 8192
    """Most tokens in one step; longer prompts are prefilled in chunks."""
    enforce_eager: bool = False
    """true: no CUDA graphs for decoding."""
    enable_prefix_caching: bool = True
    """Keep the KV blocks of finished prompts for later prompts that begin alike."""
    seed: int = 0
    """Seed of requests that have none of their own."""
    check_lockstep: bool = False
    """Compare a hash of the scheduler over the ranks every step; for debugging."""


def _takes_vllm_arguments(schema: type) -> type:
    """Let the constructor of `schema` take what vLLM's takes besides; see config/vllm.py."""
    made = schema.__init__

    @wraps(made)
    def init(self: Any, *args: Any, **given: Any) -> None:
        others = {name: value for name, value in given.items() if name not in schema.__dataclass_fields__}
        own = {name: value for name, value in given.items() if name not in others}
        made(self, *args, **own, **(vllm.SAMPLING.sort_out(others) if others else {}))

    schema.__init__ = init
    return schema


@_takes_vllm_arguments
@dataclass(slots=True)
class SamplingParams:
    """How one request is sampled and when it ends. The same class as the `sampling` section and the Python API.

    May be changed until it is used: a call works on its own copy."""

    n: int = 1
    """Completions returned for a prompt; at most 16384, and with all of them a request has at most 2^27 tokens."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token generated so far; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or output (CTRL, arXiv 1909.05858);
    > 0."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities reach this."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 or -1: all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    seed: int | None = None
    """Seed of this request; null: by engine.seed and the request's place in the input, in Python in all calls."""
    stop: Any = None
    """A string or list of strings that end the output; not part of the text unless include_stop_str_in_output. At most
    1024, and 65536 characters together; times the samples, with logit_bias, at most 2^24."""
    stop_token_ids: list[int] | None = None
    """Token ids that end the output; at most 2^18."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    max_tokens: int | None = 16
    """Most tokens generated; null: up to max_model_len."""
    min_tokens: int = 0
    """No end-of-sequence, stop token or stop string before this many."""
    logprobs: int | None = None
    """For each generated token, log-probabilities of the token and of this many likeliest, at most 20, or -1: of all;
    of the model's full distribution. Of all samples and the prompt together at most 2^26."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    _: KW_ONLY
    flat_logprobs: bool = False
    """In Python, log-probabilities come as FlatLogprobs: a few long lists instead of a dict for each position."""
    detokenize: bool = True
    """Make text of the output; false: token ids only."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string that ended the output in its text."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids; -100 to 100. At most 2^18."""
    allowed_token_ids: list[int] | None = None
    """Sample from these token ids only; null: all. At most 2^18."""
    bad_words: list[str] | None = None
    """Texts that are not to be generated: the token that would complete one, as the tokenizer writes it at the start,
    after a space or after a line break, is never sampled. Bounds as for stop."""
    best_of: int | None = None
    """Completions sampled, of which the n with the highest cumulative log-probability are returned; null: n.
    At most 16384."""

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
    """Variables of the chat template, e.g. {enable_thinking: false}; a chat's own of the same name go first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSection:
    """Where results go."""

    file: str | None = None
    """JSON lines, appended as prompts finish; run again, it goes on where it stopped. null: text on the terminal."""
    overwrite: bool = False
    """Start the file anew instead of going on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorSection:
    """What is told about the run."""

    report: bool = True
    """Print memory, speed and where the time went, for each rank, at the end."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    status_file: str | None = None
    """Where the run's state is kept, as JSON; null: beside the output file, or in a temporary folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainMonitorSection:
    """What is told about the run besides its log."""

    report: bool = True
    """Print memory, speed and where the time went, for each rank, at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedSection:
    """The processes of a run and how they find and watch each other."""

    start_timeout: float = 60.0
    """Seconds within which every rank must have come."""
    peer_timeout: float = 15.0
    """Seconds after which a rank counts as lost that is stopped, or whose host does not answer. Those that died do at
    once; those that are busy, for however long, never do."""
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
    engine: EngineSection = field(default_factory=EngineSection)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    input: InputSection = field(default_factory=InputSection)
    output: OutputSection = field(default_factory=OutputSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewModelSection:
    """The model to train: a new one of this shape, or `path` to go on from."""

    path: str | None = None
    """Folder in Hugging Face layout whose weights are the start; null: new weights of the shape below."""
    config: dict[str, Any] | None = None
    """A Hugging Face config.json as a mapping, e.g. {model_type: qwen3, hidden_size: 256, ...}; used when path is
    null."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Numbers of the forward and backward pass; optimizer state is float32."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts; null: as config.json says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSection:
    """The tokenizer: one that exists, or a byte-level BPE trained on the training files."""

    path: str | None = None
    """Folder with a tokenizer.json to use as it is; null: that of model.path, or if there is none train one."""
    vocab_size: int = 4096
    """Tokens of one that is trained, the special ones included."""


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
    """Variables of the chat template, e.g. {enable_thinking: false}; a chat's own of the same name go first."""
    pattern: str = "**/*.py"
    """Files taken from a folder."""
    exclude: list[str] = field(default_factory=list)
    """Globs of relative names to leave out; `*` goes across folders."""
    held_out: float = 0.03
    """Share kept for evaluation: of text files by a hash of their names, of lines by a hash of what they hold."""
    sequence_length: int = 512
    """Tokens in one training sequence; of examples, the most that one may have."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """What happens to longer examples: the run is refused, they are left out, or they lose their end."""
    seed: int = 0
    """Seed of the order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """AdamW, with warm-up and a cosine."""

    learning_rate: float = 1e-3
    """Peak, after warm-up."""
    min_learning_rate: float = 1e-4
    """At the end of the cosine."""
    warmup_steps: int = 100
    """Steps over which the rate rises from 0 to its peak."""
    weight_decay: float = 0.1
    """Decoupled (arXiv 1711.05101)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the running means of gradients and of their squares, a step."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0: none."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that gradients are added up in, over micro batches and replicas. bfloat16 halves their memory and loses
    what is small beside the sum; only for a model in bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """How long, in what batches, and what happens in between."""

    steps: int = 1000
    """Optimizer steps."""
    micro_batch_size: int = 8
    """Sequences a rank computes at once. Of examples, the most tokens at once are this many times
    data.sequence_length."""
    gradient_accumulation_steps: int = 1
    """Micro batches that make one optimizer step, on each rank. A step takes micro_batch_size times this times
    parallel.dp sequences; examples are packed into as few micro batches as hold them, with pipeline stages
    into no fewer than this. Give several times as many as stages: those idle for (pp - 1) / interleave a step."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage over dp; 0 is refused."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    eval_every: int = 200
    """Steps between held-out evaluations."""
    eval_batches: int = 50
    """Micro batches of one evaluation, over all replicas; fewer when the held-out files are fewer."""
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out loss; null: run all steps."""
    max_seconds: float | None = None
    """Stop after this long in one go, with an evaluation and a checkpoint; null: run all steps."""
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between log lines."""
    seed: int = 0
    """Of new weights."""
    sample_prompts: list[str] = field(default_factory=list)
    """Texts that the model card shows the model's completions of; after training on chats, its answers to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOutputSection:
    """Where the model goes."""

    folder: str | None = None
    """Where the model (Hugging Face layout), the log and the training state go. Required."""
    resume: bool = True
    """Go on from the last training state in the folder, if there is one."""
    tensorboard: bool | None = None
    """Write what is logged for TensorBoard too, into folder/training/tensorboard; null: when it is installed."""


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

    source: str | None = None
    """A task, `package.module:function`, or a file of JSON lines, each with `prompt` or `messages` (and `tools`,
    `chat_template_kwargs`), what the reward reads, and for supervised steps `response`. Required."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task's function."""
    tools: list[Any] | None = None
    """JSON schemas of tools that the chat template shows, for chats that have none of their own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}; a chat's own of the same name go first."""
    seed: int = 0
    """Seed of the order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridTrainSection:
    """The training side."""

    parallel: ParallelSection = field(default_factory=ParallelSection)
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage over dp; 0 is refused."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    micro_batch_tokens: int = 4096
    """Most tokens that a replica computes at once; a longer sequence is computed alone."""
    seed: int = 0
    """Of new weights."""


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

    steps: int = 0
    """Optimizer steps; 0: none."""
    examples_per_step: int = 64
    """Responses in one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridSection:
    """The loop: sample, reward, update, hand the new weights to the sampler."""

    algorithm: Literal["grpo", "rejection"] = "grpo"
    """grpo: policy gradient with group-normalised advantages (arXiv 2402.03300), of the distribution over the whole
    vocabulary at sampling.temperature, so nothing else may shape it; an update in which no group has a difference is
    left out. rejection: fine-tuning on the best samples, whatever they are drawn from."""
    steps: int = 100
    """Iterations."""
    prompts_per_step: int = 16
    """Prompts in one iteration; at most 2^20."""
    samples_per_prompt: int = 8
    """Samples of each prompt: the group that advantages are taken over; at most 16384."""
    updates_per_step: int = 1
    """Optimizer steps that the samples of an iteration are dealt out to."""
    sync_every: int = 1
    """Iterations between weight syncs; above 1 the sampler lags behind."""
    reward: str | None = None
    """`package.module:function` that gives a sample's reward. Required."""
    reward_workers: int = 1
    """Processes that compute rewards."""
    reward_time_limit: float = 15.0
    """Seconds that one sample's reward may take."""
    failure_reward: float = 0.0
    """Reward of a sample whose reward function failed or took too long."""
    clip_low: float = 0.2
    """grpo: the probability ratio is clipped below 1 less this."""
    clip_high: float = 0.2
    """grpo: and above 1 plus this."""
    kl_coefficient: float = 0.0
    """grpo: weight of the divergence from the model after the supervised steps; 0: no such model is kept."""
    divide_by_deviation: bool = True
    """grpo: divide advantages by the group's standard deviation."""
    keep_above: float = 0.0
    """rejection: the best sample of a prompt is learnt from if its reward is above this."""
    importance_correction: Literal["off", "token", "sequence"] = "off"
    """grpo: weigh each token or sample by how much likelier the trainer holds it than the sampler did, truncated."""
    importance_limit: float = 2.0
    """Largest such weight."""
    verify_sync: Literal["always", "first", "off"] = "always"
    """Compare checksums of every tensor between trainer and sampler after a sync."""
    sync_bucket: float = 32.0
    """MiB that a rank sends or receives at once in a sync."""
    free_kv_while_training: bool = False
    """Give the KV cache's memory back while training."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory while generating."""
    save_every: int = 10
    """Iterations between checkpoints."""
    log_every: int = 1
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
    """The model's generation_config.json sets none of it: what is sampled from is part of the training."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    supervised: SupervisedSection = field(default_factory=SupervisedSection)
    hybrid: HybridSection = field(default_factory=HybridSection)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys for DeepSpeed's own config; keys that megalite sets itself are refused."""
    output: TrainOutputSection = field(default_factory=TrainOutputSection)
    monitor: TrainMonitorSection = field(default_factory=TrainMonitorSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)


Config = InferConfig | TrainConfig | HybridConfig
