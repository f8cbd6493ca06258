"""Train and generate in one job: `python`, `deepspeed` or `torchrun` launch/hybrid.py --config FILE [key=value ...]."""

from __future__ import annotations

import sys

from megalite.cli import main
from megalite.config.load import Loaded
from megalite.hybrid.checks import problems


def run(loaded: Loaded) -> int:
    from megalite.hybrid import job  # imports torch, so only once everything has been checked

    return job.run(loaded)


if __name__ == "__main__":
    sys.exit(main("hybrid", run, checks=problems))
