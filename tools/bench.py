"""Measurements that anyone can repeat: `python tools/bench.py NAME ...`; each is a module of benchmarks/."""

from __future__ import annotations

import importlib
import sys

from toolkit import Parser, main

BENCHMARKS = {
    "convert": "convert, reshard, export and verify beside cp and transformers",
    "load": "ranks that load a Hugging Face folder, and shards of it",
    "offline": "generation beside transformers",
    "sync": "weights between two layouts in memory, beside gathering every tensor",
    "train": "a training step beside transformers, both under DeepSpeed",
}

if __name__ == "__main__":
    listed = "\n".join(f"  {name:10} {text}" for name, text in BENCHMARKS.items())
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        parser = Parser(module.__doc__ or "")
        parser.prog = f"bench.py {name}"
        module.add_arguments(parser)
        del sys.argv[1]
        sys.exit(main(parser, module.run))
    parser = Parser(f"Measures megalite beside what it replaces.\n\nbenchmarks:\n{listed}")
    parser.add_argument("benchmark", choices=BENCHMARKS, help="each has a --help of its own")
    sys.exit(main(parser, lambda args: 0))
