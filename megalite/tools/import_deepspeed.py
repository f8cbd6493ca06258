"""The weights of a DeepSpeed checkpoint that was written elsewhere (ZeRO 1, 2 or 3, or a universal checkpoint), as a
folder in Hugging Face layout. Optimizer state is not taken.

DeepSpeed's checkpoints are PICKLES: reading one can run any code that whoever made it put there. So --allow-pickle
is needed, and belongs only to files that you trust. No other tool and no job of megalite reads pickles.

example:
  megalite import_deepspeed --from run/checkpoints --model run/model --out run/hf --allow-pickle
  megalite convert --model run/hf --layout tp=2 --out run/tp2
"""

from __future__ import annotations

import argparse

from megalite.model.hf_config import DTYPES
from megalite.tools.toolkit import Bar, Parser, report


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--from", required=True, dest="source", metavar="CK", help="what save_checkpoint wrote")
    parser.add_argument("--model", required=True, metavar="MODEL", help="whose config.json and tokenizer belong to it")
    parser.add_argument("--out", required=True, metavar="HF_DIR", help="the folder to make")
    parser.add_argument("--overwrite", action="store_true", help="HF_DIR may hold something else, which is replaced")
    parser.add_argument("--allow-pickle", action="store_true", help="read pickles, which can run code")
    parser.add_argument("--tag", help="which save, e.g. global_step500 (default: the one that `latest` names)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_shard_size()


def run(args: argparse.Namespace) -> int:
    from megalite.convert.import_deepspeed import import_checkpoint  # imports torch

    with Bar("import") as bar:
        written = import_checkpoint(
            args.source,
            args.model,
            args.out,
            allow_pickle=args.allow_pickle,
            tag=args.tag,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
            progress=bar,
        )
    report(written, bar.seconds, "Hugging Face layout")
    return 0
