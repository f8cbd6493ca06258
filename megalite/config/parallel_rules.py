"""The rules of layouts: of any, of those that train, of those that generate."""

from __future__ import annotations

from megalite.config.rules import ModelFacts, Rules
from megalite.config.schema import ParallelSection
from megalite.errors import Problem


def layout_rules(rules: Rules, model: ModelFacts | None, *, first_rank: bool = False) -> None:
    """Rules of any layout; `first_rank`: this layout may have one."""
    parallel: ParallelSection = rules.section
    _, pp, _ = parallel.sizes
    if parallel.layers is not None:
        _layers_rules(rules, model)
    if model is not None:
        rule = f"the model has {model.num_layers} layers, and each pipeline stage needs at least one"
        rules.need("pp", pp <= model.num_layers, rule)
    if not first_rank:
        rules.need("first_rank", parallel.first_rank == 0, "is for hybrid jobs, which have two layouts", "Leave it 0.")


def _layers_rules(rules: Rules, model: ModelFacts | None) -> None:
    """Rules of stages that are set by hand."""
    parallel: ParallelSection = rules.section
    _, pp, _ = parallel.sizes
    counts = parallel.layers or []
    rules.need("layers", len(counts) == pp, f"must be one number for each of the {pp} pipeline stages")
    rules.need("layers", parallel.interleave == 1, "is for stages that are not interleaved", "Leave one of them out.")
    if model is not None:
        rule = f"must add up to the model's {model.num_layers} layers, and is {sum(counts)}"
        rules.need("layers", sum(counts) == model.num_layers, rule)


def training_layout_rules(rules: Rules, zero_stage: int, model: ModelFacts | None, *, adapts: bool = False) -> None:
    """Rules of a layout that trains; `zero_stage`: that of `train`; `adapts`: adapters beside the model train."""
    parallel: ParallelSection = rules.section
    tp, pp, _ = parallel.sizes
    rules.need("dp_mode", parallel.dp_mode == "sync", "replicas of a training run go in step", "Leave it at sync.")
    if model is not None and model.quantized_as is not None and not adapts:
        rule = f"holds weights stored as {model.quantized_as}, and codes have no gradients"
        fix = "Train adapters beside it (train.lora.r), or the unquantized model, to be quantized by megalite convert."
        rules.problems.append(Problem(key="model.path", rule=rule, fix=fix))
    if model is not None:
        rule = f"must be at most the model's {model.num_heads} attention heads in training"
        rules.need("tp", tp <= model.num_heads, rule)
    if parallel.interleave > 1:
        needs_stages = f"needs more than one pipeline stage, {rules.prefix}pp is {pp}"
        rules.need("interleave", pp > 1, needs_stages, "Leave it 1.")
    if parallel.interleave > 1 and model is not None:
        chunks = pp * parallel.interleave
        rule = f"makes {chunks} chunks, and the model has {model.num_layers} layers"
        rules.need("interleave", chunks <= model.num_layers, rule)
    reason = zero_refusal(
        zero_stage, pp=pp, tied=not adapts and model is not None and model.tie_embeddings, adapts=adapts
    )
    if reason is not None:
        rules.problems.append(Problem(key="train.zero_stage", rule=f"{zero_stage} {reason}", fix="Use stage 1."))


def generating_layout_rules(rules: Rules) -> None:
    """Rules of a layout that generates."""
    rule = "is for training; generating has no use for it"
    rules.need("sequence_parallel", not rules.section.sequence_parallel, rule, "Leave it false.")
    rules.need("interleave", rules.section.interleave == 1, rule, "Leave it 1.")


def zero_refusal(stage: int, *, pp: int, tied: bool, adapts: bool = False) -> str | None:
    """Why ZeRO `stage` can't be had, as DeepSpeed 0.19.8 is; `tied`: embedding and head are one tensor that trains.

    `adapts`: adapters train beside frozen weights.
    """
    if stage == 0:
        return "has no gradient norm to report in float32, and with tp in bfloat16 clips by a wrong one"
    if stage == 3 and adapts:
        return "cuts what trains over dp, and of adapters that saves next to nothing: the frozen weights stay whole"
    if stage == 3 and pp > 1:
        return "leaves norms and biases of all pipeline stages but the first out of the gradient norm"
    if stage == 2 and pp > 1 and tied:
        return "cuts gradients over dp before those of the first and the last stage's tied embedding can be added up"
    return None
