"""Cut rank shards anew: `python tools/reshard.py --from DIR --layout tp=2,pp=3 --out DIR2`."""

from __future__ import annotations

import argparse
import sys

from toolkit import Bar, Parser, main, report

from megalite.convert.convert import parse_layout, reshard

DESCRIPTION = """\
Rank shards of one layout into another, without the Hugging Face original: any tp and pp to any tp and pp. Training
state is resharded with its optimizer moments. Every byte that is read is checked against the manifest. If it is
killed, the same command goes on where it stopped."""
EPILOG = """\
example:
  python tools/reshard.py --from /tmp/demo-tp2pp2 --layout tp=3,pp=1 --out /tmp/demo-tp3"""


def run(args: argparse.Namespace) -> int:
    layout = parse_layout(args.layout)
    with Bar("reshard") as bar:
        outcome = reshard(
            args.source,
            layout,
            args.out,
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
    parser.add_argument("--from", required=True, dest="source", metavar="DIR", help="rank shards or training state")
    parser.add_argument("--layout", required=True, metavar="tp=T,pp=P", help="what to cut it for")
    parser.add_writing("where the new rank files go")
    sys.exit(main(parser, run))
