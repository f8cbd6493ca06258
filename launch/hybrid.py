"""Train and generate in one job: `python`, `deepspeed` or `torchrun` launch/hybrid.py --config FILE [key=value ...]."""

import sys

from megalite.cli import launch

if __name__ == "__main__":
    sys.exit(launch("hybrid"))
