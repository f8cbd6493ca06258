"""Rank shards of one layout into another, without the Hugging Face original: any tp and pp to any tp and pp. Training
state is resharded with its optimizer moments. Every byte that is read is checked against the manifest. If it is
killed, the same command keeps the files that are finished and makes the others.

example:
  megalite reshard --from /tmp/demo-tp2pp2 --layout tp=3,pp=1 --out /tmp/demo-tp3
"""

from __future__ import annotations

import argparse

from megalite.convert.convert import parse_layout, reshard
from megalite.tools.toolkit import Parser, report, writing


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--from", required=True, dest="source", metavar="DIR", help="rank shards or training state")
    parser.add_argument("--layout", required=True, metavar="tp=T,pp=P", help="what to cut it for")
    parser.add_writing("where the new rank files go")


def run(args: argparse.Namespace) -> int:
    layout = parse_layout(args.layout)
    with writing("reshard", args) as (bar, options):
        written = reshard(args.source, layout, args.out, **options)
    report(written, bar.seconds, f"tp={layout.tp},pp={layout.pp}, manifest.json")
    return 0
