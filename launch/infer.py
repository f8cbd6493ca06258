"""Generate text: `python`, `deepspeed` or `torchrun` launch/infer.py --config FILE [section.key=value ...]."""

from __future__ import annotations

import sys

from megalite.cli import main
from megalite.config.load import Loaded


def run(loaded: Loaded) -> int:
    from megalite.inference import job  # imports torch, so only once everything has been checked

    return job.run(loaded)


if __name__ == "__main__":
    sys.exit(main("infer", run))
