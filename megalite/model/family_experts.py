"""Which layers have experts, and what router, by a config.json: the rules among which families choose. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from megalite.model.hf_config import HFConfig
from megalite.model.kinds.experts import ClampedGate, Experts, Router

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
MAX_EXPERTS = 1 << 18
"""Most experts of all layers together: each has tensors of its own, which are listed before any is looked for."""
ROUTER_FIELDS = {one.name for one in fields(Router)}
LayerExperts = tuple[Experts | None, ...]
"""Of each layer, its experts; None: it has an MLP."""
MoERule = Callable[[HFConfig, int], LayerExperts]


def dense(config: HFConfig, layers: int) -> LayerExperts:
    return (None,) * layers


def everywhere(config: HFConfig, layers: int) -> LayerExperts:
    return (_experts(config, layers, "intermediate_size", normalize=True),) * layers


def as_stated(config: HFConfig, layers: int) -> LayerExperts:
    """Everywhere, their probabilities divided by their sum if `norm_topk_prob` says so."""
    return (_experts(config, layers, "intermediate_size", normalize=config.flag("norm_topk_prob")),) * layers


def by_step(config: HFConfig, layers: int) -> LayerExperts:
    """Every `decoder_sparse_step`-th layer, `mlp_only_layers` excepted."""
    if config.size("num_experts", low=0) == 0:
        return dense(config, layers)
    more: dict[str, Any] = {}
    if config.raw("shared_expert_intermediate_size"):
        more = {"shared_size": config.size("shared_expert_intermediate_size"), "shared_gate": True}
    spec = _experts(config, layers, "moe_intermediate_size", normalize=config.flag("norm_topk_prob"), **more)
    step, dense_layers = config.size("decoder_sparse_step"), config.indices("mlp_only_layers", layers)
    return tuple(spec if (i + 1) % step == 0 and i not in dense_layers else None for i in range(layers))


def stacked(config: HFConfig, layers: int) -> LayerExperts:
    """Everywhere, stored as one tensor, with a shared expert if `shared_intermediate_size` says so."""
    shared = config.size_or("shared_intermediate_size", 0, low=0)
    return (
        _experts(config, layers, "intermediate_size", normalize=True, stored="stacked", shared_size=shared),
    ) * layers


def if_any(config: HFConfig, layers: int) -> LayerExperts:
    """As `stacked`, beside a shared expert of the dense MLP's width, which alone is there without experts."""
    if config.size("num_experts", low=0) == 0:
        return dense(config, layers)
    shared = config.size("intermediate_size")
    return (
        _experts(config, layers, "moe_intermediate_size", normalize=True, stored="stacked", shared_size=shared),
    ) * layers


def beside_shared(config: HFConfig, layers: int) -> LayerExperts:
    """Everywhere, with a shared expert as wide as they are; layers may differ in how many a token has (Hunyuan)."""
    shared = config.size("intermediate_size")
    return tuple(
        _experts(
            config.of_layer(layer, layers, "num_experts", "num_experts_per_tok"),
            layers,
            "intermediate_size",
            normalize=True,
            shared_size=shared,
        )
        for layer in range(layers)
    )


def by_range(config: HFConfig, layers: int) -> LayerExperts:
    """From `moe_layer_start_index` to `moe_layer_end_index`, of which -1 is the last; chosen by corrected scores."""
    router = {"normalize": True, "least_sum": config.number("moe_norm_min"), "correction": True, "precise": True}
    spec = _experts(
        config,
        layers,
        "moe_intermediate_size",
        shared_size=config.size("moe_num_shared_experts", low=0) * config.size("moe_intermediate_size"),
        correction_is_row=True,
        **router,
    )
    first, step = config.size("moe_layer_start_index", low=0), config.size("moe_layer_interval")
    end = config.raw("moe_layer_end_index")
    last = layers - 1 if end in (None, -1) else config.size("moe_layer_end_index", low=0)
    return tuple(spec if first <= i <= last and (i + 1) % step == 0 else None for i in range(layers))


def in_groups(config: HFConfig, layers: int) -> LayerExperts:
    """From layer `first_k_dense_replace` on; sigmoid scores, corrected where experts are chosen (DeepSeek V3)."""
    router = _groups(config) | {"score": "sigmoid", "correction": True, "group_score": "two_best"}
    return _upper_experts(config, layers, normalize=config.flag("norm_topk_prob"), least_sum=1e-20, **router)


