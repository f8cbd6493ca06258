"""Which layout should a model have? `python tools/plan.py --model MODEL --devices 8 --device h200`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("plan"))
