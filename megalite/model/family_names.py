"""Tensor names in checkpoints: `names_of` a model, and the tables that family entries are made of; torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megalite.core.formats import Gptq
from megalite.errors import ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.model.kinds.base import Row

if TYPE_CHECKING:
    from megalite.model.family_spec import Family


def in_layer(**names: str) -> dict[str, str]:
    """Weights of a layer -> their tensors' names, given without `model.layers.{layer}.`."""
    return {weight: f"model.layers.{{layer}}.{name}" for weight, name in names.items()}


def gated_mlp(weight: str, module: str) -> dict[str, str]:
    """The three matrices of a gated MLP in `module` of a layer; `weight` is what their names here begin with."""
    return in_layer(**{f"{weight}{part}": f"{module}.{part}_proj.weight" for part in ("gate", "up", "down")})


def llama_with(*tables: Mapping[str, str], **names: str) -> dict[str, str]:
    """Llama's names, with those of `tables` and, given as in `in_layer`, `names` instead or beside them."""
    merged = dict(LLAMA_WEIGHTS)
    for table in (*tables, in_layer(**names)):
        merged |= table
    return merged


LLAMA_WEIGHTS = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    **in_layer(
        attn_norm="input_layernorm.weight",
        q="self_attn.q_proj.weight",
        k="self_attn.k_proj.weight",
        v="self_attn.v_proj.weight",
        attn_out="self_attn.o_proj.weight",
        mlp_norm="post_attention_layernorm.weight",
    ),
    **gated_mlp("", "mlp"),
}
QK_NORM_WEIGHTS = in_layer(q_norm="self_attn.q_norm.weight", k_norm="self_attn.k_norm.weight")
HUNYUAN_QK_NORM_WEIGHTS = in_layer(q_norm="self_attn.query_layernorm.weight", k_norm="self_attn.key_layernorm.weight")
FUSED_GATE_UP_WEIGHTS = in_layer(gate="mlp.gate_up_proj.weight", up="mlp.gate_up_proj.weight")
SANDWICH_WEIGHTS = in_layer(
    post_attn_norm="post_attention_layernorm.weight",
    mlp_norm="pre_feedforward_layernorm.weight",
    post_mlp_norm="post_feedforward_layernorm.weight",
)
"""Norms after attention and MLP, and where there are any, before them."""
MOE_WEIGHTS = {**in_layer(router="mlp.gate.weight"), **gated_mlp("expert_", "mlp.experts.{expert}")}
SHARED_WEIGHTS = {
    **in_layer(router_correction="mlp.gate.e_score_correction_bias"),
    **gated_mlp("shared_", "mlp.shared_experts"),
}
SHARED_GATE_WEIGHTS = {
    **gated_mlp("shared_", "mlp.shared_expert"),
    **in_layer(shared_scale="mlp.shared_expert_gate.weight"),
}
"""Of a shared expert whose output is scaled."""
GRANITE_MOE_WEIGHTS = in_layer(
    router="block_sparse_moe.router.layer.weight",
    experts_up="block_sparse_moe.input_linear.weight",
    experts_down="block_sparse_moe.output_linear.weight",
    shared_gate="shared_mlp.input_linear.weight",
    shared_up="shared_mlp.input_linear.weight",
    shared_down="shared_mlp.output_linear.weight",
)
LATENT_WEIGHTS = in_layer(
    q_down="self_attn.q_a_proj.weight",
    q_down_norm="self_attn.q_a_layernorm.weight",
    q_up="self_attn.q_b_proj.weight",
    kv_down="self_attn.kv_a_proj_with_mqa.weight",
    kv_down_norm="self_attn.kv_a_layernorm.weight",
    kv_up="self_attn.kv_b_proj.weight",
)
DEEPSEEK_WEIGHTS = {**LATENT_WEIGHTS, **MOE_WEIGHTS, **SHARED_WEIGHTS}
DELTA_WEIGHTS = in_layer(
    **dict.fromkeys(("delta_conv_q", "delta_conv_k", "delta_conv_v"), "linear_attn.conv1d.weight"),
    delta_time_shift="linear_attn.dt_bias",
    delta_log_decay="linear_attn.A_log",
    delta_norm="linear_attn.norm.weight",
    delta_out="linear_attn.out_proj.weight",
)
"""Of gated delta nets, without the projections into them."""
QWEN3_5_WEIGHTS = {
    **QK_NORM_WEIGHTS,
    **DELTA_WEIGHTS,
    **in_layer(
        **dict.fromkeys(("delta_q", "delta_k", "delta_v"), "linear_attn.in_proj_qkv.weight"),
        **{f"delta_{part}": f"linear_attn.in_proj_{part}.weight" for part in ("z", "b", "a")},
    ),
}
MAMBA_WEIGHTS = in_layer(
    **{f"ssm_{part}": "mamba.in_proj.weight" for part in ("gate", "x", "b", "c", "time")},
    **{f"ssm_conv_{part}": "mamba.conv1d.weight" for part in ("x", "b", "c")},
    ssm_time_shift="mamba.dt_bias",
    ssm_log_decay="mamba.A_log",
    ssm_skip="mamba.D",
    ssm_norm="mamba.norm.weight",
    ssm_out="mamba.out_proj.weight",
)


