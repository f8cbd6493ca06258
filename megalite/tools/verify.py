"""Derive every range of every rank file again and compare digests: with the manifest, and with --against also with
another checkpoint of the same model, in any form and layout. Names each file, tensor and range that differs.
Of a quantized checkpoint against an unquantized one it says how far each weight is from its own, and with --text the
perplexity of a text by both.
Exit code 0: all is well; 1: something differs.

example:
  megalite verify /tmp/demo-tp2pp2 --against checkpoints/demo
"""

from __future__ import annotations

import argparse

from megalite.convert.verify import verify
from megalite.errors import ConfigError, Problem
from megalite.monitor.words import format_bytes, format_count
from megalite.tools.toolkit import Bar, Parser

SHOWN = 50
"""Findings that are printed; the rest are counted."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="DIR", help="rank shards, training state or a Hugging Face folder")
    parser.add_argument("--against", metavar="MODEL", help="a Hugging Face folder, a hub id or rank shards")
    parser.add_argument("--text", metavar="FILE", help="with --against: also the perplexity of a text by both models")
    parser.add_jobs()


def run(args: argparse.Namespace) -> int:
    if args.text is not None and args.against is None:
        raise ConfigError(Problem(key="--text", rule="is for --against"))
    with Bar("verify") as bar:
        report = verify(args.path, args.against, text=args.text, jobs=args.jobs, progress=bar)
    for note in report.notes:
        print(f"note: {note}")
    for finding in report.findings[:SHOWN]:
        print(finding)
    if len(report.findings) > SHOWN:
        print(f"... and {len(report.findings) - SHOWN} more")
    checked = f"{format_count(report.files, 'weight file')}, {format_count(report.ranges, 'range')}"
    verdict = "all is well" if report.is_well else format_count(len(report.findings), "finding")
    print(f"{report.folder}: {verdict}; {checked}, {format_bytes(report.nbytes)} compared in {bar.seconds:.1f} s")
    return 0 if report.is_well else 1
