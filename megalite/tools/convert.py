"""Cut a model in Hugging Face layout into one safetensors file for each tp x pp rank, and a manifest.json with the
digest of every range. megalite runs and trains from the result. Needs no GPU and little memory. If it is killed,
the same command keeps the files that are finished and makes the others.

A GGUF file (llama.cpp's format; needs `pip install 'megalite[gguf]'`) is dequantised, tokenizer and chat template
included; without --layout into a folder in Hugging Face layout.

With --quantize the weights of linear maps are rounded to codes of 4 or 8 bits, in compressed-tensors' formats, which
transformers and vLLM read; without --layout into a folder in Hugging Face layout.

example:
  megalite convert --model checkpoints/demo --layout tp=2,pp=2 --out /tmp/demo-tp2pp2
  megalite verify /tmp/demo-tp2pp2 --against checkpoints/demo
  megalite convert --model checkpoints/demo --quantize int4 --group 64 --out checkpoints/demo-int4
  megalite convert --model checkpoints/demo --quantize int4 --group 64 --calibrate TEXTS.jsonl --out checkpoints/demo-4
  megalite convert --model model-q8_0.gguf --dtype bfloat16 --out checkpoints/model
"""

from __future__ import annotations

import argparse

from megalite.convert.convert import convert, parse_layout
from megalite.convert.from_gguf import from_gguf, is_gguf
from megalite.convert.quantize import KINDS, quantize
from megalite.errors import ConfigError, Problem
from megalite.tools.toolkit import Parser, report, writing


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="folder in Hugging Face layout, hub id or .gguf file"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--layout", metavar="tp=T,pp=P", help="what to cut it for; may be left out for a .gguf file and with --quantize"
    )
    parser.add_argument("--quantize", choices=KINDS, help="round the weights of linear maps to nearest")
    text = "JSON lines of texts, for whose activations int4 and int8 are scaled before they are rounded (AWQ)"
    parser.add_argument("--calibrate", metavar="PROMPTS", help=text)
    text = "columns that share a scale, -1: all of a row (default: 128 for int4, else -1)"
    parser.add_argument("--group", type=int, metavar="N", help=text)
    parser.add_writing("where the rank files go")


def run(args: argparse.Namespace) -> int:
    layout = None if args.layout is None else parse_layout(args.layout)
    gguf = is_gguf(args.model)
    if args.group is not None and args.quantize is None:
        raise ConfigError(Problem(key="--group", rule="is for --quantize"))
    if args.calibrate is not None and args.quantize is None:
        raise ConfigError(Problem(key="--calibrate", rule="is for --quantize"))
    if gguf and args.quantize is not None:
        rule, fix = "does not read .gguf files", "Convert the file to a folder first, then quantize that."
        raise ConfigError(Problem(key="--quantize", rule=rule, fix=fix))
    if layout is None and not gguf and args.quantize is None:
        raise ConfigError(Problem(key="--layout", rule="is required", fix="Write it as tp=4,pp=2."))
    with writing("convert", args) as (bar, options):
        if args.quantize is not None:
            more = {"group": args.group, "calibrate": args.calibrate, "revision": args.revision}
            written = quantize(args.model, layout, args.out, args.quantize, **more, **options)
        elif gguf:
            written = from_gguf(args.model, layout, args.out, **options)
        else:
            assert layout is not None
            written = convert(args.model, layout, args.out, revision=args.revision, **options)
    made = "Hugging Face layout" if layout is None else f"tp={layout.tp},pp={layout.pp}, manifest.json"
    report(written, bar.seconds, made)
    return 0
