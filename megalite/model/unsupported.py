"""What an architecture would need that is not supported, for the message that refuses it; importable without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

BY_NAME = {
    r"^(DeepseekV|GlmMoeDsa)": "sparse attention over latent vectors, with its indexer",
    r"^Longcat": "two attentions and experts that do nothing in a layer",
    r"^KimiLinear": "gated delta nets whose decay differs by channel",
    r"^OlmoHybrid": "its own kind of gated delta net",
    r"^Mamba2": "layers of a Mamba-2 mixer alone, which is here only beside an MLP (as in Granite 4)",
    r"^(Mamba|FalconMamba|Jamba)": "Mamba-1 layers: a selective scan with a decay of each channel and state",
    r"^FalconH1": "attention and a Mamba-2 mixer side by side in a layer, each with multipliers",
    r"^(NemotronH|Zamba)": "layers that are a Mamba-2 mixer, attention or MLP alone, or that share their weights",
    r"^Bamba": "an entry beside that of Granite 4, with a rotary embedding on part of each head",
    r"(?i)^rwkv": "RWKV's time and channel mixing, a recurrence with a state of its own",
    r"^MiniMaxM[2-9]": "an entry for its router and partial rope, whose kinds are here",
    r"^MiniMax": "lightning attention: linear attention with a fixed decay of each head",
    r"^(Lfm|RecurrentGemma|Zaya|BailingHybrid)": "its own kind of layer with a state of each sequence",
    r"^(Bloom|Mpt|Falcon|RW)": "attention biased by distance (ALiBi), or its fused projections",
    r"^(OPT|XGLM|GPTNeo|GPTBigCode|CodeGen|GPTJ|BioGpt)": "an entry for its positions, biases and fused tensors",
    r"^Olmo(For|1)": "norms without weights",
    r"^Phimoe|^PhiMoE": "its router, which draws one expert after the other",
    r"^Gemma(3n|4)": "embeddings of each layer, and keys and values that layers share",
    r"ForConditionalGeneration$": "the text part of a multimodal checkpoint to be read by itself",
    r"(For\w+Classification|ForMaskedLM|ForQuestionAnswering|Model)$": "a causal language model's head",
    r"(Moe|MoE)": "an entry for its router and experts",
}
"""Pattern of an architecture's name -> what it would need; the first that matches counts."""
KNOWN_LAYERS = {
    *("full_attention", "sliding_attention", "chunked_attention", "attention"),
    *("linear_attention", "mamba"),
}
BY_KEY = {
    r"^alibi$": "attention biased by distance (ALiBi)",
    r"^(mamba_\w+|ssm_\w+|state_size|conv_kernel)$": "its own kind of layer with a state of each sequence",
    r"^(kv_lora_rank|q_lora_rank)$": "an entry for its latent attention",
    r"^(num_local_experts|num_experts|n_routed_experts|moe_num_experts)$": "an entry for its router and experts",
}
"""Pattern of a key of config.json whose value is not null, false or 0 -> what it would need."""
AN_ENTRY = "an entry that names its tensors and choices"


def needed(architecture: str, values: Mapping[str, object]) -> str:
    """What an architecture would need, by its name, else by its config.json: the end of a sentence."""
    for pattern, what in BY_NAME.items():
        if re.search(pattern, architecture):
            return what
    types = values.get("layer_types")
    listed = [one for one in types if isinstance(one, str)] if isinstance(types, list) else []
    strange = sorted(set(listed) - KNOWN_LAYERS)
    if strange:
        return f"layers of type {', '.join(strange[:3])}"
    for pattern, what in BY_KEY.items():
        if any(re.search(pattern, key) and value for key, value in values.items()):
            return what
    return AN_ENTRY
