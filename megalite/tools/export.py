"""Rank shards, or the weights of training state, as a folder in Hugging Face layout, which transformers and others
load. Without --dtype every tensor has the very bytes of the original. If it is killed, the same command keeps
the files that are finished and makes the others.

With --merge a LoRA adapter is added to the weights; then --from may be a Hugging Face folder too.

example:
  megalite export --from /tmp/demo-tp2pp2 --out /tmp/demo-hf --max-shard-size 2GB
  megalite export --from checkpoints/demo --merge my-adapter --out /tmp/demo-merged
"""

from __future__ import annotations

import argparse

from megalite.convert.convert import export
from megalite.convert.merge import merge
from megalite.tools.toolkit import Parser, report, writing


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--from", required=True, dest="source", metavar="DIR", help="rank shards or training state")
    parser.add_argument("--merge", metavar="ADAPTER", help="a LoRA adapter to merge, as PEFT saves it")
    parser.add_shard_size()
    parser.add_writing("the Hugging Face folder to make")


def run(args: argparse.Namespace) -> int:
    with writing("export", args) as (bar, options):
        options["max_shard_bytes"] = args.max_shard_size
        if args.merge is not None:
            written = merge(args.source, args.merge, args.out, **options)
        else:
            written = export(args.source, args.out, **options)
    report(written, bar.seconds, "Hugging Face layout")
    return 0
