"""Rank shards back to a Hugging Face folder: `python tools/export.py --from DIR --out HF_DIR`."""

from __future__ import annotations

import argparse
import sys

from toolkit import Bar, Parser, main, report, size

from megalite.convert.convert import export

DESCRIPTION = """\
Rank shards, or the weights of training state, as a folder in Hugging Face layout, which transformers and others load.
Without --dtype every tensor has the very bytes of the original. If it is killed, the same command goes on where it
stopped."""
EPILOG = """\
example:
  python tools/export.py --from /tmp/demo-tp2pp2 --out /tmp/demo-hf --max-shard-size 2GB"""


def run(args: argparse.Namespace) -> int:
    with Bar("export") as bar:
        outcome = export(
            args.source,
            args.out,
            max_shard_bytes=args.max_shard_size,
            dtype=args.dtype,
            jobs=args.jobs,
            overwrite=args.overwrite,
            begin=bar.begin,
            progress=bar.advance,
        )
    report(outcome, bar.seconds, "Hugging Face layout")
    return 0


if __name__ == "__main__":
    parser = Parser(DESCRIPTION, EPILOG)
    parser.add_argument("--from", required=True, dest="source", metavar="DIR", help="rank shards or training state")
    text = "largest size of one weight file, e.g. 500MB or 2GiB (default: %(default)s)"
    parser.add_argument("--max-shard-size", type=size, default="5GB", metavar="SIZE", help=text)
    parser.add_writing("the Hugging Face folder to make")
    sys.exit(main(parser, run))
