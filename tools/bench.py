"""Measurements that anyone can repeat: `python tools/bench.py NAME ...`."""

import sys

from megalite.tools.bench import main

if __name__ == "__main__":
    sys.exit(main())
