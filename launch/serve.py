"""Serve a model: `python`, `deepspeed` or `torchrun` launch/serve.py --config FILE [section.key=value ...]."""

import sys

from megalite.cli import launch

if __name__ == "__main__":
    sys.exit(launch("serve"))
