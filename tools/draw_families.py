"""Write the tables of model families, from their entries, and of weight formats, from their readers, into README.md:
`tools/draw_families.py --out README.md`.

Without `--out` the tables are printed. A test compares the two.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.convert.quantize import KINDS, quantization_config
from megalite.core.formats import Mxfp4, Part, WeightFormat
from megalite.core.linear import Quantized
from megalite.core.quantized import coded
from megalite.files import write_durably
from megalite.model.families import FAMILIES, from_values
from megalite.model.family_experts import (
    dense,
)
from megalite.model.family_rules import (
    attention_everywhere,
    chunked_with_rope,
    delta_apart,
    delta_fused,
    mamba_by_layer_types,
    no_growth,
    no_rope,
    no_windows,
    rope_by_layer_kind,
    rope_by_list,
    rope_if_stated,
    rope_on_windows,
)
from megalite.model.family_spec import (
    Family,
    latent_layers,
)
from megalite.model.quantization import format_of
from megalite.tools.toolkit import Parser, main
from megalite.weights.dtypes import DTYPE_BYTES

BEGIN, END = "<!-- families: tools/draw_families.py -->\n\n", "\n<!-- end of families -->\n"
FORMATS_BEGIN, FORMATS_END = "<!-- formats: tools/draw_families.py -->\n\n", "\n<!-- end of formats -->\n"
NORMS = {
    "rms": "RMSNorm",
    "rms_zero_centred": "RMSNorm (1 + w)",
    "layer": "LayerNorm",
    "layer_zero_centred": "LayerNorm (1 + w)",
    "layer_without_bias": "LayerNorm without bias",
}
QK_NORMS = {
    "head": "q/k norm",
    "head_after_rope": "q/k norm after rope",
    "width": "q/k norm over all heads",
    "layer_by_head": "q/k LayerNorm by head",
}
ROPES = {
    no_rope: "learned positions",
    rope_by_list: "layers without rope",
    rope_if_stated: "rope or no positions",
    rope_on_windows: "rope on windows only",
    rope_by_layer_kind: "rope of windows apart",
}


MIXERS = {
    attention_everywhere: "",
    delta_fused: "gated delta nets",
    delta_apart: "gated delta nets",
    mamba_by_layer_types: "Mamba-2",
}


def _attention(family: Family) -> str:
    said = [
        MIXERS[family.mixers],
        "gated" if family.fixed.get("gated_attention") else "",
        "latent" if family.layers is latent_layers else "",
        "interleaved rope" if family.interleaved_rope else "",
        "partial rope" if family.partial_rotary else "",
        ROPES.get(family.ropes, ""),
        QK_NORMS.get(family.fixed.get("qk_norm"), ""),
        "windows" if family.windows is not no_windows else "",
        "softcap" if family.softcaps else "",
        "chunks, q/k norm without weights" if family.attention is chunked_with_rope else "",
        "sinks" if family.fixed.get("sinks") else "",
        "queries grow with position" if family.query_growth is not no_growth else "",
    ]
    return ", ".join(filter(None, said)) or "rope"


def _block(family: Family) -> str:
    fixed = family.fixed
    said = [NORMS[fixed.get("norm", "rms")]]
    if not fixed.get("pre_norms", True):
        said.append("after only")
    elif fixed.get("post_norms"):
        said.append("before and after")
    if fixed.get("parallel") or "parallel" in family.flags:
        said.append("attention beside MLP")
    return ", ".join(said)


def _by_kernels(family: Family) -> bool:
    """Whether norms, rotation and cache of attention are one kernel on a GPU; see `layers.softmax.Attention`."""
    usual = family.fixed.get("qk_norm") in (None, "head") and not family.interleaved_rope
    usual = usual and family.layers is not latent_layers
    return usual and family.query_growth is no_growth and family.ropes is not no_rope


def table() -> str:
    """The families, in Markdown."""
    rows = [
        (
            f"`{family.architecture}`" + (f" ({family.text_model_type})" if family.text_model_type else ""),
            _block(family),
            _attention(family),
            "experts" if family.moe is not dense else "gated" if family.fixed.get("gated_mlp", True) else "plain",
            "yes" if _by_kernels(family) else "no",
        )
        for _, family in sorted(FAMILIES.items())
    ]
    head = ("architecture", "norms", "attention", "MLP", "heads in one kernel")
    return _markdown(head, rows)


def formats_table() -> str:
    """The weight formats, in Markdown: what their readers make of a `quantization_config` of each kind."""
    made = {_read(quantization_config(MODEL, kind, None)).words: f"`--quantize {kind}`" for kind in KINDS}
    rows = []
    for given in QUANTIZED:
        format, method = (
            _read(given),
            f"`{given['quant_method']}`" + (f" {given['format']}" if "format" in given else ""),
        )
        bits = 8 * sum(_part_bytes(format, part) for part in format.parts) / SIZE**2
        cut = " x ".join(str(unit) for unit in format.units)
        rows.append((method, format.words, f"{bits:.2f}", cut, _kernel(format), made.get(format.words, "")))
    head = ("quantization_config", "weights", "bits a weight", "tp cuts", "multiplied on a GPU as", "made by")
    return _markdown(head, rows)


SIZE = 4096
"""Rows and columns of a matrix whose bytes are counted."""
SCHEME = {"num_bits": 8, "type": "float", "symmetric": True}
QUANTIZED: list[dict[str, Any]] = [
    {"quant_method": "fp8"},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    {"quant_method": "gptq", "bits": 8, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "group_size": 128},
    *(
        {
            "quant_method": "compressed-tensors",
            "format": kind,
            "config_groups": {"all": {"targets": ["Linear"], **more}},
        }
        for kind, more in (
            ("float-quantized", {"weights": {**SCHEME, "strategy": "channel"}}),
            ("int-quantized", {"weights": {**SCHEME, "type": "int", "strategy": "channel"}}),
            ("pack-quantized", {"weights": {**SCHEME, "type": "int", "strategy": "channel"}}),
            ("pack-quantized", {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}),
            (
                "pack-quantized",
                {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False}},
            ),
        )
    ),
    {"quant_method": "mxfp4"},
]
"""One of each kind that is read."""
MODEL = from_values(
    Path("config.json"),
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": 1,
        **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), SIZE),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 32),
    },
)


def _read(given: Mapping[str, Any]) -> WeightFormat:
    if given["quant_method"] == "mxfp4":
        return Mxfp4()
    found = format_of(Path("config.json"), given, "model.layers.0.mlp.up_proj")
    assert found is not None
    return found


def _part_bytes(format: WeightFormat, part: Part) -> int:
    count = math.prod(format.shapes([SIZE], SIZE, SIZE)[part.name])
    return count * DTYPE_BYTES["F16" if part.is_float else part.dtypes[0]]


def _kernel(format: WeightFormat) -> str:
    """What `kernels.codes` take of it."""
    import torch

    made = Quantized(format, [128], 128, torch.float16, all_columns=128)
    stored = {name: torch.zeros_like(param) for name, param in made.parameters().items()}
    if "g_idx" in stored:
        stored["g_idx"] = torch.arange(128, dtype=torch.int32) // (getattr(format, "group", 0) or 128)
    found = coded(format, stored, [128], 128)
    return "numbers" if found is None else f"{found[0]} codes"


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) + "\n"


def replaced(text: str) -> str:
    """`text` with the tables of today between their marks."""
    for begin, end, made in ((BEGIN, END, table()), (FORMATS_BEGIN, FORMATS_END, formats_table())):
        before, _, rest = text.partition(begin)
        _, mark, after = rest.partition(end)
        assert mark, "the marks of the table are missing"
        text = f"{before}{begin}{made}{end}{after}"
    return text


def run(args: argparse.Namespace) -> int:
    if args.out is None:
        print(table(), formats_table(), sep="\n", end="")
    else:
        write_durably(args.out, replaced(args.out.read_text(encoding="utf-8")).encode())
    return 0


if __name__ == "__main__":
    parser = Parser((__doc__ or "").strip())
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file with the marks; default: print")
    sys.exit(main(parser, run))
