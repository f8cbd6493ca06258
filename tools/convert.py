"""Cut a Hugging Face model for a layout: `python tools/convert.py --model MODEL --layout tp=4,pp=2 --out DIR`."""

from __future__ import annotations

import argparse
import sys

from toolkit import Bar, Parser, main, report

from megalite.convert.convert import convert, parse_layout

DESCRIPTION = """\
Cut a model in Hugging Face layout into one safetensors file for each tp x pp rank, and a manifest.json with the
digest of every range. megalite runs and trains from the result. Needs no GPU and little memory. If it is killed,
the same command goes on where it stopped."""
EPILOG = """\
example:
  python tools/convert.py --model checkpoints/demo --layout tp=2,pp=2 --out /tmp/demo-tp2pp2
  python tools/verify.py /tmp/demo-tp2pp2 --against checkpoints/demo"""


def run(args: argparse.Namespace) -> int:
    layout = parse_layout(args.layout)
    with Bar("convert") as bar:
        outcome = convert(
            args.model,
            layout,
            args.out,
            revision=args.revision,
            dtype=args.dtype,
            jobs=args.jobs,
            overwrite=args.overwrite,
            begin=bar.begin,
            progress=bar.advance,
        )
    report(outcome, bar.seconds, f"tp={layout.tp},pp={layout.pp}, manifest.json")
    return 0


if __name__ == "__main__":
    parser = Parser(DESCRIPTION, EPILOG)
    parser.add_argument("--model", required=True, metavar="MODEL", help="folder in Hugging Face layout, or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--layout", required=True, metavar="tp=T,pp=P", help="what to cut it for")
    parser.add_writing("where the rank files go")
    sys.exit(main(parser, run))
