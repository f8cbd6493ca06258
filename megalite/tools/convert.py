"""Cut a model in Hugging Face layout into one safetensors file for each tp x pp rank, and a manifest.json with the
digest of every range. megalite runs and trains from the result. Needs no GPU and little memory. If it is killed,
the same command keeps the files that are finished and makes the others.

example:
  megalite convert --model checkpoints/demo --layout tp=2,pp=2 --out /tmp/demo-tp2pp2
  megalite verify /tmp/demo-tp2pp2 --against checkpoints/demo
"""

from __future__ import annotations

import argparse

from megalite.convert.convert import convert, parse_layout
from megalite.tools.toolkit import Parser, report, writing


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="folder in Hugging Face layout, or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--layout", required=True, metavar="tp=T,pp=P", help="what to cut it for")
    parser.add_writing("where the rank files go")


def run(args: argparse.Namespace) -> int:
    layout = parse_layout(args.layout)
    with writing("convert", args) as (bar, options):
        written = convert(args.model, layout, args.out, revision=args.revision, **options)
    report(written, bar.seconds, f"tp={layout.tp},pp={layout.pp}, manifest.json")
    return 0
