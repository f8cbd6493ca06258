"""Write the table of model families, from their entries, into README.md: `tools/draw_families.py --out README.md`.

Without `--out` the table is printed. A test compares the two.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalite.files import write_durably
from megalite.model.families import FAMILIES
from megalite.model.family_spec import (
    Family,
    attention_everywhere,
    chunked_with_rope,
    delta_apart,
    delta_fused,
    dense,
    latent_layers,
    mamba_by_layer_types,
    no_growth,
    no_rope,
    no_windows,
    rope_by_layer_kind,
    rope_by_list,
    rope_if_stated,
    rope_on_windows,
)
from megalite.tools.toolkit import Parser, main

BEGIN, END = "<!-- families: tools/draw_families.py -->\n\n", "\n<!-- end of families -->\n"
NORMS = {
    "rms": "RMSNorm",
    "rms_zero_centred": "RMSNorm (1 + w)",
    "layer": "LayerNorm",
    "layer_zero_centred": "LayerNorm (1 + w)",
    "layer_without_bias": "LayerNorm without bias",
}
QK_NORMS = {"head": "q/k norm", "head_after_rope": "q/k norm after rope", "width": "q/k norm over all heads"}
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
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) + "\n"


def replaced(text: str) -> str:
    """`text` with the table of today between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, "the marks of the table are missing"
    return f"{before}{BEGIN}{table()}{END}{after}"


def run(args: argparse.Namespace) -> int:
    if args.out is None:
        print(table(), end="")
    else:
        write_durably(args.out, replaced(args.out.read_text(encoding="utf-8")).encode())
    return 0


if __name__ == "__main__":
    parser = Parser((__doc__ or "").strip())
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file with the marks; default: print")
    sys.exit(main(parser, run))