def in_best_groups(config: HFConfig, layers: int) -> LayerExperts:
    """From layer `first_k_dense_replace` on; softmax scores (DeepSeek V2)."""
    methods = {"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}
    limited = config.choice("topk_method", methods) == "group_limited_greedy"
    if config.flag("norm_topk_prob"):
        raise config.problem("norm_topk_prob", "must be false for this family", True)
    return _upper_experts(config, layers, normalize=False, **(_groups(config) if limited else {}))


def clamped(config: HFConfig, layers: int) -> LayerExperts:
    """Everywhere, with biases and a clamped gate (gpt-oss)."""
    spec = _experts(
        config,
        layers,
        "intermediate_size",
        normalize=True,
        bias=True,
        biases=True,
        stored="stacked_turned",
        clamped=ClampedGate(alpha=config.number("swiglu_alpha"), limit=config.number("swiglu_limit")),
    )
    return (spec,) * layers


def by_interval(config: HFConfig, layers: int) -> LayerExperts:
    """On `moe_layers`, or else every `interleave_moe_layer_step`-th layer, beside a shared expert (Llama 4)."""
    size = config.size("moe_intermediate_size")
    router = {"score": "sigmoid", "normalize": False, "weighs_input": True}
    more: dict[str, Any] = {**router, "stored": "stacked_turned", "shared_size": size}
    spec = _experts(config, layers, "moe_intermediate_size", **more)
    step = config.size("interleave_moe_layer_step")
    listed = config.indices("moe_layers", layers)
    chosen = listed if config.raw("moe_layers") is not None else range(step - 1, layers, step)
    return tuple(spec if layer in chosen else None for layer in range(layers))


def _groups(config: HFConfig) -> dict[str, Any]:
    experts, groups, top = config.size("num_experts"), config.size_or("n_group", 1), config.size_or("topk_group", 1)
    if experts % groups:
        raise config.problem("n_group", f"must divide the number of experts ({experts})", groups)
    if top > groups or config.size("num_experts_per_tok") > experts // groups * top:
        raise config.problem("topk_group", "must leave as many experts as a token has, of groups that there are", top)
    return {"groups": groups, "top_groups": top}


def _upper_experts(config: HFConfig, layers: int, **router: Any) -> LayerExperts:
    sparse = _sparse_layers(config, layers)
    if not any(sparse):
        return dense(config, layers)
    shared = config.size_or("n_shared_experts", 0, low=0) * config.size("moe_intermediate_size")
    scale = config.optional_number("routed_scaling_factor") or 1.0
    spec = _experts(config, layers, "moe_intermediate_size", shared_size=shared, scale=scale, precise=True, **router)
    return tuple(spec if one else None for one in sparse)


def _sparse_layers(config: HFConfig, layers: int) -> list[bool]:
    """Whether each has experts: by `mlp_layer_types`; without it from `first_k_dense_replace` on."""
    kinds = config.raw("mlp_layer_types")
    if kinds is None:
        first = config.size("first_k_dense_replace", low=0)
        return [layer >= first for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(one not in ("dense", "sparse") for one in kinds):
        raise config.problem("mlp_layer_types", f"must be a list of {layers} entries, dense or sparse", kinds)
    return [one == "sparse" for one in kinds]


def _experts(config: HFConfig, layers: int, width: str, **more: Any) -> Experts:
    """`more`: fields of `Router` and `Experts`."""
    experts, top_k = config.size("num_experts"), config.size("num_experts_per_tok")
    if top_k > experts:
        raise config.problem("num_experts_per_tok", f"must be at most the number of experts ({experts})", top_k)
    if experts * layers > MAX_EXPERTS:
        raise config.problem("num_experts", f"of {layers} layers must be at most {MAX_EXPERTS} together", experts)
    router = {name: more.pop(name) for name in ROUTER_FIELDS & more.keys()}
    return Experts(
        num_experts=experts,
        router=Router(top_k=top_k, **router),
        intermediate_size=config.size(width),
        activation=config.choice("hidden_act", ACTIVATIONS),
        **more,
    )
