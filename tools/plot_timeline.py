"""Who computes, who waits? `python tools/plot_timeline.py TIMELINE [TIMELINE] --out FILE.svg`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("plot_timeline"))