MOST_NEXT_LAYERS = 8
"""Most layers that `Family.next_token_layers` leaves out."""
ESCAPED_FIELD = r"\\{(layer|expert)\\}"
"""`{layer}` and `{expert}` in a tensor's name that `re.escape` has been applied to."""
COMMON_IGNORED = (r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", r"^model\.rotary_emb\.inv_freq$")
"""Tables that older transformers saved along with the weights."""
CACHE_SCALE_ENDS = {
    ".k_proj.k_scale": (".k_scale",),
    ".k_proj.output_scale": (".k_scale",),
    ".v_proj.v_scale": (".v_scale",),
    ".v_proj.output_scale": (".v_scale",),
    ".kv_scale": (".k_scale", ".v_scale"),
}
"""What the scales of keys and values have been called, as vLLM reads them."""
UNUSED_SCALES = (r"\.(q_proj\.)?q_scale$", r"\.q_proj\.output_scale$", r"\.prob(_output)?_scale$")
"""Beside them: of queries and probabilities, which are never codes here."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a weight lies in a checkpoint."""

    hf: str
    """Tensor name with `{layer}` and `{expert}` to be filled in."""
    transpose: bool = False
    """Stored [in, out] instead of [out, in]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightNames:
    """The names of a model's tensors in a checkpoint."""

    prefix: str
    """What every name but the head's begins with; checkpoints of the bare model leave it out."""
    ignored: tuple[str, ...]
    """Anchored patterns of tensors that may be in a checkpoint and are not weights of the model."""
    tied_head: str | None
    """What the head would be called, where it is the embedding."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Pattern of tensors that are no weights but numbers that the model's code has -> their value."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Other beginnings that a checkpoint's names may have, where none has `prefix` -> theirs here."""
    ends: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other ends that a checkpoint's names may have -> theirs here; of two it is both."""
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """End of the name of a tensor [experts, rows, columns] that a checkpoint may have instead of each expert's -> the
    ends of theirs, which share the rows in this order."""
    tensors: Mapping[str, TensorRef]
    """Every weight of the model's rows -> its tensor. Weights of one tensor lie in it in the order of the rows."""

    @property
    def embedding(self) -> str:
        """Tensor name of the embedding."""
        return self.tensors["embed"].hf


def names_of(name: str, family: Family, config: ModelConfig) -> WeightNames:
    """The tensors that a checkpoint of this model must hold. ConfigError if the family does not name one of them."""
    different = {layer: index for index, layer in enumerate(config.layers)}
    layer_rows = {row.weight: row for index in different.values() for row in config.layer_rows(index)}
    end_rows = {row.weight: row for row in (*config.first_rows(), *config.last_rows())}
    tensors = {weight: _tensor(name, family, row, in_layer=True) for weight, row in layer_rows.items()}
    tensors |= {weight: _tensor(name, family, row, in_layer=False) for weight, row in end_rows.items()}
    has_scales = "k_scale" in tensors
    constants = {**family.constants, **_spare_biases(config, tensors)}
    head = family.weights["lm_head"] if config.tie_embeddings else None
    tied = (f"^{re.escape(head)}$",) if head else ()
    later = range(config.num_layers, config.num_layers + MOST_NEXT_LAYERS) if family.next_token_layers else ()
    after = tuple(rf"^model\.layers\.{layer}\." for layer in later)
    spare = UNUSED_SCALES if has_scales else ()
    ignored = (*COMMON_IGNORED, *family.ignored, *constants, *tied, *after, *spare)
    return WeightNames(
        prefix=family.prefix,
        ignored=ignored,
        tied_head=head,
        constants=constants,
        renamed=family.renamed,
        ends=CACHE_SCALE_ENDS if has_scales else {},
        stacked=family.stacked,
        tensors=tensors,
    )


def _spare_biases(config: ModelConfig, tensors: Mapping[str, TensorRef]) -> dict[str, float]:
    """GPTQ's tools have written biases of zeros beside matrices that have none."""
    found = config.quantization.formats if config.quantization else ()
    weights = {weight for _, weight, format in found if isinstance(format, Gptq) and f"{weight}_bias" not in tensors}
    stems = (re.escape(tensors[weight].hf.removesuffix(".weight")) for weight in sorted(weights))
    return {rf"^{re.sub(ESCAPED_FIELD, '[0-9]+', stem)}\.bias$": 0.0 for stem in stems}


def _tensor(name: str, family: Family, row: Row, *, in_layer: bool) -> TensorRef:
    if row.exact:  # beside the projections
        return TensorRef(f"{family.weights['k'].removesuffix('.weight').rpartition('.')[0]}.{row.weight}")
    if row.weight in family.weights:
        return TensorRef(family.weights[row.weight], transpose=family.transposed and row.linear and in_layer)
    base = row.weight.removesuffix("_bias")
    if base not in family.weights:
        raise ConfigError(Problem(key=f"family {name}", rule=f"has no tensor name for {base!r}"))
    return TensorRef(family.weights[base].removesuffix(".weight") + ".bias")
