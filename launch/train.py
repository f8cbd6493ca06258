"""Train a model: `python`, `deepspeed` or `torchrun` launch/train.py --config FILE [section.key=value ...]."""

from __future__ import annotations

import sys

from megalite.cli import main
from megalite.config.load import Loaded
from megalite.config.schema import TrainConfig
from megalite.errors import Problem


def run(loaded: Loaded) -> int:
    from megalite.hybrid.samples import write_samples  # these import torch: only once everything has been checked
    from megalite.train import job

    return job.run(loaded, write_samples)


def checks(config: TrainConfig) -> list[Problem]:
    from megalite.train.data.prepared import check  # imports tokenizers, which --help has no need of

    return check(config)


if __name__ == "__main__":
    sys.exit(main("train", run, checks=checks))
